"""Test class-aware affinity against slow, obvious references."""

import pytest
import torch
import torch.nn.functional as F

from diclip.affinity import box_mask, caa, calibration, pair_affinity, propagate, sinkhorn, transition
from diclip.cam import Maps


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slow_box_mask(scores, threshold, full_border=False):
    """Flood-fill each bright region of one map, cell by cell, and paint its box."""
    h, w = scores.shape
    levels = [[int(255 * value) for value in row] for row in scores.tolist()]
    limit = int(threshold * max(map(max, levels)))
    todo = {(y, x) for y in range(h) for x in range(w) if levels[y][x] > limit}
    bottom, right = (h, w) if full_border else (h - 1, w - 1)
    mask = torch.zeros(h, w, dtype=torch.bool)
    while todo:
        region, front = [], [todo.pop()]
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            front += near
        rows, columns = zip(*region, strict=True)
        mask[min(rows) : min(max(rows) + 1, bottom), min(columns) : min(max(columns) + 1, right)] = True
    return mask


@pytest.mark.parametrize("full_border", [False, True])
@pytest.mark.parametrize(("shape", "threshold"), [((60, 6, 9), 0.79), ((60, 9, 5), 0.9), ((8, 20, 20), 0.4)])
def test_boxes_equal_flood_fill(shape, threshold, full_border):
    scores = random(*shape) ** 2
    expected = torch.stack([slow_box_mask(one, threshold, full_border) for one in scores])
    assert box_mask(scores, threshold=threshold, full_border=full_border).equal(expected)


def test_last_row_and_column_are_never_inside():
    scores = torch.zeros(3, 4, 5)
    scores[0, 1:, 2:] = 1  # reaches both borders
    scores[1, 3, 1] = 1  # in the last row alone
    scores[2, 2, 4] = 1  # in the last column alone
    mask = box_mask(scores)
    assert mask[0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert not mask[1:].any()
    assert box_mask(scores, full_border=True).equal(scores.bool())


def test_diagonal_neighbours_join_and_maps_do_not():
    scores = torch.zeros(2, 4, 4)
    scores[0, 0, 0] = scores[0, 1, 1] = scores[1, 2, 0] = 1
    mask = box_mask(scores)
    assert mask[0, :2, :2].all() and mask[0].sum() == 4
    assert mask[1].nonzero().tolist() == [[2, 0]]


def test_bright_is_strictly_above_the_cut_threshold():
    scores = torch.tensor([[[1.0, 202 / 255 + 1e-4, 201.9 / 255, 0.0, 0.0], [0.0] * 5]])
    assert box_mask(scores, threshold=0.79)[0, 0].tolist() == [True, True, False, False, False]  # 202 > 201


def test_dark_and_absent_maps_have_no_boxes():
    assert not box_mask(torch.zeros(2, 3, 3)).any()
    assert box_mask(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


def test_sinkhorn_balances():
    balanced = sinkhorn(random(2, 6, 6) + 0.1, iterations=50)
    torch.testing.assert_close(balanced.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(balanced.sum(-2), torch.ones(2, 6))
    once = sinkhorn(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), iterations=1)  # columns first, then rows
    torch.testing.assert_close(once, torch.tensor([[0.4, 0.6], [2 / 3, 1 / 3]]))


def test_transition_one_image_at_a_time():
    attention, affinity = random(8, 3, 13, 13), random(3, 12, 12, seed=1)
    attention[-3:] *= 12  # head sums
    plain, learned = transition(attention), transition(attention, affinity=affinity)
    for b in range(3):
        layers = attention[-6:, b, 1:, 1:]
        gaps = [(affinity[b] - layer).sum() for layer in layers]
        kept = [layer for layer, gap in zip(layers, gaps, strict=True) if gap <= sum(gaps) / 6]
        assert len(kept) == 3
        for mean, result in ((layers.mean(0), plain[b]), (sum(kept) / 3 * affinity[b], learned[b])):
            balanced = sinkhorn(mean)
            balanced = (balanced + balanced.T) / 2
            torch.testing.assert_close(result, balanced @ balanced)


def test_equal_layers_are_not_all_dropped():
    attention, affinity = random(1, 200, 5, 5).repeat(6, 1, 1, 1), random(200, 4, 4)
    expected = transition(attention[:1], layers=1, affinity=affinity)
    torch.testing.assert_close(transition(attention, affinity=affinity), expected)


def test_propagation_cell_by_cell():
    maps = Maps(random(4, 3, 4), torch.tensor([0, 0, 2, 0]), torch.tensor([1, 4, 0, 5]))
    steps = random(3, 12, 12, seed=1)
    spread = propagate(maps, steps, threshold=0.6)
    inside = box_mask(maps.scores, threshold=0.6)
    assert inside.flatten(1).any(1).all()
    for p, image in enumerate(maps.image.tolist()):
        for i in range(12):
            old = maps.scores[p].flatten()
            new = sum(steps[image, i, j] * old[j] for j in range(12) if inside[p].flatten()[j])
            torch.testing.assert_close(spread.scores[p].flatten()[i], new)
    assert spread.label is maps.label


def test_batch_equals_loop_and_empty_tags():
    attention = random(6, 2, 17, 17)
    maps = Maps(random(3, 4, 4), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]))
    together = caa(maps, attention)
    for index in range(2):
        scores, label = maps.of(index)
        alone = caa(Maps(scores, torch.zeros_like(label), label), attention[:, index : index + 1])
        torch.testing.assert_close(together.of(index)[0], alone.scores)
    none = torch.zeros(0, dtype=torch.long)
    assert caa(Maps(torch.zeros(0, 4, 4), none, none), attention).scores.shape == (0, 4, 4)


