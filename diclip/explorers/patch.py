"""Explore one patch: where it attends, in CLIP and in the diffusion model, and what texts it resembles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from diclip.cam import minmax, normalise, surgery_scores
from diclip.clip import Encoded
from diclip.data import Batch
from diclip.explorers import pictures
from diclip.explorers.core import Photo, Pick, Studio, View, digest
from diclip.explorers.pictures import Panel
from diclip.settings import Settings
from diclip.surgery import attend, head_sum, project

KINDS = {"original, q–k": "qk", "q–q": "qq", "k–k": "kk", "v–v": "vv", "intra-correlation": "intra", "biased": "biased"}
PATHS = ("CLIP's own", "surgery", "biased")
TEXTS = 9


@dataclass(frozen=True)
class PatchChoice:
    """Say which patch to ask, (row, column) from 0, and whom; heads count from 1, and 0 is their mean."""

    pick: Pick = field(default_factory=Pick)
    row: int = 8
    column: int = 8
    kind: str = "original, q–k"
    block: int = 0  # from 1; 0: the last
    head: int = 0
    layer: str | None = None  # of the diffusion model; None: that of the correlation
    layer_head: int = 0
    timestep: int | None = None
    seed: int = 0  # of the noise
    opacity: float = 0.7
    colours: str = "magma"


class PatchExplorer:
    """Turn choices into views; forward passes are made once a picture, timestep and draw of noise."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def view(self, choice: PatchChoice, *, side: int = pictures.SIDE) -> View:
        """Draw a choice, each panel's longer side `side` pixels; raise ValueError, in one line, for a wrong one."""
        photo = self.studio.photo(choice.pick)
        batch = self.studio.batch(photo, (), self.studio.classes)
        grid = self.grid(batch)
        if not (0 <= choice.row < grid[0] and 0 <= choice.column < grid[1]):
            found = f"({choice.row}, {choice.column})"
            raise ValueError(f"there is no patch {found}, expected up to ({grid[0] - 1}, {grid[1] - 1})")
        base = pictures.fit(photo.image, side=side)
        frame = partial(pictures.framed, cell=(choice.row, choice.column), grid=grid)
        panels = [Panel(f"{photo.name} · patch {choice.row}, {choice.column}", frame(base))]
        for title, found in (self.clip_row(choice, batch, grid), self.diffusion_row(choice, batch, grid)):
            if isinstance(found, str):
                panels.append(Panel(title, pictures.note(found, base.shape)))
                continue
            heat = pictures.overlay(base, found, opacity=choice.opacity, colours=choice.colours)
            panels.append(Panel(title, frame(heat)))
        panels += self.texts(choice, photo, batch, grid, base.shape)
        line = "maps: where the framed patch looks, stretched without the patch itself · bars: how like each text it is"
        return View(pictures.table(panels), line, self.studio.doubts(photo))

    def grid(self, batch: Batch) -> tuple[int, int]:
        """Return CLIP's patches down and across."""
        (height, width), (down, across) = batch.images.shape[2:], self.studio.clip.patch_size
        return height // down, width // across

    def clip_row(self, choice: PatchChoice, batch: Batch, grid: tuple[int, int]) -> tuple[str, Tensor | str]:
        """Return a title and where the patch attends in CLIP, (h, w) in [0, 1], or why that is unknown."""
        blocks, kind = self.studio.clip.blocks, KINDS.get(choice.kind)
        number = choice.block or len(blocks)
        if kind is None or not 1 <= number <= len(blocks):
            raise ValueError(
                f"found {choice.kind!r} in block {number}, expected {', '.join(KINDS)}, 1 to {len(blocks)}"
            )
        block = blocks[number - 1]
        q, k, v = project(block, self.hidden(batch)[number - 1])  # each (1, heads, 1 + N, d)
        if not 0 <= choice.head <= q.shape[1]:
            raise ValueError(f"head is {choice.head}, expected 1 to {q.shape[1]}, or 0 for their mean")
        if choice.head:
            q, k, v = (x[:, choice.head - 1 : choice.head] for x in (q, k, v))
        who = f"head {choice.head}" if choice.head else "mean"
        title = f"block {number}, {who}: {choice.kind}"
        if kind == "biased" and self.studio.lacks_diffusion:
            return title, f"Nothing biases CLIP: {self.studio.lacks_diffusion}."
        if kind in ("intra", "biased"):
            bias = self.bias(choice, batch) if kind == "biased" else None
            attention = head_sum(q, k, v, attention=self.studio.settings.attention, bias=bias)[0]
        else:
            part = {"q": q, "k": k, "v": v}
            attention = attend(part[kind[0]], part[kind[1]]).mean(1)[0]
        spot = choice.row * grid[1] + choice.column
        return title, _stretched(attention[1 + spot, 1:], spot).unflatten(0, grid)

    def hidden(self, batch: Batch) -> list[Tensor]:
        """Return what each block's attention gets, (1, 1 + N, D)."""

        def look() -> list[Tensor]:
            with listening([block.ln_1 for block in self.studio.clip.blocks]) as heard:
                self.studio.frozen.encode(batch.images, surgery_blocks=0, tokens=None, need_attention=False)
            return heard

        return self.studio.memo("hidden", digest(batch.images), look)

    def diffusion_row(self, choice: PatchChoice, batch: Batch, grid: tuple[int, int]) -> tuple[str, Tensor | str]:
        """Return a title and where the patch attends in the diffusion model, or why that is unknown."""
        if self.studio.lacks_diffusion:
            return (
                "diffusion · self-attention",
                f"Here the diffusion model would answer, but {self.studio.lacks_diffusion}.",
            )
        settings, diffusion = self.of(choice), self.studio.diffusion
        timestep = settings.diffusion_timesteps[0]
        taps = diffusion.capture(
            batch.images,
            latents=diffusion.encode(batch.images),
            timestep=timestep,
            coarse=settings.coarse_layer,
            fine=None,
            generator=[torch.Generator().manual_seed(choice.seed)],
            prompt=settings.diffusion_prompt,
        )
        heads, (h, w) = taps.coarse_q.shape[1], taps.coarse_grid
        if not 0 <= choice.layer_head <= heads:
            raise ValueError(f"the layer's head is {choice.layer_head}, expected 1 to {heads}, or 0 for their mean")
        place = zip((choice.row, choice.column), grid, (h, w), strict=True)
        row, column = (int((own + 0.5) / n * m) for own, n, m in place)
        spot = row * w + column
        rows = attend(taps.coarse_q[:, :, spot : spot + 1], taps.coarse_k)[0, :, 0]  # (heads, n)
        found = rows[choice.layer_head - 1] if choice.layer_head else rows.mean(0)
        who = f"head {choice.layer_head}" if choice.layer_head else "mean"
        return f"diffusion at {timestep}, {who}: {h}×{w}", _stretched(found, spot).unflatten(0, (h, w))

    def of(self, choice: PatchChoice) -> Settings:
        """Return the settings with a choice's layer, timestep and noise."""
        changed = {"method": "diclip", "seed": choice.seed}
        if choice.layer is not None:
            changed["coarse_layer"] = choice.layer
        if choice.timestep is not None:
            changed["diffusion_timesteps"] = (choice.timestep,)
        return self.studio.settings.model_copy(update=changed)

    def bias(self, choice: PatchChoice, batch: Batch) -> Tensor:
        """Return the diffusion's correlation (1, N, N), times its strength; its layer is the settings'."""
        from diclip.methods.diclip import DiCLIP

        settings = self.of(choice).model_copy(update={"coarse_layer": self.studio.settings.coarse_layer})

        def look() -> Tensor:
            return DiCLIP(settings, self.studio.clip, self.studio.diffusion, None).correlation(batch)[0]

        key = (*digest(batch.images), batch.names[0], settings.model_dump_json())
        return settings.bias_strength * self.studio.memo("correlation", key, look)

    def texts(
        self, choice: PatchChoice, photo: Photo, batch: Batch, grid: tuple[int, int], shape: tuple[int, ...]
    ) -> Iterator[Panel]:
        """Yield bars of the texts that the patch resembles most, along each path."""
        settings, vocabulary = self.studio.settings, self.studio.settings.vocabulary(self.studio.classes)
        names, texts = (*vocabulary.classes, *vocabulary.background), self.studio.clip.encode_text(vocabulary.prompts())
        how = {"attention": settings.attention, "surgery_blocks": settings.surgery_blocks, "tokens": None}
        plain = self.studio.clip.encode(batch.images, need_attention=False, **how)
        for path in PATHS:
            title = f"texts · {path} path"
            if path == "biased" and self.studio.lacks_diffusion:
                yield Panel(title, pictures.note("This path needs the diffusion model as well.", shape))
                continue
            encoded = plain
            if path == "biased":
                bias = self.bias(choice, batch)
                encoded = self.studio.clip.encode(batch.images, bias=bias, need_attention=False, **how)
            patches = encoded.plain_patches if path == PATHS[0] else encoded.patches
            scores = self.scores(encoded, patches, texts)[choice.row * grid[1] + choice.column]
            best = scores.topk(min(TEXTS, len(names))).indices.tolist()
            values = {names[index]: float(scores[index]) for index in best}
            yield Panel(title, pictures.bars(values, shape, marked=photo.tags))

    def scores(self, encoded: Encoded, patches: Tensor, texts: Tensor) -> Tensor:
        """Return what patches say to texts (n, E), less what all texts share: (N, n)."""
        how = {"pooled_is_token": self.studio.clip.pooled_is_token, "norm_dim": self.studio.settings.norm_dim}
        return surgery_scores(*normalise(patches, encoded.pooled, **how), texts)[0][0]


@contextmanager
def listening(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what modules return to this thread, in the order in which it calls them."""
    heard: list[Tensor] = []
    owner = get_ident()

    def hear(module: nn.Module, arguments: Any, output: Tensor) -> None:
        if get_ident() == owner:
            heard.append(output)

    handles = [module.register_forward_hook(hear) for module in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _stretched(row: Tensor, spot: int) -> Tensor:
    """Stretch a row to [0, 1] with the patch itself, which likes itself best, at the median."""
    row = row.detach().clone()
    row[spot] = row.median()
    return minmax(row, 0)
