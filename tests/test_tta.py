"""Test maps of several scales and of mirror images, on methods whose maps are known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diclip.cam import Maps, flip_max
from diclip.clip import load_clip
from diclip.data import Batch, batches, open_dataset
from diclip.evaluate import measure
from diclip.methods import build_method
from diclip.settings import load_settings
from diclip.tta import average, resized, views


class Bright:
    """A method whose only map is the brightness of 8 x 8 patches, and which remembers what it was shown."""

    restretch = False

    def __init__(self) -> None:
        self.clip = type("CLIP", (), {"patch_size": (8, 8)})
        self.seen = []

    def rungs(self, batch):
        self.seen.append(batch.images)
        scores = F.avg_pool2d(batch.images.mean(1), 8)
        yield "bright", Maps(scores, torch.arange(len(batch)), torch.zeros(len(batch), dtype=torch.long))
        yield "dark", Maps(1 - scores, torch.arange(len(batch)), torch.zeros(len(batch), dtype=torch.long))


class Left(Bright):
    """A method that is sure that things are on the left, whatever it sees."""

    def rungs(self, batch):
        scores = torch.linspace(1, 0, 4).expand(len(batch), 4, 4)
        yield "left", Maps(scores, torch.arange(len(batch)), torch.zeros(len(batch), dtype=torch.long))


@pytest.fixture
def batch() -> Batch:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Batch(["a", "b"], images, [torch.tensor([0])] * 2, [None, None], [(64, 64)] * 2)


def test_one_scale_is_the_method_itself(batch):
    method = Bright()
    plain = dict(method.rungs(batch))
    found = dict(views(method, batch, load_settings()))
    assert list(found) == ["bright", "dark"]
    assert all(torch.equal(found[name].scores, plain[name].scores) for name in plain)
    assert len(method.seen) == 2 and method.seen[1] is batch.images


def test_scales_are_averaged_at_the_largest_size(batch):
    method = Bright()
    found = dict(views(method, batch, load_settings(scales="0.5, 1.5")))["bright"]
    assert [tuple(images.shape[2:]) for images in method.seen] == [(32, 32), (96, 96)]
    expected = []
    for side in (32, 96):
        image = F.interpolate(batch.images, size=(side, side), mode="bilinear", align_corners=False)
        grid = F.avg_pool2d(image, 8).mean(1, keepdim=True)
        expected.append(F.interpolate(grid, size=(12, 12), mode="bilinear", align_corners=False)[:, 0])
    torch.testing.assert_close(found.scores, (expected[0] + expected[1]) / 2)
    assert found.image.tolist() == [0, 1] and found.label.tolist() == [0, 0]


def test_sides_stay_multiples_of_what_all_models_take(batch):
    assert resized(batch.images, 0.7, step=8).shape[2:] == (48, 48)  # 44.8
    assert resized(batch.images, 0.7, step=32).shape[2:] == (32, 32)
    assert resized(batch.images, 0.1, step=32).shape[2:] == (32, 32)
    assert resized(batch.images, 1, step=48) is batch.images
    method = Bright()
    method.diffusion = type("Diffusion", (), {"factor": 12})
    list(views(method, batch, load_settings(scales=(0.7,))))
    assert method.seen[0].shape[2:] == (48, 48)  # a multiple of 8 and of 12


def test_a_mirrored_image_gives_the_mirrored_map(batch):
    mirrored = replace(batch, images=batch.images.flip(-1))
    for join in ("mean", "max"):
        settings = load_settings(flip=True, flip_join=join, scales=(1, 0.5))
        one, other = (dict(views(Bright(), b, settings))["bright"].scores for b in (batch, mirrored))
        torch.testing.assert_close(one, other.flip(-1))
    plain = dict(Bright().rungs(batch))["bright"].scores
    mean = dict(views(Bright(), batch, load_settings(flip=True)))["bright"].scores
    torch.testing.assert_close(mean, plain)  # what a map shows does not depend on the side


def test_what_is_always_on_the_left_evens_out(batch):
    mean = dict(views(Left(), batch, load_settings(flip=True)))["left"].scores
    torch.testing.assert_close(mean, torch.full((2, 4, 4), 0.5))
    largest = dict(views(Left(), batch, load_settings(flip=True, flip_join="max")))["left"].scores
    row = torch.linspace(1, 0, 4)
    torch.testing.assert_close(largest, flip_max(row.expand(2, 4, 4), row.expand(2, 4, 4)))
    torch.testing.assert_close(largest[0, 0, [0, 3]], torch.ones(2), atol=1e-4, rtol=0)
    assert largest[0, 0, 1] == largest[0, 0, 2] == 0


def test_one_map_is_its_own_average(batch):
    maps = dict(Bright().rungs(batch))["dark"]
    torch.testing.assert_close(average([maps]).scores, maps.scores)


@pytest.mark.parametrize(("name", "value"), [("scales", ""), ("scales", "0"), ("scales", "9"), ("flip_join", "min")])
def test_wrong_settings(name, value):
    with pytest.raises(ValueError, match=f"setting '{name}' is .* but it should"):
        load_settings(**{name: value})


def test_a_real_method_at_two_scales_and_mirrored(tiny_world, tiny_clip):
    settings = load_settings(
        data_root=str(tiny_world), clip_model=str(tiny_clip), device="cpu", baselines=False, batch_size=6
    )
    several = settings.model_copy(update={"scales": (0.75, 1.0), "flip": True})
    method = build_method(settings, load_clip(tiny_clip))
    batch = next(iter(batches(open_dataset(settings), image_size=128, batch_size=6)))
    mirrored = replace(batch, images=batch.images.flip(-1))
    for (name, one), (_, other) in zip(views(method, batch, several), views(method, mirrored, several), strict=True):
        assert one.scores.shape[1:] == (16, 16), name
        torch.testing.assert_close(one.scores, other.scores.flip(-1), atol=1e-4, rtol=0)
    plain, joined = measure(settings, method=method), measure(several, method=method)
    assert joined.background.keys() == plain.background.keys() and joined.background != plain.background
    assert (joined.tuned["intra"] != plain.tuned["intra"]).any()
