"""Refine soft maps made of true masks: on rendered scenes, and on real photographs where DICLIP_PHOTOS has VOC's."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from diclip.cam import Maps
from diclip.crf import dense_crf
from diclip.data.voc import Sample, VOCFolder
from diclip.labels import pseudo_labels
from diclip.refine import par
from diclip.score import image_counts, miou

IMAGES = 8
VOC = Path(os.environ.get("DICLIP_PHOTOS", "")) / "VOCdevkit/VOC2012"

# PAR looks 24 pixels far, at photographs of 320 and more: as far for the scenes' 128.
REFINE = {
    "PAR": {"photographs": par, "scenes": partial(par, dilations=(1, 2, 4, 8))},
    "CRF": dict.fromkeys(("photographs", "scenes"), dense_crf),
}


@pytest.fixture(scope="module", params=["scenes", "photographs"])
def source(request) -> str:
    if request.param == "photographs" and not (os.environ.get("DICLIP_PHOTOS") and VOC.is_dir()):
        pytest.skip("DICLIP_PHOTOS names no folder with VOCdevkit/VOC2012")
    return request.param


@pytest.fixture(scope="module")
def samples(source, request) -> list[Sample]:
    root = VOC if source == "photographs" else request.getfixturevalue("tiny_world") / "minivoc-0"
    return list(VOCFolder(root, "val", limit=IMAGES))


def soft_maps(sample: Sample, kind: str) -> Maps:
    """Return the true mask's classes as maps of 20 x 20 cells: one pixel of each, or a blur of two cells."""
    label = sample.mask.unique()
    label = label[(label > 0) & (label < 255)]
    dense = (sample.mask == label.view(1, -1, 1, 1)).float()
    if kind == "sampled":
        scores = F.interpolate(dense, size=(20, 20), mode="nearest")
    else:  # the plain average of a cell keeps edges to a few pixels (mIoU above 90): nothing is left to refine
        scores = gaussian_blur(F.interpolate(dense, size=(20, 20), mode="area"), 13, 2.0)
    return Maps(scores[0], torch.zeros_like(label), label - 1)


def score(samples: list[Sample], kind: str, refine=None) -> float:
    counts = []
    for sample in samples:
        call = None if refine is None else lambda scores, image=sample.image: refine(scores, [image])
        (mask,) = pseudo_labels(soft_maps(sample, kind), [sample.size], refine=call)
        counts.append(image_counts(mask, sample.mask, num_classes=20))
    return float(miou(sum(counts)))


@pytest.mark.parametrize("kind", ["sampled", "blurred"])
@pytest.mark.parametrize("name", REFINE)
def test_mean_iou_rises(source, samples, name, kind, record_property):
    if name == "CRF":
        pytest.importorskip("pydensecrf", reason="the dense CRF's package is not installed (pydensecrf2)")
    before, after = score(samples, kind), score(samples, kind, REFINE[name][source])
    record_property("images", f"{len(samples)}, {samples[0].name} to {samples[-1].name}")
    record_property("mIoU before", f"{before:.2f}")
    record_property("after", f"{after:.2f}")
    assert after > before
