"""Test what is counted of masks beyond their classes, against counts made a pixel at a time."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diclip.cam import Maps
from diclip.labels import BackgroundSweep, pseudo_labels
from diclip.score import boundary_counts, image_counts, interval, part_counts
from diclip.tally import Ledger, Tally, confusions, dense_of, errors_of, extremes, rows_of, size_rates

CLASSES = 3
NAMES = ("background", "cat", "dog", "sofa")
labels = arrays(np.int64, (5, 6), elements=st.integers(0, CLASSES))
targets = arrays(np.int64, (5, 6), elements=st.sampled_from([0, 1, 2, 3, 255]))


@pytest.fixture
def images():
    """Hold seven images' predictions, truths and parts (7, 12, 14)."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, CLASSES + 1, (7, 3, 7), generator=generator)
    truth = truth.repeat_interleave(4, 1).repeat_interleave(2, 2)
    wrong = torch.rand(truth.shape, generator=generator) < torch.arange(7)[:, None, None] / 12
    guess = torch.where(wrong, torch.randint(0, CLASSES + 1, truth.shape, generator=generator), truth)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    parts = torch.where(truth % 255 > 0, torch.randint(1, 3, truth.shape, generator=generator), 0)
    return guess, truth, parts


@given(labels, targets)
def test_a_tally_of_one_image_counts_every_pixel(guess, truth):
    tally = Tally(CLASSES)
    pair = torch.from_numpy(guess), torch.from_numpy(truth)
    np.testing.assert_array_equal(tally.add(*pair), image_counts(*pair, num_classes=CLASSES))
    confusion, wrong = np.zeros((4, 4), int), {"background": 0, "other": 0, "missed": 0}
    for g, t in zip(guess.ravel(), truth.ravel(), strict=True):
        if t == 255:
            continue
        confusion[t, g] += 1
        if g != t:
            wrong["background" if t == 0 else "missed" if g == 0 else "other"] += 1
    np.testing.assert_array_equal(tally.confusion, confusion)
    assert tally.errors.tolist() == [[*wrong.values(), confusion.sum()]]
    assert errors_of(confusion) == tuple(wrong.values())


def test_a_tally_sums_over_images(images):
    tally = Tally(CLASSES)
    counts = np.stack([tally.add(*each) for each in zip(*images, strict=True)])
    near = sum(boundary_counts(g, t, num_classes=CLASSES) for g, t, _ in zip(*images, strict=True))
    np.testing.assert_array_equal(tally.boundary, near)
    np.testing.assert_array_equal(tally.parts, sum(part_counts(*each) for each in zip(*images, strict=True)))
    report = json.loads(json.dumps(tally.report(counts, NAMES[1:]), allow_nan=False))
    hits, guessed, true = counts.sum(0).T
    assert report["rates"]["precision"] == pytest.approx(100 * np.mean(hits / guessed), abs=0.006)
    assert report["rates"]["recall"] == pytest.approx(100 * np.mean(hits / true), abs=0.006)
    part = (tally.parts[:, 0] / tally.parts[:, 1] * 100).tolist()
    assert [report["rates"][f"{name} recall"] for name in ("part", "body")] == pytest.approx(part, abs=0.006)
    known = (images[1] != 255).sum()
    assert sum(report["errors"].values()) == pytest.approx(
        100 * float(((images[0] != images[1]) & (images[1] != 255)).sum() / known), abs=0.02
    )


def test_a_dataset_without_parts_has_no_recall_on_them(images):
    tally = Tally(CLASSES)
    counts = np.stack([tally.add(*each) for each in zip(*images[:2], strict=True)])
    assert list(tally.report(counts, NAMES[1:])["rates"]) == ["precision", "recall", "boundary IoU"]


@given(arrays(np.int64, (4, 3, 3), elements=st.integers(0, 2)))
def test_rows_hold_all_counts(counts):
    rows = rows_of(counts)
    assert len(rows) == counts.any(-1).sum()
    np.testing.assert_array_equal(dense_of(rows, 4, 2), counts)


def test_a_ledger_is_a_mapping_of_dense_counts(images):
    ledger, plain = Ledger(CLASSES), {"a": [], "b": []}
    for index, (guess, truth, _) in enumerate(zip(*images, strict=True)):
        for name, mask in (("a", guess), ("b", torch.zeros_like(guess))):
            counts = image_counts(mask, torch.full_like(truth, 255) if index == 3 else truth, num_classes=CLASSES)
            ledger.add(name, counts)
            plain[name].append(counts)
    assert list(ledger) == ["a", "b"] and len(ledger) == 2 and "c" not in ledger
    for name, counts in ledger.items():
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, plain[name])


