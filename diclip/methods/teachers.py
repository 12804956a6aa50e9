"""Make labels for a decoder while it learns: from tags, as ExCEL and DiCLIP do, or from true masks, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.affinity import calibrate
from diclip.cam import Maps, pack
from diclip.clip import IMAGENET_MEAN, IMAGENET_STD, DenseCLIP, Encoded
from diclip.data import Batch
from diclip.labels import pseudo_labels
from diclip.memory import fuse
from diclip.methods.diclip import DiCLIP
from diclip.methods.excel import ExCEL
from diclip.refine import par, rar
from diclip.settings import Settings
from diclip.tta import resized


@dataclass(frozen=True)
class View:
    """Hold what the frozen models say of a batch: its maps are made of `encoded`, the decoder sees `seen`.

    They are one unless labels are made at another scale.
    """

    encoded: Encoded
    seen: Encoded
    fine: Tensor | None = None  # (B, M, M), the diffusion's fine self-attention
    fine_grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Learned:
    """Hold what the trained parts say of a batch, detached; None is not to be used (yet)."""

    pairs: Tensor | None  # (B, N, N), `pair_logits` of the decoder's features, for maps
    adapted: Tensor | None  # (B, 1 + C, h, w), the adapter's logits, for maps
    affinity: Tensor | None  # (B, N, N) in [0, 1], their `pair_affinity`, for CAA


class Teacher(Protocol):
    """Look at a batch with frozen models, once, then make maps and labels of it with what is learnt by then.

    `labels` are (B, H, W), int64, at the size of the batch's images; `rungs` yields the maps by name, `raw` before any
    refinement. A `step` is one of a training: noise is drawn anew, and what only `rungs` needs may be left out.
    """

    raw: tuple[str, ...]
    refined: tuple[str, ...]
    restretch: bool

    def look(self, batch: Batch, *, step: int | None) -> View: ...

    def rungs(self, batch: Batch, view: View, learned: Learned) -> Iterator[tuple[str, Maps]]: ...

    def labels(self, batch: Batch, view: View, learned: Learned) -> Tensor: ...


class ExCELTeacher:
    """Calibrate CLIP by the decoder's features (learnable visual calibration), spread by CAA, refine by pixels (PAR).

    Source: ExCEL, CVPR 2025.
    """

    raw, refined = ("dynamic",), ("caa",)
    restretch = False

    def __init__(self, settings: Settings, method: ExCEL) -> None:
        self.settings, self.method = settings, method

    def look(self, batch: Batch, *, step: int | None) -> View:
        """Run CLIP, and keep what the calibration will change."""
        scaled = at_label_scale(batch, self.settings, step=self.method.clip.patch_size)
        attention = self.settings.train_caa or step is None
        how = {"tokens": self.settings.decoder_tokens, "need_attention": attention, "need_pull": True}
        encoded = self.method.encode(scaled, **how)
        return View(encoded, _seen(encoded, batch, scaled, self.settings, self.method.clip))

    def rungs(self, batch: Batch, view: View, learned: Learned) -> Iterator[tuple[str, Maps]]:
        """Yield `dynamic`, which without learned pairs is the static map, and `caa`."""
        maps = self.dynamic(batch, view, learned)
        yield "dynamic", maps
        yield "caa", self.method.spread(maps, view.encoded, affinity=learned.affinity)

    def labels(self, batch: Batch, view: View, learned: Learned) -> Tensor:
        """Return what is largest after PAR, of classes and of one minus their maximum."""
        maps = self.dynamic(batch, view, learned)
        if self.settings.train_caa:
            maps = self.method.spread(maps, view.encoded, affinity=learned.affinity)
        images = truncated(batch.images) if self.settings.par_image == "truncated" else batch.images
        how = {"iterations": self.settings.par_rounds, "dilations": self.settings.par_dilations}
        return _stack(maps, batch, self.settings, refine=lambda scores: par(scores, images, **how))

    def dynamic(self, batch: Batch, view: View, learned: Learned) -> Maps:
        """Return the maps before any refinement."""
        encoded, patches = view.encoded, view.encoded.patches
        if learned.pairs is not None:
            patches = self.method.clip.biased(encoded, calibrate(learned.pairs))
        return pack(self.method.cam(patches, encoded.pooled, encoded.grid, texts=self.method.enriched), batch.tags)


class DiCLIPTeacher:
    """Bias CLIP by the diffusion's correlation, add the adapter's maps to the texts', spread by CAA and by RAR.

    Source: DiCLIP, IEEE TIP 2026.
    """

    raw, refined = ("dynamic",), ("caa", "rar")
    restretch = True

    def __init__(self, settings: Settings, method: DiCLIP) -> None:
        self.settings, self.method = settings, method

    def look(self, batch: Batch, *, step: int | None) -> View:
        """Run the diffusion model, and CLIP with the bias that it gives."""
        if step is not None:  # noise is drawn by an image's name: then a step's is its own, whatever the batch
            batch = replace(batch, names=[f"{name} {step}" for name in batch.names])
        scaled = at_label_scale(batch, self.settings, step=self.method.clip.patch_size)
        coarse, fine, fine_grid = self.method.correlation(batch, grid=self.method.grid(scaled))
        bias, attention = self.settings.bias_strength * coarse, self.settings.train_caa or step is None
        encoded = self.method.encode(scaled, bias=bias, tokens=self.settings.decoder_tokens, need_attention=attention)
        return View(encoded, _seen(encoded, batch, scaled, self.settings, self.method.clip), fine, fine_grid)

    def rungs(self, batch: Batch, view: View, learned: Learned) -> Iterator[tuple[str, Maps]]:
        """Yield `dynamic`, which without the adapter is the memory's map, `caa` and `rar`."""
        maps = self.dynamic(batch, view, learned)
        yield "dynamic", maps
        maps = self.method.spread(maps, view.encoded, affinity=learned.affinity)
        yield "caa", maps
        yield "rar", rar(maps, view.fine, rounds=self.settings.rar_rounds, grid=view.fine_grid)

    def labels(self, batch: Batch, view: View, learned: Learned) -> Tensor:
        """Return what is largest, of classes and of one minus their maximum."""
        maps = self.dynamic(batch, view, learned)
        if self.settings.train_caa:
            maps = self.method.spread(maps, view.encoded, affinity=learned.affinity)
        maps = rar(maps, view.fine, rounds=self.settings.train_rar_rounds, grid=view.fine_grid)
        return _stack(maps, batch, self.settings, restretch=True)

    def dynamic(self, batch: Batch, view: View, learned: Learned) -> Maps:
        """Return the maps before any refinement."""
        encoded, method = view.encoded, self.method
        cam = method.cam(encoded.patches, encoded.pooled, encoded.grid)  # (B, C, h, w)
        if learned.adapted is None:
            cam = method.remember(encoded, cam)
        else:  # in the place of what the memory retrieves, not beside it
            likeness = learned.adapted[:, 1:].relu().flatten(2)
            cam = fuse(cam.flatten(2), likeness, weight=self.settings.adapter_strength).unflatten(-1, encoded.grid)
        return pack(cam, batch.tags)


