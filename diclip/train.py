"""Train a network that needs no tags, from tags or, as its ceiling, from masks: the loop, on accelerate."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diclip.checkpoints import LEARNED, WEIGHTS, forget, load_checkpoint, load_weights, save_checkpoint, save_weights
from diclip.data import Batch, open_dataset
from diclip.data.crops import crop_batches, training_images
from diclip.evaluate import Evaluation, Progress, silent
from diclip.learner import Learner, System, own_chance, start
from diclip.runs import create_run, is_finished, write_json
from diclip.score import interval, miou
from diclip.settings import Settings, shown
from diclip.validate import count_masks, write_evaluation

if TYPE_CHECKING:
    from accelerate import Accelerator

Watch = Callable[[dict[str, Any], System], None]

FREE = ("batch_size", "data_root", "device", "max_minutes", "reference_run", "run_dir", "workers")
"""Settings that may differ when a training is resumed: what it computes does not depend on them."""


@dataclass
class Reached:
    """Hold how far a training has come: steps, seconds, of these on `tune`, the best mIoU there and its step."""

    step: int = 0
    seconds: float = 0.0
    judging: float = 0.0
    best: float = -1.0
    best_step: int = 0


class Paused(Exception):
    """Leave a run before its end."""


def train(
    settings: Settings,
    progress: Progress = silent,
    *,
    resume: bool = False,
    build: Callable[[Settings], System] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train in the settings' run folder and return its metrics: what `diclip train` does, in each of its processes.

    The folder receives metrics.jsonl (a line every few steps), checkpoints/last and checkpoints/best (on `tune`),
    each with model.safetensors, val.json with val.npz for `diclip compare`, and metrics.json at the end. With
    `resume` a run that was killed or ran out of time goes on from its last checkpoint, on a CPU bit for bit as if
    nothing had happened, and a finished one returns its metrics. `build` makes the system, by default the settings'
    method's; `watch` is shown each line and the system as it is, to draw a curve or predictions. Processes other than
    the first return nothing. Raises ValueError, in one line, for a folder that cannot be used, a batch that cannot be
    shared and a loss that is no number.
    """
    folder = settings.run_dir
    if resume and is_finished(folder, settings, free=FREE):
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if not resume and (folder / "settings.json").exists() and not (folder / "finished.json").exists():
        raise ValueError(f"{shown(folder)} holds a run that is not finished: go on with --resume auto")
    accelerator = start(settings)
    first = accelerator.is_main_process
    try:
        with ExitStack() as stack:
            if first:
                stack.enter_context(create_run(folder, settings, free=FREE))
            accelerator.wait_for_everyone()
            stack.enter_context(own_chance(settings.seed))
            training = Training(settings, accelerator, build or _build, progress if first else silent, watch)
            if not training.run():
                raise Paused
            metrics = training.report()
            if first:
                write_json(folder / "metrics.json", metrics)
    except Paused:
        again = "out of time: run the same command with --resume auto to go on"
        metrics = {"steps": training.reached.step, "seconds": round(training.reached.seconds, 1), "unfinished": again}
    return metrics if first else {}