def test_sizes_are_shares_of_what_is_not_void():
    # Of 100 known pixels cat has 4, dog 30; in the second image cat has 20 of 100, all found, and dog nothing.
    counts = np.zeros((2, 4, 3), int)
    counts[0] = [[60, 70, 66], [1, 6, 4], [24, 24, 30], [0, 0, 0]]
    counts[1] = [[80, 80, 80], [20, 20, 20], [0, 0, 0], [0, 0, 0]]
    found = size_rates(counts)
    assert found["small"] == {"IoU": round(100 / 9, 2), "recall": 25, "regions": 1}
    assert found["medium"] == {"IoU": None, "recall": None, "regions": 0}
    assert found["large"] == {"IoU": 90, "recall": 90, "regions": 2}  # the mean of dog's 80 and cat's 100


def test_confusions_are_shares_of_the_true_class():
    matrix = np.array([[90, 10, 0, 0], [0, 5, 5, 0], [30, 10, 60, 0], [0, 0, 0, 0]])
    assert confusions(matrix, NAMES, most=3) == [
        {"truth": "cat", "taken for": "dog", "per cent": 50},
        {"truth": "dog", "taken for": "background", "per cent": 30},
        {"truth": "background", "taken for": "cat", "per cent": 10},
    ]
    assert matrix[0, 0] == 90 and confusions(np.diag([1, 2, 3, 4]), NAMES) == []


def test_extremes_say_what_went_wrong(images):
    tally = Tally(CLASSES)
    counts = np.stack([tally.add(*each) for each in zip(*images, strict=True)])
    void = torch.full_like(images[1][0], 255)
    counts = np.concatenate([counts, tally.add(images[0][0], void)[None]])
    found = extremes(list("abcdefgh"), counts, tally.errors, most=3)
    own = {}
    for name, image in zip("abcdefg", counts, strict=False):
        rates = [100 * h / (g + t - h) for h, g, t in image if t]
        own[name] = sum(rates) / len(rates)
    order = sorted(own, key=own.get)
    assert [row["image"] for row in found["worst"]] == order[:3]
    assert [row["image"] for row in found["best"]] == order[::-1][:3]  # h, all void, is neither
    row = found["worst"][0]
    index = "abcdefg".index(row["image"])
    guess, truth = (x[index].numpy() for x in images[:2])
    assert row["mIoU"] == pytest.approx(own[row["image"]], abs=0.005)
    missed = ((guess == 0) & (truth % 255 > 0)).sum() / (truth != 255).sum()
    assert row["object missed"] == pytest.approx(100 * missed, abs=0.005)
    assert found["best"][0]["object missed"] == 0


def test_eighty_classes_cost_no_more_than_twenty(record_property):
    """What an image holds is counted, whatever the dataset could: less than 1.3 times the seconds, at their fastest."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (4, 8, 8), generator=generator).repeat_interleave(32, 1).repeat_interleave(32, 2)
    image, label = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    maps = Maps(torch.rand(12, 20, 20, generator=generator), image, label)

    def seconds(classes: int) -> float:
        start = time.process_time()
        tally, ledger, sweep = Tally(classes), Ledger(classes), BackgroundSweep(classes)
        for _ in range(3):
            sweep.update(maps, truth)
            for mask, target in zip(pseudo_labels(maps, [(256, 256)] * 4), truth, strict=True):
                ledger.add("a", tally.add(mask, target))
        return time.process_time() - start

    seconds(80)
    twenty, eighty = (min(times) for times in zip(*((seconds(20), seconds(80)) for _ in range(7)), strict=True))
    record_property("80 classes over 20", round(eighty / twenty, 2))
    assert eighty < 1.3 * twenty


def test_resamples_of_many_classes_cost_what_images_hold(record_property):
    random = np.random.default_rng(0)
    seconds = {}
    for classes in (20, 80):
        counts = np.zeros((1000, classes + 1, 3), np.int64)
        for row in counts:
            row[random.choice(classes + 1, 3, replace=False)] = random.integers(1, 100, (3, 3))
        times = []
        for _ in range(4):
            start = time.process_time()
            interval(counts, generator=np.random.default_rng(0), metric=lambda sums: sums[:, 0, 0])
            times.append(time.process_time() - start)
        seconds[classes] = min(times)
    record_property("80 classes over 20", round(seconds[80] / seconds[20], 2))
    assert seconds[80] < 1.3 * seconds[20]
