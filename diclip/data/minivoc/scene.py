"""Scenes: what stands where, before anything is painted. A scene is a small immutable record.

`sample_scene` draws one from a generator; `dataclasses.replace` and the counterfactuals below change one thing
and leave the rest of the picture as it was, because every thing carries a seed of its own.
"""

from dataclasses import dataclass, replace

import numpy as np

from diclip.data.minivoc.backgrounds import COMPANION, PLACES
from diclip.data.minivoc.outlines import CAST, DISTRACTORS, SHIFT_CAST, SHIFT_DISTRACTORS
from diclip.data.minivoc.textures import CLASS_MATERIALS, FAMILIES, FAMILY_OF

CLASSES: tuple[str, ...] = tuple(CLASS_MATERIALS)
LONG_SIDE = 128
COMPANION_RATE = 0.7
CAMOUFLAGE_RATE = 1 / 3


@dataclass(frozen=True)
class Thing:
    """One object: a labelled one (`label` is its class) or a distractor (`label` is None)."""

    outline: str
    direction: str  # where the part lies on the outline
    family: str
    label: str | None
    material: str | None  # class whose material the part wears; None: the part wears the family's, as the body
    x: float  # centre and longer side, in units of a picture whose long side is 128
    y: float
    size: float
    angle: float  # degrees
    shear: float
    flip: bool
    camouflaged: bool  # the body wears a colour near the background's
    seed: int


@dataclass(frozen=True)
class Scene:
    """A whole picture: `things` from back to front on a place."""

    width: int
    height: int
    place: str
    things: tuple[Thing, ...]
    shifted: bool  # family materials and turned class materials of the `shift` split
    seed: int
    out_of_focus: bool = False  # the place is: what stands on it is not

    @property
    def tags(self) -> tuple[str, ...]:
        """Class names present, in class order."""
        present = {thing.label for thing in self.things}
        return tuple(name for name in CLASSES if name in present)


def _frame(rng: np.random.Generator) -> tuple[int, int]:
    short = int(rng.choice([128, 112, 104, 96], p=[0.4, 0.25, 0.2, 0.15]))
    return (LONG_SIDE, short) if rng.random() < 0.65 else (short, LONG_SIDE)


def _classes(rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct classes; half of the draws of two or more hold two of one family, the others none."""
    first = str(rng.choice(CLASSES))
    chosen = [first]
    if count > 1 and rng.random() < 0.5:
        chosen.append(str(rng.choice([name for name in FAMILIES[FAMILY_OF[first]] if name != first])))
    while len(chosen) < count:
        taken = {FAMILY_OF[name] for name in chosen}
        chosen.append(str(rng.choice([name for name in CLASSES if FAMILY_OF[name] not in taken])))
    return chosen


def _place(rng: np.random.Generator, label: str) -> str:
    """Companion of `label` with the co-occurrence rate, otherwise any other place."""
    if rng.random() < COMPANION_RATE:
        return COMPANION[label]
    return str(rng.choice([place for place in PLACES if place != COMPANION[label]]))


def _seat(rng: np.random.Generator, frame: tuple[int, int], size: float, taken: list[tuple]) -> tuple[float, float]:
    """Find a centre with little overlap: the best of a few tries."""
    width, height = frame
    tries = rng.uniform(size * 0.38, (width - size * 0.38, height - size * 0.38), (14, 2))
    if not taken:
        return tuple(tries[0])
    others = np.array(taken)  # (n, 3): x, y, size
    gap = np.linalg.norm(tries[:, None] - others[None, :, :2], axis=2) / (size + others[None, :, 2])
    return tuple(tries[gap.min(1).argmax()])


def _thing(rng: np.random.Generator, label: str | None, size: float, xy: tuple, shifted: bool) -> Thing:
    if label is None:
        family = str(rng.choice(list(FAMILIES)))
        outline, direction = str(rng.choice((SHIFT_DISTRACTORS if shifted else DISTRACTORS)[family])), "n"
    else:
        cast = (SHIFT_CAST if shifted else CAST)[label]
        family, outline = FAMILY_OF[label], str(rng.choice(list(cast)))
        direction = cast[outline]
    return Thing(
        outline=outline, direction=direction, family=family, label=label, material=label,
        x=float(xy[0]), y=float(xy[1]), size=float(size),
        angle=float(rng.normal(0, 11)), shear=float(rng.normal(0, 0.12)), flip=bool(rng.random() < 0.5),
        camouflaged=bool(rng.random() < CAMOUFLAGE_RATE), seed=int(rng.integers(2**31)),
    )  # fmt: skip


def sample_scene(rng: np.random.Generator, *, iconic: bool = False, shifted: bool = False) -> Scene:
    """Draw a scene with 1 to 3 tags and 1 to 3 distractors; `iconic` draws one large object and at most one."""
    frame = _frame(rng)
    count = 1 if iconic else int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.30]))
    labels = _classes(rng, count)
    place = _place(rng, labels[0])
    largest = {1: (0.65, 0.92), 2: (0.52, 0.74), 3: (0.44, 0.62)}[count]
    seats: list[tuple] = []
    things = []
    extra = [labels[0]] if not iconic and count < 3 and rng.random() < 0.15 else []
    for label in labels + extra:
        size = rng.uniform(*((0.6, 0.98) if iconic else largest)) * min(frame)
        xy = _seat(rng, frame, size, seats)
        seats.append((*xy, size))
        things.append(_thing(rng, label, size, xy, shifted))
    order = list(rng.permutation(len(things)))
    things = [things[i] for i in order]
    for _ in range(int(rng.integers(0, 2) if iconic else rng.integers(1, 4))):
        size = rng.uniform(0.24, 0.5) * min(frame)
        xy = _seat(rng, frame, size, seats)
        seats.append((*xy, size))
        things.insert(0 if rng.random() < 0.7 else len(things), _thing(rng, None, size, xy, shifted))
    return Scene(*frame, place, tuple(things), shifted, int(rng.integers(2**31)))


def in_studio(scene: Scene) -> Scene:
    """Take the distractors away and the place out of focus, as in pictures of one thing for its own sake."""
    return replace(scene, things=tuple(t for t in scene.things if t.label), out_of_focus=True)


def on_place(scene: Scene, place: str) -> Scene:
    """Move the scene to another place.

    Raises:
        ValueError: if there is no such place.
    """
    if place not in PLACES:
        raise ValueError(f"unknown place '{place}'; choose one of {', '.join(PLACES)}")
    return replace(scene, place=place)


def without_part(scene: Scene, label: str) -> Scene:
    """Hide the discriminative part of a class: its objects wear the family's material all over."""
    return replace(scene, things=tuple(replace(t, material=None) if t.label == label else t for t in scene.things))


def in_material(scene: Scene, label: str, material: str) -> Scene:
    """Dress the part of a class in the material of another class.

    Raises:
        ValueError: if no class has that material.
    """
    if material not in CLASSES:
        raise ValueError(f"unknown class '{material}'; choose one of {', '.join(CLASSES)}")
    return replace(scene, things=tuple(replace(t, material=material) if t.label == label else t for t in scene.things))


def with_distractor(scene: Scene, rng: np.random.Generator) -> Scene:
    """Put one more unlabelled thing in front."""
    frame = (scene.width, scene.height)
    size = 0.35 * min(frame)
    xy = _seat(rng, frame, size, [(t.x, t.y, t.size) for t in scene.things])
    return replace(scene, things=(*scene.things, _thing(rng, None, size, xy, scene.shifted)))
