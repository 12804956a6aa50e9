"""Compose a scene of MiniVOC's parts, and see what every system makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from diclip.cam import minmax
from diclip.data.minivoc import CLASSES, Rendered, Scene, Thing, render, with_distractor
from diclip.data.minivoc.backgrounds import PLACES
from diclip.data.minivoc.outlines import CAST
from diclip.data.minivoc.textures import FAMILY_OF
from diclip.explorers import pictures
from diclip.explorers.cam import CamChoice, CamExplorer, class_iou
from diclip.explorers.core import Photo, Studio, View
from diclip.explorers.pictures import Panel

FRAME = 128
SIDE = 224  # of a panel: there are eleven
OWN, HIDDEN = "its own", "hidden"
# What is shown of a scene: from CLIP's own patches to what each system has last before any refinement.
SHOWN = (("clip", "clip"), ("clip", "intra"), ("clip", "caa"), ("clip-es", "gradcam"), ("excel", "tse"))
WITH_DIFFUSION = (("diclip", "vce"), ("diclip", "tsa"), ("diclip", "rar"))


@dataclass(frozen=True)
class Piece:
    """Say which object stands where: centre and longer side in pixels of a picture of 128 x 128.

    `material` is what its discriminative part wears: its own, another class's, or nothing of the kind (hidden).
    """

    label: str = "sheep"
    outline: int = 0
    x: float = 64
    y: float = 68
    size: float = 84
    material: str = OWN
    camouflaged: bool = False


@dataclass(frozen=True)
class SceneChoice:
    """Say what stands on which place, from back to front, and which class is looked for."""

    pieces: tuple[Piece, ...] = (Piece(),)
    place: str = "grass"
    distractors: int = 1
    seed: int = 0  # of colours, shading, and all else that is not said
    look_for: str = "sheep"
    opacity: float = 0.6
    colours: str = "magma"


def compose(choice: SceneChoice) -> Scene:
    """Return the scene of a choice; raise ValueError, in one line, for what MiniVOC does not have."""
    if choice.place not in PLACES:
        raise ValueError(f"place is {choice.place!r}, expected one of {', '.join(PLACES)}")
    things = tuple(_thing(piece, choice.seed, index) for index, piece in enumerate(choice.pieces))
    scene = Scene(FRAME, FRAME, choice.place, things, False, choice.seed)
    for number in range(choice.distractors):
        scene = with_distractor(scene, np.random.default_rng([choice.seed, 1000 + number]))
    # Distractors go behind: in front they would hide what is looked for.
    return replace(scene, things=(*scene.things[len(things) :], *things))


def _thing(piece: Piece, seed: int, index: int) -> Thing:
    materials = (OWN, HIDDEN, *CLASSES)
    if piece.label not in CAST or piece.material not in materials:
        found = f"{piece.label!r} in material {piece.material!r}"
        raise ValueError(f"found {found}, expected one of {', '.join(CLASSES)}, in {OWN}, {HIDDEN} or another's")
    outlines = tuple(CAST[piece.label].items())
    outline, direction = outlines[piece.outline % len(outlines)]
    rng = np.random.default_rng([seed, index])  # another piece, size or material leaves the rest as it is
    return Thing(
        outline=outline,
        direction=direction,
        family=FAMILY_OF[piece.label],
        label=piece.label,
        material={OWN: piece.label, HIDDEN: None}.get(piece.material, piece.material),
        x=piece.x,
        y=piece.y,
        size=piece.size,
        angle=float(rng.normal(0, 8)),
        shear=float(rng.normal(0, 0.08)),
        flip=bool(rng.random() < 0.5),
        camouflaged=piece.camouflaged,
        seed=int(rng.integers(2**31)),
    )


class SceneExplorer:
    """Turn choices into views: the scene, its parts and its truth, then one class's map of every system."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.cams = studio, CamExplorer(studio)

    def view(self, choice: SceneChoice, *, side: int = SIDE) -> View:
        """Draw a choice; raise ValueError, in one line, for a wrong one."""
        if choice.look_for not in self.studio.classes:
            raise ValueError(f"{choice.look_for!r} is no class of the dataset, expected one of MiniVOC's")
        scene = compose(choice)
        drawn = self.studio.memo("scene", scene, lambda: render(scene))
        photo = photo_of(scene, drawn)
        base = pictures.fit(photo.image, side=side)
        panels = [
            Panel("scene", base),
            Panel("truth", pictures.painted(photo.mask, base.shape)),
            Panel("part (light) and body (dark)", pictures.shaded(drawn.parts, base.shape)),
            *self.maps(choice, photo, base),
        ]
        line = f"{', '.join(scene.tags) or 'nothing'} on {choice.place} · maps of {choice.look_for}, of every system"
        return View(pictures.table(panels), line)

    def maps(self, choice: SceneChoice, photo: Photo, base: pictures.Pixels) -> Iterator[Panel]:
        """Yield the map of the class that is looked for, of each system."""
        classes = tuple(name for name in self.studio.classes if name in {*photo.tags, choice.look_for})
        label = self.studio.classes.index(choice.look_for)
        for method, rung in (*SHOWN, *(() if self.studio.lacks else WITH_DIFFUSION)):
            wanted = CamChoice(method=method, rung=rung)
            settings = self.cams.settings(wanted)
            system = self.studio.system(settings)
            maps = self.cams.rungs(wanted, photo, settings, system, classes)[rung]
            labels = self.cams.labels(wanted, photo, system, maps)[0]
            iou = class_iou(labels, photo.mask, len(self.studio.classes)).get(label + 1)
            heat = minmax(maps.scores[(maps.label == label).nonzero()[0, 0]], (-2, -1))
            pixels = pictures.overlay(base, heat, opacity=choice.opacity, colours=choice.colours)
            title = f"{method} · {rung}" + ("" if iou is None else f" · IoU {100 * iou:.0f} %")
            yield Panel(title, pixels, pictures.colour_of(label))


def photo_of(scene: Scene, drawn: Rendered) -> Photo:
    """Return a painted scene as a picture with tags and truth."""
    image = torch.from_numpy(drawn.image.astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    return Photo("scene", image, scene.tags, torch.from_numpy(drawn.classes.astype(np.int64)), False)
