"""Say what annotation costs, and what networks reach for it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diclip.settings import shown
from diclip.train import FREE

SECONDS = {"tags": 20.0, "points": 22.1, "scribbles": 34.9, "masks": 239.7}
"""Seconds of a person's work on an image of PASCAL VOC, as published: Bearman et al., What's the Point: Semantic
Segmentation with Point Supervision, ECCV 2016, annotation time. Tags are 20 classes at a second each."""

OWN = ("seed", *FREE)
"""Settings in which runs of one row may differ."""


def minutes(kind: str, images: int) -> float:
    """Return the minutes of a person's work that annotating images takes; raise ValueError for an unknown kind."""
    if kind not in SECONDS:
        raise ValueError(f"kind of annotation is {kind!r}, expected one of {', '.join(SECONDS)}")
    return SECONDS[kind] * images / 60


def affordable(kind: str, within: float) -> int:
    """Return how many images can be annotated in so many minutes; raise ValueError for an unknown kind."""
    return int(within / minutes(kind, 1) + 1e-9)


def summarise(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Join finished trainings that differ in their seed alone: a row for each system, supervision and number of images.

    A row holds `method`, `supervision`, `images`, `minutes` of annotation, `steps`, the `seeds`, the reported `split`,
    and mean and standard deviation (n - 1) of `val_miou` and `pseudo_miou`, each None where it was not measured.
    Raises FileNotFoundError for a folder that holds no finished run, and ValueError for runs of one row that differ in
    more, both in one line.
    """
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"{shown(path)}: there is no such file: finish that training first")
        found = json.loads(path.read_text(encoding="utf-8"))
        which = (found["settings"]["method"], found["settings"]["supervision"], found["train_images"])
        rows.setdefault(which, []).append(found)
    return [_row(*which, found) for which, found in rows.items()]


def _row(method: str, supervision: str, images: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = (run["settings"] for run in runs)
    changed = sorted({name for other in others for name in first if name not in OWN and other.get(name) != first[name]})
    if changed:
        raise ValueError(
            f"runs of {method}, {supervision}, {images} images differ in {', '.join(changed)}: join others"
        )
    row: dict[str, Any] = {
        "method": method,
        "supervision": supervision,
        "images": images,
        "minutes": round(minutes(supervision, images), 1),
        "steps": runs[0]["steps"],
        "seeds": [run["settings"]["seed"] for run in runs],
        "split": runs[0]["protocol"]["split"],
    }
    for name in ("val_miou", "pseudo_miou"):
        values = [run[name] for run in runs if run[name] is not None]
        row[name] = round(statistics.mean(values), 2) if values else None
        row[f"{name}_sd"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return row
