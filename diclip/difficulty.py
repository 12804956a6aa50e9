"""Measure that a dataset is not trivial: what comes for free, without any learning of what tags mean.

Three things could make weak supervision look easier than it is: objects that stand out, objects of one colour,
and patches that name their class by themselves. Each is given its best chance here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diclip.baselines import colour_texture_affinity
from diclip.data import Batch, VOCFolder, batches, open_dataset
from diclip.data.images import VOID, read_mask
from diclip.data.voc import part_ids
from diclip.evaluate import Progress, count_grabcut, silent
from diclip.report import origin
from diclip.runs import environment
from diclip.score import interval, mean, miou, pair_auc
from diclip.settings import Settings

PATCH = 8
BARS = {"grabcut": 30.0, "colour_auc": 0.77, "body_patch": 1 / 3}
"""What a dataset has to stay below to be called difficult: mIoU in per cent, area under the curve, accuracy."""


def object_ids(dataset: VOCFolder, name: str) -> Tensor:
    """Read which object each pixel of an image belongs to, (H, W) int64.

    0 is background and everything unlabelled, 255 the border. Raises what `read_mask` raises.
    """
    classes = dataset.mask(name)
    path = dataset.root / "SegmentationObject" / f"{name}.png"
    objects = read_mask(path, num_classes=VOID - 1, size=(classes.shape[0], classes.shape[1]))
    return torch.where((classes > 0) & (classes < VOID), objects, classes)


def majority(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the commonest label of each patch of labels (H, W) squashed to a grid (h, w): (h, w) int64.

    A border's pixels do not vote; a patch of nothing else is 255.
    """
    size = (grid[0] * PATCH, grid[1] * PATCH)
    squashed = F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    ids, squashed = squashed.unique(return_inverse=True)  # ascending, so that void comes last
    votes = F.one_hot(squashed, len(ids)).unflatten(0, (grid[0], PATCH)).unflatten(2, (grid[1], PATCH))
    votes = votes.sum((1, 3)) * torch.where(ids == VOID, 1, PATCH**2 + 1)  # (h, w, ids); void only if alone
    return ids[votes.argmax(-1)]


def same_object_auc(
    settings: Settings, affinity: Callable[[Batch], Tensor], progress: Progress = silent
) -> NDArray[np.float64]:
    """Count how well an affinity (B, N, N) of patches tells "same object, or both background": (images, 2).

    The counts are for `score.mean`. All pairs of patches of each squashed image on a square grid count, in both
    directions together; things without a label are background.
    """
    return same_object_aucs(settings, lambda batch: {"": affinity(batch)}, progress)[""]


def same_object_aucs(
    settings: Settings, affinities: Callable[[Batch], Mapping[str, Tensor]], progress: Progress = silent
) -> dict[str, NDArray[np.float64]]:
    """Count the same for several affinities by name, which a batch gives at once: (images, 2) each."""
    dataset = open_dataset(settings)
    loader = batches(dataset, image_size=settings.image_size, batch_size=settings.batch_size)
    counts: dict[str, list[NDArray[np.float64]]] = {}
    for batch in progress(loader, desc="pairs of patches"):
        objects = [object_ids(dataset, name) for name in batch.names]
        for kind, affinity in affinities(batch).items():
            affinity = affinity.cpu()
            grid = (isqrt(affinity.shape[1]),) * 2
            for ids, own in zip(objects, (affinity + affinity.transpose(1, 2)) / 2, strict=True):
                labels = majority(ids, grid).flatten()
                known = labels != VOID
                first, second = torch.triu_indices(int(known.sum()), int(known.sum()), 1)
                same = labels[known][first] == labels[known][second]
                scores = own[known][:, known][first, second]
                counts.setdefault(kind, []).append(pair_auc([scores.numpy()], [same.numpy()]))
    return {kind: np.concatenate(found) for kind, found in counts.items()}


