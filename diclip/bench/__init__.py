"""Time the stages of the methods, and compare them with plain references: `diclip bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

from diclip.settings import Settings, Stage

STAGES: tuple[str, ...] = get_args(Stage)
T = TypeVar("T")


def bench(settings: Settings, progress: Callable[..., Iterable[str]]) -> dict[str, Any]:
    """Measure the settings' `bench_stages`, or all; return the rows, and what they depend on.

    Each stage has a process of its own, its reference's memory another, so that peaks are theirs alone. A stage that
    cannot run here, for want of a package or of weights, is an error if it was named, else it is listed as skipped.
    Raises ValueError for that, for a stage that differs from its reference, and for a process that was killed.
    """
    from diclip.bench.measure import Unequal, measure, measure_reference
    from diclip.bench.stages import prepare
    from diclip.runs import environment, pick_device

    pick_device(settings.device)
    stages, rows, skipped = tuple(dict.fromkeys(settings.bench_stages)) or STAGES, [], {}
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "inputs.safetensors")
        images = _apart("inputs", prepare, settings, path)
        for stage in progress(stages, total=len(stages), desc="stages"):
            try:
                row = _apart(stage, measure, stage, settings, path)
            except Unequal:
                raise
            except ValueError as error:
                if settings.bench_stages:
                    raise
                skipped[stage] = str(error)
                continue
            if row["ratio"] is not None:
                row["reference_peak_mb"] = _apart(stage, measure_reference, stage, settings, path)
            rows.append(row)
    return {
        "rows": rows,
        "skipped": skipped,
        "images": images,
        "environment": environment(),
        "settings": settings.model_dump(mode="json"),
    }


def _apart(name: str, call: Callable[..., T], *arguments: Any) -> T:
    """Call in a fresh process; ValueError if it dies."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool:
            raise ValueError(f"stage {name}: its process was killed, perhaps for want of memory") from None


def bench_table(results: Mapping[str, Any]) -> str:
    """Lay what `bench` returned out as a Markdown table, with what it depends on below."""
    columns = ("stage", "s an image", "plain reference", "faster", "peak, MB", "reference's, MB")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in results["rows"]:
        numbers = (row["seconds_per_image"], row["reference_seconds_per_image"])
        cells = [f"`{row['stage']}`", *map(digits, numbers)]
        cells.append(f"{digits(row['ratio'])}×" if row["ratio"] is not None else "–")
        cells += ["–" if row[name] is None else f"{row[name]:.0f}" for name in ("peak_mb", "reference_peak_mb")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions(results)])


def conditions(results: Mapping[str, Any]) -> str:
    """Say in a sentence or two what the rows of `bench` depend on."""
    settings, where = results["settings"], results["environment"]
    kinds = sorted({row["device"] for row in results["rows"]})
    weights = "random weights" if settings["random_weights"] else "its own weights"
    drawn = all(name.startswith("MiniVOC") for name in results["images"])
    text = (
        f"{settings['bench_images']} {'MiniVOC scenes' if drawn else 'photographs'} of {settings['image_size']} px at "
        f"a time, {settings['bench_tags']} classes present in each; {settings['clip_model']} with {weights}; "
        f"{', '.join(kinds) or 'nothing ran'}: {where['device']}, {where['threads']} thread(s), "
        f"torch {where['packages']['torch']}. Memory is what a stage takes beyond its inputs and its model."
    )
    for row in results["rows"]:
        if row.get("workers"):
            seconds = digits(row["workers_seconds_per_image"])
            text += f" `{row['stage']}` runs in one process; in {row['workers']}: {seconds} s."
    return text


def digits(value: float | None) -> str:
    """Show three significant digits, or as many as there are before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.2g}"
