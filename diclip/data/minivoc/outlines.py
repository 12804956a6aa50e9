"""The cast: outlines of twenty classes and of things that nobody labelled.

Most come from two icon fonts (see NOTICE), the rest is drawn in `drawings`. An outline carries the split of its
silhouette into the discriminative *part*, which wears the class's material, and the *body*, which wears the family's.
"""

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module, resources

import cv2
import numpy as np
from fontTools.pens.recordingPen import DecomposingRecordingPen
from fontTools.ttLib import TTFont

from diclip.data.minivoc.drawings import DRAWINGS

PART_FRACTION = 0.6
"""Share of the silhouette that wears the class's material."""

_COMPASS = {"n": (0, -1), "s": (0, 1), "w": (-1, 0), "e": (1, 0), "nw": (-0.7, -0.7), "sw": (-0.7, 0.7)}

# outline -> where its discriminative part lies; 'mdi:' Material Design Icons, 'fa:' Font Awesome, 'own:' ours
CAST: dict[str, dict[str, str]] = {
    "aeroplane": {"mdi:airplane": "n", "mdi:airplane-takeoff": "e", "mdi:airplane-landing": "n"},
    "bicycle": {"mdi:bicycle": "s", "mdi:bicycle-basket": "w"},
    "bird": {"mdi:bird": "n", "mdi:owl": "n", "mdi:duck": "nw"},
    "boat": {"mdi:sail-boat": "n", "mdi:ferry": "s"},
    "bottle": {"mdi:bottle-wine": "n", "mdi:bottle-tonic": "n", "mdi:bottle-soda-classic": "n"},
    "bus": {"mdi:bus": "n", "mdi:bus-side": "n", "mdi:bus-double-decker": "w"},
    "car": {"mdi:car": "n", "mdi:car-side": "n", "mdi:car-hatchback": "w"},
    "cat": {"mdi:cat": "n", "own:cat-strolling": "w"},
    "chair": {"mdi:chair-rolling": "n", "own:chair-kitchen": "n", "own:chair-throne": "n"},
    "cow": {"mdi:cow": "n", "own:cow-grazing": "e"},
    "diningtable": {"mdi:table-furniture": "n", "own:table-round": "n", "own:table-laid": "n"},
    "dog": {"mdi:dog": "n", "mdi:dog-side": "w"},
    "horse": {"mdi:horse-variant": "nw", "mdi:horse": "n", "mdi:chess-knight": "n"},
    "motorbike": {"mdi:motorbike": "w", "mdi:moped": "e"},
    "person": {"mdi:human": "n", "mdi:human-handsup": "n", "mdi:run": "n", "mdi:human-greeting": "s"},
    "pottedplant": {"own:pot-cactus": "n", "own:pot-palm": "n", "own:pot-flower": "n"},
    "sheep": {"mdi:sheep": "n", "own:sheep-standing": "e"},
    "sofa": {"mdi:sofa": "n", "mdi:sofa-single": "n", "own:sofa-lounge": "n"},
    "train": {"mdi:train": "n", "mdi:train-variant": "s", "mdi:tram": "n"},
    "tvmonitor": {"mdi:television-classic": "s", "mdi:monitor": "n", "mdi:television": "w"},
}
SHIFT_CAST: dict[str, dict[str, str]] = {
    "aeroplane": {"fa:plane": "e", "fa:plane-departure": "e", "fa:jet-fighter": "n"},
    "bicycle": {"fa:bicycle": "s", "mdi:bicycle-penny-farthing": "w"},
    "bird": {"fa:crow": "nw", "fa:dove": "n", "fa:kiwi-bird": "w"},
    "boat": {"fa:ship": "s", "fa:sailboat": "n"},
    "bottle": {"fa:wine-bottle": "n", "fa:bottle-water": "n"},
    "bus": {"fa:bus": "n", "fa:van-shuttle": "n"},
    "car": {"fa:car": "n", "fa:car-side": "n", "fa:truck-pickup": "n"},
    "cat": {"fa:cat": "n", "own:cat-sitting": "n"},
    "chair": {"fa:chair": "n", "own:chair-deck": "nw"},
    "cow": {"fa:cow": "e", "own:cow-head": "n"},
    "diningtable": {"own:table-trestle": "n", "own:table-cloth": "n"},
    "dog": {"fa:dog": "n", "own:dog-begging": "n"},
    "horse": {"fa:horse": "n", "fa:horse-head": "n"},
    "motorbike": {"fa:motorcycle": "w", "own:motorbike-chopper": "w"},
    "person": {"fa:person": "n", "fa:child-reaching": "n", "fa:person-walking": "n"},
    "pottedplant": {"own:pot-bush": "n", "own:pot-snake": "n"},
    "sheep": {"own:sheep-facing": "n", "own:sheep-lying": "e"},
    "sofa": {"fa:couch": "n", "own:sofa-chaise": "w"},
    "train": {"fa:train": "n", "fa:train-tram": "n"},
    "tvmonitor": {"fa:tv": "n", "fa:desktop": "n"},
}
DISTRACTORS: dict[str, tuple[str, ...]] = {
    "animals": ("mdi:fish", "mdi:rabbit", "mdi:turtle", "mdi:snail", "mdi:elephant", "mdi:butterfly", "mdi:ladybug"),
    "vehicles": ("mdi:tractor-variant", "mdi:rocket", "mdi:helicopter", "mdi:forklift", "mdi:skateboard",
                 "mdi:wheelchair"),
    "things": ("mdi:umbrella", "mdi:guitar-acoustic", "mdi:kettle", "mdi:lamp", "mdi:mushroom", "mdi:castle",
               "mdi:bell", "mdi:anchor", "mdi:home", "mdi:key-variant", "mdi:trophy", "mdi:hat-fedora"),
}  # fmt: skip
SHIFT_DISTRACTORS: dict[str, tuple[str, ...]] = {
    "animals": ("fa:frog", "fa:hippo", "fa:otter", "fa:fish-fins", "fa:spider"),
    "vehicles": ("fa:tractor", "fa:shuttle-space", "fa:helicopter", "fa:snowplow"),
    "things": ("fa:umbrella", "fa:guitar", "fa:mug-hot", "fa:lightbulb", "fa:gift", "fa:fort-awesome", "fa:crown",
               "fa:drum"),
}  # fmt: skip

