"""The CAM explorer's widgets."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ipywidgets as widgets

from diclip.explorers.board import STYLE, Board, Picker, choose, lacking, slider
from diclip.explorers.cam import LADDERS, VIEWS, CamChoice, CamExplorer, CamView, refinements, words_of
from diclip.explorers.core import Studio
from diclip.explorers.pictures import HEATS
from diclip.settings import for_method, shown
from diclip.surgery import ATTENTIONS

GROUPS = {
    "Picture": ("split", "index", "folder", "upload"),
    "System": ("method", "rung", "beside"),
    "Patches": ("attention", "surgery_blocks", "bias_strength", "acr", "memory_weight"),
    "Labels": ("refinement", "rule", "score"),
    "Look": ("opacity", "colours"),
}
OWN = "own"  # a menu shows nothing where None is chosen
RULES = {"as the rung has it": OWN, "fixed score": "fixed", "1 − largest map": "one_minus_max"}


def explore_cams(studio: Studio, start: CamChoice | None = None) -> Board:
    """Return the CAM explorer, to be shown as the last expression of a cell.

    explore_cams(Studio(settings), CamChoice(Pick(index=7), method="clip", rung="intra"))
    """
    return _CamBoard(CamExplorer(studio), start or CamChoice()).board


class _CamBoard:
    def __init__(self, explorer: CamExplorer, start: CamChoice) -> None:
        self.explorer, self.studio = explorer, explorer.studio
        self.own_classes = start.classes is not None  # else they follow the picture
        self.picker = Picker(self.studio, start.pick)
        self.toggles = {name: _toggle(name) for name in self.studio.classes}
        self.all, self.none = (widgets.Button(description=x, layout=_narrow()) for x in ("as tagged", "none"))
        self.save = widgets.Button(description="save masks and figure", icon="save", layout={"width": "200px"})
        self.saved = widgets.HTML()
        controls = {**self.picker.controls, **self._system(start), **self._labels(start), **self._words(start)}
        self._enable(controls)
        controls["method"].observe(self._other_method, names="value")
        for name in ("rung", "rule"):
            controls[name].observe(lambda change: self._enable(self.controls), names="value")
        for name in ("split", "index", "folder", "upload"):
            controls[name].observe(self._follow, names="value")
        self.controls = controls
        toggles = widgets.Box([*self.toggles.values(), self.all, self.none])
        toggles.layout = widgets.Layout(flex_flow="row wrap")
        below = [
            widgets.HTML("<b>Classes</b> to look for"),
            toggles,
            controls["words"],
            controls["background_words"],
            widgets.HBox([self.save, self.saved]),
        ]
        for name in start.classes or ():
            self.toggles[name].value = True
        groups = {name: (*names, *lacking(self.studio, name)) for name, names in GROUPS.items()}
        self.board = Board(controls, groups, read=self.read, draw=explorer.view, below=below, shown=self._shown)
        for toggle in self.toggles.values():
            toggle.observe(self._toggled, names="value")
        self.all.on_click(lambda button: self._choose(None))
        self.none.on_click(lambda button: self._choose(()))
        self.save.on_click(self._save)
        self.board.controls.update({f"class {name}": toggle for name, toggle in self.toggles.items()}, save=self.save)

    def _system(self, start: CamChoice) -> dict[str, widgets.Widget]:
        lacks, settings, blocks = self.studio.lacks, self.studio.settings, len(self.studio.clip.blocks)
        methods = [name for name in LADDERS if name != "diclip" or not lacks]
        ladder = LADDERS[start.method]
        strength, weight = (
            getattr(settings if value is None else start, name)
            for name, value in (("bias_strength", start.bias_strength), ("memory_weight", start.memory_weight))
        )
        acr = settings.acr if start.acr is None else start.acr
        menu = [kind for kind in ATTENTIONS if kind != "bias"]
        return {
            "method": choose("method", methods, start.method),
            "rung": choose("up to rung", ladder, start.rung),
            "beside": choose("side by side", VIEWS, start.beside),
            "attention": choose("attention", menu, start.attention or settings.attention),
            "surgery_blocks": slider(
                widgets.IntSlider, "in last blocks", start.surgery_blocks or settings.surgery_blocks, 1, blocks, 1
            ),
            "bias_strength": slider(widgets.FloatSlider, "correlation", strength, 0, 20, 0.5),
            "acr": widgets.Checkbox(acr, description="even it out by clusters (ACR)", indent=False),
            "memory_weight": slider(widgets.FloatSlider, "memory", weight, 0, 1, 0.01),
        }

    def _labels(self, start: CamChoice) -> dict[str, widgets.Widget]:
        score = self.explorer.background(start) if start.score is None else start.score
        return {
            "refinement": choose("refine by", refinements(), start.refinement),
            "rule": choose("background", list(RULES.items()), start.rule or OWN),
            "score": slider(widgets.FloatSlider, "its score", score, 0, 1, 0.01),
            "opacity": slider(widgets.FloatSlider, "opacity", start.opacity, 0, 1, 0.05),
            "colours": choose("colours", HEATS, start.colours),
        }

    def _words(self, start: CamChoice) -> dict[str, widgets.Widget]:
        background = start.background_words
        background = self.studio.settings.background_words if background is None else background
        wide = {"continuous_update": False, "style": STYLE, "layout": widgets.Layout(width="auto")}
        own, behind = ", ".join(start.words), ", ".join(background)
        hint = "any words, apart by commas: each gets a map, such as: little bird, thing with bubbly glass"
        return {
            "words": widgets.Text(own, description="own words", placeholder=hint, **wide),
            "background_words": widgets.Textarea(behind, description="background", rows=2, **wide),
        }

    def _other_method(self, change: Any) -> None:
        """Offer the new system's rungs, and what it has for the attention."""
        method, rungs = change["new"], LADDERS[change["new"]]
        keep, own = self.controls["rung"].value, for_method(self.studio.settings, method)
        with self._quiet():
            self.controls["rung"].options = rungs
            self.controls["rung"].value = keep if keep in rungs else rungs[min(1, len(rungs) - 1)]
            self.controls["attention"].value = own.attention
            self.controls["surgery_blocks"].value = own.surgery_blocks
        self._enable(self.controls)

    def _enable(self, controls: dict[str, Any]) -> None:
        """Offer what the chosen system and rung use."""
        method = controls["method"].value
        choice = CamChoice(method=method, rung=controls["rung"].value)
        raw = choice.rung not in ("caa", "rar")
        fixed = controls["rule"].value == "fixed" or (controls["rule"].value == OWN and raw)
        controls["score"].disabled = not fixed
        if controls["rule"].value == OWN and hasattr(self, "board"):
            with self._quiet():
                controls["score"].value = self.explorer.background(choice)
        for name, used in (
            ("attention", method != "clip-es"),
            ("surgery_blocks", method != "clip-es"),
            ("bias_strength", method == "diclip"),
            ("acr", method == "diclip"),
            ("memory_weight", method == "diclip"),
        ):
            controls[name].disabled = not used
            controls[name].tooltip = "" if used else (self.studio.lacks or f"not part of {method}")

    def _quiet(self) -> AbstractContextManager[Any]:
        return self.board.quietly() if hasattr(self, "board") else nullcontext()

    def _follow(self, change: Any) -> None:
        self.own_classes = False

    def _toggled(self, change: Any) -> None:
        if not self.board._held:
            self.own_classes = True
            self.board.request()

    def _choose(self, classes: tuple[str, ...] | None) -> None:
        with self.board.quietly():
            for name, toggle in self.toggles.items():
                toggle.value = name in (classes or ())
        self.own_classes = classes is not None
        self.board.request()

    def _shown(self, view: CamView) -> None:
        if not self.own_classes:
            for name, toggle in self.toggles.items():
                toggle.value = name in view.classes

    def read(self) -> CamChoice:
        """Return what the widgets say."""
        values = {name: control.value for name, control in self.controls.items() if name not in Picker.names}
        values["words"] = words_of(values["words"])
        values["rule"] = None if values["rule"] == OWN else values["rule"]
        values["background_words"] = words_of(values["background_words"])
        classes = tuple(name for name, toggle in self.toggles.items() if toggle.value) if self.own_classes else None
        return CamChoice(self.picker.pick(), classes=classes, **values)

    def _save(self, button: Any) -> None:
        try:
            self.saved.value = f"written to {shown(self.explorer.save(self.read()))}"
        except (ValueError, OSError) as error:
            self.saved.value = " ".join(str(error).split())


def _toggle(name: str) -> widgets.ToggleButton:
    return widgets.ToggleButton(description=name, layout=_narrow())


def _narrow() -> widgets.Layout:
    return widgets.Layout(width="auto", height="26px")
