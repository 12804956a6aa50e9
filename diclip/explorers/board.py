"""Lay widgets around one picture: a change draws it again, in the background, and only the newest wish counts."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import escape
from time import perf_counter
from typing import Any

import ipywidgets as widgets
import numpy as np

from diclip.data.images import pictures_in
from diclip.explorers import pictures
from diclip.explorers.core import Pick, Studio, View

LOG = logging.getLogger(__name__)
WORKER = ThreadPoolExecutor(1, thread_name_prefix="explorer")  # one at a time: models share the processor's cores
STYLE = {"description_width": "92px"}
SPLITS = ("train", "tune", "val", "shift")


class Board:
    """Show what `draw` makes of what `read` returns, and again whenever one of the `controls` changes.

    `read` runs where the widgets live, `draw` in a thread; an error of theirs becomes a line below the picture, which
    stays. `groups` name the controls beside the picture (or hold
    other widgets), under headings; `below` are those below it. Without a running
    event loop, as in tests and scripts, and with DICLIP_HEADLESS in the environment, all happens at once.
    """

    def __init__(
        self,
        controls: Mapping[str, widgets.Widget],
        groups: Mapping[str, Sequence[str | widgets.Widget]],
        *,
        read: Callable[[], Any],
        draw: Callable[[Any], View],
        below: Sequence[widgets.Widget] = (),
        shown: Callable[[Any], None] = lambda view: None,
    ) -> None:
        self.controls, self._read, self._draw, self._shown = dict(controls), read, draw, shown
        self._wanted = self._done = self.dropped = 0
        self._task: asyncio.Task[None] | None = None
        self._held = False
        self._pixels = np.full((64, 64, 3), 255, np.uint8)
        self.picture = widgets.Image(format="png", value=pictures.png(self._pixels))
        self.picture.layout = widgets.Layout(width="auto", max_width="100%", object_fit="contain")
        self.line, self.doubts = widgets.HTML(), widgets.HTML()
        for control in self.controls.values():
            control.observe(self.request, names="value")
        column = []
        for heading, names in groups.items():
            own = [self.controls[name] if isinstance(name, str) else name for name in names]
            column += [widgets.HTML(f"<b>{escape(heading)}</b>"), *own]
        left = widgets.VBox([self.doubts, self.picture, self.line, *below])
        left.layout = widgets.Layout(flex="1 1 480px", min_width="0", max_width="820px")
        right = widgets.VBox(column, layout=widgets.Layout(flex="0 1 330px", min_width="280px"))
        around = widgets.Layout(flex_flow="row wrap", width="100%", grid_gap="16px")
        self.box = widgets.Box([left, right], layout=around)
        self.box.add_class("diclip-explorer")  # the browser test looks for it
        self.request()

    def __getitem__(self, name: str) -> widgets.Widget:
        return self.controls[name]

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if _headless():  # a notebook that is run unseen keeps a picture, not the widgets' empty places
            return {"image/png": pictures.png(self._pixels, small=True), "text/plain": repr(self)}
        return self.box._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        return f"<explorer with {len(self.controls)} controls>"

    @contextmanager
    def quietly(self) -> Any:
        """Change controls without drawing for each."""
        self._held, before = True, self._held
        try:
            yield
        finally:
            self._held = before

    def request(self, change: Any = None) -> None:
        """Draw what is wanted now; a wish that another overtakes before its turn is dropped."""
        if self._held:
            return
        self._wanted += 1
        try:
            loop = None if _headless() else asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:
            number, choice = self._next()
            self._show(number, *self._attempt(choice))
            return
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._follow())

    async def _follow(self) -> None:
        while self._done != self._wanted:
            number, choice = self._next()
            work = asyncio.get_running_loop().run_in_executor(WORKER, self._attempt, choice)
            waited, _ = await asyncio.wait([work], timeout=0.15)
            if not waited:  # a word only where one would notice
                self.line.value = "<i>working …</i>"
            self._show(number, *await work)

    def _next(self) -> tuple[int, Any]:
        self.dropped += self._wanted - self._done - 1
        try:
            return self._wanted, self._read()
        except (ValueError, OSError) as error:
            return self._wanted, error

    def _attempt(self, choice: Any) -> tuple[View | None, bytes, str]:
        """Draw; return the view, its PNG and what to say: an error is told in one line."""
        if isinstance(choice, Exception):
            return None, b"", _told(choice)
        start = perf_counter()
        try:
            view = self._draw(choice)
            data = pictures.png(view.pixels)
        except (ValueError, OSError) as error:
            return None, b"", _told(error)
        except Exception as error:  # the widget is the border: the log has the traceback, the reader a line
            LOG.exception("an explorer failed")
            return None, b"", _told(error)
        return view, data, f"{escape(view.line)} <span style='color:#888'>· {perf_counter() - start:.2f} s</span>"

    def _show(self, number: int, view: View | None, data: bytes, line: str) -> None:
        self._done = number
        self.line.value = line
        if view is None:
            return
        self.picture.value, self._pixels = data, view.pixels
        style = "background:#fff3cd;color:#533f03;padding:4px 8px;border-left:4px solid #d39e00"
        self.doubts.value = "".join(f"<div style='{style}'>{escape(doubt)}</div>" for doubt in view.doubts)
        with self.quietly():
            self._shown(view)


def _headless() -> bool:
    return bool(os.environ.get("DICLIP_HEADLESS"))


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, ValueError | OSError)
    return f"<span style='color:#b00020'>{escape(text if expected else f'{type(error).__name__}: {text}')}</span>"


def slider(kind: type[widgets.Widget], name: str, value: float, low: float, high: float, step: float) -> Any:
    """Make a slider that speaks while it moves."""
    return kind(value, min=low, max=high, step=step, description=name, style=STYLE, layout=_wide())


def choose(name: str, options: Sequence[Any], value: Any) -> widgets.Dropdown:
    """Make a menu."""
    return widgets.Dropdown(options=options, value=value, description=name, style=STYLE, layout=_wide())


def lacking(studio: Studio, group: str) -> list[widgets.HTML]:
    """Say below a group of controls what it lacks, if it does."""
    what, why = {"System": ("diclip", studio.lacks), "Diffusion": ("this", studio.lacks_diffusion)}.get(
        group, ("", None)
    )
    return [widgets.HTML(f"<span style='color:#666'>{what} is off: {escape(why)}</span>")] if why else []


def _wide() -> widgets.Layout:
    return widgets.Layout(width="auto", min_width="240px")


class Picker:
    """Hold the widgets that say which picture is meant: split and number, a folder, or an uploaded file."""

    names = ("split", "index", "folder", "upload")

    def __init__(self, studio: Studio, pick: Pick) -> None:
        self.studio, self._upload = studio, None
        have = [split for split in dict.fromkeys((pick.split, *SPLITS)) if _has(studio, split)]
        self.split = choose("split", have, pick.split)
        self.index = slider(widgets.IntSlider, "number", pick.index, 0, len(studio.dataset(pick.split)) - 1, 1)
        self.folder = widgets.Text(
            description="or a folder", placeholder="of pictures", continuous_update=False, style=STYLE, layout=_wide()
        )
        self.upload = widgets.FileUpload(description="or upload a picture", multiple=False, layout=_wide())
        self.index.observe(self._other_index, names="value")
        self.split.observe(self._other_split, names="value")
        self.folder.observe(self._other_folder, names="value")
        self.upload.observe(self._uploaded, names="value")

    @property
    def controls(self) -> dict[str, widgets.Widget]:
        """Return the widgets by name."""
        return {name: getattr(self, name) for name in self.names}

    def pick(self) -> Pick:
        """Return which picture is meant now."""
        return Pick(self.split.value, self.index.value, self.folder.value.strip(), self._upload)

    def _other_index(self, change: Any) -> None:
        self._upload = None

    def _other_split(self, change: Any) -> None:
        self._upload, self.folder.value = None, ""
        self.index.max = len(self.studio.dataset(self.split.value)) - 1

    def _other_folder(self, change: Any) -> None:
        self._upload = None
        try:
            self.index.max = len(pictures_in(self.folder.value.strip())) - 1 if self.folder.value.strip() else 0
        except (ValueError, OSError):
            return  # who draws says so
        if not self.folder.value.strip():
            self.index.max = len(self.studio.dataset(self.split.value)) - 1

    def _uploaded(self, change: Any) -> None:
        if self.upload.value:
            file = self.upload.value[0]
            self._upload = (file["name"], bytes(file["content"]))


def _has(studio: Studio, split: str) -> bool:
    try:
        return len(studio.dataset(split)) > 0
    except OSError:
        return False
