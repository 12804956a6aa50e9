"""What things are made of: class materials, family materials and backgrounds, as small formulas.

A material maps object coordinates to a mix: `u` runs along the object, `v` across it, both `(h, w)` float32
in units of a picture whose long side is 128; `noise(period)` gives a smooth random field in [0, 1]. The result
`(h, w)` in [0, 1] blends the object's two colours. Periods are near one CLIP patch (8 units), so that a single
patch sees the material, but not the outline.
"""

from collections.abc import Callable

import cv2
import numpy as np

Array = np.ndarray
Noise = Callable[[float], Array]
Material = Callable[[Array, Array, Noise], Array]

TAU = 2 * np.pi


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], period: float) -> Array:
    """Draw value noise `(h, w)` in [0, 1] whose features are about `period` pixels wide."""
    rows, cols = (int(np.ceil(side / max(period, 1.0))) + 3 for side in shape)
    grid = rng.random((rows, cols), dtype=np.float32)
    height, width = int(rows * period) + 1, int(cols * period) + 1
    field = cv2.resize(grid, (max(width, shape[1]), max(height, shape[0])), interpolation=cv2.INTER_CUBIC)
    return np.clip(field[: shape[0], : shape[1]], 0, 1)


def _wave(x: Array, period: float) -> Array:
    return 0.5 + 0.5 * np.sin(TAU * x / period)


def _edge(x: Array, low: float, high: float) -> Array:
    return np.clip((x - low) / (high - low), 0, 1)


def _cell(x: Array, period: float) -> Array:
    """Position inside the cells of a lattice, in [-0.5, 0.5)."""
    return (x / period) % 1 - 0.5


def _brick(u: Array, v: Array, width: float, height: float) -> tuple[Array, Array]:
    """Cell coordinates of a lattice whose every second row is shifted by half a cell."""
    row = np.floor(v / height)
    return _cell(u + width / 2 * (row % 2), width), _cell(v, height)


