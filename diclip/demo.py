"""Show the whole thing on the embedded default: every teaching notebook, then the ladder of rungs."""

from __future__ import annotations

import base64
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat

from diclip.evaluate import evaluate, silent
from diclip.runs import locked, progress, run_notebook, write_json
from diclip.settings import ROOT, Settings, load_settings, shown

NOTEBOOKS = "0[0-5]_*.ipynb"
IMAGES = 200  # of the split, that the ladder is measured on


def run_demo(settings: Settings) -> dict[str, Any]:
    """Execute the notebooks 00 to 05 and evaluate a ladder; return it and where everything is.

    The ladder is DiCLIP's on the first `IMAGES` images unless the settings say otherwise, and runs beside the
    notebooks. Writes runs/demo: the executed notebooks, figures/ with every picture in them, and ladder.json. An older
    demo is replaced only when all has succeeded. Raises what `run_notebook` and `evaluate` raise.
    """
    final = ROOT / "runs" / "demo"
    fresh = final.with_name("demo-unfinished")
    changed = {name: getattr(settings, name) for name in settings.model_fields_set - {"run_dir"}}
    system = {"method": "diclip", "limit": IMAGES} | changed
    final.parent.mkdir(exist_ok=True)
    with locked(final.parent), ThreadPoolExecutor(1) as beside:
        shutil.rmtree(fresh, ignore_errors=True)  # what a demo that failed has left to look at
        ladder = None
        for notebook in progress(sorted((ROOT / "notebooks").glob(NOTEBOOKS)), desc="notebooks and ladder"):
            executed = run_notebook(notebook, {**changed, "run_dir": str(fresh / notebook.stem)})
            save_pictures(executed, fresh / "figures")
            # Only now, since the first notebook draws MiniVOC.
            ladder = ladder or beside.submit(evaluate, load_settings(**system), silent)
        evaluation = ladder.result()
        write_json(fresh / "ladder.json", evaluation)
        _replace_folder(fresh, final)
    figures = sorted(shown(path) for path in (final / "figures").glob("*.png"))
    return {"evaluation": evaluation, "folder": shown(final), "figures": figures}


def save_pictures(notebook: Path, folder: Path) -> list[Path]:
    """Write every PNG in a notebook's outputs to FOLDER/STEM-NUMBER.png; return the files."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{notebook.stem}-{number}.png" for number in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(base64.b64decode(picture))
    return paths


def _replace_folder(fresh: Path, final: Path) -> None:
    """Rename one folder onto another, which a single rename cannot do where the other is not empty."""
    old = final.with_name(f"{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)