class MaskTeacher:
    """Hand out true masks: what the same decoder reaches with full supervision, which is no method but a ceiling."""

    raw: tuple[str, ...] = ()
    refined: tuple[str, ...] = ()
    restretch = False

    def __init__(self, settings: Settings, clip: DenseCLIP) -> None:
        self.settings, self.clip = settings, clip

    def look(self, batch: Batch, *, step: int | None) -> View:
        """Run CLIP."""
        seen = tokens_of(self.settings, self.clip, batch.images)
        return View(seen, seen)

    def rungs(self, batch: Batch, view: View, learned: Learned) -> Iterator[tuple[str, Maps]]:
        """Yield nothing: there are no maps."""
        yield from ()

    def labels(self, batch: Batch, view: View, learned: Learned) -> Tensor:
        """Return the masks at the size of the images, by nearest pixels; raise ValueError where one is missing."""
        for name, mask in zip(batch.names, batch.masks, strict=True):
            if mask is None:
                raise ValueError(f"image {name} has no mask to learn from: read a split with masks")
        size = batch.images.shape[2:]
        resized = [F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0] for mask in batch.masks]
        return torch.stack(resized).long().to(self.clip.device)


def tokens_of(settings: Settings, clip: DenseCLIP, images: Tensor) -> Encoded:
    """Encode images (B, 3, H, W) for the decoder alone: no attention, no surgery path unless its tokens need it."""
    aliased = settings.decoder_tokens == "aliased"
    return clip.encode(
        images,
        attention=settings.attention,
        surgery_blocks=settings.surgery_blocks if aliased else 0,
        tokens=settings.decoder_tokens,
        need_attention=False,
    )


def at_label_scale(batch: Batch, settings: Settings, *, step: tuple[int, int]) -> Batch:
    """Return the batch itself, or with images `label_scale` times as large, their sides multiples of `step`."""
    if settings.label_scale == 1:
        return batch
    return replace(batch, images=resized(batch.images, settings.label_scale, step=step))


def _seen(encoded: Encoded, batch: Batch, scaled: Batch, settings: Settings, clip: DenseCLIP) -> Encoded:
    return encoded if scaled is batch else tokens_of(settings, clip, batch.images)


def truncated(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] as the released code shows them to PAR.

    Bytes are normalised, restored in float32 and cut, not rounded, to bytes: a few in a hundred are one darker.
    """
    mean, std = (255 * torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (((images.cpu().double() * 255).round() - mean) / std).float()
    return ((normalised * std.float() + mean.float()).trunc() / 255).to(images.device)


def _stack(
    maps: Maps,
    batch: Batch,
    settings: Settings,
    *,
    restretch: bool = False,
    refine: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Tensor:
    """Return the labels (B, H, W) of maps at the size of the batch's images."""
    height, width = batch.images.shape[2:]
    how = {"power": settings.label_power, "restretch": restretch, "refine": refine}
    return torch.stack(pseudo_labels(maps, [(height, width)] * len(batch), **how))
