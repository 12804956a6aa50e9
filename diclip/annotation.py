"""Say what annotation costs."""

from __future__ import annotations

SECONDS = {"tags": 20.0, "points": 22.1, "scribbles": 34.9, "masks": 239.7}
"""Seconds of a person's work on an image of PASCAL VOC, as published: Bearman et al., What's the Point: Semantic
Segmentation with Point Supervision, ECCV 2016, annotation time. Tags are 20 classes at a second each."""


def minutes(kind: str, images: int) -> float:
    """Return the minutes of a person's work that annotating images takes; raise ValueError for an unknown kind."""
    if kind not in SECONDS:
        raise ValueError(f"kind of annotation is {kind!r}, expected one of {', '.join(SECONDS)}")
    return SECONDS[kind] * images / 60


def affordable(kind: str, within: float) -> int:
    """Return how many images can be annotated in so many minutes; raise ValueError for an unknown kind."""
    return int(within / minutes(kind, 1) + 1e-9)
