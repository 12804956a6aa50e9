"""Painting a scene: one picture and its exact class, instance and part masks, at any scale."""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

from diclip.data.minivoc.backgrounds import paint_place
from diclip.data.minivoc.outlines import Outline, fill, outline
from diclip.data.minivoc.scene import CLASSES, Scene, Thing
from diclip.data.minivoc.textures import (
    CLASS_MATERIALS,
    FAMILY_MATERIALS,
    SHIFT_FAMILY_MATERIALS,
    SHIFT_TURNED,
    Material,
    smooth_noise,
)

VOID = 255
_OVERSAMPLE = 4
_DEPTH = 14  # pixels of a picture of 128 by which a place out of focus is blurred

# hues (degrees) that a class often, never always, wears: colour must not name the class
_USUAL_HUES = {
    "cow": (25,), "sheep": (40,), "dog": (28,), "cat": (30,), "horse": (20,), "chair": (25,), "diningtable": (5, 210),
    "pottedplant": (110,), "tvmonitor": (200,), "bus": (45, 5), "boat": (5, 210), "bottle": (130,),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rendered:
    """A painted scene: `image (H, W, 3)` uint8 and masks `(H, W)` uint8.

    `classes` holds 0 for background, 1 + class index for objects and 255 on their borders, as VOC does;
    `instances` 0 or 1 + the index of the thing (distractors too); `parts` 0, 1 the discriminative part, 2 the body.
    """

    image: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    parts: np.ndarray


def _colour(rng: np.random.Generator, hue: float | None = None) -> np.ndarray:
    hue = rng.uniform(0, 360) if hue is None else hue + rng.normal(0, 12)
    return np.array(colorsys.hsv_to_rgb((hue % 360) / 360, rng.uniform(0.25, 0.85), rng.uniform(0.35, 0.95)))


def _palette(scene: Scene) -> np.ndarray:
    """The three colours `(3, 3)` that most surfaces of a scene share, so that colour tells no thing from another."""
    rng = np.random.default_rng(scene.seed + 2)
    return np.stack([_colour(rng) for _ in range(3)])


def _contrast(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A partner that a pattern can be seen with: lighter or darker, somewhat turned in hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    value = value - rng.uniform(0.3, 0.5) if value > 0.55 else value + rng.uniform(0.35, 0.55)
    return np.array(
        colorsys.hsv_to_rgb((hue + rng.normal(0, 0.06)) % 1, saturation * rng.uniform(0.5, 1), np.clip(value, 0, 1))
    )


def _to_canvas(thing: Thing, unit: float) -> np.ndarray:
    """Affine matrix (2, 3) from the outline's unit box to pixels."""
    angle = np.radians(thing.angle)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = np.array([[-1.0 if thing.flip else 1.0, thing.shear], [0.0, 1.0]])
    return np.column_stack([turn @ shape * thing.size * unit, np.array([thing.x, thing.y]) * unit])


def _coverage(polygons: tuple[np.ndarray, ...], matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased share of each pixel that the polygons cover, `(height, width)` in [0, 1]."""
    k = _OVERSAMPLE
    placed = [(p @ matrix[:, :2].T + matrix[:, 2]) * k - 0.5 for p in polygons]
    fine = fill(placed, height * k, width * k)
    return cv2.resize(fine * np.float32(1), (width, height), interpolation=cv2.INTER_AREA)


class _Brush:
    """Paints one thing into a picture that already holds what lies behind it."""

    def __init__(self, thing: Thing, shape: Outline, canvas: np.ndarray, unit: float, scene: Scene):
        self.thing, self.shape, self.unit, self.shifted = thing, shape, unit, scene.shifted
        self.palette = _palette(scene)
        self.rng = np.random.default_rng(thing.seed)
        self.part_rng = np.random.default_rng([thing.seed, 1])  # its own: another material leaves the body as it is
        self.matrix = _to_canvas(thing, unit)
        height, width = canvas.shape[:2]
        corners = np.concatenate(shape.solids) @ self.matrix[:, :2].T + self.matrix[:, 2]
        low = np.clip(np.floor(corners.min(0)).astype(int) - 3, 0, (width - 2, height - 2))
        high = np.clip(np.ceil(corners.max(0)).astype(int) + 4, low + 2, (width, height))
        self.window = (slice(low[1], high[1]), slice(low[0], high[0]))
        self.local = self.matrix - np.column_stack([np.zeros((2, 2)), low])
        self.height, self.width = high[1] - low[1], high[0] - low[0]

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit-box coordinates x, y of the window's pixels, each `(h, w)`."""
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32) + 0.5
        inverse = np.linalg.inv(self.local[:, :2])
        dx, dy = x - self.local[0, 2], y - self.local[1, 2]
        return inverse[0, 0] * dx + inverse[0, 1] * dy, inverse[1, 0] * dx + inverse[1, 1] * dy

    def colour(self, rng: np.random.Generator, hue: float | None = None) -> np.ndarray:
        if hue is None and rng.random() < 0.8:
            return np.clip(rng.choice(self.palette) * rng.uniform(0.85, 1.15), 0, 1)
        return _colour(rng, hue)

    def dress(
        self, material: Material, u: np.ndarray, v: np.ndarray, colour: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        def noise(period: float) -> np.ndarray:
            return smooth_noise(rng, (self.height, self.width), period * self.unit)

        partner = _contrast(rng, colour)
        mix = material(u, v, noise)[..., None]
        return colour * (1 - mix) + partner * mix

    def dress_part(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        usual = _USUAL_HUES.get(self.thing.label or "", ())
        hue = self.part_rng.choice(usual) if usual and self.part_rng.random() < 0.25 else None
        colour = self.colour(self.part_rng, hue)
        if self.shifted and self.thing.material in SHIFT_TURNED:
            u, v = (u + v) / 2.1, (v - u) / 2.1
        return self.dress(CLASS_MATERIALS[self.thing.material][0], u, v, colour, self.part_rng)

    def paint(self, canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Paint into `canvas` in place; return coverage and part masks of the window."""
        thing, rng = self.thing, self.rng
        x, y = self.coordinates()
        zoom = thing.size * rng.uniform(0.75, 1.1) / (0.55 + thing.size / 140)  # small things wear finer material
        u, v = x * zoom + rng.uniform(0, 50), y * zoom + rng.uniform(0, 50)
        behind = canvas[self.window]
        families = SHIFT_FAMILY_MATERIALS if self.shifted else FAMILY_MATERIALS
        body_colour = self.colour(rng)
        if thing.camouflaged:
            body_colour = np.clip(behind.reshape(-1, 3).mean(0) * rng.uniform(0.8, 1.2) + rng.normal(0, 0.04, 3), 0, 1)
        surface = self.dress(families[thing.family], u, v, body_colour, rng)
        wobble = 0.05 * np.sin(9 * x + rng.uniform(0, 6)) * np.sin(9 * y + rng.uniform(0, 6))
        part = x * self.shape.direction[0] + y * self.shape.direction[1] + wobble > self.shape.threshold
        if thing.material is not None:
            surface = np.where(part[..., None], self.dress_part(u, v), surface)
        cover = self.shade(surface, behind, x, y)
        return cover, part

    def shade(self, surface: np.ndarray, behind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Add line work, light, contour and a soft shadow, and blend the thing over what is behind it."""
        rng, unit = self.rng, self.unit
        cover = _coverage(self.shape.solids, self.local, self.height, self.width)
        line = _coverage(self.shape.details, self.local, self.height, self.width) if self.shape.details else 0 * cover
        if self.shape.islands:
            line = line * (1 - _coverage(self.shape.islands, self.local, self.height, self.width))
        tilt = rng.uniform(0, 2 * np.pi)
        light = 1 + 0.30 * (x * np.cos(tilt) + y * np.sin(tilt))
        inner = cv2.GaussianBlur(cover, (0, 0), 1.6 * unit)
        rim = np.clip((inner - 0.5) * 2.4 + 0.38, 0.25, 1)  # the contour is darker, as if the thing were round
        ink = rng.choice([0.45, 0.6, 1.45])
        surface = surface * (light * rim * (1 - line + line * ink))[..., None]
        down, right = round(2 * unit), round(1.5 * unit)
        shadow = np.zeros_like(inner)
        shadow[down:, right:] = 0.42 * inner[: self.height - down, : self.width - right]
        behind *= 1 - shadow[..., None]
        behind *= 1 - cover[..., None]
        behind += np.clip(surface, 0, 1) * cover[..., None]
        return cover


def _borders(labels: np.ndarray, unit: float) -> np.ndarray:
    """Pixels within about one unit of a change of label: VOC's void border, `(H, W)` bool."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * max(round(unit), 1) + 1,) * 2)
    return cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)


def render(scene: Scene, *, scale: float = 1.0) -> Rendered:
    """Paint a scene; `scale` 1 gives a long side of 128 pixels."""
    width, height = round(scene.width * scale), round(scene.height * scale)
    rng = np.random.default_rng(scene.seed)
    canvas = paint_place(scene.place, rng, height, width, scale, _palette(scene))
    if scene.out_of_focus:
        canvas = cv2.GaussianBlur(canvas, (0, 0), _DEPTH * scale, borderType=cv2.BORDER_REFLECT)
    classes, instances, parts = (np.zeros((height, width), np.uint8) for _ in range(3))
    for index, thing in enumerate(scene.things):
        brush = _Brush(thing, outline(thing.outline, thing.direction), canvas, scale, scene)
        cover, part = brush.paint(canvas)
        inside = cover > 0.5
        classes[brush.window][inside] = 0 if thing.label is None else 1 + CLASSES.index(thing.label)
        instances[brush.window][inside] = 1 + index
        parts[brush.window][inside] = 0 if thing.label is None else np.where(part, 1, 2)[inside]
    camera = np.random.default_rng(scene.seed + 1)  # its own: another place leaves the exposure as it is
    exposure, grain = camera.uniform(0.88, 1.1), camera.normal(0, 0.012, canvas.shape)
    image = np.clip((canvas * exposure + grain) * 255, 0, 255).astype(np.uint8)
    labels = np.where(classes > 0, instances, 0).astype(np.uint8)
    classes = np.where(_borders(labels, scale), VOID, classes).astype(np.uint8)
    return Rendered(image, classes, instances, np.where(classes == VOID, 0, parts).astype(np.uint8))
