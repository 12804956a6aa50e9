"""The patch explorer's widgets: a click, a moving mouse or two sliders choose the patch."""

from __future__ import annotations

import ipywidgets as widgets

from diclip.explorers.board import Board, Picker, choose, lacking, slider
from diclip.explorers.core import Studio
from diclip.explorers.patch import KINDS, PatchChoice, PatchExplorer
from diclip.explorers.pictures import HEATS
from diclip.explorers.pointer import Pointer

GROUPS = {
    "Picture": ("split", "index", "folder", "upload"),
    "Patch: click the picture, or": ("row", "column", "follow"),
    "CLIP": ("kind", "block", "head"),
    "Diffusion": ("layer", "layer_head", "timestep", "seed"),
    "Look": ("opacity", "colours"),
}


def explore_patches(studio: Studio, start: PatchChoice | None = None) -> Board:
    """Return the patch explorer, to be shown as the last expression of a cell.

    explore_patches(Studio(settings), PatchChoice(Pick(index=7), row=4, column=9))
    """
    return _PatchBoard(PatchExplorer(studio), start or PatchChoice()).board


class _PatchBoard:
    def __init__(self, explorer: PatchExplorer, start: PatchChoice) -> None:
        self.explorer, self.studio = explorer, explorer.studio
        self.picker = Picker(self.studio, start.pick)
        self.pointer = Pointer(self.studio, self.picker, start.row, start.column)
        self.controls = {
            **self.picker.controls,
            **self.pointer.controls,
            **self._models(start),
            "opacity": slider(widgets.FloatSlider, "opacity", start.opacity, 0, 1, 0.05),
            "colours": choose("colours", HEATS, start.colours),
        }
        groups = {name: (*names, *lacking(self.studio, name)) for name, names in GROUPS.items()}
        self.board = Board(self.controls, groups, read=self.read, draw=explorer.view)
        self.pointer.watch(self.board)

    def _models(self, start: PatchChoice) -> dict[str, widgets.Widget]:
        blocks, settings, off = self.studio.clip.blocks, self.studio.settings, self.studio.lacks_diffusion
        heads, kinds = blocks[-1].attn.num_heads, [kind for kind in KINDS if not off or kind != "biased"]
        layers = {} if off else self.studio.diffusion.self_attentions()
        names = [(name.partition(".transformer")[0], name) for name in layers or (settings.coarse_layer,)]
        own = layers[start.layer or settings.coarse_layer].heads if layers else 1
        every = {"mean of heads": 0}
        made = {
            "kind": choose("attention", kinds, start.kind),
            "block": slider(widgets.IntSlider, "block", start.block or len(blocks), 1, len(blocks), 1),
            "head": choose("head", list({**every, **{str(n): n for n in range(1, heads + 1)}}.items()), start.head),
            "layer": choose("layer", names, start.layer or settings.coarse_layer),
            "layer_head": choose("head", list({**every, **{str(n): n for n in range(1, own + 1)}}.items()), 0),
            "timestep": slider(
                widgets.IntSlider, "timestep", start.timestep or settings.diffusion_timesteps[0], 1, 991, 10
            ),
            "seed": slider(widgets.IntSlider, "noise seed", start.seed, 0, 20, 1),
        }
        for name in ("layer", "layer_head", "timestep", "seed"):
            made[name].disabled = bool(off)
        if layers:
            made["layer"].observe(lambda change: self._heads(layers[change["new"]].heads), names="value")
        return made

    def _heads(self, count: int) -> None:
        with self.board.quietly():
            self.controls["layer_head"].options = [("mean of heads", 0), *((str(n), n) for n in range(1, count + 1))]

    def read(self) -> PatchChoice:
        """Return what the widgets say."""
        others = (*Picker.names, *Pointer.names)
        values = {name: control.value for name, control in self.controls.items() if name not in others}
        return PatchChoice(self.picker.pick(), *self.pointer.place, **values)
