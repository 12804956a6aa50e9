"""Figures about scores: what went wrong where, which classes are mixed up, how systems compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from diclip.plots import COLOURS, draw_labels, panels, show_picture
from diclip.tally import ERRORS

VOID = 255
# What a pixel is: right in two ways, wrong in the order of `ERRORS`, or not known.
OUTCOMES = {"background, right": "#ffffff", "object, right": "#c4c4c4"} | dict(
    zip(ERRORS, (COLOURS[1], COLOURS[4], COLOURS[0]), strict=True)
)
UNKNOWN = "#f0f0f0"


def outcomes(mask: Any, truth: Any) -> NDArray[np.int64]:
    """Return what each pixel of a mask (H, W) is: the number of one of `OUTCOMES`, or 255 where the truth is."""
    mask, truth = np.asarray(mask), np.asarray(truth)
    right = mask == truth
    kinds = [truth == VOID, right & (truth == 0), right, truth == 0, mask > 0]
    return np.select(kinds, [VOID, 0, 1, 2, 3], default=4)


def error_table(
    images: Sequence[Any],
    masks: Sequence[Any],
    truths: Sequence[Any],
    *,
    names: Sequence[str],
    side: float = 1.5,
) -> Figure:
    """Show a column an image, named: the picture, the labels, the truth, and which pixels went wrong how."""
    figure, axes = panels(4, len(images), side=side, titles=False)
    colours = np.array([to_rgb(colour) for colour in OUTCOMES.values()] + [to_rgb(UNKNOWN)])
    for column, (image, mask, truth) in enumerate(zip(images, masks, truths, strict=True)):
        show_picture(axes[0, column], image)
        axes[0, column].set_title(names[column], fontsize=8)
        draw_labels(axes[1, column], mask)
        draw_labels(axes[2, column], truth)
        kinds = outcomes(mask, truth)
        axes[3, column].imshow(colours[np.where(kinds == VOID, len(OUTCOMES), kinds)], interpolation="nearest")
    for axis, what in zip(axes[:, 0], ("image", "labels", "truth", "errors"), strict=True):
        axis.text(-0.08, 0.5, what, transform=axis.transAxes, rotation=90, va="center", ha="right", size=9)
    entries = [Patch(color=colours[2 + index], label=name) for index, name in enumerate(ERRORS)]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def confusion(matrix: Any, names: Sequence[str], *, title: str = "") -> Figure:
    """Show pixels (classes, classes) of truth by prediction, each row as shares of its class; rows without are blank.

    Colours are of the square root of the share, or the diagonal would hide all else.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    total = matrix.sum(1, keepdims=True)
    share = np.divide(100 * matrix, total, out=np.full_like(matrix, np.nan), where=total > 0)
    figure = Figure(figsize=(6.2, 5.6), layout="constrained", dpi=100)
    axis = figure.subplots()
    drawn = axis.imshow(np.sqrt(share), cmap="viridis", vmin=0, vmax=10, interpolation="nearest")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="prediction", ylabel="truth")
    axis.set_title(title, fontsize=9)
    bar = figure.colorbar(drawn, ax=axis, shrink=0.7, label="per cent of the true class's pixels")
    bar.set_ticks([0, 1, 10**0.5, 5, 50**0.5, 10], labels=["0", "1", "10", "25", "50", "100"])
    return figure


def dots(
    values: Mapping[str, Mapping[str, float | None]],
    *,
    xlabel: str,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    title: str = "",
) -> Figure:
    """Show a row for each group, on it a dot for each name, with its interval (low, high) where there is one.

    dots({"cat": {"clip": 43.0, "excel": 45.1}, "dog": {"clip": 40.2, "excel": 41.0}}, xlabel="IoU (%)")
    """
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    figure = Figure(figsize=(5.6, 0.9 + 0.24 * len(values)), layout="constrained", dpi=100)
    axis = figure.subplots()
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        offset = 0.5 * (place - (len(names) - 1) / 2) / max(len(names), 1)
        for row, (group, own) in enumerate(values.items()):
            if own.get(name) is None:
                continue
            axis.plot(own[name], row + offset, "o", color=colour, markersize=4)
            ends = (intervals or {}).get(group, {}).get(name)
            if ends is not None:
                axis.plot(ends, (row + offset,) * 2, color=colour, linewidth=1.2)
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        pairs = zip(names, COLOURS, strict=False)
        marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in pairs]
        figure.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    return figure
