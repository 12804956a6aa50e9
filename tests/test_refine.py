"""Test recursive affinity refinement against a slow reference, and what it does to odd input."""

from math import e, log10

import pytest
import torch
import torch.nn.functional as F

from diclip.cam import Maps, minmax
from diclip.labels import BackgroundSweep, pseudo_labels, upsample
from diclip.refine import entropy_step, rar, sharpen

GRID = (6, 7)
OPTIONS = {"grid": GRID, "canvas": 20}


def attention(batch=2, seed=0):
    """Return random probabilities with a few strong pairs, (B, 42, 42)."""
    return (3 * torch.randn(batch, 42, 42, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.fixture
def maps() -> Maps:
    """Three maps of two images, out of their order, neither stretched nor square."""
    scores = 0.01 + 0.1 * torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(1))
    return Maps(scores, torch.tensor([1, 0, 1]), torch.tensor([4, 0, 2]))


def resize(one, size):
    return F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def slow_rar(scores, probabilities, rounds):
    """Refine one map of one image, entry by entry."""
    rows = probabilities.tolist()
    peaks = [max(row[j] for row in rows) for j in range(42)]
    steps = []
    for row in rows:
        row = [value / peak for value, peak in zip(row, peaks, strict=True)]
        row = [max(0.0, x + 0.02 * log10(e * x)) for x in row]
        steps.append([x / sum(row) for x in row])
    now = resize(scores, GRID).flatten().tolist()
    for turn in range(rounds + 1):
        if turn:
            now = [sum(step * value for step, value in zip(row, now, strict=True)) for row in steps]
        low = min(now)
        total = sum(value - low for value in now)
        now = [(value - low) / total for value in now]
    return minmax(resize(torch.tensor(now).unflatten(0, GRID), (20, 20)), (0, 1))


@pytest.mark.parametrize("rounds", [0, 1, 4, 40])  # 40 even a map out beyond float32
def test_each_map_entry_by_entry(maps, rounds):
    probabilities = attention()
    given = probabilities.clone()
    refined = rar(maps, probabilities, rounds=rounds, **OPTIONS)
    assert probabilities.equal(given)
    assert refined.image is maps.image and refined.label is maps.label
    for p, image in enumerate(maps.image.tolist()):
        expected = slow_rar(maps.scores[p], probabilities[image], rounds)
        torch.testing.assert_close(refined.scores[p], expected, atol=1e-4, rtol=0)


def test_entropy_step_is_a_soft_threshold():
    x = torch.tensor([0.0, 1e-30, 0.0237, 0.0239, 0.1, 1 / e, 1.0], dtype=torch.float64)
    step = entropy_step(x)
    assert step[:3].tolist() == [0, 0, 0] and 0 < step[3] < 0.001  # soft: no jump
    assert step[4:].tolist() == pytest.approx([0.1 + 0.02 * log10(0.1 * e), 1 / e, 1 + 0.02 * log10(e)])
    assert entropy_step(torch.tensor(0.0237), rate=0.01) > 0
    assert x[3] == 0.0239


def test_steps_are_sparse_shares():
    steps = sharpen(attention())
    torch.testing.assert_close(steps.sum(-1), torch.ones(2, 42))
    assert (steps >= 0).all() and 0.2 < (steps == 0).double().mean() < 1


def test_no_affinity_gives_no_nan(maps):
    lonely = attention().half()
    lonely[0, 3], lonely[1, :, 5] = 0, 0  # a token that attends to nothing, one that nothing attends to
    steps = sharpen(lonely)
    assert steps.dtype == torch.float32 and steps.isfinite().all()
    assert steps[0, 3].count_nonzero() == 0 and steps[1, :, 5].count_nonzero() == 0
    assert rar(maps, lonely, rounds=3, **OPTIONS).scores.isfinite().all()


def test_constant_maps_become_zero(maps):
    flat = maps.with_scores(torch.tensor([0.0, 0.09, 0.31])[:, None, None].expand(3, 3, 4))
    assert not F.interpolate(flat.scores[None, 1:2], size=GRID, mode="bilinear").std() == 0  # resizing rounds
    assert rar(flat, attention(), rounds=5, **OPTIONS).scores.equal(torch.zeros(3, 20, 20))


def test_scale_does_not_matter_and_no_tags_no_maps(maps):
    refined = rar(maps, attention(), rounds=2, **OPTIONS)
    again = rar(maps.with_scores(7 * maps.scores - 1), attention(), rounds=2, **OPTIONS)
    torch.testing.assert_close(again.scores, refined.scores, atol=1e-4, rtol=0)
    assert (refined.scores.amin((1, 2)) == 0).all() and (refined.scores.amax((1, 2)) == 1).all()
    none = torch.zeros(0, dtype=torch.long)
    assert rar(Maps(torch.zeros(0, 3, 4), none, none), attention(), rounds=2, **OPTIONS).scores.shape == (0, 20, 20)


def test_labels_stretch_again_at_the_image_s_size(maps):
    refined = rar(maps, attention(), rounds=2, **OPTIONS)
    plain, label = upsample(refined, 1, (9, 5))
    again, same = upsample(refined, 1, (9, 5), restretch=True)
    assert label.tolist() == same.tolist() == [4, 2]
    torch.testing.assert_close(again, minmax(plain, (-2, -1)), atol=1e-5, rtol=0)
    assert not torch.allclose(again, plain, atol=1e-3)
    (mask,) = pseudo_labels(Maps(again, 0 * label, label), [(9, 5)], stretch=False)
    masks = pseudo_labels(refined, [(7, 8), (9, 5)], restretch=True)
    assert masks[1].equal(mask)
    sweep = BackgroundSweep(5, scores=[0.5])
    sweep.update(refined, [0 * mask for mask in masks], restretch=True)
    assert sweep.confusion()[0, 0].equal(torch.cat([mask.flatten() for mask in masks]).bincount(minlength=6))


def test_what_does_not_fit_is_said_in_one_line(maps):
    for call, message in (
        (lambda: rar(maps, attention(), rounds=2, grid=(6, 6)), "36, 36\\) for 6x6"),
        (lambda: rar(maps, attention()[0], rounds=2, grid=GRID), "\\(42, 42\\), expected"),
        (lambda: rar(maps, attention(), rounds=-1, grid=GRID), "-1, expected 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