class Training:
    """Run one training in one process of some; `reached` tells how far it has come."""

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        build: Callable[[Settings], System],
        progress: Progress,
        watch: Watch | None,
    ) -> None:
        self.settings, self.accelerator, self.progress, self.watch = settings, accelerator, progress, watch
        self.first = accelerator.is_main_process
        self.last, self.best = (settings.run_dir / "checkpoints" / name for name in ("last", "best"))
        for split in (settings.train_split, settings.tune_split, settings.val_split):
            open_dataset(settings.model_copy(update={"split": split}))  # what is missing is found now, not at the end
        self.reference = _reference(settings)
        self.learner, self.reached = Learner(settings, accelerator, build), Reached()
        self.system = self.learner.system
        if found := load_checkpoint(self.last):
            weights, state = found
            self.learner.resume(weights, state["learner"])
            self.reached = Reached(**state["reached"])
        if self.first:
            forget(settings.run_dir / "metrics.jsonl", after=self.reached.step)

    def run(self) -> bool:
        """Train to the end or until time is up; tell whether the end is reached."""
        s, at, started = self.settings, self.reached, time.monotonic() - self.reached.seconds
        crops = iter(crop_batches(s, self.learner.share, first=at.step))
        until = time.monotonic() + 60 * s.max_minutes if s.max_minutes else math.inf
        for step in self.progress(range(at.step, s.max_iters), desc=f"train {s.method}"):
            losses = self.learner.advance(step, crops)
            at.step = step + 1
            late = self.learner.any(time.monotonic() > until) if s.max_minutes else False
            ended = at.step == s.max_iters
            judged = bool(s.validate_every) and (ended or at.step % s.validate_every == 0)
            logged = judged or ended or at.step % s.log_every == 0
            saved = judged or ended or late or at.step % s.save_every == 0
            if logged or saved:
                record = {"step": at.step, "lr": self.learner.rate(step), **self.learner.checked(at.step, losses)}
                if judged:
                    record |= self._judge()
                at.seconds = time.monotonic() - started
                if logged:
                    self._log({**record, "seconds": round(at.seconds, 1)})
                if saved:
                    self._save()
            if late:
                break
        return at.step == s.max_iters

    def report(self) -> dict[str, Any]:
        """Score the finished network on the settings' `val_split` and return all metrics; write val.json."""
        s, at = self.settings, self.reached
        chosen = s.scored_checkpoint if at.best_step else "last"
        if chosen == "best":
            self.accelerator.wait_for_everyone()  # the first process may still be writing
            self.system.load_state_dict(load_weights(self.best / WEIGHTS)[0])
        pseudo = s.score_pseudo_labels and s.supervision == "tags"
        started = time.monotonic()
        found = self._score(s.model_copy(update={"split": s.val_split}), pseudo=pseudo)
        if not self.first:
            return {}
        which = f"best on {s.tune_split}, step {at.best_step}" if chosen == "best" else f"last, step {at.step}"
        result = write_evaluation(found, s.run_dir / "val.json", checkpoint=which)
        write_json(s.run_dir / "val.json", result)
        rungs = ("network", "pseudo labels", "training-free labels")
        network, labels, static = (_spread(found, name) for name in rungs)
        return {
            "val_miou": network[0],
            "val_interval": network[1],
            "pseudo_miou": labels[0],
            "pseudo_interval": labels[1],
            "training_free_miou": static[0],
            "full_supervision_miou": network[0] if s.supervision == "masks" else self.reference,
            "tune_miou": round(at.best, 2) if at.best_step else None,
            "best_step": at.best_step or None,
            "protocol": result["protocol"],
            "train_images": len(training_images(s)),
            "steps": at.step,
            "seconds": round(at.seconds, 1),
            "images_per_second": round(at.step * s.train_batch / max(at.seconds - at.judging, 1e-9), 2),
            "scoring_seconds": round(time.monotonic() - started, 1),
            "peak_mb": self.learner.peak_mb(),
            "processes": self.accelerator.num_processes,
            "settings": s.model_dump(mode="json"),
        }

    def _score(self, settings: Settings, *, pseudo: bool = False) -> Evaluation:
        def predict(batch: Batch) -> dict[str, Tensor]:
            labels = self.system.compared_labels(batch, self.reached.step) if pseudo else {}
            return {**labels, "network": self.system.segment(batch.images)}

        with self._frozen():
            return count_masks(
                settings,
                predict,
                device=self.learner.device,
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
                gather=_gather,
                progress=self.progress,
            )

    def _judge(self) -> dict[str, float]:
        """Score on `tune`, and keep the weights if they are the best so far."""
        s, at, started = self.settings, self.reached, time.monotonic()
        found = self._score(s.model_copy(update={"split": s.tune_split, "limit": s.validate_images}))
        value = float(miou(found.rung("network").sum(0)))
        if value > at.best:
            at.best, at.best_step = value, at.step
            if self.first:
                save_weights(self.best / WEIGHTS, self.system.state_dict(), self._about())
        at.judging += time.monotonic() - started
        return {"tune_miou": round(value, 3)}

    def _save(self) -> None:
        if self.first:
            state = {"learner": self.learner.state(), "reached": asdict(self.reached)}
            save_checkpoint(self.last, self.system.state_dict(), self._about(), state)

    def _about(self) -> dict[str, Any]:
        s = self.settings
        shape = {name: getattr(s, name) for name in LEARNED}
        return {"method": s.method, "preset": s.preset, "step": self.reached.step, **shape}

    def _log(self, record: dict[str, Any]) -> None:
        if self.first:
            with (self.settings.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.watch is not None:
                with self._frozen():
                    self.watch(record, self.system)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Let the system be used, not trained."""
        self.system.eval()
        with torch.no_grad(), self.accelerator.autocast():
            yield
        self.system.train()


def _build(settings: Settings) -> System:
    from diclip.methods.trained import build_system

    return build_system(settings)


def _gather(own: list[Any]) -> list[Any]:
    from accelerate.utils import gather_object

    return gather_object(own)


def _spread(found: Evaluation, name: str) -> tuple[float | None, list[float] | None]:
    """Return mIoU and its 95 % interval over images, if it was measured."""
    if name not in found.ladder:
        return None, None
    value, low, high = interval(found.rung(name), generator=np.random.default_rng(found.settings.seed))
    return round(value, 2), [round(low, 2), round(high, 2)]


def _reference(settings: Settings) -> float | None:
    """Return the mIoU of the run that the settings name, of the same system trained on masks."""
    if settings.reference_run is None:
        return None
    path = settings.reference_run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: there is no such file: finish the run of supervision masks first")
    return json.loads(path.read_text(encoding="utf-8"))["full_supervision_miou"]


if __name__ == "__main__":  # accelerate launch -m diclip.train --preset voc …
    from diclip.__main__ import main

    sys.exit(main(["train", *sys.argv[1:]]))