_FONTS = {
    "mdi": (("fonticon_mdi7", "materialdesignicons-webfont.ttf"),),
    "fa": (
        ("fonticon_fa6", "Font Awesome 6 Free-Solid-900.otf"),
        ("fonticon_fa6", "Font Awesome 6 Brands-Regular-400.otf"),
    ),
}


@dataclass(frozen=True, eq=False)
class Outline:
    """A silhouette in a unit box centred on 0 (x right, y down): polygons `(n, 2)` and where its part lies."""

    name: str
    solids: tuple[np.ndarray, ...]  # their union is the silhouette
    details: tuple[np.ndarray, ...]  # inner line work: windows, eyes, seams
    islands: tuple[np.ndarray, ...]  # what lies inside a detail and belongs to the surface again
    direction: tuple[float, float]  # the part is where x . direction > threshold
    threshold: float


@lru_cache(maxsize=4)
def _font(package: str, file: str) -> TTFont:
    font = TTFont(resources.files(import_module(package)) / "fonts" / file, lazy=True)
    logger = logging.getLogger("fontTools.ttLib")
    level, _ = logger.level, logger.setLevel(logging.ERROR)  # it remarks on the fonts' odd creation dates
    try:
        font["head"], font["post"], font["cmap"]
    finally:
        logger.setLevel(level)
    return font


def _flatten(commands: list[tuple[str, tuple]]) -> list[np.ndarray]:
    """Turn pen commands into closed polygons; quadratic and cubic curves become ten segments each."""
    t = np.linspace(0, 1, 11)[1:, None]
    polygons: list[list[np.ndarray]] = []
    for command, raw in commands:
        points = [np.array(p, float) for p in raw]
        if command == "moveTo":
            polygons.append([points[0]])
        elif command == "lineTo":
            polygons[-1].append(points[0])
        elif command == "curveTo":
            a, (b, c, d) = polygons[-1][-1], points
            polygons[-1].extend((1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d)
        elif command == "qCurveTo":
            middles = [(p + q) / 2 for p, q in zip(points[:-2], points[1:-1], strict=True)] + [points[-1]]
            for control, end in zip(points[:-1], middles, strict=True):
                start = polygons[-1][-1]
                polygons[-1].extend((1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end)
    return [np.stack(polygon) for polygon in polygons if len(polygon) > 2]


def _glyph(font: str, name: str) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    for package, file in _FONTS[font]:
        glyphs = _font(package, file).getGlyphSet()
        if name in glyphs:
            break
    else:
        raise ValueError(f"glyph '{name}' is not in the icon font '{font}'; install the versions of constraints.txt")
    pen = DecomposingRecordingPen(glyphs)
    glyphs[name].draw(pen)
    contours = [c * (1, -1) for c in _flatten(pen.value)]  # fonts have y up
    layers: tuple[list[np.ndarray], ...] = ([], [], [])
    for contour in contours:
        start = tuple(float(x) for x in contour[0])
        around = [cv2.pointPolygonTest(c.astype(np.float32), start, False) > 0 for c in contours if c is not contour]
        depth = sum(around)
        layers[0 if depth == 0 else 2 - depth % 2].append(contour)  # silhouette, hole, island in a hole
    return layers


def fill(polygons: tuple[np.ndarray, ...] | list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fill the union of polygons in pixel coordinates, `(height, width)` uint8 of 0 and 1."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(mask, [np.round(polygon * 16).astype(np.int32)], 1, shift=4)
    return mask


@cache
def outline(name: str, direction: str = "n") -> Outline:
    """Load an outline by its name in the cast, scaled so that its longer side is 1.

    Raises:
        ValueError: if the installed icon font has no such glyph.
    """
    source, _, glyph = name.partition(":")
    solids, details, islands = (*DRAWINGS[glyph], []) if source == "own" else _glyph(source, glyph)
    points = np.concatenate(solids)
    low, high = points.min(0), points.max(0)
    unit = [[(p - (low + high) / 2) / (high - low).max() for p in layer] for layer in (solids, details, islands)]
    toward = np.array(_COMPASS[direction])
    silhouette = fill([(p + 0.5) * 128 for p in unit[0]], 128, 128)
    ys, xs = np.nonzero(silhouette)
    along = (np.stack([xs, ys], 1) / 128 - 0.5) @ toward
    threshold = float(np.quantile(along, 1 - PART_FRACTION))
    return Outline(name, *(tuple(layer) for layer in unit), tuple(toward), threshold)