def colour_auc(settings: Settings, progress: Progress = silent) -> NDArray[np.float64]:
    """Count how well colour and texture of 8×8 patches tell "same object, or both background": (images, 2)."""
    grid = (settings.image_size // PATCH,) * 2
    return same_object_auc(settings, lambda batch: colour_texture_affinity(batch.images, grid), progress)


def patches(dataset: VOCFolder, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Cut an image into the 8×8 patches that show one class: pixels (n, 8, 8, 3) in [0, 1], class, part.

    A patch counts if at least three quarters of it are one class; its part is 1, the discriminative part, or 2, the
    body, whichever has more pixels.
    """
    height, width = (side - side % PATCH for side in dataset.mask(name).shape)

    def cut(pixels: Tensor) -> NDArray[Any]:
        rows = pixels[:height, :width].unflatten(0, (-1, PATCH)).unflatten(2, (-1, PATCH))
        return rows.transpose(1, 2).flatten(0, 1).numpy()  # (n, 8, 8, …)

    classes, parts = (cut(x).reshape(-1, PATCH**2) for x in (dataset.mask(name), part_ids(dataset, name)))
    votes = (classes[:, :, None] == np.arange(1, len(dataset.class_names) + 1)).mean(1)  # (n, C)
    shown = votes.max(1) >= 0.75
    part = np.where((parts == 1).sum(1) >= (parts == 2).sum(1), 1, 2)
    return cut(dataset.image(name).permute(1, 2, 0))[shown], votes[shown].argmax(1), part[shown]


def describe(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Describe patches (n, 8, 8, 3): pixels, spectrum of the grey values, mean and spread of colour (n, 238)."""
    grey = pixels.mean(-1)
    spectrum = np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True)))
    parts = [pixels.reshape(len(pixels), -1), spectrum.reshape(len(pixels), -1)]
    return np.concatenate([*parts, pixels.mean((1, 2)), pixels.std((1, 2))], 1).astype(np.float32)


def patch_accuracy(
    settings: Settings, progress: Progress = silent, *, teachers: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Count how often a classifier names the class of a single patch: {"part", "body"} of (images, 2).

    A random forest learns from the true masks of the first `teachers` images of `train` (0: all of them): far
    more than weak supervision has.
    """
    from sklearn.ensemble import RandomForestClassifier

    def read(settings: Settings, desc: str) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        dataset = open_dataset(settings)
        for name in progress(dataset.names, desc=desc):
            yield patches(dataset, name)

    known = {"split": "train", "limit": teachers, "shard_index": 0, "num_shards": 1}
    pixels, classes, _ = map(np.concatenate, zip(*read(settings.model_copy(update=known), "teach"), strict=True))
    forest = RandomForestClassifier(150, min_samples_leaf=2, random_state=settings.seed)
    forest.fit(describe(pixels), classes)
    counts: dict[str, list[tuple[int, int]]] = {"part": [], "body": []}
    for pixels, classes, parts in read(settings, "name patches"):
        right = forest.predict(describe(pixels)) == classes if len(pixels) else np.zeros(0, bool)
        for index, of_kind in enumerate(counts.values(), start=1):
            of_kind.append((int(right[parts == index].sum()), int((parts == index).sum())))
    return {kind: np.array(of_kind, float) for kind, of_kind in counts.items()}


def measure_difficulty(settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Measure all three on the settings' split, ready for JSON; each with its 95 % bootstrap interval."""
    patch = patch_accuracy(settings, progress)
    found = {
        "grabcut": (count_grabcut(settings, progress), miou),
        "colour_auc": (colour_auc(settings, progress), mean),
        "body_patch": (patch["body"], mean),
        "part_patch": (patch["part"], mean),
    }
    rows = {}
    for name, (counts, metric) in found.items():
        spread = interval(counts, metric=metric, generator=np.random.default_rng(settings.seed))
        rows[name] = {**{k: round(v, 4) for k, v in spread._asdict().items()}, "bar": BARS.get(name)}
    images, versions = len(found["grabcut"][0]), environment()
    return {
        "protocol": origin(settings, versions, images=images) | {"seeds": f"{settings.seed} (one run)"},
        "difficulty": rows,
        "images": images,
        "settings": settings.model_dump(mode="json"),
        "versions": versions,
    }
