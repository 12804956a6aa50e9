"""Draw what explorers show, with numpy and Pillow alone: fast enough to follow a slider."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from zlib import Z_RLE

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diclip.data.minivoc import palette

Pixels = NDArray[np.uint8]  # (H, W, 3)
HEATS = ("magma", "viridis", "cividis", "gray")
SIDE, GAP, TITLE = 256, 12, 24
INK, FAINT, MARK = (32, 32, 32), (120, 120, 120), (86, 180, 233)


@dataclass(frozen=True)
class Panel:
    """Hold one picture of a grid, what is written over it, and the colour of the class that it is about."""

    title: str
    pixels: Pixels
    swatch: tuple[int, int, int] | None = None


def png(pixels: Pixels, *, small: bool = False) -> bytes:
    """Return pixels as PNG, packed lightly: time counts for more than bytes between kernel and browser.

    `small` is for notebooks that are kept: two thirds of the size, and at most 256 colours.
    """
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if small:
        size = (round(image.width / 1.5), round(image.height / 1.5))
        image = image.resize(size, Image.Resampling.LANCZOS).quantize(256, dither=Image.Dither.NONE)
    how = {"optimize": True} if small else {"compress_level": 1, "compress_type": Z_RLE}
    image.save(file, "PNG", **how)
    return file.getvalue()


def fit(image: Any, *, side: int = SIDE) -> Pixels:
    """Scale an image (3, H, W) in [0, 1] so that its longer side is `side`."""
    pixels = (_array(image).transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)
    scale = side / max(pixels.shape[:2])
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def stretch(values: Any, shape: Sequence[int]) -> NDArray[np.float32]:
    """Resize a map (h, w) to (H, W): bilinear, half-pixel centres."""
    values = _array(values).astype(np.float32)
    return np.asarray(Image.fromarray(values).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def overlay(picture: Pixels, heat: Any, *, opacity: float = 0.6, colours: str = "magma") -> Pixels:
    """Lay a map (h, w) in [0, 1] of any resolution over a picture, which turns grey below it."""
    index = (stretch(heat, picture.shape) * 255).round().clip(0, 255).astype(np.uint8)
    grey = (picture.sum(2, dtype=np.uint16) * np.float32((1 - opacity) / 3)).astype(np.uint8)
    return grey[..., None] + (opacity * _heats(colours)).astype(np.uint8)[index]  # no more than 255 together


def painted(labels: Any, shape: Sequence[int]) -> Pixels:
    """Return label ids (H, W) in VOC's colours, scaled without mixing; void is light grey."""
    ids = Image.fromarray(_array(labels).astype(np.uint8)).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return _label_colours()[np.asarray(ids)]


def shaded(ids: Any, shape: Sequence[int]) -> Pixels:
    """Return part ids (H, W), 0 nothing, 1 part, 2 body, as white, light and dark blue."""
    shades = np.array([(255, 255, 255), (140, 200, 240), (0, 90, 150)], np.uint8)
    image = Image.fromarray(_array(ids).astype(np.uint8))
    return shades[np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.NEAREST))]


