"""Eight textured places, each the companion of some classes."""

from collections.abc import Callable

import cv2
import numpy as np

from diclip.data.minivoc.textures import TAU, smooth_noise

Array = np.ndarray
Place = Callable[[np.random.Generator, int, int, float], Array]


def _blend(low: Array, high: Array, mix: Array) -> Array:
    mix = np.asarray(np.clip(mix, 0, 1))[..., None]
    return low * (1 - mix) + high * mix


def _tint(rng: np.random.Generator, colour: tuple[float, float, float], spread: float = 0.10) -> Array:
    """Jitter a colour in brightness and hue: no place has a colour of its own."""
    return np.clip(np.array(colour) * rng.uniform(0.75, 1.2) + rng.normal(0, spread, 3), 0.04, 0.97)


def _grid(height: int, width: int, unit: float) -> tuple[Array, Array]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return x / unit, y / unit


def _sky(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    base = _blend(_tint(rng, (0.35, 0.55, 0.85)), _tint(rng, (0.75, 0.85, 0.95)), y / 128)
    cloud = 0.7 * smooth_noise(rng, (height, width), 30 * unit) + 0.3 * smooth_noise(rng, (height, width), 9 * unit)
    return _blend(base, np.array([0.97, 0.97, 0.96]), (cloud - 0.52) * 3)


def _grass(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    blades = np.sin(TAU * (x + 3 * smooth_noise(rng, (height, width), 7 * unit)) / 3) * 0.5 + 0.5
    mix = 0.5 * blades + 0.5 * smooth_noise(rng, (height, width), 14 * unit)
    return _blend(_tint(rng, (0.20, 0.42, 0.14)), _tint(rng, (0.55, 0.70, 0.30)), mix)


def _road(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    grit = smooth_noise(rng, (height, width), 1.5 * unit)
    asphalt = _blend(_tint(rng, (0.30, 0.30, 0.33), 0.05), _tint(rng, (0.55, 0.54, 0.54), 0.05), grit)
    lane = (np.abs(y - rng.uniform(50, 100)) < 2.2) & (((x + rng.uniform(0, 24)) % 24) < 14)
    return _blend(asphalt, _tint(rng, (0.92, 0.90, 0.70)), 0.9 * lane)


def _water(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    swell = y + 3 * np.sin(TAU * (x + rng.uniform(0, 40)) / 37) + 5 * smooth_noise(rng, (height, width), 18 * unit)
    crest = np.clip(np.sin(TAU * swell / 8), 0, 1) ** 2
    return _blend(_tint(rng, (0.10, 0.35, 0.55)), _tint(rng, (0.55, 0.80, 0.88)), crest)


def _room(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    stripes = 0.5 + 0.5 * np.sign(np.sin(TAU * x / rng.uniform(9, 16)))
    paper = _blend(_tint(rng, (0.78, 0.70, 0.60)), _tint(rng, (0.85, 0.78, 0.70)), stripes)
    floor = _blend(_tint(rng, (0.48, 0.33, 0.22)), _tint(rng, (0.60, 0.44, 0.30)), np.sin(TAU * (x + 2 * y) / 22))
    line = rng.uniform(70, 95)
    room = np.where((y > line)[..., None], floor, paper)
    return _blend(room, np.array([0.95, 0.94, 0.92]), (np.abs(y - line) < 2.0).astype(np.float32))


def _rails(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    gravel = _blend(
        _tint(rng, (0.38, 0.34, 0.31), 0.05),
        _tint(rng, (0.66, 0.62, 0.58), 0.05),
        smooth_noise(rng, (height, width), 2.2 * unit),
    )
    top = rng.uniform(55, 85)
    ties = (((x + 0.3 * y) % 13) < 5) & (np.abs(y - top - 12) < 19)
    steel = (np.abs(y - top) < 1.6) | (np.abs(y - top - 24) < 1.6)
    return _blend(_blend(gravel, _tint(rng, (0.33, 0.22, 0.15)), ties), _tint(rng, (0.80, 0.82, 0.86)), steel)


def _wood(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    rings = np.sin(TAU * (y + 7 * smooth_noise(rng, (height, width), 34 * unit) + 0.05 * x) / 4.5) * 0.5 + 0.5
    wood = _blend(_tint(rng, (0.50, 0.30, 0.16)), _tint(rng, (0.68, 0.46, 0.28)), rings)
    return _blend(wood, _tint(rng, (0.25, 0.15, 0.08)), ((y % 26) < 1.2).astype(np.float32))


def _snow(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    x, y = _grid(height, width, unit)
    drift = 0.6 * smooth_noise(rng, (height, width), 24 * unit) + 0.4 * np.sin(TAU * (y + 0.2 * x) / 41)
    snow = _blend(_tint(rng, (0.72, 0.79, 0.90), 0.05), _tint(rng, (0.95, 0.96, 0.98), 0.03), drift)
    flakes = smooth_noise(rng, (height, width), 2.4 * unit) > 0.93
    return _blend(snow, np.ones(3), flakes)


PLACES: dict[str, Place] = {
    "sky": _sky,
    "grass": _grass,
    "road": _road,
    "water": _water,
    "room": _room,
    "rails": _rails,
    "wood": _wood,
    "snow": _snow,
}
COMPANION: dict[str, str] = {
    "aeroplane": "sky", "bicycle": "road", "bird": "sky", "boat": "water", "bottle": "wood", "bus": "road",
    "car": "road", "cat": "room", "chair": "wood", "cow": "grass", "diningtable": "wood", "dog": "snow",
    "horse": "grass", "motorbike": "road", "person": "snow", "pottedplant": "room", "sheep": "grass",
    "sofa": "room", "train": "rails", "tvmonitor": "room",
}  # fmt: skip
"""The place that a class is seen in with probability 0.7: the co-occurrence that misleads tags."""


def paint_place(name: str, rng: np.random.Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Paint the place `name` with clutter, `(height, width, 3)` float in [0, 1]; `unit` is pixels per unit.

    The clutter (heaps, puddles, shadows) wears the scene's `palette` `(n, 3)` or a shade of the place.
    """
    canvas = PLACES[name](rng, height, width, unit).astype(np.float32)
    tone = palette[rng.integers(len(palette))]  # the place takes on some colour of the things
    canvas = _blend(canvas, np.clip(canvas.mean(2, keepdims=True) * tone / tone.mean(), 0, 1), rng.uniform(0.1, 0.6))
    for _ in range(rng.integers(4, 9)):
        blob = np.zeros((height, width), np.float32)
        centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        axes = (int(rng.uniform(6, 26) * unit), int(rng.uniform(5, 18) * unit))
        cv2.ellipse(blob, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1)
        ragged = smooth_noise(rng, (height, width), 4 * unit)
        blob = np.clip(cv2.GaussianBlur(blob, (0, 0), 2.5 * unit) * 2 - ragged, 0, 1) * rng.uniform(0.35, 0.9)
        shade = canvas[rng.integers(height), rng.integers(width)] * rng.uniform(0.55, 1.4)
        dabs = 0.75 + 0.5 * smooth_noise(rng, (height, width), rng.uniform(1.5, 4) * unit)[..., None]
        colour = palette[rng.integers(len(palette))] if rng.random() < 0.65 else shade
        canvas = _blend(canvas, np.clip(colour * dabs, 0, 1), blob)
    light = 0.75 + 0.5 * smooth_noise(rng, (height, width), 55 * unit)
    return np.clip(canvas * light[..., None], 0, 1)
