"""Take the steps of a training, in one process of several: what accelerate is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diclip.cam import Maps
from diclip.data import Batch
from diclip.data.crops import Share
from diclip.runs import high_water, pick_device
from diclip.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

CHANCE = 3  # what a random stream is for; 1 and 2 are the order of the images and their crops


class System(Protocol):
    """What the loop trains: a module whose `parameters` and `state_dict` are what is trained, and nothing frozen.

    Batches come with images and masks on the device; `masks` are crops (S, S) under the supervision of masks, else
    None. Chance comes from the `generator`, from PyTorch's own (dropout), both seeded at each step, or from `step`.
    """

    def loss(self, batch: Batch, *, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return named scalars, of which "loss" is minimised.

        Of a batch that several processes share each sees a part; gradients are averaged over them. A loss whose sums
        and counts are added up over the processes, with gradients, is then the loss of the whole batch.
        """

    def segment(self, images: Tensor) -> Tensor:
        """Return logits (B, 1 + C, h, w) of images (B, 3, S, S), background first, without tags."""

    def cam(self, batch: Batch) -> Maps:
        """Return the maps that the labels are made of."""

    def compared_labels(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return "training-free labels" and "pseudo labels", what the network learns from at a step.

        Both are (B, S, S) int64, 0 background, 255 void.
        """


def start(settings: Settings) -> Accelerator:
    """Return accelerate's view of the processes and the device; raise ValueError for a precision that is not there."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import GradientAccumulationPlugin

    device = pick_device(settings.device)
    if settings.mixed_precision == "fp16" and device.type != "cuda":
        raise ValueError(f"mixed_precision is fp16, which {device.type} has not: set it to bf16 or no")
    return Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
        # before its switch point a branch is no part of the loss
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@contextmanager
def own_chance(seed: int) -> Iterator[None]:
    """Seed PyTorch's generators, and give everyone else's back at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def warm_linear(step: int, *, steps: int, warmup: int) -> float:
    """Return the share of the learning rate at a step: up from 1e-6 in `warmup` steps, then 1 - step / steps.

    Source: ExCEL, CVPR 2025, and DiCLIP, IEEE TIP 2026, as released.
    """
    return 1e-6 + (1 - 1e-6) * step / warmup if step < warmup else 1 - step / steps


class Learner:
    """Hold a system and its optimiser in one process of some, and take steps.

    Raises ValueError for a batch that the processes cannot share, and what `build` raises.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, build: Callable[[Settings], System]) -> None:
        self.settings, self.accelerator = settings, accelerator
        alone = accelerator.num_processes == 1
        self.device = pick_device(settings.device) if alone else accelerator.device
        whose = (accelerator.process_index, accelerator.num_processes)
        self.share = Share(settings.train_batch, settings.accumulate, *whose)
        self.system = build(settings.model_copy(update={"device": str(self.device)}))
        self.system.train()
        betas = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.AdamW(self.system.parameters(), lr=settings.learning_rate, **betas)
        self.losses, self.optimizer = accelerator.prepare(_Losses(self.system), optimizer)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def state(self) -> dict[str, Any]:
        """Return what goes on besides the system's weights: all chance comes from the number of a step."""
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}

    def resume(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up weights and a state; raise ValueError if they are of another model."""
        try:
            self.system.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError("found another model in the checkpoint: choose another run_dir") from error
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def advance(self, step: int, crops: Iterator[Batch]) -> dict[str, Tensor]:
        """Take one step and return this process's mean losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        means: dict[str, Tensor] = {}
        for part in range(self.settings.accumulate):
            batch = moved(next(crops), self.device)
            seed = seed_of(self.settings.seed, step, self.share.positions(step, part).start)
            torch.manual_seed(seed)
            with self.accelerator.accumulate(self.losses):
                losses = self.losses(batch, step, torch.Generator().manual_seed(seed))
                self.accelerator.backward(losses["loss"])
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / self.settings.accumulate
        return means

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        s = self.settings
        return s.learning_rate * warm_linear(step, steps=s.max_iters, warmup=s.warmup_iters)

    def checked(self, step: int, losses: dict[str, Tensor]) -> dict[str, float]:
        """Return the mean losses of all processes; raise ValueError for one that is no number."""
        values = self.accelerator.reduce(
            torch.stack([value.float().to(self.device) for value in losses.values()]), "mean"
        ).tolist()
        if not all(map(math.isfinite, values)):
            named = ", ".join(f"{name} {value:g}" for name, value in zip(losses, values, strict=True))
            rate = f"a learning_rate below {self.settings.learning_rate:g}"
            raise ValueError(f"step {step}: found {named}, expected numbers: try {rate}, in another run_dir")
        return {name: round(value, 6) for name, value in zip(losses, values, strict=True)}

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is up in any process."""
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum") > 0)

    def peak_mb(self) -> float | None:
        """Return the most memory that this process has held, on a GPU there; none where nobody knows."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        found = high_water()
        return None if found is None else round(found, 1)


class _Losses(nn.Module):
    """Let data parallelism see a system's loss as a forward pass."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        losses = self.system.loss(batch, step=step, generator=generator)
        return {name: value if name == "loss" else value.detach() for name, value in losses.items()}


def seed_of(seed: int, step: int, position: int) -> int:
    """Return the seed of what happens by chance at a step, in the part that begins with a crop's position."""
    return int(np.random.SeedSequence([seed, CHANCE, step, position]).generate_state(1, np.uint64)[0]) % 2**63


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its images and masks on a device."""
    masks = [None if mask is None else mask.to(device, non_blocking=True) for mask in batch.masks]
    return replace(batch, images=batch.images.to(device, non_blocking=True), masks=masks)
