"""DiCLIP without training: diffusion correlation, key-value memory, and refinement along attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from diclip.baselines import colour_texture_affinity
from diclip.cam import Maps, pack
from diclip.clip import DenseCLIP, Encoded
from diclip.correlation import acr, cluster, correlate, walk
from diclip.data import Batch
from diclip.diffusion import Diffusion
from diclip.memory import Memory, fuse, retrieve
from diclip.methods.clip import PlainCLIP
from diclip.refine import rar
from diclip.settings import Settings
from diclip.vocabulary import Vocabulary

PARTS = ("vce", "tsa", "caa", "rar")


@dataclass(frozen=True)
class Seen:
    """Hold what the two frozen models say of a batch, before there is any class map."""

    plain: Encoded  # without the diffusion's bias
    biased: Encoded  # with it
    fine: Tensor  # (B, M, M), the diffusion's fine self-attention
    fine_grid: tuple[int, int]


class DiCLIP(PlainCLIP):
    """Rungs `clip`, `intra`, `vce` (the diffusion's correlation biases the surgery path), `tsa` (a memory of
    generated pictures joins the texts), `caa` (spread along CLIP's attention), `rar` (along the diffusion's).

    The baseline `clip_rar` is `clip` with the last two; `without_vce` … leave one part out of the whole.
    Noise depends on the settings' seed and the image's name alone, not on batches and shards. Without a memory there
    is no `tsa`, neither as a rung nor as a part. Source: DiCLIP, IEEE TIP 2026, without its decoder. Raises ValueError
    for a memory of other classes than those of the `vocabulary`, which is the dataset's unless it is given.
    """

    raw = ("clip", "intra", "vce", "tsa")
    refined = ("caa", "rar")
    baselines = ("clip_rar",)
    ablations = tuple(f"without_{part}" for part in PARTS)
    restretch = True

    def __init__(
        self,
        settings: Settings,
        clip: DenseCLIP,
        diffusion: Diffusion,
        memory: Memory | None,
        *,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(settings, clip, vocabulary=vocabulary)
        if memory is not None and memory.classes != self.vocabulary.classes:
            odd = sorted(set(memory.classes) ^ set(self.vocabulary.classes))[:3]
            found = f"other classes ({', '.join(odd)} …)" if odd else "the classes in another order"
            raise ValueError(f"the memory knows {found}: build one with `diclip memory` and the same --preset")
        self.diffusion, self.memory = diffusion, memory
        self.lacking = () if memory else ("tsa",)
        self.raw = tuple(rung for rung in self.raw if rung not in self.lacking)
        self.ablations = tuple(f"without_{part}" for part in PARTS if part not in self.lacking)

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield the ladder's maps, those of the baseline and, if the settings say so, those of the ablation."""
        seen = self.look(batch)
        clip = pack(self.cam(seen.plain.plain_patches, seen.plain.pooled, seen.plain.grid), batch.tags)
        yield "clip", clip
        yield "intra", self.map(seen, batch, without=PARTS)
        yield "vce", self.map(seen, batch, without=PARTS[1:])
        tsa = self.map(seen, batch, without=(*PARTS[2:], *self.lacking))
        if not self.lacking:
            yield "tsa", tsa
        spread = self.refine(tsa, seen, without=("rar",))
        yield "caa", spread
        yield "rar", self.refine(spread, seen, without=("caa",))
        yield "clip_rar", self.refine(clip, seen)
        if self.settings.ablate:
            for name in self.ablations:
                yield name, self.map(seen, batch, without=(name.removeprefix("without_"), *self.lacking))

    def look(self, batch: Batch) -> Seen:
        """Run the diffusion model and, with and without what it says, CLIP."""
        coarse, fine, fine_grid = self.correlation(batch)
        bias = self.settings.bias_strength * coarse
        return Seen(self.encode(batch), self.encode(batch, bias=bias, need_attention=False), fine, fine_grid)

    def correlation(
        self, batch: Batch, *, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return the correlation (B, N, N) that biases CLIP, the fine attention (B, M, M), and its grid.

        N are the patches of the batch's images, or of another `grid`, for a CLIP that looks at them enlarged.
        """
        grid = grid or self.grid(batch)
        coarse, fine, fine_grid = self.walked(batch, grid=grid)
        if self.settings.correlation == "colour":
            coarse = self.walked_colours(batch, grid=grid)
        return self.clustered(coarse, grid) if self.settings.acr else coarse, fine, fine_grid

    def walked(
        self, batch: Batch, *, grid: tuple[int, int] | None = None, diffusion: Diffusion | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return what a diffusion model (the system's own) says before clustering, as `correlation` does.

        Both are averages over the settings' timesteps and draws of noise, on CLIP's device.
        """
        settings, diffusion, grid = self.settings, diffusion or self.diffusion, grid or self.grid(batch)
        noise = [image_generator(settings.seed, name) for name in batch.names]
        latents = diffusion.encode(batch.images)
        draws = list(product(settings.diffusion_timesteps, range(settings.diffusion_draws)))
        totals: list[Tensor] = []
        for timestep, _ in draws:
            taps = diffusion.capture(
                batch.images,
                latents=latents,
                timestep=timestep,
                coarse=settings.coarse_layer,
                fine=settings.fine_layer,
                fine_heads=settings.fine_heads,
                generator=noise,
                prompt=settings.diffusion_prompt,
            )
            step = correlate(
                taps.coarse_q,
                taps.coarse_k,
                source=taps.coarse_grid,
                grid=grid,
                heads=settings.coarse_heads,
                threshold=settings.correlation_threshold,
                softmax=settings.correlation_softmax,
            )
            found = [step.div_(len(draws)), taps.fine.div_(len(draws))]
            totals = [total.add_(one) for total, one in zip(totals, found, strict=True)] if totals else found
        coarse, fine = (total.to(self.clip.device) for total in totals)
        return coarse, fine, taps.fine_grid

    def walked_colours(self, batch: Batch, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the same walk along colour and texture, the null of the diffusion's correlation: (B, N, N)."""
        affinity = colour_texture_affinity(batch.images, grid or self.grid(batch))
        heads = torch.stack([affinity] * len(self.settings.coarse_heads), 1)
        return walk(heads, threshold=self.settings.correlation_threshold).to(self.clip.device)

    def clustered(self, correlation: Tensor, grid: tuple[int, int]) -> Tensor:
        """Replace the rows of a correlation (B, N, N), N = h·w of a grid, by the means of their clusters."""
        return acr(correlation, cluster(correlation, grid=grid))

    def grid(self, batch: Batch) -> tuple[int, int]:
        """Return CLIP's patches down and across."""
        (height, width), (down, across) = batch.images.shape[2:], self.clip.patch_size
        return height // down, width // across

    def map(self, seen: Seen, batch: Batch, *, without: Collection[str] = ()) -> Maps:
        """Make the class maps of a batch with all parts but some of `PARTS`."""
        encoded = seen.plain if "vce" in without else seen.biased
        cam = self.cam(encoded.patches, encoded.pooled, encoded.grid)  # (B, C, h, w)
        if "tsa" not in without:
            cam = self.remember(encoded, cam)
        return self.refine(pack(cam, batch.tags), seen, without=without)

    def remember(self, encoded: Encoded, cam: Tensor, *, memory: Memory | None = None) -> Tensor:
        """Add what a memory (the system's own) retrieves to class maps (B, C, h, w)."""
        settings, memory = self.settings, memory or self.memory
        if memory is None:
            raise ValueError("no memory to retrieve from: build one with `diclip memory` and the same --preset")
        found = retrieve(
            encoded.patches,
            encoded.pooled,
            memory,
            self.texts,
            pooled_is_token=self.clip.pooled_is_token,
            norm_dim=settings.norm_dim,
            value_mode=settings.value_mode,
            affinity=settings.memory_affinity,
        )
        return fuse(cam.flatten(2), found, weight=settings.memory_weight).unflatten(-1, encoded.grid)

    def refine(self, maps: Maps, seen: Seen, *, without: Collection[str] = ()) -> Maps:
        """Spread maps along CLIP's attention, then along the diffusion's."""
        if "caa" not in without:
            maps = self.spread(maps, seen.plain)
        if "rar" not in without:
            maps = rar(maps, seen.fine, rounds=self.settings.rar_rounds, grid=seen.fine_grid)
        return maps


def image_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator of an image's own."""
    state = np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)
