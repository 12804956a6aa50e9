"""Refine class maps beyond the patch grid: recursive affinity refinement (RAR)."""

from __future__ import annotations

from math import log, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.affinity import spread
from diclip.cam import Maps, minmax


def entropy_step(affinity: Tensor, *, rate: float = 0.02) -> Tensor:
    """Return max(0, x + rate · log10(e · x)) of affinities x in [0, 1], and 0 for x = 0.

    It is one gradient step that lowers the entropy: a soft threshold, which maps all below 0.0238 (for the
    rate 0.02) to 0, lowers what is below 1/e and raises what is above (iSeg, as used by DiCLIP).
    """
    # log 0 is -inf, which the relu turns into the 0 that is wanted.
    return affinity.log().add_(1).mul_(rate / log(10)).add_(affinity).relu_()


def sharpen(attention: Tensor, *, rate: float = 0.02) -> Tensor:
    """Turn attention (B, M, M), query by key, values at least 0, into sparse steps (B, M, M) whose rows sum to 1.

    Each key's column is divided by its maximum, `entropy_step` follows, and rows are divided by their sums
    (DiCLIP, recursive affinity refinement). A row where nothing is left is 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    attention = attention.float()
    steps = entropy_step(attention / attention.amax(-2, keepdim=True).clamp_min(tiny), rate=rate)
    return steps.div_(steps.sum(-1, keepdim=True).clamp_min(tiny))


def rar(maps: Maps, attention: Tensor, *, rounds: int, grid: tuple[int, int], canvas: int = 512) -> Maps:
    """Spread maps `rounds` times along fine attention; return them in [0, 1] at canvas x canvas.

    `attention` (B, M, M) are a self-attention's probabilities, averaged over heads, between the M = h·w tokens
    of `grid`, to which the maps (P, any h, any w) are resized; they may have any scale, and a constant map
    becomes 0. Source: DiCLIP, recursive affinity refinement. Its labels come from `pseudo_labels` with
    `restretch`. Raises ValueError for shapes that do not fit and for less than 0 rounds.
    """
    h, w = grid
    if attention.shape[1:] != (prod(grid), prod(grid)):
        found, m = tuple(attention.shape), prod(grid)
        raise ValueError(f"attention is {found}, expected (B, {m}, {m}) for {h}x{w} tokens")
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}, expected 0 or more")
    steps = sharpen(attention)
    # DiCLIP makes maps sum to 1 after each round. Rows of steps sum to 1, so shift and scale of a map pass
    # through them to the last stretch: stretching each round ends in the same maps, and keeps float32's digits.
    scores = minmax(maps.scores.float(), (-2, -1))  # before the resizing: a constant map is then exactly 0
    maps = maps.with_scores(_resize(scores, (h, w)))
    for _ in range(rounds):
        maps = maps.with_scores(minmax(spread(maps, steps).scores, (-2, -1)))
    return maps.with_scores(minmax(_resize(maps.scores, (canvas, canvas)), (-2, -1)))


def _resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
