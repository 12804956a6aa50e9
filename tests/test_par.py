"""Test pixel-adaptive refinement against a reference that reads as its description, and its properties."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diclip.cam import Maps
from diclip.labels import pseudo_labels, to_labels, upsample, with_background
from diclip.refine import par

DILATIONS = (1, 2, 4, 8, 12, 24)


def around(x: torch.Tensor) -> torch.Tensor:
    """Return the 48 neighbours of each pixel of x (C, H, W): (C, 48, H, W)."""
    kernels = torch.eye(9)[torch.arange(9) != 4].view(8, 1, 3, 3)
    padded = [(d, F.pad(x[:, None], (d,) * 4, mode="replicate")) for d in DILATIONS]
    return torch.cat([F.conv2d(wider, kernels, dilation=d) for d, wider in padded], dim=1)


def plain_par(scores: torch.Tensor, image: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Refine one image's scores (K, H, W), with all neighbours of all of them at once."""
    pixels = around(image)
    unit = 0.3 * (pixels.std(1, keepdim=True) + 1e-8)
    colour = (-(((pixels - image[:, None]).abs() / unit) ** 2)).mean(0).softmax(0)
    distance = torch.tensor([d * s for d in DILATIONS for s in (2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5)])
    near = (-((distance / (0.3 * (distance.std() + 1e-8))) ** 2)).softmax(0)
    weights = colour + 0.01 * near.view(-1, 1, 1)
    for _ in range(iterations):
        scores = (weights * around(scores)).sum(1)
    return scores


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_images_of_several_sizes_and_numbers_of_classes():
    shapes = [(2, 20, 31), (4, 20, 31), (2, 20, 31), (1, 9, 5), (2, 20, 31)]
    scores = [some(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    images = [some(3, *shape[1:], seed=9 + seed) for seed, shape in enumerate(shapes)]
    given_scores, given_images = [x.clone() for x in scores], [x.clone() for x in images]
    for held in (1, 2 * 48 * 20 * 31, 2**24):  # one, two, all images at a time
        refined = par(scores, images, iterations=4, held=held)
        for own, score, image in zip(refined, scores, images, strict=True):
            torch.testing.assert_close(own, plain_par(score, image, 4), atol=2e-5, rtol=0)
    assert all(map(torch.equal, scores + images, given_scores + given_images))


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_dense_scores_of_a_batch(device):
    scores, images = some(3, 2, 12, 10), some(3, 3, 12, 10, seed=1)
    refined = par(scores.to(device), images, iterations=2)
    assert all(own.device.type == device for own in refined)
    for own, score, image in zip(refined, scores, images, strict=True):
        torch.testing.assert_close(own.cpu(), plain_par(score, image, 2), atol=2e-5, rtol=0)


@given(seed=st.integers(0, 2**31), gain=st.floats(0.1, 255), shift=st.floats(-3, 3))
def test_mass_linearity_and_any_scale_of_colour(seed, gain, shift):
    scores, image = some(3, 14, 11, seed=seed), some(3, 14, 11, seed=seed + 1)
    (refined,) = par([scores], [image], iterations=3)
    torch.testing.assert_close(par([scores], [gain * image + shift], iterations=3)[0], refined, atol=1e-3, rtol=0)
    torch.testing.assert_close(par([scores.sum(0)[None]], [image], iterations=3)[0][0], refined.sum(0))
    (ones,) = par([torch.ones(1, 14, 11)], [image], iterations=3)
    torch.testing.assert_close(ones, torch.full_like(ones, 1.01**3))
    (shares,) = par([scores], [image], iterations=3, normalise=True)
    torch.testing.assert_close(shares * 1.01**3, refined)
    assert scores.min() - 1e-6 <= shares.min() and shares.max() <= scores.max() + 1e-6


def test_edges_in_the_image_hold_scores_back():
    """Values were computed in float64 from the description."""
    image = (torch.arange(32) >= 16).float().expand(3, 32, 32)
    scores = torch.zeros(2, 32, 32)
    scores[1, 12:20, 20:28] = 1
    scores[0] = 1 - scores[1]
    (refined,) = par([scores], [image], iterations=10)
    places = ((16, 24, 0.058474), (16, 17, 0.058292), (16, 15, 0.000443), (16, 4, 0.0000408))
    for y, x, expected in places:
        assert refined[1, y, x].item() == pytest.approx(expected, rel=2e-2, abs=1e-6)
    torch.testing.assert_close(refined.sum(0), torch.full((32, 32), 1.01**10))


def test_what_is_brought_to_whose_size():
    scores, image = some(2, 6, 7), some(3, 15, 11, seed=1)
    for corners in (True, False):
        size = {"mode": "bilinear", "align_corners": corners}
        smaller, larger = (
            F.interpolate(image[None], size=(6, 7), **size)[0],
            F.interpolate(scores[None], (15, 11), **size),
        )
        (own,) = par([scores], [image], iterations=2, align_corners=corners)
        torch.testing.assert_close(own, plain_par(scores, smaller, 2), atol=2e-5, rtol=0)
        (own,) = par([scores], [image], iterations=2, align_corners=corners, resize="scores")
        torch.testing.assert_close(own, plain_par(larger[0], image, 2), atol=2e-5, rtol=0)


def test_labels_of_refined_scores():
    maps = Maps(some(3, 4, 4), torch.tensor([0, 0, 2]), torch.tensor([1, 4, 0]))
    sizes, images = [(20, 17), (9, 9), (12, 12)], some(3, 3, 16, 16, seed=1)
    masks = pseudo_labels(maps, sizes, refine=lambda scores: par(scores, images, iterations=3))
    assert [tuple(mask.shape) for mask in masks] == sizes and not masks[1].any()
    scores, label = upsample(maps, 0, sizes[0])
    image = F.interpolate(images[:1], size=sizes[0], mode="bilinear", align_corners=True)[0]
    assert masks[0].equal(to_labels(plain_par(with_background(scores), image, 3), label))
    assert not masks[0].equal(pseudo_labels(maps, sizes)[0])


def test_speed(record_property):
    scores, images = some(2, 4, 160, 160), some(2, 3, 160, 160, seed=1)

    def seconds(run) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    par(scores, images, iterations=1)
    ours = min(seconds(lambda: par(scores, images)) for _ in range(2))
    plain = seconds(lambda: [plain_par(own, image) for own, image in zip(scores, images, strict=True)])
    record_property("PAR of two images of 160 x 160 with 4 scores, s", round(ours, 3))
    record_property("plain reference, s", round(plain, 2))
    assert 3 * ours < plain


def test_what_does_not_fit_is_said_in_one_line():
    scores, images = [some(2, 8, 8)], [some(3, 8, 8)]
    for call, message in (
        (lambda: par(scores, images * 2), "of 1 images, expected those of 2"),
        (lambda: par([some(8, 8)], images), r"scores 0: found \(8, 8\), expected \(K, H, W\)"),
        (lambda: par(scores, [some(4, 8, 8)]), r"image 0: found \(4, 8, 8\), expected \(3"),
        (lambda: par(scores, images, iterations=-1), "found -1 iterations"),
        (lambda: par(scores, images, dilations=()), "one or more from 1"),
        (lambda: par(scores, images, dilations=(1, 0)), "one or more from 1"),
        (lambda: par(scores, images, bandwidth=0), "bandwidth is 0"),
        (lambda: par(scores, images, resize="both"), "'both', expected image or scores"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert par([], []) == []
