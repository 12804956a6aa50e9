"""Run many trainings, or notebooks, one by one or at once: what is finished is skipped, what failed is listed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diclip.cluster import as_tasks, check_ray
from diclip.compare import load_result
from diclip.evaluate import Progress, silent
from diclip.runs import is_finished, locked, write_json
from diclip.score import Counts, miou, paired_interval
from diclip.settings import ROOT, Folder, load_settings, shown
from diclip.train import FREE

MEASURED = ("val_miou", "pseudo_miou", "training_free_miou", "full_supervision_miou", "seconds", "peak_mb")


TAUGHT = ("method", "supervision", "train_images", "split")


class Sweep(BaseModel):
    """Hold what a sweep's file says: every variant, with the base's settings, at every point of the grid.

        run_dir: runs/ablations
        base: {preset: mini, method: diclip}
        variants: {whole: {}, without_vce: {bias_strength: 0}}
        grid: {seed: [0, 1, 2]}

    Each run is a training in the folder run_dir/VARIANT/NAME=VALUE,…, or the `notebook` if one is named. On a `cluster`
    the folders and this package are where all machines see them, and a run has `gpu_share` of a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: Folder
    base: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = Field({"all": {}}, min_length=1)
    grid: dict[str, list[Any]] = {}
    notebook: str | None = None
    cluster: bool = False
    gpu_share: float = Field(1.0, gt=0, le=1)

    def folder(self, variant: str, name: str) -> Path:
        """Return where a run lies."""
        return self.run_dir / variant / name

    def runs(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield each run's variant, point of the grid, and settings; raise ValueError for settings that do not fit."""
        for variant, changed in self.variants.items():
            for values in product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                name = ",".join(f"{key}={value}" for key, value in point.items()).replace("/", "-") or "run"
                given = {**self.base, **changed, **point, "run_dir": str(self.folder(variant, name))}
                load_settings(**given)
                yield variant, name, given


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file, here or in notebooks/; raise FileNotFoundError and ValueError, in one line, for no such."""
    places = [Path(path), ROOT / "notebooks" / path, ROOT / "notebooks/params" / path]
    found = next(filter(Path.is_file, places), None)
    if found is None:
        raise FileNotFoundError(f"there is no sweep {path}, neither here nor in notebooks/ or notebooks/params/")
    try:
        return Sweep(**(yaml.safe_load(found.read_text(encoding="utf-8")) or {}))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{shown(found)} is no YAML of a sweep: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{shown(found)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def run_sweep(path: str | Path, progress: Progress = silent, *, cluster: bool = False) -> dict[str, Any]:
    """Run what is not finished, each in a process of its own; return runs, means, differences and what failed.

    Beside each run's folder lies its output, NAME.log; run_dir/table.json holds what is returned. Running a
    sweep again runs what failed, resumes what was killed, and skips the rest. On a `cluster`, which the file may ask
    for too, runs are Ray tasks, as many at once as there are GPUs or CPUs for.
    """
    sweep = read_sweep(path)
    runs = list(sweep.runs())
    if cluster := cluster or sweep.cluster:
        check_ray()
    sweep.run_dir.mkdir(parents=True, exist_ok=True)
    with locked(sweep.run_dir):
        folders = [sweep.folder(variant, name) for variant, name, _ in runs]
        jobs = {
            folder: (folder, given, sweep.notebook)
            for folder, (*_, given) in zip(folders, runs, strict=True)
            if not _is_done(folder, given, sweep.notebook)
        }
        ended = as_tasks(_execute, jobs, gpu_share=sweep.gpu_share) if cluster else _in_turn(jobs)
        states = dict.fromkeys(folders, ("finished", None)) | dict(progress(ended, total=len(jobs), desc="sweep"))
        rows = [_row(*run[:2], folder, *states[folder]) for run, folder in zip(runs, folders, strict=True)]
        failed = [f"{row['variant']}/{row['run']}: {row.pop('reason')}" for row in rows if row["state"] == "failed"]
        pairs = {"B - A in mIoU, paired 95 % bootstrap over images": differences(sweep, rows)}
        result = {"runs": rows, "means": means(rows), **pairs, "problems": failed}
        write_json(sweep.run_dir / "table.json", result)
    return result


def _is_done(folder: Path, given: dict[str, Any], notebook: str | None) -> bool:
    """Tell whether a run is finished; raise ValueError for a training of other settings, which none may overwrite."""
    if notebook:
        return (folder / "finished.json").exists()
    return is_finished(folder, load_settings(**given), free=FREE)


def _in_turn(jobs: dict[Path, tuple[Any, ...]]) -> Iterator[tuple[Path, tuple[str, str | None]]]:
    return ((folder, _execute(*job)) for folder, job in jobs.items())


def _row(variant: str, name: str, folder: Path, state: str, reason: str | None) -> dict[str, Any]:
    row = {"variant": variant, "run": name, "state": state, **({"reason": reason} if reason else {})}
    metrics = next((path for path in (folder / "metrics.json", *folder.glob("*/metrics.json")) if path.exists()), None)
    found = json.loads(metrics.read_text(encoding="utf-8")) if metrics and state == "finished" else {}
    said = {**found.get("settings", {}), **found.get("protocol", {}), **found}
    return {**row, **{name: said.get(name) for name in (*TAUGHT, *MEASURED)}}


def _execute(folder: Path, given: dict[str, Any], notebook: str | None) -> tuple[str, str | None]:
    """Run one in a process of its own: its state, and the last line that it said if it failed."""
    parameters, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parameters.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    what = ["run", notebook, "-f"] if notebook else ["train", "--resume", "auto", "--params"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "diclip", *what, str(parameters)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DICLIP_HEADLESS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        return "failed", f"it said {lines[-1]!r} (exit code {done.returncode}); see {shown(log)}"
    return ("finished" if (folder / "finished.json").exists() else "unfinished"), None


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each variant what it learned from, and the mean of what was measured over its finished runs.

    Standard deviations (n - 1) are named ± and the number's name.
    """
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant and row["state"] == "finished"]
        line: dict[str, Any] = {"variant": variant, "runs": len(mine)}
        for name in TAUGHT:  # None where runs differ
            values = {row.get(name) for row in mine}
            line[name] = values.pop() if len(values) == 1 else None
        for name in MEASURED:
            values = [row[name] for row in mine if row[name] is not None]
            mean = sum(values) / len(values) if values else None
            line[name] = mean
            if name.endswith("miou"):
                several = len(values) > 1
                spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)) if several else None
                line[f"± {name}"] = spread
        found.append(line)
    return found


def differences(sweep: Sweep, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how much the other variants differ from the first, over the points of the grid that both have finished.

    An image's counts are summed over these points, seeds as a rule, and images are what is resampled.
    """
    stored: dict[str, dict[str, Counts]] = {}
    for row in rows:
        path = sweep.folder(row["variant"], row["run"]) / "val.json"
        if row["state"] == "finished" and path.exists():
            found = load_result(path)
            stored.setdefault(row["variant"], {})[row["run"]] = found.counts(list(found.result["ladder"])[-1])
    first, *others = sweep.variants
    found = []
    for other in others:
        shared = [name for name in stored.get(first, {}) if name in stored.get(other, {})]
        if shared:
            sums = [np.sum([stored[variant][name] for name in shared], axis=0) for variant in (first, other)]
            reached = {side: round(float(miou(x.sum(0))), 2) for side, x in zip("AB", sums, strict=True)}
            gain = paired_interval(*sums, generator=np.random.default_rng(0))
            spread = {"B - A": round(gain.value, 2), "low": round(gain.low, 2), "high": round(gain.high, 2)}
            found.append({"A is": first, "B is": other, "runs": len(shared), **reached, **spread})
    return found