def stretched_colours(values: Any, shape: Sequence[int]) -> Pixels:
    """Resize values (h, w, 3) in [0, 1] to (H, W), and take them for colours."""
    return np.stack([stretch(channel, shape) * 255 for channel in _array(values).transpose(2, 0, 1)], -1).astype(
        np.uint8
    )


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class index in masks."""
    return tuple(_label_colours()[1 + label].tolist())


def framed(picture: Pixels, cell: tuple[int, int], grid: tuple[int, int]) -> Pixels:
    """Frame one (row, column) of a grid (h, w) over a picture, so that it shows on bright and dark."""
    image = Image.fromarray(picture)
    draw, (height, width) = ImageDraw.Draw(image), picture.shape[:2]
    left, right = (round(width * (cell[1] + step) / grid[1]) for step in (0, 1))
    top, bottom = (round(height * (cell[0] + step) / grid[0]) for step in (0, 1))
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="black", width=1)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=MARK, width=2)
    return np.asarray(image)


def note(text: str, shape: Sequence[int]) -> Pixels:
    """Write a sentence where a picture would be."""
    image = Image.new("RGB", (shape[1], shape[0]), (244, 244, 244))
    draw, font = ImageDraw.Draw(image), _font(12)
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        line, lines = (longer, lines) if draw.textlength(longer, font) < shape[1] - 24 else (word, [*lines, line])
    draw.multiline_text((12, 12), "\n".join([*lines, line]), FAINT, font, spacing=5)
    return np.asarray(image)


def sheet(rows: Sequence[Sequence[str]], *, width: int) -> Pixels:
    """Write rows of texts as a table, its first row as headings; what does not fit a column is cut."""
    image = Image.new("RGB", (width, 22 * len(rows) + 4), "white")
    draw, font, step = ImageDraw.Draw(image), _font(12), width / len(rows[0])
    for number, row in enumerate(rows):
        for column, text in enumerate(row):
            place = (column * step, 22 * number + 12)
            draw.text(place, _short(draw, text, step - 10, font), FAINT if number else INK, font, anchor="lm")
    draw.line((0, 23, width, 23), fill=FAINT)
    return np.asarray(image)


def raster(figure: Any, *, side: int | None = None) -> Pixels:
    """Return a matplotlib figure as pixels, as it is or square with that side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if side is not None:
        figure.set_size_inches(side / figure.dpi, side / figure.dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def bars(values: Mapping[str, float], shape: Sequence[int], *, marked: Sequence[str] = (), most: float = 0) -> Pixels:
    """Draw named values as horizontal bars from a common zero; those that are `marked` in another colour.

    The scale reaches to `most` at least.
    """
    image = Image.new("RGB", (shape[1], shape[0]), "white")
    draw, font = ImageDraw.Draw(image), _font(12)
    low, high = min(0, *values.values()), max(0, most, *values.values())
    left, span = min(92, shape[1] // 3), max(high - low, 1e-9)
    scale = (shape[1] - left - 46) / span
    zero, step = left - low * scale, shape[0] / len(values)
    for row, (name, value) in enumerate(values.items()):
        middle = (row + 0.5) * step
        ends = sorted((zero, zero + value * scale))
        colour = (213, 94, 0) if name in marked else (0, 114, 178)
        draw.text((left - 6, middle), _short(draw, name, left - 8, font), INK, font, anchor="rm")
        draw.rectangle((ends[0], middle - 0.32 * step, max(ends[1], ends[0] + 1), middle + 0.32 * step), fill=colour)
        draw.text((ends[1] + 5, middle), f"{value:.2f}", FAINT, font, anchor="lm")
    return np.asarray(image)


def table(panels: Sequence[Panel], *, columns: int = 3) -> Pixels:
    """Join panels row by row to one picture on white, each under its title."""
    width = max(panel.pixels.shape[1] for panel in panels)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(panel.pixels.shape[0] for panel in row) for row in rows]
    across = min(columns, len(panels))
    size = (across * (width + GAP) - GAP, sum(heights) + len(rows) * (TITLE + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font, top = ImageDraw.Draw(sheet), _font(13), 0
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            left = column * (width + GAP)
            if panel.swatch is not None:
                draw.rectangle((left, top + 5, left + 12, top + 17), fill=panel.swatch)
            start = left + (18 if panel.swatch is not None else 0)
            text = _short(draw, panel.title, left + width - start, font)
            draw.text((start, top + TITLE / 2 - 1), text, INK, font, anchor="lm")
            sheet.paste(Image.fromarray(panel.pixels), (left, top + TITLE))
        top += height + TITLE + GAP
    return np.asarray(sheet)


def _short(draw: ImageDraw.ImageDraw, text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"


def _array(x: Any) -> NDArray[Any]:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


@cache
def _heats(name: str) -> NDArray[np.float32]:
    from matplotlib import colormaps

    return (colormaps[name](np.arange(256))[:, :3] * 255).astype(np.float32)


@cache
def _label_colours() -> Pixels:
    colours = palette()
    colours[255] = (224, 224, 224)
    return colours
