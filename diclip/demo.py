"""Show the whole thing on the embedded default: every teaching notebook, then the ladder of rungs."""

from __future__ import annotations

import base64
import os
import shutil
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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

    Two of these run at a time. The ladder is DiCLIP's on the first `IMAGES` images unless the settings say otherwise.
    Writes runs/demo: the executed notebooks, figures/ with every picture in them, and ladder.json. An older demo is
    replaced only when all has succeeded. Raises what `run_notebook` and `evaluate` raise.
    """
    final = ROOT / "runs" / "demo"
    fresh = final.with_name("demo-unfinished")
    changed = {name: getattr(settings, name) for name in settings.model_fields_set - {"run_dir"}}
    system = load_settings(**{"method": "diclip", "limit": IMAGES} | changed)
    first, *others = sorted((ROOT / "notebooks").glob(NOTEBOOKS))
    play = partial(_play, changed=changed, folder=fresh)
    final.parent.mkdir(exist_ok=True)
    with locked(final.parent), _pool() as pool:
        shutil.rmtree(fresh, ignore_errors=True)  # what a demo that failed has left to look at
        pool.submit(play, first).result()  # alone, since it draws MiniVOC
        jobs: list[Future[Any]] = [*(pool.submit(play, notebook) for notebook in others)]
        jobs.append(pool.submit(evaluate, system, silent))
        try:
            *_, evaluation = [job.result() for job in progress(jobs, desc="notebooks and ladder")]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        write_json(fresh / "ladder.json", evaluation)
        _replace_folder(fresh, final)
    figures = sorted(shown(path) for path in (final / "figures").glob("*.png"))
    return {"evaluation": evaluation, "folder": shown(final), "figures": figures}


def _pool() -> ProcessPoolExecutor:
    """Return two workers with half the processor each: small models do not keep a whole one busy."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_take_half)


def _take_half() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))


def _play(notebook: Path, *, changed: dict[str, Any], folder: Path) -> None:
    """Execute a notebook below `folder` and keep its pictures."""
    executed = run_notebook(notebook, {**changed, "run_dir": str(folder / notebook.stem)})
    save_pictures(executed, folder / "figures")


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
