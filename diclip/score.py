"""Score masks and rankings, and say how sure the score is.

What is counted for each image is small and adds up: scores of shards are scores of their concatenated counts,
and a bootstrap over images is a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]
Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Interval(NamedTuple):
    """Hold a value and its bootstrap interval."""

    value: float
    low: float
    high: float


def image_confusion(prediction: Tensor, target: Tensor, *, num_classes: int, ignore: int = 255) -> Counts:
    """Count one image's pixels by true and by predicted class: (1 + num_classes, 1 + num_classes), int64.

    `prediction` and `target` are (H, W) label images, 0 the background; where the target is `ignore` nothing
    counts. Raises ValueError for shapes that differ and labels out of range.
    """
    if prediction.shape != target.shape:
        found, expected = tuple(prediction.shape), tuple(target.shape)
        raise ValueError(f"prediction is {found}, expected the target's {expected}")
    known, labels = target != ignore, num_classes + 1
    truth, guess = target[known].long(), prediction[known].to(target.device).long()
    for name, label in (("prediction", guess), ("target", truth)):
        if label.numel() and not 0 <= label.min() <= label.max() <= num_classes:
            found = label[(label < 0) | (label > num_classes)][0]
            raise ValueError(f"{name} holds label {found}, expected 0 to {num_classes}")
    return (truth * labels + guess).bincount(minlength=labels**2).view(labels, labels).cpu().numpy()


def image_counts(prediction: Tensor, target: Tensor, *, num_classes: int, ignore: int = 255) -> Counts:
    """Count one image's pixels by class: (1 + num_classes, 3), int64, of hits, predicted and true ones.

    For what it takes and raises see `image_confusion`.
    """
    return class_counts(image_confusion(prediction, target, num_classes=num_classes, ignore=ignore))


def class_counts(confusion: NDArray[Any]) -> Counts:
    """Return hits, predicted and true pixels of each class, (..., classes, 3), of (..., truth, prediction)."""
    return np.stack([np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-2), confusion.sum(-1)], -1)


def part_counts(prediction: Tensor, target: Tensor, parts: Tensor) -> Counts:
    """Count one image's object pixels by part: (2, 2), int64, of hits and pixels, discriminative part first.

    `parts` (H, W) is 1 on the part of an object that wears its class's material, 2 on its body, 0 elsewhere; a
    hit is a pixel whose predicted class is right. `mean` of the sums is the recall on part and body.
    """
    prediction, parts = prediction.to(target.device), parts.to(target.device)
    right = (prediction == target) & (target != 255)
    masks = [(parts == part) & (target != 255) for part in (1, 2)]
    return np.array([[int((right & mask).sum()), int(mask.sum())] for mask in masks])


def boundary_counts(
    prediction: Tensor, target: Tensor, *, num_classes: int, width: float = 0.02, ignore: int = 255
) -> Counts:
    """Count one image's pixels as `image_counts` does, but of each class only those near its own boundary.

    Near is within `width` of the image's diagonal, inside of a class's region; the intersection of the two bands
    over their union is the boundary IoU (Cheng et al., CVPR 2021), the metric `miou` of summed counts. The edges of the
    picture and of what the target says to `ignore` are boundaries too.
    """
    reach = max(1, round(width * (target.shape[0] ** 2 + target.shape[1] ** 2) ** 0.5))
    side = 2 * reach + 1
    known = target != ignore
    pair = [torch.where(known, labels.to(target.device), ignore) for labels in (prediction, target)]
    counts = np.zeros((num_classes + 1, 3), np.int64)
    for label in torch.stack(pair)[:, known].unique().tolist():
        regions = torch.stack([labels == label for labels in pair])
        whole = F.pad(regions.int(), (reach + 1, reach) * 2).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
        inside = whole[:, side:, side:] - whole[:, side:, :-side] - whole[:, :-side, side:] + whole[:, :-side, :-side]
        bands = regions & (inside < side**2)  # a square around the pixel is not all of its class
        counts[label] = [int(bands.all(0).sum()), *bands.sum((1, 2)).tolist()]
    return counts


def class_rates(counts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return iou, precision and recall in per cent, (..., classes), of summed counts (..., classes, 3).

    A class without true pixels is NaN in all three; one that is never predicted has precision 0.
    """
    hits, predicted, true = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    there = np.where(true > 0, 100.0, np.nan)
    return {
        "iou": there * hits / np.maximum(predicted + true - hits, 1),
        "precision": there * hits / np.maximum(predicted, 1),
        "recall": there * hits / np.maximum(true, 1),
    }


