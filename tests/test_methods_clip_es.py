"""Test the system CLIP-ES on a tiny random CLIP: its rungs, made of its parts by hand."""

import pytest
import torch

from diclip.affinity import caa
from diclip.clip import DenseCLIP, load_clip
from diclip.data import Batch
from diclip.evaluate import evaluate
from diclip.gradcam import softmax_gradcam
from diclip.methods import build_method
from diclip.methods.clip_es import CLIPES
from diclip.settings import load_settings

TAGS = [torch.tensor(tag, dtype=torch.long) for tag in ((2, 7), (), (19,))]
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BATCH = Batch(["a", "b", "c"], IMAGES, TAGS, [None] * 3, [(50, 70)] * 3)


@pytest.fixture(scope="module")
def clip(tiny_clip) -> DenseCLIP:
    return load_clip(tiny_clip)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradcam_pool": "patches"}, {"caa_layers": 2}, {"tau_box": 0.8}, {"background_words": "sky"}],
    ids=str,
)
def test_rungs(clip, settings):
    settings = load_settings(method="clip-es", **settings)
    method = build_method(settings, clip)
    assert isinstance(method, CLIPES)
    rungs = dict(method.rungs(BATCH))
    assert list(rungs) == ["gradcam", "caa"] == [*method.raw, *method.refined]
    encoded = clip.encode(BATCH.images, surgery_blocks=0)
    texts = clip.encode_text(settings.vocabulary().prompts())
    how = {"num_classes": 20, "grid": (8, 8), "pool": settings.gradcam_pool}
    explained = softmax_gradcam(clip, encoded.tokens[-2], texts, TAGS, **how)
    torch.testing.assert_close(rungs["gradcam"].scores, explained.maps.scores, atol=1e-4, rtol=0)
    layers = min(settings.caa_layers, 4)
    expected = caa(explained.maps, encoded.attention, threshold=settings.tau_box, layers=layers)
    torch.testing.assert_close(rungs["caa"].scores, expected.scores, atol=1e-4, rtol=1e-3)
    assert rungs["caa"].label.tolist() == [2, 7, 19] and rungs["caa"].image.tolist() == [0, 0, 2]


def test_settings_change_the_rungs(clip):
    found = {}
    for name, value in {"gradcam_pool": "patches", "caa_layers": 2, "tau_box": 0.8, "background_words": "sky"}.items():
        found[name] = dict(build_method(load_settings(method="clip-es", **{name: value}), clip).rungs(BATCH))
    plain = dict(build_method(load_settings(method="clip-es"), clip).rungs(BATCH))
    for name, rungs in found.items():
        assert not torch.allclose(rungs["caa"].scores, plain["caa"].scores, atol=1e-4), name


def test_evaluation(tiny_world, tiny_clip):
    settings = {"data_root": str(tiny_world), "clip_model": str(tiny_clip), "device": "cpu", "baselines": False}
    found = evaluate(load_settings(method="clip-es", batch_size=4, **settings))
    assert list(found["ladder"]) == ["gradcam", "caa"] and list(found["gains"]) == ["gradcam to caa"]
    assert found["ladder"]["caa"] == found["miou_one_minus_max"]["caa"]
    assert found["settings"]["tau_box"] == 0.4
