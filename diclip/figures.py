"""Make every figure that the README shows: `python -m diclip.figures`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from diclip import plots
from diclip.data.minivoc import render, scene_of
from diclip.runs import replacing
from diclip.settings import ROOT

FOLDER = ROOT / "figures"


def minivoc(path: Path, *, rows: int = 4, columns: int = 8) -> None:
    """Draw the first scenes of val at their own size on one sheet."""
    pictures = [render(scene_of("val", index)).image for index in range(rows * columns)]
    with replacing(path) as temporary:
        Image.fromarray(plots.contact_sheet(pictures, columns=columns)).save(temporary, "PNG", optimize=True)


FIGURES = {"minivoc.png": minivoc}


def make_figures(folder: Path = FOLDER) -> list[Path]:
    """Write all figures into a folder; return their paths."""
    for name, draw in FIGURES.items():
        draw(folder / name)
    return [folder / name for name in FIGURES]


if __name__ == "__main__":
    make_figures()
