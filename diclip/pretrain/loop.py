"""The training loop of the mini models: stateless randomness, checkpoints from the first minute, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from diclip.checkpoints import forget
from diclip.pretrain.muon import MuonAdamW
from diclip.runs import replacing
from diclip.settings import shown

Optimizer = torch.optim.Optimizer | MuonAdamW


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then a cosine down to zero."""

    steps: int
    peak: float
    warmup: int = 200

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1)))


def train(
    model: nn.Module,
    loss: Callable[[int], dict[str, Tensor]],
    *,
    folder: Path,
    schedule: Schedule,
    optimizer: Optimizer,
    after_step: Callable[[], None] = lambda: None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    save_every: int = 200,
    evaluate_every: int = 2000,
    max_minutes: float = 0,
    progress: Callable[[range], object] = lambda steps: steps,
) -> int:
    """Train until the schedule ends or `max_minutes` have passed; return the number of steps that are done.

    `loss(step)` returns named scalars, of which "loss" is minimised; it draws its random numbers from the step's
    number alone, so that a run that was killed and resumed equals one that was not, bit for bit on CPU.
    `folder` receives `checkpoint.pt` and `metrics.jsonl`. Training resumes from a checkpoint that is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        done = _resume(checkpoint, model, optimizer)
        forget(folder / "metrics.jsonl", after=done)
    start = time.monotonic()
    with open(folder / "metrics.jsonl", "a") as log:
        for step in progress(range(done, schedule.steps)):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step) * group.get("ratio", 1.0)
            parts = loss(step)
            optimizer.zero_grad()
            parts["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            after_step()
            done = step + 1
            out_of_time = max_minutes and time.monotonic() - start > 60 * max_minutes
            last = done == schedule.steps or out_of_time
            if done % 50 == 0 or last:
                record = {"step": done, "lr": schedule(step), **{k: round(v.item(), 5) for k, v in parts.items()}}
                if evaluate is not None and (done % evaluate_every == 0 or last):
                    record |= evaluate(done)
                record["seconds"] = round(time.monotonic() - start, 1)
                log.write(json.dumps(record) + "\n")
                log.flush()
            if done % save_every == 0 or last:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                with replacing(checkpoint) as scratch:  # a kill leaves the old one or the new one
                    torch.save(state, scratch)
            if out_of_time:
                break
    return done


def _resume(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> int:
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        place = shown(checkpoint)
        raise ValueError(f"{place} is damaged or of another model: remove it or choose another run_dir") from error