def test_bad_shapes_say_so_in_one_line():
    maps = Maps(random(1, 3, 4), torch.tensor([0]), torch.tensor([0]))
    for call, message in (
        (lambda: transition(random(4, 1, 5, 5)), ">= 6"),
        (lambda: transition(random(6, 5, 5)), "1 \\+ N"),
        (lambda: transition(random(6, 1, 5, 5), affinity=random(1, 5, 5)), "\\(1, 4, 4\\)"),
        (lambda: propagate(maps, random(1, 9, 9)), "maps of 3x4"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_pair_affinity_of_every_pair():
    features = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    for mean in ("batch", "image"):
        affinity = pair_affinity(features, gain=2.0, mean=mean)
        bias = calibration(features, gain=2.0, mean=mean)
        flat = features.flatten(2).transpose(1, 2)
        cosine = torch.stack([F.cosine_similarity(own[:, None], own[None], dim=-1) for own in flat])
        for image in range(2):
            logits = 2 * (cosine[image] - (cosine.mean() if mean == "batch" else cosine[image].mean()))
            torch.testing.assert_close(affinity[image], logits.sigmoid())
            for row, found in zip(logits, bias[image], strict=True):
                weights = torch.where(row >= 0, row.exp(), 0)
                torch.testing.assert_close(found, weights / weights.sum())
    alone = torch.cat([pair_affinity(one[None], mean="image") for one in features])
    torch.testing.assert_close(pair_affinity(features, mean="image"), alone)
    assert not torch.allclose(pair_affinity(features, mean="batch"), alone)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_a_constant_map_calibrates_without_nan(value):
    bias = calibration(torch.full((1, 7, 3, 3), value))
    torch.testing.assert_close(bias.sum(-1), torch.ones(1, 9))


def test_pair_affinity_of_a_batch_in_parts():
    """What adds up the parts' cosines and pairs makes them one batch; an image's own mean needs no other part."""
    features = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, sums = pair_affinity(features, mean="batch"), []
    for part in (features[:1], features[1:]):
        pair_affinity(part, mean="batch", total=lambda own: sums.append(own) or own)
    assert [pairs.item() for _, pairs in sums] == [36, 72]
    last = pair_affinity(features[1:], mean="batch", total=lambda own: own + sums[0])
    torch.testing.assert_close(last, whole[1:])


def test_pair_affinity_of_an_unknown_mean():
    with pytest.raises(ValueError, match="mean is 'pixel', expected batch or image"):
        pair_affinity(torch.ones(1, 2, 3, 3), mean="pixel")
