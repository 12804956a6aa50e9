"""Choose a patch: by a click, by a mouse that is followed, or with two sliders, which the arrow keys move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
from ipyevents import Event

from diclip.explorers.board import Board, Picker, slider
from diclip.explorers.core import Studio
from diclip.explorers.pictures import GAP, SIDE, TITLE, fit


class Pointer:
    """Hold the widgets that say which patch is meant; in all upper panels of a board's picture a click does so too."""

    names = ("row", "column", "follow")

    def __init__(self, studio: Studio, picker: Picker, row: int, column: int) -> None:
        self.studio, self.picker = studio, picker
        (down, across), side = studio.clip.patch_size, studio.settings.image_size
        self.grid = (side // down, side // across)
        self.controls = {
            "row": slider(widgets.IntSlider, "row", row, 0, self.grid[0] - 1, 1),
            "column": slider(widgets.IntSlider, "column", column, 0, self.grid[1] - 1, 1),
            "follow": widgets.Checkbox(False, description="follow the mouse", indent=False),
        }

    @property
    def place(self) -> tuple[int, int]:
        """Return (row, column)."""
        return self.controls["row"].value, self.controls["column"].value

    def watch(self, board: Board) -> None:
        """Listen to the mouse over a board's picture."""
        self.board, board.pointed = board, self.pointed
        board.event = Event(source=board.picture, watched_events=["click", "mousemove"], wait=60)
        board.event.on_dom_event(self.pointed)

    def pointed(self, event: Mapping[str, Any]) -> None:
        """Take the patch below the pointer: a click's, or a moving mouse's if it is to be followed."""
        known = event.get("dataX") is not None  # in pixels of the picture, however large it is shown
        if not known or (event["type"] != "click" and not self.controls["follow"].value):
            return
        try:
            height, width = fit(self.studio.photo(self.picker.pick()).image, side=SIDE).shape[:2]
        except (ValueError, OSError):
            return  # the board says already that there is no picture
        x, y = event["dataX"] % (width + GAP), event["dataY"] - TITLE
        if not (0 <= x < width and 0 <= y < height):
            return
        place = int(y / height * self.grid[0]), int(x / width * self.grid[1])
        if place != self.place:
            with self.board.quietly():
                self.controls["row"].value, self.controls["column"].value = place
            self.board.request()
