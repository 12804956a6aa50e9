"""Measure seconds and memory of one stage, in the process that calls."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diclip.bench.stages import Results, Stage, build
from diclip.runs import high_water, pick_device
from diclip.settings import Settings

_CLEAR = Path("/proc/self/clear_refs")  # Linux


class Unequal(ValueError):
    """Say that ours and the reference differ: then their times mean nothing."""


@torch.no_grad()
def measure(stage: str, settings: Settings, path: str) -> dict[str, Any]:
    """Return the row of a stage but for the reference's memory; `path` is the file of inputs.

    The first calls show the peak of memory, beyond what inputs and model take. Then ours and the reference take
    turns, so that whatever else the machine does slows both. Raises Unequal if they do not agree, ValueError for
    what `build` refuses.
    """
    device, made = pick_device(settings.device), build(stage, settings, path)
    first, peak, result = _warm(made.ours, settings, device)
    if made.reference is not None:
        _compare(stage, made, result, made.reference())
    del result
    calls = {"ours": made.ours, "reference": made.reference, "in_processes": made.in_processes}
    calls = {name: call for name, call in calls.items() if call is not None}
    times = _turns(calls, first, settings, device)
    each = {name: median(own) / settings.bench_images for name, own in times.items()}
    ratio = each["reference"] / each["ours"] if made.reference else None
    row = {
        "stage": stage,
        "seconds_per_image": each["ours"],
        "reference_seconds_per_image": each.get("reference"),
        "ratio": ratio,
        "peak_mb": peak,
        "reference_peak_mb": None,
        "device": str(device),
        "batch": settings.bench_images,
        "repeats": len(times["ours"]),
    }
    if made.in_processes:
        row |= {"workers": made.workers, "workers_seconds_per_image": each["in_processes"]}
    return row


@torch.no_grad()
def measure_reference(stage: str, settings: Settings, path: str) -> float | None:
    """Return the peak of memory, in MB, of a stage's reference; none without a reference."""
    made = build(stage, settings, path)
    return _warm(made.reference, settings, pick_device(settings.device))[1] if made.reference else None


def _turns(
    calls: dict[str, Callable], first: float, settings: Settings, device: torch.device
) -> dict[str, list[float]]:
    """Time the calls in turn, again and again; a first call that took all the time there is stands for all."""
    if len(calls) == 1 and first > settings.bench_seconds:
        return {name: [first] for name in calls}
    times, start = {name: [] for name in calls}, time.perf_counter()
    for repeat in range(settings.bench_repeats):
        if repeat and time.perf_counter() - start > settings.bench_seconds:
            break
        for name, call in calls.items():
            times[name].append(_seconds(call, device))
    return times


def _seconds(call: Callable, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm(call: Callable[[], Any], settings: Settings, device: torch.device) -> tuple[float, float | None, Any]:
    """Call once, and once more if there is time, since a first call also loads libraries; return as `_once` does."""
    found = _once(call, device)
    if found[0] > settings.bench_seconds:
        return found
    del found
    return _once(call, device)


def _once(call: Callable[[], Any], device: torch.device) -> tuple[float, float | None, Any]:
    """Call: seconds, the peak of memory beyond what is held before in MB, the result."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what an earlier call has freed
        if trim:
            trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) / 1e6
    else:
        if os.access(_CLEAR, os.W_OK):
            _CLEAR.write_text("5")  # what making the inputs took is no longer the peak
        held = high_water()
    start = time.perf_counter()
    result = call()
    _wait(device)
    seconds = time.perf_counter() - start
    top = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else high_water()
    return seconds, None if top is None or held is None else max(top - held, 0.0), result


def _compare(name: str, stage: Stage, ours: Results, plain: Results) -> None:
    gap, scale = (torch.stack(list(x)) for x in (ours, plain))
    gap, scale = (gap - scale).abs(), scale.abs().max()
    within = (gap <= stage.tolerance * scale).double().mean().item()  # NaN is not within
    if within < stage.share:
        found = f"{gap.max().item():.2g} apart, {100 * within:.2f} % of the values within the tolerance"
        expected = f"{100 * stage.share:g} % within {stage.tolerance:g} of the largest, {scale.item():.2g}"
        raise Unequal(f"stage {name}: ours and the plain reference are up to {found}; expected {expected}")
