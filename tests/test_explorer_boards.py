"""Widgets without a browser: a value is set, the picture changes; outdated wishes, work in progress, errors."""

import asyncio
import logging
import threading
import time

import numpy as np
import pytest

from diclip.explorers import pictures
from diclip.explorers.board import Board, slider
from diclip.explorers.cam import CamChoice
from diclip.explorers.cam_board import explore_cams
from diclip.explorers.core import Pick, View
from diclip.explorers.patch import PatchChoice
from diclip.explorers.patch_board import explore_patches

widgets = pytest.importorskip("ipywidgets")


# Widgets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", 3),
        ("split", "shift"),
        ("method", "excel"),
        ("rung", "clip"),
        ("beside", "rungs"),
        ("attention", "vv"),
        ("surgery_blocks", 1),
        ("refinement", "PAR"),
        ("rule", "one_minus_max"),
        ("score", 0.95),
        ("opacity", 0.1),
        ("colours", "viridis"),
        ("words", "zebra"),
        ("background_words", "sky"),
        ("class cat", True),
    ],
)
def test_every_widget_changes_the_picture(studio, name, value):
    board = explore_cams(studio, CamChoice(Pick(index=1), classes=("dog",)))
    before = board.picture.value
    assert bytes(before[:4]) == b"\x89PNG"
    board[name].value = value
    assert board.picture.value != before and "b00020" not in board.line.value


def test_toggles_follow_the_picture_until_one_is_pressed(studio):
    board = explore_cams(studio)

    def on() -> set[str]:
        return {name[6:] for name, control in board.controls.items() if name.startswith("class ") and control.value}

    board["index"].value = 2
    assert on() == set(studio.photo(Pick(index=2)).tags)
    other = next(name for name in studio.classes if name not in on())
    board[f"class {other}"].value = True
    assert on() == {*studio.photo(Pick(index=2)).tags, other}
    board["opacity"].value = 0.3
    assert other in on()
    board["index"].value = 4
    assert on() == set(studio.photo(Pick(index=4)).tags)


@pytest.mark.parametrize(
    ("name", "value"),
    [("row", 3), ("column", 2), ("kind", "v–v"), ("block", 1), ("head", 1), ("index", 3), ("opacity", 0.2)],
)
def test_every_patch_widget_changes_the_picture(studio, name, value):
    board = explore_patches(studio, PatchChoice(Pick(index=1)))
    before = board.picture.value
    board[name].value = value
    assert board.picture.value != before and "b00020" not in board.line.value


def test_a_click_chooses_the_patch_and_a_mouse_is_followed_if_asked(studio):
    board = explore_patches(studio, PatchChoice(Pick(index=1)))
    height, width = pictures.fit(studio.photo(Pick(index=1)).image).shape[:2]

    def at(kind: str, row: int, column: int, panel: int = 0) -> tuple[int, int]:
        x = panel * (width + pictures.GAP) + (column + 0.5) * width / 16
        board.pointed({"type": kind, "dataX": x, "dataY": pictures.TITLE + (row + 0.5) * height / 16})
        return board["row"].value, board["column"].value

    before = board.picture.value
    assert at("click", 3, 12) == (3, 12) and board.picture.value != before
    assert at("click", 15, 0, panel=1) == (15, 0)  # on the map beside it
    assert at("mousemove", 1, 1) == (15, 0)
    board["follow"].value = True
    assert at("mousemove", 1, 1) == (1, 1)
    board.pointed({"type": "click", "dataX": 5, "dataY": 5})  # on the title
    assert (board["row"].value, board["column"].value) == (1, 1)


def test_outdated_wishes_are_dropped():
    drawn, begun, go = [], threading.Event(), threading.Event()

    def draw(value: int) -> View:
        begun.set()
        assert go.wait(60)
        drawn.append(value)
        return View(np.full((8, 8, 3), value, np.uint8), f"drew {value}")

    async def drag() -> Board:
        number = slider(widgets.IntSlider, "number", 0, 0, 100, 1)
        board = Board({"number": number}, {"all": ["number"]}, read=lambda: number.value, draw=draw)
        while not begun.is_set():
            await asyncio.sleep(0.01)
        for value in range(1, 51):  # while the first is being drawn
            number.value = value
        go.set()
        await board._task
        return board

    board = asyncio.run(drag())
    assert drawn == [0, 50] and board.dropped == 49 and "drew 50" in board.line.value


def test_work_in_progress_is_shown():
    seen = []

    async def wait() -> None:
        number = slider(widgets.IntSlider, "number", 0, 0, 9, 1)
        draw = lambda value: time.sleep(0.4) or View(np.zeros((8, 8, 3), np.uint8), "done")  # noqa: E731
        board = Board({"number": number}, {"all": ["number"]}, read=lambda: number.value, draw=draw)
        board.line.observe(lambda change: seen.append(change["new"]), names="value")
        await board._task

    asyncio.run(wait())
    assert "working" in seen[0] and "done" in seen[-1]


@pytest.mark.parametrize("error", [ValueError("a\nb <b>"), OSError("a b <b>"), ZeroDivisionError("a b <b>")], ids=repr)
def test_an_error_is_a_line_and_the_picture_stays(error, caplog):
    def draw(value: int) -> View:
        if value == 1:
            raise error
        return View(np.full((8, 8, 3), value, np.uint8), f"drew {value}")

    number = slider(widgets.IntSlider, "number", 0, 0, 9, 1)
    board = Board({"number": number}, {"all": ["number"]}, read=lambda: number.value, draw=draw)
    before = board.picture.value
    with caplog.at_level(logging.ERROR):
        number.value = 1
    assert board.picture.value == before and "\n" not in board.line.value
    assert "a b &lt;b&gt;" in board.line.value and "Traceback" not in board.line.value
    assert bool(caplog.records) == isinstance(error, ZeroDivisionError)  # what nobody expected is logged
    number.value = 2
    assert board.picture.value != before and "drew 2" in board.line.value
