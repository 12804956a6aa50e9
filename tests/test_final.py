"""Test what comes after all rungs: refinement by the photographs' pixels, and labels that are sure."""

import json

import numpy as np
import pytest
import torch

from diclip import crf
from diclip.clip import load_clip
from diclip.data import batches, open_dataset
from diclip.evaluate import measure
from diclip.export import export_voc
from diclip.final import refinement, refiner
from diclip.labels import soft_labels, to_labels
from diclip.methods import build_method
from diclip.outside import measure_masks
from diclip.refine import par
from diclip.report import protocol, report
from diclip.score import image_counts
from diclip.screen import brief, text
from diclip.settings import load_settings


@pytest.fixture
def settings(tiny_world, tiny_clip):
    named = {"data_root": str(tiny_world), "clip_model": str(tiny_clip), "device": "cpu", "background": "fixed"}
    return load_settings(baselines=False, batch_size=4, limit=3, **named)


@pytest.fixture
def method(settings, tiny_clip):
    return build_method(settings, load_clip(tiny_clip))


def last_scores(settings, method):
    """Return each image's last scores with background and its classes, image by image, and what they are of."""
    dataset = open_dataset(settings)
    for batch in batches(dataset, image_size=settings.image_size, batch_size=4):
        maps = dict(method.rungs(batch))["caa"]
        yield from zip(batch.names, soft_labels(maps, batch.sizes), batch.masks, strict=True)


def test_par_is_one_more_rung(settings, method):
    """Refine each image's scores by hand; nothing before the last rung changes."""
    plain = measure(settings, method=method)
    refined = measure(settings.model_copy(update={"refine": "par", "par_dilations": (1, 3)}), method=method)
    dataset, counts = open_dataset(settings), []
    for name, (scores, label), truth in last_scores(settings, method):
        (scores,) = par([scores], [dataset.image(name)], iterations=20, dilations=(1, 3))
        counts.append(image_counts(to_labels(scores, label), truth, num_classes=20))
    assert refined.ladder == ("clip", "intra", "caa", "par") and refined.refined == ("caa", "par")
    pixels = np.abs(refined.rung("par") - np.stack(counts)).sum()
    assert pixels < 0.002 * np.stack(counts)[..., 2].sum()  # rounding may move a pixel on the edge
    assert not np.array_equal(refined.rung("par"), refined.rung("caa"))
    for rung in plain.ladder:
        np.testing.assert_array_equal(plain.rung(rung), refined.rung(rung))


def test_the_report_of_a_refinement(settings, method):
    chosen = settings.model_copy(update={"refine": "par", "ablate": True, "confidence": 0.6})
    found = json.loads(json.dumps(report(measure(chosen, method=method)), allow_nan=False))
    assert list(found["ladder"]) == ["clip", "intra", "caa", "par"]
    assert found["gains"]["caa to par"][0] == pytest.approx(found["ladder"]["par"] - found["ladder"]["caa"], abs=0.011)
    assert "par" not in found["miou_tuned_background"] and found["worst"]["rung"] == "par"
    assert (found["protocol"]["PAR"], found["protocol"]["CRF"]) == ("20 iterations, dilations 1, 2, 4, 8", "no")
    lines = text(brief(found)).splitlines()
    assert any(line.split()[0] == "par" and line.split()[-2] == "–" for line in lines if line.strip())
    assert "labels that are sure, in per cent:" in lines


@pytest.mark.parametrize("refine", ["none", "par"])
def test_sure_labels_are_scored_alone(settings, method, refine):
    chosen = settings.model_copy(update={"confidence": 0.55, "refine": refine})
    found = measure(chosen, method=method)
    dataset, kept, pixels = open_dataset(settings), 0, 0
    for name, (scores, _), truth in last_scores(settings, method):
        how = refiner(chosen, dataset, [name])
        (scores,) = [scores] if how is None else how([scores])
        sure = scores.amax(0) >= 0.55 * scores.sum(0)
        kept, pixels = kept + int((sure & (truth != 255)).sum()), pixels + int((truth != 255).sum())
    said = report(found)["sure"]
    assert 0 < kept < pixels and said["confidence"] == 0.55
    assert said["pixels kept"] == pytest.approx(100 * kept / pixels, abs=0.3)
    assert said["low"] <= said["mIoU of these"] <= said["high"]
    assert report(measure(settings, method=method))["sure"] == {}


def test_the_crf_is_one_more_rung(settings, method, monkeypatch):
    """The package is optional: a CRF that shrinks objects stands in for it, on the photographs that it is given."""
    given = []

    def shrink(scores, images, *, workers):
        for own, image in zip(scores, images, strict=True):
            given.append((tuple(own.shape[1:]), tuple(image.shape[1:]), workers))
            yield torch.cat([own[:1] + 9, own[1:]])

    monkeypatch.setattr(crf, "dense_crf", shrink)
    monkeypatch.setattr(crf, "check_installed", lambda: None)
    found = measure(settings.model_copy(update={"refine": "crf"}), method=method)
    assert found.ladder[-1] == "crf" and not found.rung("crf")[:, 1:, 1].any() and found.rung("caa")[:, 1:, 1].any()
    assert len(given) == 3 and all(size == photograph and workers == 0 for size, photograph, workers in given)


@pytest.mark.parametrize("command", [measure, lambda s, method: export_voc(s, s.data_root / "sent", method=method)])
def test_a_missing_crf_is_said_before_any_work(settings, method, monkeypatch, command):
    monkeypatch.setattr(crf, "find_spec", lambda name: None)
    monkeypatch.setattr("diclip.evaluate.open_dataset", lambda *_, **__: pytest.fail("read the images first"))
    monkeypatch.setattr("diclip.export.open_dataset", lambda *_, **__: pytest.fail("read the images first"))
    with pytest.raises(ValueError, match="no package for the dense CRF: pip install"):
        command(settings.model_copy(update={"refine": "crf"}), method=method)


def test_exported_masks_are_refined(settings, method, tmp_path):
    chosen = settings.model_copy(update={"refine": "par"})
    said = export_voc(chosen, tmp_path, method=method)["protocol"]
    again = measure_masks(settings, tmp_path / "results/VOC2012/Segmentation/comp6_val_cls")
    np.testing.assert_array_equal(again.rung("masks"), measure(chosen, method=method).rung("par"))
    assert said["PAR"].startswith("20 iterations")


def test_the_protocol_says_what_refined():
    versions = {"diclip": "1.2", "packages": {}}
    assert refinement(load_settings()) == {"PAR": "no", "CRF": "no"}
    found = protocol(load_settings("voc", refine="par"), versions, images=9)
    assert found["PAR"] == "20 iterations, dilations 1, 2, 4, 8, 12, 24"
    assert protocol(load_settings(refine="crf"), versions, images=9)["CRF"] == "as CLIP-ES's, 10 iterations"
    with pytest.raises(ValueError, match="'refine' is 'gabor'"):
        load_settings(refine="gabor")
    with pytest.raises(ValueError, match="par_dilations"):
        load_settings(par_dilations="0, 2")
