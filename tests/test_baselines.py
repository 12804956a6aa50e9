"""Test the nulls: colour-and-texture affinity, saliency, GrabCut with tags."""

import cv2
import numpy as np
import pytest
import torch

from diclip.baselines import colour_texture_affinity, colour_texture_features, grabcut, place_affinity, saliency
from diclip.data.minivoc import CLASSES, render, scene_of


def disc(side: int = 96, radius: int = 24, centre: tuple[int, int] = (50, 44)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a red disc on noisy blue: the picture (side, side, 3) and where the disc is."""
    image = np.full((side, side, 3), (40, 70, 160), np.int16) + np.random.default_rng(0).integers(
        -9, 9, (side, side, 1)
    )
    inside = np.hypot(*(np.mgrid[:side, :side] - np.array(centre)[:, None, None])) < radius
    image[inside] += np.array([150, -20, -110], np.int16)
    return np.clip(image, 0, 255).astype(np.uint8), inside


def halves(batch: int = 1) -> torch.Tensor:
    """Draw stripes on the left and an even surface on the right, (B, 3, 64, 64)."""
    images = torch.full((batch, 3, 64, 64), 0.5)
    images[:, :, :, :32] += 0.3 * torch.sign(torch.sin(torch.arange(32) * 1.3))
    noise = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (images + 0.02 * noise).clamp(0, 1)


def test_features_are_standardised_inside_each_image():
    features = colour_texture_features(halves(2), (8, 8))
    assert features.shape == (2, 64, 14) and features.isfinite().all()
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 14), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(1), torch.ones(2, 14), atol=1e-3, rtol=0)
    non_square = colour_texture_features(halves()[:, :, :48], (6, 8))
    assert non_square.shape == (1, 48, 14)


def test_features_see_colour_and_direction():
    image = torch.full((1, 3, 32, 32), 0.5)
    image[:, 0, :16] = 0.9  # the upper half is red
    image[0, :, 16:, :16] += 0.2 * torch.sign(torch.sin(torch.arange(16) * 1.6))  # vertical stripes
    image[0, :, 16:, 16:] += 0.2 * torch.sign(torch.sin(torch.arange(16) * 1.6))[:, None]  # horizontal ones
    features = colour_texture_features(image, (2, 2))[0]
    upper, lower = features[:2], features[2:]
    assert (upper[:, 1] > lower[:, 1]).all()  # Lab's a: red against green
    across, down = features[2, 6:], features[3, 6:]
    assert across[0] > across[4] and down[4] > down[0]  # energy along x at angle 0, along y at 90 degrees


def test_affinity_tells_textures_apart():
    affinity = colour_texture_affinity(halves(2), (8, 8))
    assert affinity.shape == (2, 64, 64) and 0 < affinity.min() and affinity.max() <= 1
    torch.testing.assert_close(affinity, affinity.mT)
    torch.testing.assert_close(affinity.diagonal(dim1=1, dim2=2), torch.ones(2, 64), atol=1e-2, rtol=0)
    column = torch.arange(64) % 8
    left, right = column < 3, column > 4  # away from the seam
    within = [affinity[:, side][:, :, side].mean() for side in (left, right)]
    assert affinity[:, left][:, :, right].mean() < 0.3 < 0.4 < min(within)


def test_each_image_for_itself():
    one, two = halves(2)[:1], torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    together = colour_texture_affinity(torch.cat([one, two]), (8, 8))
    torch.testing.assert_close(together[:1], colour_texture_affinity(one, (8, 8)), atol=1e-4, rtol=0)
    torch.testing.assert_close(together[1:], colour_texture_affinity(two, (8, 8)), atol=1e-4, rtol=0)


def test_saliency_finds_what_differs_from_the_border():
    image, inside = disc()
    rated = saliency(image)
    assert rated.shape == inside.shape and rated.min() == 0 and rated.max() == 1
    assert rated[inside].mean() > 0.5 and rated[~inside].mean() < 0.1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_even_picture_is_no_reason_to_fail(value):
    image = np.full((40, 60, 3), value, np.uint8)
    assert np.isfinite(saliency(image)).all()
    mask = grabcut(image, [3, 4], rng=np.random.default_rng(0))
    assert mask.shape == (40, 60) and set(np.unique(mask)) <= {0, 4, 5}


def test_grabcut_cuts_the_disc_out():
    image, inside = disc()
    mask = grabcut(image, [6], rng=np.random.default_rng(0))
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 7}
    assert ((mask == 7) & inside).sum() / ((mask == 7) | inside).sum() > 0.9


def test_tags_are_dealt_out_at_random_but_each_once():
    image, inside = disc()
    image[inside & (np.arange(96) > 44)] = (60, 160, 60)  # the disc's right half is green
    found = [grabcut(image, [2, 9], rng=np.random.default_rng(seed)) for seed in range(6)]
    for mask in found:
        assert set(np.unique(mask)) == {0, 3, 10}
    assert len({int(mask[50, 30]) for mask in found}) == 2  # nothing here knows what a class looks like
    again = grabcut(image, [2, 9], rng=np.random.default_rng(3))
    np.testing.assert_array_equal(again, found[3])


def test_no_tags_no_objects():
    assert not grabcut(disc()[0], [], rng=np.random.default_rng(0)).any()


def test_on_minivoc_grabcut_is_better_than_nothing_and_far_from_good():
    hits, union = 0, 0
    for index in range(6):
        scene = scene_of("tune", index)
        drawn = render(scene)
        mask = grabcut(drawn.image, [CLASSES.index(tag) for tag in scene.tags], rng=np.random.default_rng(index))
        known = drawn.classes != 255
        front, truth = (mask > 0) & known, (drawn.classes > 0) & known
        hits, union = hits + (front & truth).sum(), union + (front | truth).sum()
    assert 0.2 < hits / union < 0.7


def test_pictures_stay_as_they_were():
    image = disc()[0]
    before = image.copy()
    saliency(image)
    grabcut(image, [1], rng=np.random.default_rng(0))
    np.testing.assert_array_equal(image, before)
    assert cv2.cvtColor(image, cv2.COLOR_RGB2LAB).dtype == np.uint8


def test_place_knows_distance_alone():
    found = place_affinity((3, 5), width=1.5)
    assert found.shape == (1, 15, 15)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 15))
    row = found[0, 7].unflatten(0, (3, 5))  # of the middle
    assert row[1, 2] == row.max() and row[1, 1] == row[1, 3]
    assert (row[1, 3] / row[1, 2]).item() == pytest.approx(np.exp(-1 / (2 * 1.5**2)))
    assert (row[0, 1] / row[1, 2]).item() == pytest.approx(np.exp(-2 / (2 * 1.5**2)))
