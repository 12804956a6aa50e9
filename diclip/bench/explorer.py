"""Time how soon the explorers answer, from a choice to a PNG: `diclip bench --explorer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

from diclip.bench import digits
from diclip.explorers import (
    CamChoice,
    CamExplorer,
    DiffusionChoice,
    DiffusionExplorer,
    PatchChoice,
    PatchExplorer,
    Pick,
    Piece,
    SceneChoice,
    SceneExplorer,
    Studio,
)
from diclip.explorers.core import View
from diclip.explorers.pictures import png
from diclip.runs import environment
from diclip.settings import Settings

LIMITS = {"nothing new": 0.1, "CLIP": 0.3, "diffusion": 1.0}  # seconds, by what a choice needs a forward pass of
PASSES = {"CLIP": ("clip", "hidden"), "diffusion": ("diffusion",)}  # stages of the studio's memo


class Act(NamedTuple):
    """Name something that people do, what it needs, and how the n-th choice follows from the one at the start."""

    name: str
    needs: str
    view: Callable[[Any], View]
    start: Any
    change: Callable[[Any, int], Any]


def acts(studio: Studio) -> Iterator[Act]:
    """Yield what is timed; each n gives another choice, so that nothing is remembered that was not there before."""
    cams, patches = CamExplorer(studio), PatchExplorer(studio)
    cam, patch = CamChoice(Pick(index=1)), PatchChoice(Pick(index=1))
    yield Act("CAM: opacity", "nothing new", cams.view, cam, lambda c, n: replace(c, opacity=n / 40))
    yield Act("CAM: background score", "nothing new", cams.view, cam, lambda c, n: replace(c, score=n / 40))
    yield Act(
        "CAM: another class", "nothing new", cams.view, cam, lambda c, n: replace(c, classes=studio.classes[n:][:2])
    )
    yield Act("CAM: a new word", "nothing new", cams.view, cam, lambda c, n: replace(c, words=(f"thing number {n}",)))
    yield Act("CAM: another picture", "CLIP", cams.view, cam, lambda c, n: replace(c, pick=Pick(index=n + 1)))
    blocks = len(studio.clip.blocks)
    yield Act("CAM: surgery blocks", "CLIP", cams.view, cam, lambda c, n: replace(c, surgery_blocks=1 + n % blocks))
    yield Act("patch: another patch", "nothing new", patches.view, patch, lambda c, n: replace(c, row=n % 16))
    yield Act("patch: another block", "nothing new", patches.view, patch, lambda c, n: replace(c, block=1 + n % blocks))
    if studio.lacks:
        return
    full = replace(cam, method="diclip", rung="rar")
    yield Act("DiCLIP: correlation's weight", "CLIP", cams.view, full, lambda c, n: replace(c, bias_strength=n / 4))
    yield Act("DiCLIP: another picture", "diffusion", cams.view, full, lambda c, n: replace(c, pick=Pick(index=n + 30)))
    yield Act("patch: noise seed", "diffusion", patches.view, patch, lambda c, n: replace(c, seed=n))
    diffusion, choice = DiffusionExplorer(studio), DiffusionChoice(Pick(index=1))
    yield Act("diffusion: another patch", "nothing new", diffusion.view, choice, lambda c, n: replace(c, row=n % 16))
    yield Act("diffusion: noise seed", "diffusion", diffusion.view, choice, lambda c, n: replace(c, seed=n + 50))
    yield Act("diffusion: timestep", "diffusion", diffusion.view, choice, lambda c, n: replace(c, timestep=10 * n))
    scenes, scene = SceneExplorer(studio), SceneChoice((Piece("sheep", x=40, size=70), Piece("dog", x=92, size=64)))
    yield Act("scene: opacity", "nothing new", scenes.view, scene, lambda c, n: replace(c, opacity=n / 40))
    yield Act("scene: an object moves, all systems", "diffusion", scenes.view, scene, lambda c, n: replace(c, seed=n))


def bench_explorer(settings: Settings, progress: Callable[..., Iterable[Act]]) -> dict[str, Any]:
    """Time each act `bench_repeats` times; return median and worst seconds, and what they depend on.

    Raises ValueError for weights that are absent and, if an act needs more forward passes than it says, for that.
    """
    studio = Studio(settings)
    answers = []
    for act in progress(list(acts(studio)), desc="explorers"):
        png(act.view(act.start).pixels)
        times, work = [], []
        for n in range(1, settings.bench_repeats + 2):
            before = _passes(studio)
            begun, worked = perf_counter(), process_time()
            png(act.view(act.change(act.start, n)).pixels)
            times.append(perf_counter() - begun)
            work.append(process_time() - worked)
            _check(act, before, _passes(studio))
        times = times[1:]  # the first one warms
        limit = LIMITS[act.needs]
        seconds = {"median": median(times), "worst": max(times), "processor": median(work[1:]), "limit": limit}
        answers.append({"act": act.name, "needs": act.needs, **seconds, "kept": median(times) < limit})
    return {"answers": answers, "environment": environment(), "settings": settings.model_dump(mode="json")}


def _passes(studio: Studio) -> dict[str, int]:
    return {need: sum(studio.memo.made[stage] for stage in stages) for need, stages in PASSES.items()}


def _check(act: Act, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    new = [need for need in PASSES if after[need] > before[need]]
    allowed = {"nothing new": (), "CLIP": ("CLIP",), "diffusion": ("CLIP", "diffusion")}[act.needs]
    if set(new) - set(allowed):
        raise ValueError(f"{act.name} needs {act.needs}, but passes of {', '.join(new)} were made")


def explorer_table(results: Mapping[str, Any]) -> str:
    """Lay what `bench_explorer` returned out as a Markdown table, with what it depends on below."""
    columns = ("what one does", "needs", "median, s", "worst, s", "of a processor, s", "bar, s")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|---:|"]
    for row in results["answers"]:
        numbers = " | ".join(digits(row[name]) for name in ("median", "worst", "processor"))
        lines.append(f"| {row['act']} | {row['needs']} | {numbers} | {row['limit']:g} |")
    where, settings = results["environment"], results["settings"]
    below = (
        f"From a choice to a PNG, {settings['bench_repeats']} times each, every time something not seen before; preset "
        f"`{settings['preset']}`, {where['device']}, {where['threads']} thread(s), torch {where['packages']['torch']}. "
        "`nothing new`: the models' answers are remembered; `CLIP`: a pass through it; `diffusion`: a step of it too. "
        "`of a processor`: seconds of all threads together; where other work runs beside it, the clock shows more."
    )
    return "\n".join([*lines, "", below])
