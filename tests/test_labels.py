"""Test background rules, pseudo labels and the sweep of background scores."""

import pytest
import torch
import torch.nn.functional as F

from diclip.cam import Maps, minmax
from diclip.labels import BackgroundSweep, pseudo_labels, to_labels, upsample, with_background


@pytest.fixture
def maps() -> Maps:
    """Three images: two classes, none, one."""
    scores = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    return Maps(scores, torch.tensor([0, 0, 2]), torch.tensor([1, 4, 0]))


SIZES = [(11, 7), (6, 9), (5, 4)]


def test_background_rules():
    scores = torch.tensor([[[0.2, 0.9]], [[0.6, 0.1]]])
    torch.testing.assert_close(with_background(scores)[0], torch.tensor([[0.4, 0.1]]))
    torch.testing.assert_close(with_background(scores, power=2)[0], torch.tensor([[0.16, 0.01]]))
    assert with_background(scores, rule="fixed", score=0.5)[0].tolist() == [[0.5, 0.5]]
    assert with_background(scores)[1:].equal(scores)
    batch = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert with_background(batch)[1].equal(with_background(batch[1]))
    with pytest.raises(ValueError, match="one_minus_max or fixed"):
        with_background(scores, rule="sweep")


def test_upsampling_is_bilinear_after_the_stretch(maps):
    scores, label = upsample(maps, 0, (11, 7))
    stretched = minmax(maps.scores[:2], (-2, -1))
    expected = F.interpolate(stretched[None], size=(11, 7), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert label.tolist() == [1, 4]
    assert upsample(maps, 2, (5, 4), stretch=False)[0].equal(maps.scores[2:])


def test_labels_are_class_index_plus_one_and_background_wins_ties():
    scores = torch.tensor([[[0.5, 0.1, 0.3]], [[0.5, 0.7, 0.3]], [[0.1, 0.2, 0.4]]])
    assert to_labels(scores, torch.tensor([2, 7])).tolist() == [[0, 3, 8]]


def test_pixels_that_are_not_sure_are_left_out():
    scores = torch.tensor([[[0.05, 0.94, 0.96, 0.0]], [[0.95, 0.06, 0.04, 3.0]]])
    assert to_labels(scores, torch.tensor([4]), confidence=0.95).tolist() == [[5, 255, 0, 5]]
    assert to_labels(scores, torch.tensor([4]), confidence=0.95, ignore=99).tolist() == [[5, 99, 0, 5]]
    assert to_labels(scores, torch.tensor([4])).tolist() == [[5, 0, 0, 5]]


def test_confident_pseudo_labels_differ_in_what_they_leave_out(maps):
    plain, sure = pseudo_labels(maps, SIZES), pseudo_labels(maps, SIZES, confidence=0.6)
    for index, (all_of_them, some) in enumerate(zip(plain, sure, strict=True)):
        left = some != 255
        assert some[left].equal(all_of_them[left])
        assert left.all() if index == 1 else left.any() and not left.all()


def test_pseudo_labels_at_each_image_s_size(maps):
    masks = pseudo_labels(maps, SIZES)
    assert [tuple(mask.shape) for mask in masks] == SIZES
    assert all(mask.dtype == torch.int64 for mask in masks)
    assert set(masks[0].unique().tolist()) == {0, 2, 5}
    assert not masks[1].any()
    torch.testing.assert_close(masks[2], (minmax(maps.scores[2], (0, 1)) > 0.5).long())
    everything = pseudo_labels(maps, SIZES, rule="fixed", score=-1.0)
    assert (everything[0] > 0).all() and not everything[1].any()


@pytest.mark.parametrize("stretch", [True, False])
def test_sweep_equals_a_run_at_each_score(maps, stretch):
    generator = torch.Generator().manual_seed(1)
    truth = [torch.randint(0, 6, size, generator=generator) for size in SIZES]
    truth[0][0] = 255
    tried = [0.0, 0.25, 0.5, 0.75, 1.0]
    sweep = BackgroundSweep(5, scores=tried)
    sweep.update(maps, truth, stretch=stretch)
    expected = torch.zeros(5, 6, 6, dtype=torch.long)
    for k, score in enumerate(tried):
        masks = pseudo_labels(maps, SIZES, rule="fixed", score=score, stretch=stretch)
        for mask, true in zip(masks, truth, strict=True):
            for t, p in zip(true.flatten().tolist(), mask.flatten().tolist(), strict=True):
                if t != 255:
                    expected[k, t, p] += 1
    assert sweep.confusion().equal(expected)


def test_sweep_adds_up_and_knows_one_minus_max(maps):
    truth = [torch.zeros(size, dtype=torch.uint8) for size in SIZES]
    sweep = BackgroundSweep(5)
    for _ in range(2):
        sweep.update(maps, truth)
    confusion = sweep.confusion()
    assert confusion.shape == (101, 6, 6)
    assert (confusion.sum((1, 2)) == 2 * sum(h * w for h, w in SIZES)).all()
    found = torch.cat([mask.flatten() for mask in pseudo_labels(maps, SIZES)]).bincount(minlength=6)
    assert confusion[50, 0].equal(2 * found)


def test_sweep_refuses_other_labels_and_scores(maps):
    with pytest.raises(ValueError, match="label 6, expected 0 to 5 or 255"):
        BackgroundSweep(5).update(maps, [torch.full((3, 3), 6)])
    with pytest.raises(ValueError, match="ascending"):
        BackgroundSweep(5, scores=[0.5, 0.2])


@pytest.mark.parametrize("confidence", [-0.1, 95])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        to_labels(torch.ones(2, 3, 3), torch.tensor([0]), confidence=confidence)