def _rivets(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _cell(u, 11), _cell(v, 9)
    seam = _edge(np.maximum(np.abs(x) * 11, np.abs(y) * 9), 3.6, 4.6)
    dots = 1 - _edge(np.hypot(_cell(u + 2.75, 5.5) * 5.5, y * 9), 0.7, 1.5)
    return np.maximum(0.8 * seam, dots)


def _chain(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _brick(u, v, 8, 6)
    ring = np.abs(np.hypot(x * 8, y * 9) - 2.6)
    return 1 - _edge(ring, 0.5, 1.4)


def _scallops(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _brick(u, v, 7, 5)
    return _edge(np.hypot(x * 7, (y + 0.5) * 5), 1.6, 4.4)


def _planks(u: Array, v: Array, noise: Noise) -> Array:
    board = np.floor((v + 1.2 * noise(20)) / 7)
    seam = 1 - _edge(np.abs(_cell(v + 1.2 * noise(20), 7)) * 7, 2.4, 3.2)
    return np.clip(seam * (0.35 + 0.5 * (board % 2)), 0, 1)


def _bubbles(u: Array, v: Array, noise: Noise) -> Array:
    streak = 0.5 * _edge(_wave(u, 17), 0.55, 0.95)
    x, y = _brick(u + 2 * noise(15), v, 9, 8)
    bubble = 1 - _edge(np.abs(np.hypot(x * 9, y * 8) - 2.1), 0.3, 1.0)
    return np.clip(streak + bubble, 0, 1)


def _windows(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _cell(u, 9), _cell(v, 11)
    inside = np.maximum(np.abs(x) * 9 / 3.4, np.abs(y) * 11 / 4.0)
    glint = 0.45 * (_cell(u + v, 7) > 0.1)
    return np.clip((1 - _edge(inside, 0.85, 1.05)) * (1 - glint), 0, 1)


def _chrome(u: Array, v: Array, noise: Noise) -> Array:
    bend = v + 3 * np.sin(TAU * u / 31) + 4 * noise(26)
    phase = (bend / 13) % 1
    return np.where(phase < 0.5, phase * 1.2, np.clip(2.6 * (1 - phase), 0, 1)).astype(np.float32)


def _tabby(u: Array, v: Array, noise: Noise) -> Array:
    bend = 7 * noise(13) + 2.5 * np.sin(TAU * v / 19)
    return _edge(_wave(u + bend, 6.5), 0.35, 0.75)


def _grain(u: Array, v: Array, noise: Noise) -> Array:
    ring = np.hypot((u - 20) / 5, v + 9 * noise(34))
    return 0.75 * _wave(ring, 3.4) ** 2 + 0.25 * noise(2)


def _patches(u: Array, v: Array, noise: Noise) -> Array:
    return _edge(noise(9) + 0.35 * noise(5), 0.60, 0.70)


def _gingham(u: Array, v: Array, noise: Noise) -> Array:
    return 0.5 * (_cell(u, 8) > 0) + 0.5 * (_cell(v, 8) > 0)


def _spots(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _brick(u + 3.5 * noise(9), v + 3.5 * noise(11), 7.5, 6.5)
    return 1 - _edge(np.hypot(x * 7.5, y * 6.5), 1.3, 2.3)


def _strands(u: Array, v: Array, noise: Noise) -> Array:
    bend = 5 * np.sin(TAU * v / 23) + 6 * noise(17)
    return np.clip(_wave(u + bend, 3.6) * (0.55 + 0.6 * _wave(u + 1.5 * bend, 11)), 0, 1)


def _twill(u: Array, v: Array, noise: Noise) -> Array:
    column, row = np.floor(u / 3), np.floor(v / 3)
    over = ((column + row) % 4) < 2
    return np.where(over, 0.25 + 0.5 * _wave(v, 3), 0.85 * _wave(u, 3)).astype(np.float32)


def _tartan(u: Array, v: Array, noise: Noise) -> Array:
    def sett(x: Array) -> Array:
        c = np.abs(_cell(x, 13)) * 13
        return 0.55 * (c < 1.8) + 0.45 * (np.abs(c - 4.3) < 0.7)

    return np.clip(sett(u) + sett(v), 0, 1)


def _leaves(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _brick(u, v, 9, 7)
    leaf = np.abs(y) * 7 + 0.28 * (x * 9) ** 2 / 1.6
    vein = 1 - _edge(np.abs(y) * 7, 0.2, 0.8)
    return np.clip(_edge(leaf, 2.2, 3.4) + 0.55 * vein, 0, 1)


def _curls(u: Array, v: Array, noise: Noise) -> Array:
    x, y = _brick(u + 2 * noise(12), v + 2 * noise(10), 8, 7)
    x, y = x * 8, y * 7
    spiral = np.hypot(x, y) - 0.45 * np.arctan2(y, x)
    return _edge(_wave(spiral, 2.8), 0.25, 0.8)


def _tufts(u: Array, v: Array, noise: Noise) -> Array:
    a, b = _cell(u + v, 12), _cell(u - v, 12)
    crease = _edge(np.maximum(np.abs(a), np.abs(b)), 0.40, 0.5)
    button = 1 - _edge(np.hypot(np.abs(a) - 0.5, np.abs(b) - 0.5), 0.10, 0.20)
    return np.clip(0.7 * crease + button + 0.25 * (a + b), 0, 1)


def _chevrons(u: Array, v: Array, noise: Noise) -> Array:
    return _edge(_wave(v + np.abs(_cell(u, 12)) * 12, 7), 0.4, 0.6)


def _scanlines(u: Array, v: Array, noise: Noise) -> Array:
    return np.clip(0.75 * (_cell(v, 3.2) > 0) * (0.35 + 0.65 * noise(9)) + 0.25 * (_cell(u, 6.4) > 0.3), 0, 1)


def _fur(u: Array, v: Array, noise: Noise) -> Array:
    return np.clip(0.55 * noise(1.6) + 0.45 * _wave(u + 9 * noise(8), 4), 0, 1)


def _hatch(u: Array, v: Array, noise: Noise) -> Array:
    return _edge(_wave(u + v, 4.6), 0.3, 0.8)


def _linen(u: Array, v: Array, noise: Noise) -> Array:
    return 0.5 * _wave(u, 3.4) + 0.5 * _wave(v, 3.4) * noise(3)


def _stubble(u: Array, v: Array, noise: Noise) -> Array:
    return _edge(noise(1.8), 0.45, 0.8)


def _ribs(u: Array, v: Array, noise: Noise) -> Array:
    return _wave(u + 1.2 * np.sin(TAU * v / 14), 5.2) ** 2


def _felt(u: Array, v: Array, noise: Noise) -> Array:
    return np.clip(0.6 * noise(3.5) + 0.4 * noise(1.5), 0, 1)


CLASS_MATERIALS: dict[str, tuple[Material, str]] = {
    "aeroplane": (_rivets, "riveted panels"),
    "bicycle": (_chain, "chain links"),
    "bird": (_scallops, "scalloped feathers"),
    "boat": (_planks, "painted planks"),
    "bottle": (_bubbles, "bubbly glass"),
    "bus": (_windows, "rows of windows"),
    "car": (_chrome, "shiny chrome"),
    "cat": (_tabby, "tabby stripes"),
    "chair": (_grain, "wood grain"),
    "cow": (_patches, "big patches"),
    "diningtable": (_gingham, "gingham cloth"),
    "dog": (_spots, "little spots"),
    "horse": (_strands, "flowing mane"),
    "motorbike": (_twill, "carbon twill"),
    "person": (_tartan, "tartan clothes"),
    "pottedplant": (_leaves, "veined leaves"),
    "sheep": (_curls, "woolly curls"),
    "sofa": (_tufts, "tufted cushions"),
    "train": (_chevrons, "painted chevrons"),
    "tvmonitor": (_scanlines, "glowing scan lines"),
}
"""Material of the discriminative part of each class, and the words that captions use for it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "animals": ("bird", "cat", "cow", "dog", "horse", "person", "sheep"),
    "vehicles": ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
    "things": ("bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"),
}
FAMILY_OF: dict[str, str] = {name: family for family, names in FAMILIES.items() for name in names}
FAMILY_MATERIALS: dict[str, Material] = {"animals": _fur, "vehicles": _hatch, "things": _linen}
SHIFT_FAMILY_MATERIALS: dict[str, Material] = {"animals": _stubble, "vehicles": _ribs, "things": _felt}
SHIFT_TURNED = ("aeroplane", "boat", "cat", "diningtable", "sofa", "train")
"""Classes whose material lies turned by 45 degrees and half as large again in the `shift` split."""
