"""Score a network while it is trained and after: what each image counts, gathered from all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.data import Batch, open_dataset
from diclip.evaluate import Evaluation, Progress, finish, loader, silent
from diclip.report import origin, supervision
from diclip.score import Counts, image_counts
from diclip.settings import Settings
from diclip.tally import Rows, dense_of, rows_of

Predict = Callable[[Batch], dict[str, Tensor]]
"""Returns of a batch label images (B, h, w) int64, or logits (B, 1 + C, h, w), by name: always the same names."""


def count_masks(
    settings: Settings,
    predict: Predict,
    *,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    gather: Callable[[list[Any]], list[Any]] = lambda own: own,
    progress: Progress = silent,
) -> Evaluation:
    """Count what a predictor says of the settings' split, at each image's own size.

    Process `rank` of `processes` counts every n-th image; `gather` returns the lists of all of them, joined.
    """
    settings, mine = (
        settings.model_copy(update={"shard_index": index, "num_shards": count})
        for index, count in ((0, 1), (rank, processes))
    )
    whole = open_dataset(settings)
    classes = whole.class_names
    rows: dict[str, list[Rows]] = {}
    index = rank
    for batch in progress(loader(open_dataset(mine), mine), desc=f"score on {settings.split}"):
        moved = replace(batch, images=batch.images.to(device))
        found = predict(moved)
        for number, truth in enumerate(batch.masks):
            for name, predicted in found.items():
                mask = at_size(predicted[number], tuple(truth.shape)).cpu()
                counts = image_counts(mask, truth, num_classes=len(classes))
                rows.setdefault(name, []).append(rows_of(counts[None], first=index))
            index += processes
    joined = gather([rows])
    names = next(filter(None, joined), {})  # a process may have had no image
    counts = {name: _dense([part.get(name, []) for part in joined], len(whole), len(classes)) for name in names}
    return Evaluation(
        settings=settings,
        names=list(whole.names),
        classes=classes,
        ladder=tuple(counts),
        refined=tuple(counts),
        ablations=(),
        background={},
        tuned={},
        one_minus_max=counts,
        baselines={},
    )


def _dense(parts: list[list[Rows]], images: int, classes: int) -> Counts:
    return dense_of(np.concatenate([rows for part in parts for rows in part]), images, classes)


def at_size(predicted: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask (H, W) of logits (1 + C, h, w), resized bilinearly, or of labels (h, w), by nearest pixels."""
    if predicted.ndim == 2:
        return F.interpolate(predicted[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    return F.interpolate(predicted[None].float(), size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def write_evaluation(found: Evaluation, path: Path, *, checkpoint: str) -> dict[str, Any]:
    """Report what was counted, keep the counts of each image beside `path` for `diclip compare`, and return it."""
    settings = found.settings
    protocol = {
        **origin(settings, found.versions, images=len(found.names)),
        "supervision": supervision(settings),
        "tags": "given to pseudo labels, not to the network",
        "scales": f"1 of {settings.image_size} px",
        "flip": "no",
        "CRF": "no",
        "seeds": f"{settings.seed} (one training)",
        "checkpoint": checkpoint,
    }
    return {**finish(found, path.with_suffix(".npz")), "protocol": protocol}
