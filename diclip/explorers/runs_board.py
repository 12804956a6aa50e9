"""The run browser's widgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as widgets

from diclip.explorers.board import Board, choose, slider
from diclip.explorers.core import Studio
from diclip.explorers.runs import LOOKS, ORDERS, RunChoice, RunExplorer
from diclip.settings import ROOT

NONE = "none"
LAST = "the last"


def explore_runs(studio: Studio, start: RunChoice | None = None, *, root: Path = ROOT) -> Board:
    """Return the run browser, to be shown as the last expression of a cell.

    explore_runs(Studio(settings), RunChoice("clip-es-val", "diclip-val", look="images"))
    """
    return _RunBoard(RunExplorer(studio, root=root), start).board


class _RunBoard:
    def __init__(self, explorer: RunExplorer, start: RunChoice | None) -> None:
        self.explorer, names = explorer, list(explorer.runs)
        start = start or RunChoice(names[0] if names else NONE)
        self.controls = {
            "first": choose("A", names or [NONE], start.first),
            "second": choose("B", [NONE, *names], start.second or NONE),
            "look": choose("look at", LOOKS, start.look),
            "quantity": choose("logged", self._quantities(start.first, start.second), None),
            "first_system": choose("A's", self._systems(start.first), start.first_system or LAST),
            "second_system": choose("B's", self._systems(start.second or start.first), start.second_system or LAST),
            "order": choose("order", ORDERS, start.order),
            "rank": slider(widgets.IntSlider, "image", start.rank, 0, 999, 1),
        }
        self.controls["quantity"].value = self._best(self.controls["quantity"].options, start.quantity)
        groups = {
            "Runs": ("first", "second", "look"),
            "Curves": ("quantity",),
            "Images": ("first_system", "second_system", "order", "rank"),
        }
        for name in ("first", "second"):  # before the board looks
            self.controls[name].observe(self._other_run, names="value")
        self.board = Board(self.controls, groups, read=self.read, draw=explorer.view)

    def _systems(self, name: str) -> list[str]:
        run = self.explorer.runs.get(name)
        return [LAST, *(run.systems if run else ())]

    def _quantities(self, *names: str | None) -> list[str]:
        runs = [self.explorer.runs[name] for name in names if name in self.explorer.runs]
        return list(dict.fromkeys(each for run in runs for each in run.quantities())) or [NONE]

    def _best(self, options: Any, wanted: str) -> str:
        return wanted if wanted in options else options[0]

    def _other_run(self, change: Any) -> None:
        """Offer what the chosen runs have."""
        first, second = self.controls["first"].value, self.controls["second"].value
        offered = {
            "first_system": self._systems(first),
            "second_system": self._systems(first if second == NONE else second),
            "quantity": self._quantities(first, second),
        }
        with self.board.quietly():
            for name, options in offered.items():
                before = self.controls[name].value
                self.controls[name].options = options
                self.controls[name].value = self._best(options, before)

    def read(self) -> RunChoice:
        """Return what the widgets say."""
        values = {name: control.value for name, control in self.controls.items()}
        for name in ("first_system", "second_system"):
            values[name] = None if values[name] == LAST else values[name]
        values["second"] = None if values["second"] == NONE else values["second"]
        return RunChoice(**values)
