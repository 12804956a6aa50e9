"""Look at an image several times: at several scales and mirrored, one map of each class from all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import Maps, flip_max, resize
from diclip.data import Batch
from diclip.methods import Rungs
from diclip.settings import Settings


def views(method: Rungs, batch: Batch, settings: Settings) -> Iterator[tuple[str, Maps]]:
    """Yield a method's maps by name, in order, each joined over the settings' `scales` and, with `flip`, mirror images.

    A rung is joined by itself: no refinement sees the joined maps of the rung before it. Maps of mirror images are
    mirrored back, then averaged with the others ("mean": DiG, and every paper's segmentation) or, with
    `flip_join="max"`, the larger value counts, stretched to [0, 1] (ExCEL, `cam.flip_max`). Scales are averaged in the
    method's own scale (AFA), at the size of the largest map. With one scale of 1 and no flip this is `method.rungs`.
    """
    if settings.scales == (1.0,) and not settings.flip:
        yield from method.rungs(batch)
        return
    seen: dict[str, list[Maps]] = {}
    for scale in settings.scales:
        scaled = replace(batch, images=resized(batch.images, scale, step=_step(method)))
        for name, maps in _flipped(method, scaled, settings) if settings.flip else method.rungs(scaled):
            seen.setdefault(name, []).append(maps)
    for name, found in seen.items():
        yield name, average(found)


def resized(images: Tensor, scale: float, *, step: int | tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W) to `scale` times their sides, rounded to multiples of `step`, but one at least.

    Bilinear, without antialiasing, from the size that they were squashed to.
    """
    steps = (step, step) if isinstance(step, int) else step
    size = [step * max(1, round(side * scale / step)) for side, step in zip(images.shape[2:], steps, strict=True)]
    return images if scale == 1 else F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def average(found: list[Maps]) -> Maps:
    """Average the same maps of several sizes, (P, h, w) each, at the size of the largest."""
    size = max((tuple(maps.scores.shape[1:]) for maps in found), key=lambda shape: shape[0] * shape[1])
    same = (maps.scores.shape[1:] == size for maps in found)
    scores = [maps.scores if fits else resize(maps.scores, size) for maps, fits in zip(found, same, strict=True)]
    return found[0].with_scores(torch.stack(scores).mean(0))


def _flipped(method: Rungs, batch: Batch, settings: Settings) -> Iterator[tuple[str, Maps]]:
    plain = dict(method.rungs(batch))
    for name, mirrored in method.rungs(replace(batch, images=batch.images.flip(-1))):
        maps = plain.pop(name)
        if settings.flip_join == "max":
            yield name, maps.with_scores(flip_max(maps.scores, mirrored.scores))
        else:
            yield name, maps.with_scores((maps.scores + mirrored.scores.flip(-1)) / 2)


def _step(method: Rungs) -> int:
    """Return what sides of an image must be multiples of, for all of a method's models."""
    diffusion = getattr(method, "diffusion", None)
    return lcm(*method.clip.patch_size, diffusion.factor if diffusion else 1)
