"""Every figure as a function: arrays in, a matplotlib `Figure` out, nothing read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diclip.data.minivoc import palette

HEAT = "magma"
# Okabe and Ito's colours, told apart by most people
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def _picture(image: Any) -> np.ndarray:
    """Accept (3, H, W) float in [0, 1] or (H, W, 3) uint8."""
    image = _array(image)
    return np.clip(image.transpose(1, 2, 0), 0, 1) if image.shape[0] == 3 and image.ndim == 3 else image


def show_picture(axis: Axes, image: Any) -> None:
    """Show (3, H, W) float in [0, 1] or (H, W, 3) uint8."""
    axis.imshow(_picture(image), interpolation="nearest")


def panels(rows: int, columns: int, *, side: float = 1.9, titles: bool = True) -> tuple[Figure, np.ndarray]:
    """Return a figure with (rows, columns) axes without ticks."""
    figure = Figure(figsize=(columns * side, rows * (side + 0.25 * titles)), layout="compressed", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def picture_grid(
    images: Sequence[Any], *, titles: Sequence[str] | None = None, columns: int = 8, side: float = 1.5
) -> Figure:
    """Show pictures of any shapes side by side, each with its title."""
    rows = -(-len(images) // columns)
    figure, axes = panels(rows, min(columns, len(images)), side=side, titles=titles is not None)
    for index, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(_picture(image), interpolation="nearest")
        if titles is not None:
            axis.set_title(titles[index], fontsize=8)
    return figure


def draw_map(axis: Axes, image: Any, heat: Any, *, alpha: float = 0.6, limits: tuple[float, float] = (0, 1)) -> Any:
    """Lay a map (h, w) of any resolution over an image; return the drawn map, for a colour bar."""
    picture = _picture(image)
    height, width = picture.shape[:2]
    axis.imshow(picture.mean(2), cmap="gray", interpolation="nearest")
    return axis.imshow(
        _array(heat), cmap=HEAT, alpha=alpha, vmin=limits[0], vmax=limits[1],
        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear",
    )  # fmt: skip


def map_table(
    images: Sequence[Any],
    maps: Mapping[str, Sequence[Any]],
    *,
    names: Sequence[str] | None = None,
    limits: tuple[float, float] = (0, 1),
    points: Sequence[tuple[float, float]] | None = None,
    side: float = 1.6,
) -> Figure:
    """Show a row an image: the picture, then its map (h, w) of each kind in `maps`, all on one scale.

    `points`, one (y, x) an image as shares of its height and width, are ringed in the whole row.
    """
    figure, axes = panels(len(images), 1 + len(maps), side=side)
    drawn = None
    for row, image in enumerate(images):
        axes[row, 0].imshow(_picture(image), interpolation="nearest")
        axes[row, 0].set_title(names[row] if names is not None else "image", fontsize=8)
        for column, (kind, of_kind) in enumerate(maps.items(), start=1):
            drawn = draw_map(axes[row, column], image, of_kind[row], limits=limits)
            axes[row, column].set_title(kind, fontsize=8)
        if points is not None:
            y, x = points[row]
            for axis in axes[row]:
                _ring(axis, x=x, y=y)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes[:, -1].tolist(), shrink=0.7, aspect=18)
        bar.solids.set_alpha(1)
    return figure


def _ring(axis: Axes, *, x: float, y: float) -> None:
    """Ring a place given in shares of the picture's width and height, so that it shows on bright and dark."""
    left, right, bottom, top = axis.images[0].get_extent()
    place = ([left + x * (right - left)], [top + y * (bottom - top)])
    for colour, width in (("black", 3.2), ("#56B4E9", 1.6)):
        axis.plot(*place, marker="o", markersize=8, markeredgewidth=width, color=colour, fillstyle="none")


def draw_labels(axis: Axes, mask: Any) -> None:
    """Draw label ids (H, W) in VOC's colours; void is light grey."""
    colours = palette()
    colours[255] = (224, 224, 224)
    axis.imshow(colours[_array(mask).astype(np.uint8)], interpolation="nearest")


def mask_table(
    images: Sequence[Any], masks: Mapping[str, Sequence[Any]], classes: Sequence[str], *, side: float = 1.8
) -> Figure:
    """Show a row an image: the picture, then its label image of each kind, and a legend of the classes seen."""
    figure, axes = panels(len(images), 1 + len(masks), side=side)
    seen: set[int] = set()
    for row, image in enumerate(images):
        axes[row, 0].imshow(_picture(image), interpolation="nearest")
        axes[row, 0].set_title("image", fontsize=8)
        for column, (kind, of_kind) in enumerate(masks.items(), start=1):
            draw_labels(axes[row, column], of_kind[row])
            axes[row, column].set_title(kind, fontsize=8)
            seen |= set(np.unique(_array(of_kind[row])).tolist())
    colours = palette() / 255
    entries = [Patch(color=colours[i], label=classes[i - 1]) for i in sorted(seen) if 0 < i < 255]
    figure.legend(handles=entries, loc="outside right center", fontsize=8, frameon=False)
    return figure


