"""Explore what the diffusion model says of a picture: its correlation, and the clusters that even it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diclip.cam import minmax
from diclip.correlation import acr, cluster
from diclip.data import Batch
from diclip.explorers import pictures
from diclip.explorers.core import Pick, Studio, View, digest
from diclip.explorers.pictures import Panel


@dataclass(frozen=True)
class DiffusionChoice:
    """Say which patch, (row, column) from 0, of which picture, at which timestep and draw of noise."""

    pick: Pick = field(default_factory=Pick)
    row: int = 8
    column: int = 8
    timestep: int | None = None  # None: the settings'
    seed: int = 0
    threshold: float | None = None  # None: the settings'
    opacity: float = 0.7
    colours: str = "magma"


class DiffusionExplorer:
    """Turn choices into views; the U-Net runs once a picture, timestep and draw of noise."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def view(self, choice: DiffusionChoice, *, side: int = pictures.SIDE) -> View:
        """Draw a choice; raise ValueError, in one line, for a wrong one and where the diffusion model is missing."""
        if self.studio.lacks_diffusion:
            raise ValueError(self.studio.lacks_diffusion)
        photo = self.studio.photo(choice.pick)
        before, after, owner, grid = self.correlations(choice, self.studio.batch(photo, (), self.studio.classes))
        if not (0 <= choice.row < grid[0] and 0 <= choice.column < grid[1]):
            raise ValueError(f"there is no patch ({choice.row}, {choice.column}) in {grid[0]} x {grid[1]}")
        base, spot = pictures.fit(photo.image, side=side), choice.row * grid[1] + choice.column
        frame = partial(pictures.framed, cell=(choice.row, choice.column), grid=grid)

        def row(correlation: Tensor) -> pictures.Pixels:
            heat = minmax(correlation[spot], 0).unflatten(0, grid)
            return frame(pictures.overlay(base, heat, opacity=choice.opacity, colours=choice.colours))

        ids = 1 + owner.unflatten(0, grid)  # the palette's 0 is black
        clusters = (pictures.painted(ids, base.shape) * 0.6 + base.mean(2, keepdims=True) * 0.4).astype(np.uint8)
        mixed = [pictures.stretched_colours(x.unflatten(0, grid), base.shape) for x in in_colours(before, after)]
        panels = [
            Panel(f"{photo.name} · patch {choice.row}, {choice.column}", frame(base)),
            Panel("what correlates with it", row(before)),
            Panel("the same after ACR", row(after)),
            Panel(f"ACR's clusters: {int(owner.max()) + 1}", clusters),
            Panel("all rows in three colours", mixed[0]),
            Panel("the same after ACR", mixed[1]),
        ]
        where = f"timestep {self._timestep(choice)}, noise {choice.seed}"
        line = f"{where} · alike colours: patches that correlate with the same places (one projection for both)"
        return View(pictures.table(panels), line, self.studio.doubts(photo))

    def correlations(self, choice: DiffusionChoice, batch: Batch) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Return the correlation before and after ACR, (N, N) each, the clusters (N,), and the grid."""
        from diclip.methods.diclip import DiCLIP

        changed = {"method": "diclip", "seed": choice.seed, "diffusion_timesteps": (self._timestep(choice),)}
        if choice.threshold is not None:
            changed["correlation_threshold"] = choice.threshold
        settings = self.studio.settings.model_copy(update=changed)

        def look() -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
            system = DiCLIP(settings, self.studio.clip, self.studio.diffusion, None)
            before, grid = system.walked(batch)[0], system.grid(batch)
            owner = cluster(before, grid=grid)
            return before[0], acr(before, owner)[0], owner[0], grid

        key = (*digest(batch.images), batch.names[0], settings.model_dump_json())
        return self.studio.memo("walk", key, look)

    def _timestep(self, choice: DiffusionChoice) -> int:
        return self.studio.settings.diffusion_timesteps[0] if choice.timestep is None else choice.timestep


def in_colours(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Project rows (N, N) on the three main directions of those before, and stretch both alike: (N, 3) in [0, 1]."""
    mean = before.mean(0)
    directions = torch.linalg.svd(before - mean, full_matrices=False).Vh[:3]  # (3, N)
    both = torch.cat([(x - mean) @ directions.T for x in (before, after)])
    return minmax(both, 0).chunk(2)
