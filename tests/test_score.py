import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, jaccard_score, roc_auc_score

from diclip.score import (
    boundary_counts,
    class_rates,
    image_counts,
    interval,
    mean,
    miou,
    pair_auc,
    paired_interval,
    part_counts,
    summary,
    tag_average_precision,
)

CLASSES = 4
labels = arrays(np.int64, (6, 7), elements=st.integers(0, CLASSES))
targets = arrays(np.int64, (6, 7), elements=st.sampled_from([*range(CLASSES + 1), 255]))


def counts_of(prediction, target):
    return image_counts(torch.from_numpy(prediction), torch.from_numpy(target), num_classes=CLASSES)


def some_images(seed, images=40, right=0.6):
    """Return counts of images in which a share of the pixels, different for each image, is right."""
    random = np.random.default_rng(seed)
    counts = []
    for share in np.clip(random.normal(right, 0.2, images), 0, 1):
        target = random.integers(0, CLASSES + 1, (12, 12))
        guess = np.where(random.random((12, 12)) < share, target, random.integers(0, CLASSES + 1, (12, 12)))
        counts.append(counts_of(guess, target))
    return np.stack(counts)


@given(labels, targets)
def test_counts_are_those_of_the_confusion_matrix(prediction, target):
    known = target != 255
    matrix = confusion_matrix(target[known], prediction[known], labels=range(CLASSES + 1)) if known.any() else 0
    expected = np.stack([np.diag(matrix), matrix.sum(0), matrix.sum(1)], -1) if known.any() else 0
    np.testing.assert_array_equal(counts_of(prediction, target), expected)


@given(labels, targets)
def test_rates_are_bounded_and_iou_is_the_smallest(prediction, target):
    rates = class_rates(counts_of(prediction, target))
    there = np.isfinite(rates["iou"])
    np.testing.assert_array_equal(there, [(target == c).any() for c in range(CLASSES + 1)])
    for rate in rates.values():
        assert ((rate[there] >= 0) & (rate[there] <= 100)).all()
    assert (rates["iou"][there] <= np.minimum(rates["precision"], rates["recall"])[there] + 1e-9).all()


@given(targets.filter(lambda target: (target != 255).any()))
def test_the_truth_scores_100(target):
    assert miou(counts_of(np.where(target == 255, 0, target), target)) == pytest.approx(100)


def test_miou_is_the_macro_jaccard_of_all_pixels():
    random = np.random.default_rng(0)
    target = random.integers(0, CLASSES + 1, (3, 20, 20))
    guess = np.where(random.random(target.shape) < 0.5, target, 1)
    target[0, :4] = 255
    counts = np.stack([counts_of(g, t) for g, t in zip(guess, target, strict=True)])
    expected = jaccard_score(target[target < 255], guess[target < 255], average="macro")
    assert miou(counts.sum(0)) == pytest.approx(100 * expected)


def test_miou_is_over_classes_with_true_pixels():
    # Class 1 is half found, the background half lost; class 2, predicted but never there, is not in the mean.
    guess, target = torch.tensor([[0, 2, 1, 0]]), torch.tensor([[0, 0, 1, 1]])
    assert miou(image_counts(guess, target, num_classes=3)) == pytest.approx((100 / 3 + 50) / 2)


def test_precision_of_a_class_never_predicted_is_zero():
    rates = class_rates(image_counts(torch.tensor([0, 0]), torch.tensor([0, 1]), num_classes=1))
    np.testing.assert_allclose(rates["precision"], [50, 0])
    np.testing.assert_allclose(rates["recall"], [100, 0])


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.parametrize("device", DEVICES)  # of the model; masks and parts are read from disk
def test_part_counts(device):
    target = torch.tensor([[0, 1, 1, 1], [2, 2, 255, 1]])
    parts = torch.tensor([[0, 1, 1, 2], [2, 2, 1, 2]])  # the border's pixel counts for nothing
    guess = torch.tensor([[1, 1, 2, 0], [2, 0, 1, 1]], device=device)
    counts = part_counts(guess, target, parts)
    np.testing.assert_array_equal(counts, [[1, 2], [2, 4]])
    np.testing.assert_allclose(mean(counts), [0.5, 0.5])
    np.testing.assert_array_equal(part_counts(guess, target.to(device), parts), counts)


def test_labels_out_of_range_and_shapes_are_refused():
    good = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="prediction holds label 7, expected 0 to 4"):
        image_counts(good + 7, good, num_classes=4)
    with pytest.raises(ValueError, match="target holds label 9"):
        image_counts(good, good + 9, num_classes=4)
    with pytest.raises(ValueError, match=r"prediction is \(2,\), expected the target's \(2, 3\)"):
        image_counts(good[:, 0], good, num_classes=4)


def test_interval_contains_the_value_and_is_the_same_for_the_same_seed():
    counts = some_images(0)
    first, again = (interval(counts, generator=np.random.default_rng(1)) for _ in range(2))
    assert first == again
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(float(miou(counts.sum(0))))


