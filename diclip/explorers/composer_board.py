"""The scene composer's widgets."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from diclip.data.minivoc import CLASSES
from diclip.data.minivoc.backgrounds import PLACES
from diclip.data.minivoc.outlines import CAST
from diclip.explorers.board import Board, choose, lacking, slider
from diclip.explorers.composer import FRAME, HIDDEN, OWN, Piece, SceneChoice, SceneExplorer
from diclip.explorers.core import Studio
from diclip.explorers.pictures import HEATS

FIELDS = ("label", "outline", "x", "y", "size", "material", "camouflaged")
PLACES_OF = ((38, 70, 72), (90, 70, 72))  # of a first and a second object: x, y, size
NOTHING = "nothing"


def explore_scenes(studio: Studio, start: SceneChoice | None = None) -> Board:
    """Return the scene composer, to be shown as the last expression of a cell; at most two objects."""
    return _SceneBoard(SceneExplorer(studio), start or SceneChoice()).board


class _SceneBoard:
    def __init__(self, explorer: SceneExplorer, start: SceneChoice) -> None:
        if len(start.pieces) > 2:
            raise ValueError(f"found {len(start.pieces)} objects, expected at most 2: SceneExplorer draws any number")
        self.controls = {
            "place": choose("place", list(PLACES), start.place),
            "distractors": slider(widgets.IntSlider, "distractors", start.distractors, 0, 4, 1),
            "seed": slider(widgets.IntSlider, "seed", start.seed, 0, 50, 1),
            "look_for": choose("look for", CLASSES, start.look_for),
            "opacity": slider(widgets.FloatSlider, "opacity", start.opacity, 0, 1, 0.05),
            "colours": choose("colours", HEATS, start.colours),
        }
        for number in (1, 2):
            piece = start.pieces[number - 1] if number <= len(start.pieces) else None
            self.controls.update(self._piece(number, piece))
        groups = {
            "Scene": ("place", "distractors", "seed"),
            "First object": tuple(f"{name} 1" for name in FIELDS),
            "Second object": tuple(f"{name} 2" for name in FIELDS),
            "System": ("look_for", *lacking(explorer.studio, "System")),
            "Look": ("opacity", "colours"),
        }
        self.board = Board(self.controls, groups, read=self.read, draw=explorer.view)

    def _piece(self, number: int, piece: Piece | None) -> dict[str, widgets.Widget]:
        x, y, size = PLACES_OF[number - 1]
        own = piece or Piece(x=x, y=y, size=size)
        most = max(len(outlines) for outlines in CAST.values()) - 1
        made = {
            "label": choose("object", (NOTHING, *CLASSES), NOTHING if piece is None else own.label),
            "outline": slider(widgets.IntSlider, "outline", own.outline, 0, most, 1),
            "x": slider(widgets.FloatSlider, "from left", own.x, 0, FRAME, 2),
            "y": slider(widgets.FloatSlider, "from top", own.y, 0, FRAME, 2),
            "size": slider(widgets.FloatSlider, "size", own.size, 20, FRAME, 2),
            "material": choose("part wears", (OWN, HIDDEN, *CLASSES), own.material),
            "camouflaged": widgets.Checkbox(own.camouflaged, description="body like the background", indent=False),
        }
        return {f"{name} {number}": control for name, control in made.items()}

    def read(self) -> SceneChoice:
        """Return what the widgets say."""
        values: dict[str, Any] = {name: control.value for name, control in self.controls.items() if " " not in name}
        pieces = [Piece(*(self.controls[f"{name} {number}"].value for name in FIELDS)) for number in (1, 2)]
        return SceneChoice(tuple(piece for piece in pieces if piece.label != NOTHING), **values)