def rung_table(
    images: Sequence[Any],
    maps: Mapping[str, Sequence[Any]],
    masks: Mapping[str, Sequence[Any]],
    *,
    names: Sequence[str],
    side: float = 1.5,
) -> Figure:
    """Show a column an image, named; below it its map of each kind and its label image of each kind."""
    figure, axes = panels(1 + len(maps) + len(masks), len(images), side=side, titles=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(_picture(image), interpolation="nearest")
        axes[0, column].set_title(names[column], fontsize=9)
        for row, of_kind in enumerate(maps.values(), start=1):
            draw_map(axes[row, column], image, of_kind[column])
        for row, of_kind in enumerate(masks.values(), start=1 + len(maps)):
            draw_labels(axes[row, column], of_kind[column])
    for row, kind in enumerate(("image", *maps, *masks)):
        axes[row, 0].text(
            -0.08, 0.5, kind, transform=axes[row, 0].transAxes, rotation=90, va="center", ha="right", size=9
        )
    return figure


def ladder(
    values: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Show mIoU rung by rung with 95 % intervals, baselines as dashed lines."""
    figure = Figure(figsize=(4.6, 2.8), layout="constrained", dpi=100)
    axis = figure.subplots()
    heights = list(values.values())
    errors = np.abs(np.array([intervals[name] for name in values]).T - heights)
    axis.bar(list(values), heights, color=COLOURS[0], width=0.6, yerr=errors, capsize=4)
    for height, index in zip(heights, range(len(heights)), strict=True):
        axis.text(index, height + errors[1][index] + 0.6, f"{height:.1f}", ha="center", fontsize=8)
    for colour, (name, value) in zip(COLOURS[1:], (baselines or {}).items(), strict=False):
        axis.axhline(value, color=colour, linestyle="--", label=f"{name} {value:.1f}")
    axis.set(ylabel="mIoU (%)", title=title, ylim=(0, max([*heights, *(baselines or {}).values()]) * 1.18))
    _tidy(axis, legend=bool(baselines))
    return figure


def heat_matrix(values: Any, *, xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Show a matrix (rows, columns) as an image."""
    values = _array(values)
    figure = Figure(figsize=(7.2, 0.8 + 7.2 * values.shape[0] / values.shape[1]), layout="constrained", dpi=100)
    axis = figure.subplots()
    axis.imshow(values, cmap="viridis", interpolation="nearest", aspect="auto")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _tidy(axis, legend=False)
    return figure


def curves(
    x: Sequence[Any], series: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """Show one line a series over shared x values."""
    figure = Figure(figsize=(4.6, 2.8), layout="constrained", dpi=100)
    axis = figure.subplots()
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        axis.plot(x, values, marker="o", markersize=3, color=colour, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _tidy(axis, legend=len(series) > 1)
    return figure


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str) -> Figure:
    """Show one line a series, each (x, y) of its own."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", dpi=100)
    axis = figure.subplots()
    for colour, (name, (x, y)) in zip(COLOURS, series.items(), strict=False):
        axis.plot(x, y, color=colour, label=name, marker="o" if len(x) < 30 else None, markersize=3)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    _tidy(axis, legend=True)
    return figure


def scatter(x: Any, y: Any, *, xlabel: str, ylabel: str, marked: int | None = None) -> Figure:
    """Show pairs of per cent as points beside the diagonal, one of them `marked`."""
    figure = Figure(figsize=(3.2, 3.2), layout="constrained", dpi=100)
    axis = figure.subplots()
    axis.plot((0, 100), (0, 100), color="0.7", linewidth=1)
    axis.scatter(x, y, s=5, color=COLOURS[0], alpha=0.4, linewidths=0)
    if marked is not None:
        axis.scatter(x[marked], y[marked], s=36, facecolor="none", edgecolor=COLOURS[3], linewidths=1.5)
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 100), ylim=(0, 100), aspect="equal")
    _tidy(axis, legend=False)
    return figure


def bars(
    values: Mapping[str, float],
    *,
    xlabel: str,
    title: str = "",
    limit: float | None = None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Show named values as horizontal bars, those in `intervals` with their (low, high).

    `limit` draws a line that they should stay below, or pass.
    """
    figure = Figure(figsize=(5.0, 0.6 + 0.3 * len(values)), layout="constrained", dpi=100)
    axis = figure.subplots()
    lows, highs = np.array([(intervals or {}).get(name, (value, value)) for name, value in values.items()]).T
    heights = np.array(list(values.values()))
    errors = None if intervals is None else (heights - lows, highs - heights)
    axis.barh(list(values), heights, color=COLOURS[0], height=0.6, xerr=errors, capsize=3)
    if limit is not None:
        axis.axvline(limit, color=COLOURS[3], linestyle="--")
    for index, (value, high) in enumerate(zip(heights, highs, strict=True)):
        axis.text(max(value, high), index, f" {value:.3g}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, title=title)
    _tidy(axis, legend=False)
    return figure


def contact_sheet(images: Sequence[Any], *, columns: int = 8, gap: int = 4) -> np.ndarray:
    """Join pictures at their own scale to one, (H, W, 3) uint8: each centred in a cell, white between them."""
    pictures = [_picture(image) for image in images]
    pictures = [x if x.dtype == np.uint8 else (x * 255).round().astype(np.uint8) for x in pictures]
    side = max(max(x.shape[:2]) for x in pictures)
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        top = index // columns * (side + gap) + (side - height) // 2
        left = index % columns * (side + gap) + (side - width) // 2
        sheet[top : top + height, left : left + width] = picture
    return sheet


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows with the same keys as a table that notebooks show; the texts are Markdown."""
    from IPython.display import Markdown

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(row[key]) for key in rows[0]] for row in rows)]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def _tidy(axis: Axes, *, legend: bool) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_fontsize(9)
    if legend:
        axis.legend(fontsize=8, frameon=False)