def test_interval_equals_a_plain_bootstrap():
    counts = some_images(0)
    times = np.random.default_rng(2).multinomial(40, [1 / 40] * 40, size=500)
    plain = [miou(np.repeat(counts, row, axis=0).sum(0)) for row in times]
    ours = interval(counts, generator=np.random.default_rng(2), samples=500)
    np.testing.assert_allclose([ours.low, ours.high], np.quantile(plain, [0.025, 0.975]))


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    values = random.normal(5, 1, (300, 60))
    hits = 0
    for row in values:
        found = interval(np.stack([row, np.ones(60)], -1), generator=random, metric=mean, samples=300)
        hits += found.low <= 5 <= found.high
    assert 0.90 <= hits / len(values) <= 0.98


def test_pairing_cancels_what_is_hard_for_both():
    before = some_images(0)
    after = before.copy()
    after[:, 1, 0] += np.minimum(4, after[:, 1, 2] - after[:, 1, 0])  # a few more hits of class 1 everywhere
    paired = paired_interval(before, after, generator=np.random.default_rng(1))
    alone = interval(before, generator=np.random.default_rng(1))
    assert paired.low > 0
    assert paired.value == pytest.approx(float(miou(after.sum(0)) - miou(before.sum(0))))
    assert paired.high - paired.low < (alone.high - alone.low) / 3
    same = paired_interval(before, before, generator=np.random.default_rng(1))
    assert same == (0, 0, 0)


def test_intervals_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match="2 images before, 3 after"):
        paired_interval(np.ones((2, 5, 3)), np.ones((3, 5, 3)), generator=np.random.default_rng())
    with pytest.raises(ValueError, match="no images"):
        interval(np.ones((0, 5, 3)), generator=np.random.default_rng())


def test_large_datasets_are_resampled_in_chunks():
    counts = np.stack([np.arange(30_000) % 7, np.ones(30_000)], -1)
    chunks = []

    def noted(sums):
        chunks.append(len(sums))
        return mean(sums)

    found = interval(counts, generator=np.random.default_rng(0), metric=noted, samples=200)
    assert sum(chunks) == 200 + 1 and max(chunks) < 200
    assert found.value == pytest.approx(counts[:, 0].mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / np.sqrt(30_000), rel=0.3)


def test_summary_is_ready_for_json():
    counts = some_images(0)
    counts[:, 3] = 0
    found = summary(counts, ("cat", "dog", "sofa", "boat"), generator=np.random.default_rng(0))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["classes"]["sofa"] == {"iou": None, "precision": None, "recall": None}
    assert found["miou"] == pytest.approx(
        np.mean([rates["iou"] for name, rates in found["classes"].items() if name != "sofa"])
    )
    with pytest.raises(ValueError, match="expected"):
        summary(counts, ("cat",), generator=np.random.default_rng(0))


def test_tag_average_precision():
    tags = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert tag_average_precision(tags + 0.1, tags) == pytest.approx(100)  # class 2, never there, does not count
    assert tag_average_precision(1.0 - tags, tags) < 70
    with pytest.raises(ValueError, match="no image has a tag"):
        tag_average_precision(tags, tags * 0)


def test_pair_auc_is_within_images():
    random = np.random.default_rng(0)
    same = [random.random((8, 8)) < 0.3 for _ in range(5)] + [np.ones((8, 8), bool)]
    affinities = [pair + random.normal(0, 1, pair.shape) for pair in same]
    counts = pair_auc(affinities, same)
    expected = [roc_auc_score(pair.ravel(), x.ravel()) for pair, x in zip(same[:5], affinities[:5], strict=True)]
    assert mean(counts.sum(0)) == pytest.approx(np.mean(expected))
    np.testing.assert_array_equal(counts[5], 0)
    scaled = pair_auc([x * 10**index for index, x in enumerate(affinities)], same)
    np.testing.assert_allclose(scaled, counts)
    found = interval(counts, generator=random, metric=mean)
    assert 0.5 < found.low <= found.value <= found.high <= 1


def slow_band(region: np.ndarray, reach: int) -> np.ndarray:
    """Return the pixels of a region from which a square of that reach leaves it or the picture."""
    padded = np.pad(region, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return region & ~windows.all((2, 3))


def test_boundary_counts_are_those_of_bands_drawn_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 4, (2, 6, 7), generator=generator)
    prediction, target = (x.repeat_interleave(9, 0).repeat_interleave(8, 1) for x in coarse)
    target = torch.where(torch.rand(target.shape, generator=generator) < 0.002, 255, target)
    found = boundary_counts(prediction, target, num_classes=4, width=0.04)
    known, reach = (target != 255).numpy(), round(0.04 * math.hypot(*target.shape))
    assert reach == 3
    for label in range(5):
        bands = [slow_band((x.numpy() == label) & known, reach) for x in (prediction, target)]
        assert found[label].tolist() == [(bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum()]
    assert found[:4, 1:].min() > 0 and not found[4].any()
    shifted = boundary_counts(prediction.roll(2, 1), target, num_classes=4)
    assert miou(shifted) < miou(boundary_counts(target.clamp_max(3), target, num_classes=4)) == 100
