"""Count masks as they come: sums of a split, and of each image only a few small numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diclip.score import Counts, boundary_counts, class_counts, class_rates, image_confusion, miou, part_counts

ERRORS = ("background taken for object", "object taken for another class", "object missed")
SIZES = {"small": (0.0, 0.05), "medium": (0.05, 0.2), "large": (0.2, 1.01)}
"""What a class's share of an image is called: from, and up to but not including."""

Rows = NDArray[np.int32]


class Ledger(Mapping[str, Counts]):
    """Keep per-image counts of named systems, of an image only the classes that it has or was said to have.

    They are written with `add` and read as a mapping to dense arrays (images, 1 + classes, 3).
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows: dict[str, list[Rows]] = {}

    def add(self, name: str, counts: Counts) -> None:
        """Append one image's counts (1 + classes, 3) to a system's."""
        image = self._rows.setdefault(name, [])
        image.append(rows_of(counts[None], first=len(image)))

    def __getitem__(self, name: str) -> Counts:
        return dense_of(np.concatenate(self._rows[name]), len(self._rows[name]), self.num_classes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def rows_of(counts: Counts, *, first: int = 0) -> Rows:
    """Return counts (images, classes, 3) as rows (n, 5) of image, class and counts, without those that are 0.

    `first` is the number of the first image.
    """
    image, label = counts.any(-1).nonzero()
    return np.column_stack([image + first, label, counts[image, label]]).astype(np.int32)


def dense_of(rows: Rows, images: int, num_classes: int) -> Counts:
    """Return what `rows_of` had: counts (images, 1 + num_classes, 3), int64."""
    counts = np.zeros((images, num_classes + 1, 3), np.int64)
    counts[rows[:, 0], rows[:, 1]] = rows[:, 2:]
    return counts


class Tally:
    """Count what a mask says beyond its classes: confusion, boundaries, parts, and what went wrong in each image.

    `confusion` (1 + classes, 1 + classes) is truth by prediction; `boundary` (1 + classes, 3) are `boundary_counts`,
    `parts` (2, 2) `part_counts`, all summed over the images.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes + 1,) * 2, np.int64)
        self.boundary = np.zeros((num_classes + 1, 3), np.int64)
        self.parts = np.zeros((2, 2), np.int64)
        self._errors: list[NDArray[np.int32]] = []

    def add(self, prediction: Tensor, target: Tensor, parts: Tensor | None = None) -> Counts:
        """Count one image's mask (H, W) and return its `image_counts`; `parts` are the ids that it has, if any."""
        confusion = image_confusion(prediction, target, num_classes=self.num_classes)
        self.confusion += confusion
        self.boundary += boundary_counts(prediction, target, num_classes=self.num_classes)
        if parts is not None:
            self.parts += part_counts(prediction, target, parts)
        self._errors.append(np.array([*errors_of(confusion), confusion.sum()], np.int32))
        return class_counts(confusion)

    @property
    def errors(self) -> NDArray[np.int32]:
        """Return each image's pixels of the three `ERRORS`, and its pixels that are not void: (images, 4)."""
        return np.stack(self._errors) if self._errors else np.zeros((0, 4), np.int32)

    def report(self, counts: Counts, class_names: Sequence[str]) -> dict[str, Any]:
        """Return all in per cent, for JSON; `counts` (images, 1 + classes, 3) are what `add` returned."""
        rates, errors = class_rates(class_counts(self.confusion)), self.errors.sum(0)
        found = {name: _mean(rates[name]) for name in ("precision", "recall")}
        found["boundary IoU"] = _mean(class_rates(self.boundary)["iou"])
        if self.parts[:, 1].any():
            found |= {f"{name} recall": _share(*x) for name, x in zip(("part", "body"), self.parts, strict=True)}
        names = ("background", *class_names)
        return {
            "rates": found,
            "errors": {name: _share(wrong, errors[-1]) for name, wrong in zip(ERRORS, errors, strict=False)},
            "sizes": size_rates(counts),
            "confusions": confusions(self.confusion, names),
        }


def errors_of(confusion: NDArray[Any]) -> tuple[int, int, int]:
    """Return how many pixels of a matrix of truth by prediction are each of `ERRORS`, background first."""
    objects = confusion[1:, 1:]
    return int(confusion[0, 1:].sum()), int(objects.sum() - np.trace(objects)), int(confusion[1:, 0].sum())


def size_rates(counts: Counts) -> dict[str, dict[str, float | int | None]]:
    """Return IoU and recall of classes that are small, medium and large in their image, by name of size.

    What is binned is an image's pixels of one class, the objects of a class together, by their share of the image
    that is not void; the rates are means over classes, as mIoU, but without the background.
    """
    share = counts[..., 2] / np.maximum(counts[..., 2].sum(-1, keepdims=True), 1)  # (images, 1 + classes)
    share[:, 0] = 0
    found = {}
    for name, (low, high) in SIZES.items():
        inside = (share > 0) & (share >= low) & (share < high)
        rates = class_rates(np.where(inside[..., None], counts, 0).sum(0))
        found[name] = {"IoU": _mean(rates["iou"]), "recall": _mean(rates["recall"]), "regions": int(inside.sum())}
    return found


def confusions(confusion: NDArray[Any], names: Sequence[str], *, most: int = 10) -> list[dict[str, Any]]:
    """Return the classes that most often are taken for another, by share of the true class's pixels in per cent."""
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    worst = np.argsort(-share, axis=None, kind="stable")[:most]
    cells = [divmod(int(index), len(names)) for index in worst if share.flat[index] > 0]
    return [{"truth": names[t], "taken for": names[p], "per cent": round(float(share[t, p]), 2)} for t, p in cells]


def extremes(
    names: Sequence[str], counts: Counts, errors: NDArray[np.int32], *, most: int = 5
) -> dict[str, list[dict[str, Any]]]:
    """Return the `worst` and the `best` images by their own mIoU, and what share of their pixels went wrong how.

    An image's own mIoU is the mean IoU over the classes that it has, background included.
    """
    own, known = miou(counts), errors[:, -1] > 0
    order = np.argsort(own, kind="stable")
    order = order[known[order]]

    def row(index: int) -> dict[str, Any]:
        wrong = {name: _share(x, errors[index, -1]) for name, x in zip(ERRORS, errors[index], strict=False)}
        return {"image": names[index], "mIoU": round(float(own[index]), 2), **wrong}

    return {"worst": [row(index) for index in order[:most]], "best": [row(index) for index in order[::-1][:most]]}


def _share(part: Any, whole: Any) -> float | None:
    return round(100 * float(part) / float(whole), 2) if whole else None


def _mean(rates: NDArray[np.float64]) -> float | None:
    there = rates[np.isfinite(rates)]
    return round(float(there.mean()), 2) if len(there) else None