def miou(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean IoU in per cent, background included, over the classes that have true pixels.

    `counts` (..., classes, 3) are summed over images: one confusion matrix for all of them, as PASCAL VOC
    scores.
    """
    iou = class_rates(counts)["iou"]
    return np.nansum(iou, -1) / np.maximum(np.isfinite(iou).sum(-1), 1)


def mean(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of values counted as (..., 2): their sum and their number."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1)


def interval(
    counts: NDArray[Any],
    *,
    generator: np.random.Generator,
    metric: Metric = miou,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Return a metric of all images with its percentile bootstrap interval; images are what is resampled.

    `counts` (images, ...) hold what adds up for each image; `metric` turns sums (..., ...) into values.
    """
    return _interval([counts], generator=generator, metric=metric, samples=samples, level=level)


def paired_interval(
    before: NDArray[Any],
    after: NDArray[Any],
    *,
    generator: np.random.Generator,
    metric: Metric = miou,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Return how much a metric grows from `before` to `after`, counts of the same images in the same order.

    Both are resampled alike, so that what is hard for both cancels. Raises ValueError if their numbers
    differ.
    """
    if len(before) != len(after):
        raise ValueError(f"found {len(before)} images before, {len(after)} after, expected the same images")
    return _interval([before, after], generator=generator, metric=metric, samples=samples, level=level)


def _interval(
    systems: Sequence[NDArray[Any]],
    *,
    generator: np.random.Generator,
    metric: Metric,
    samples: int,
    level: float,
) -> Interval:
    from scipy import sparse

    images = len(systems[0])
    if not images:
        raise ValueError("there are no images to score: expected at least one")
    # An image has few of the classes, so that its row is nearly empty: a resample costs what is there.
    flat = [sparse.csr_array(np.asarray(c, dtype=np.float64).reshape(images, -1)) for c in systems]

    def value(weights: NDArray[Any]) -> NDArray[np.float64]:
        values = [metric((weights @ f).reshape(-1, *c.shape[1:])) for f, c in zip(flat, systems, strict=True)]
        return values[-1] - values[0] if len(values) > 1 else values[0]

    drawn = np.concatenate([value(weights) for weights in _resamples(images, samples, generator)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value(np.ones((1, images)))[0]), float(low), float(high))


def _resamples(images: int, samples: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield how often each image is drawn in each resample, (chunk, images), a few resamples at a time."""
    chunk = max(1, min(samples, 4_000_000 // images))
    for start in range(0, samples, chunk):
        yield generator.multinomial(images, np.full(images, 1 / images), size=min(chunk, samples - start))


def summary(counts: Counts, class_names: Sequence[str], *, generator: np.random.Generator) -> dict[str, Any]:
    """Return what a table needs of per-image counts (images, 1 + classes, 3), in per cent, ready for JSON.

    Mean IoU, precision and recall over the classes with true pixels, the IoU's 95 % interval, and the three
    of each class (None where a class has no true pixels).
    """
    names = ("background", *class_names)
    if counts.shape[1:] != (len(names), 3):
        raise ValueError(f"counts are {counts.shape}, expected (images, {len(names)}, 3)")
    rates = class_rates(counts.sum(0))
    spread = interval(counts, generator=generator)
    per_class = {
        name: {rate: None if np.isnan(x[index]) else float(x[index]) for rate, x in rates.items()}
        for index, name in enumerate(names)
    }
    return {
        "miou": spread.value,
        "low": spread.low,
        "high": spread.high,
        "precision": float(np.nanmean(rates["precision"])),
        "recall": float(np.nanmean(rates["recall"])),
        "images": len(counts),
        "classes": per_class,
    }


def tag_average_precision(scores: NDArray[Any], tags: NDArray[Any]) -> float:
    """Return the mean average precision of tags in per cent, over the classes that some image has.

    `scores` and `tags` are (images, classes), the tags 0 or 1. Raises ValueError if no image has a tag.
    """
    from sklearn.metrics import average_precision_score

    there = np.asarray(tags).any(0)
    if not there.any():
        raise ValueError("no image has a tag: expected at least one")
    return 100 * float(average_precision_score(np.asarray(tags)[:, there], np.asarray(scores)[:, there]))


def pair_auc(affinities: Sequence[NDArray[Any]], same: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Return how well an affinity tells pairs of one object from others: (images, 2), counts for `mean`.

    For each image, `affinities` and `same` (True or False) hold its pairs in any shape. The area under the
    ROC curve is taken within an image, since affinities of different images need not be on one scale. An
    image whose pairs are all alike counts as nothing: (0, 0).

        interval(pair_auc(affinities, same), generator=generator, metric=mean)
    """
    from scipy.stats import rankdata

    counts = np.zeros((len(affinities), 2))
    for index, (affinity, pair) in enumerate(zip(affinities, same, strict=True)):
        right = np.ravel(pair).astype(bool)
        positive, negative = int(right.sum()), int((~right).sum())
        if positive and negative:  # the sum of ranks is the statistic of Mann and Whitney, ties shared
            ranks = rankdata(np.ravel(affinity))[right].sum()
            counts[index] = (ranks - positive * (positive + 1) / 2) / (positive * negative), 1
    return counts
