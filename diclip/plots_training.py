"""Figures about trainings: how one goes, and what its annotation costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from diclip.plots import COLOURS

PARTS = {"seg": "decoder", "div": "pairs of patches", "adapter": "adapter"}  # of a loss, and their names


def learning(records: Sequence[Mapping[str, Any]], *, steps: int, title: str = "") -> Figure:
    """Show how far a training of so many steps has come: the parts of its loss, and the mIoU on `tune`.

    `records` are lines of its metrics.jsonl, of which some hold `tune_miou`; there may be none yet.
    """
    figure = Figure(figsize=(7.6, 2.6), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    for colour, (part, name) in zip(COLOURS, PARTS.items(), strict=False):
        known = [(record["step"], record[part]) for record in records if part in record]
        if known:
            left.plot(*zip(*known, strict=True), marker="o", markersize=3, color=colour, label=name)
    judged = [(record["step"], record["tune_miou"]) for record in records if "tune_miou" in record]
    if judged:
        right.plot(*zip(*judged, strict=True), marker="o", markersize=4, color=COLOURS[0])
    for axis, ylabel in ((left, "loss"), (right, "mIoU on tune (%)")):
        axis.set(xlabel="step", ylabel=ylabel, xlim=(0, 1.03 * steps))
        _tidy(axis)
        axis.set_ylim(0, 1.25 * max([1.0, *(float(max(line.get_ydata())) for line in axis.lines)]))
    if left.lines:
        left.legend(fontsize=7, frameon=False, ncols=len(PARTS), loc="upper right")
    figure.suptitle(title, fontsize=9)
    return figure


def costs(points: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Show what networks reach against the minutes that a person annotates for them, on a logarithmic scale.

    A point holds `name`, `kind`, whose colour it gets, `minutes`, `miou`, and `low` and `high`, or None for both.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained", dpi=100)
    axis = figure.subplots()
    colours = dict(zip(dict.fromkeys(point["kind"] for point in points), COLOURS, strict=False))
    for point in points:
        x, y, colour = point["minutes"], point["miou"], colours[point["kind"]]
        axis.plot(x, y, "o", color=colour, markersize=6)
        if point["low"] is not None:
            axis.plot((x, x), (point["low"], point["high"]), color=colour, linewidth=1.4)
    for x, y, name in _apart(points):
        axis.annotate(name, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
    ends = [point["minutes"] for point in points]
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="minutes of annotation", ylabel="mIoU (%)", xlim=(0.5 * min(ends), 6 * max(ends)))
    axis.set_ylim(0, 1.1 * max(point["high"] or point["miou"] for point in points))
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    _tidy(axis)
    return figure


def _apart(points: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Return where names stand, (minutes, mIoU, name): at their points, but above the last one of the same minutes."""
    found: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda point: point["miou"]):
        x, y = point["minutes"], point["miou"]
        below = [there for minutes, there, _ in found if 0.8 < minutes / x < 1.25]
        found.append((x, max([y, *(there + 3.2 for there in below)]), point["name"]))
    return found


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
