"""The diffusion explorer's widgets."""

from __future__ import annotations

import ipywidgets as widgets

from diclip.explorers.board import Board, Picker, choose, lacking, slider
from diclip.explorers.core import Studio
from diclip.explorers.diffusion import DiffusionChoice, DiffusionExplorer
from diclip.explorers.pictures import HEATS
from diclip.explorers.pointer import Pointer

GROUPS = {
    "Picture": ("split", "index", "folder", "upload"),
    "Patch: click the picture, or": ("row", "column", "follow"),
    "Diffusion": ("timestep", "seed", "threshold"),
    "Look": ("opacity", "colours"),
}


def explore_diffusion(studio: Studio, start: DiffusionChoice | None = None) -> Board:
    """Return the diffusion explorer, to be shown as the last expression of a cell."""
    start, settings = start or DiffusionChoice(), studio.settings
    picker, explorer = Picker(studio, start.pick), DiffusionExplorer(studio)
    pointer = Pointer(studio, picker, start.row, start.column)
    threshold = settings.correlation_threshold if start.threshold is None else start.threshold
    own = {
        "timestep": slider(
            widgets.IntSlider, "timestep", start.timestep or settings.diffusion_timesteps[0], 1, 991, 10
        ),
        "seed": slider(widgets.IntSlider, "noise seed", start.seed, 0, 20, 1),
        "threshold": slider(widgets.FloatSlider, "threshold", threshold, 0, 0.95, 0.05),
        "opacity": slider(widgets.FloatSlider, "opacity", start.opacity, 0, 1, 0.05),
        "colours": choose("colours", HEATS, start.colours),
    }
    for name in GROUPS["Diffusion"]:
        own[name].disabled = bool(studio.lacks_diffusion)

    def read() -> DiffusionChoice:
        values = {name: control.value for name, control in own.items()}
        return DiffusionChoice(picker.pick(), *pointer.place, **values)

    groups = {name: (*names, *lacking(studio, name)) for name, names in GROUPS.items()}
    board = Board({**picker.controls, **pointer.controls, **own}, groups, read=read, draw=explorer.view)
    pointer.watch(board)
    return board
