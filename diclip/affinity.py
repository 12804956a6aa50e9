"""Spread class maps along attention: class-aware affinity (CAA), and the pair affinities that a decoder learns."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import Maps, by_image


def sinkhorn(affinity: Tensor, *, iterations: int = 3) -> Tensor:
    """Balance matrices (..., N, N): `iterations` times divide by column sums, then by row sums."""
    for _ in range(iterations):
        affinity = affinity / affinity.sum(-2, keepdim=True)
        affinity = affinity / affinity.sum(-1, keepdim=True)
    return affinity


def transition(
    attention: Tensor,
    *,
    layers: int = 6,
    affinity: Tensor | None = None,
    iterations: int = 3,
    squared: bool = True,
) -> Tensor:
    """Turn an encoder's attention (L, B, 1 + N, 1 + N) into steps between patches (B, N, N).

    The last `layers` maps, class token dropped, are averaged, balanced, made symmetric and squared (CLIP-ES,
    CVPR 2023, class-aware attention-based affinity). A learned pair affinity (B, N, N) in [0, 1] keeps of
    them those whose gap Σ(affinity - map) is at most the average gap, and multiplies their mean (WeCLIP, CVPR
    2024; ExCEL; DiCLIP). Without `squared` it is one half of such a step. Raises ValueError for shapes that do not
    fit.
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3] or len(attention) < layers:
        raise ValueError(f"attention is {tuple(attention.shape)}, expected (>= {layers}, B, 1 + N, 1 + N)")
    maps = attention[len(attention) - layers :, :, 1:, 1:]
    if affinity is None:
        mean = maps.mean(0)
    else:
        if affinity.shape != maps.shape[1:]:
            raise ValueError(f"affinity is {tuple(affinity.shape)}, expected {tuple(maps.shape[1:])}")
        gap = (affinity - maps).sum((-2, -1))  # (layers, B)
        kept = (gap <= gap.mean(0)) | (gap == gap.amin(0))  # a rounded mean must not drop every layer
        kept = kept.to(maps)[..., None, None]
        mean = (maps * kept).sum(0) / kept.sum(0) * affinity
    balanced = sinkhorn(mean, iterations=iterations)
    balanced = (balanced + balanced.transpose(-2, -1)) / 2
    return balanced @ balanced if squared else balanced


def pair_logits(features: Tensor, *, gain: float = 3.0, mean: Literal["batch", "image"] = "batch") -> Tensor:
    """Return how much likelier than the average pair two places of a map (B, E, h, w) are one thing: (B, N, N).

    It is gain · (cosine - mean cosine). "batch" is what ExCEL and DiCLIP compute: one mean for the batch, so
    that images (and an image and its mirror image) depend on one another; "image" takes each image's own. Raises
    ValueError for another mean.
    """
    if mean not in ("batch", "image"):
        raise ValueError(f"mean is {mean!r}, expected batch or image")
    unit = F.normalize(features.flatten(2), dim=1)  # (B, E, N)
    cosine = unit.transpose(1, 2) @ unit
    return gain * (cosine - (cosine.mean() if mean == "batch" else cosine.mean((1, 2), keepdim=True)))


def pair_affinity(features: Tensor, *, gain: float = 3.0, mean: Literal["batch", "image"] = "batch") -> Tensor:
    """Return a decoder feature's (B, E, h, w) pair affinity (B, N, N) in [0, 1], for `transition` (ExCEL, DiCLIP)."""
    return pair_logits(features, gain=gain, mean=mean).sigmoid()


def calibration(features: Tensor, *, gain: float = 3.0, mean: Literal["batch", "image"] = "batch") -> Tensor:
    """Turn a decoder feature (B, E, h, w) into a bias (B, N, N) for `DenseCLIP.encode`, rows of sum 1.

    It is the softmax of `pair_logits` over the pairs that are not below the mean (ExCEL, CVPR 2025, learnable visual
    calibration). A place is always paired with itself.
    """
    logits = pair_logits(features, gain=gain, mean=mean)
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)  # else a constant map could lose all
    return logits.masked_fill((logits < 0) & ~itself, -torch.inf).softmax(-1)


def box_mask(scores: Tensor, *, threshold: float = 0.79, full_border: bool = False) -> Tensor:
    """Cover what is bright in each map (P, h, w), values in [0, 1], with boxes; return bool (P, h, w).

    Values are cut to bytes; a cell is bright above int(threshold · largest byte). Each 8-connected bright
    region is covered by its bounding box. As in the methods' released code the last row and the last column
    are never inside a box, unless `full_border` (CLIP-ES, CVPR 2023).
    """
    from scipy import ndimage

    P, h, w = scores.shape
    levels = (255 * scores.detach().clamp(0, 1)).cpu().byte()
    peak = levels.flatten(1).amax(1) if P else levels.new_zeros(0)
    bright = levels > (threshold * peak.double()).long()[:, None, None]
    within = torch.zeros(3, 3, 3)
    within[1] = 1  # neighbours in the same map only
    regions, count = ndimage.label(bright.numpy(), within.numpy())

    cells = bright.nonzero()  # (cells, 3): map, row, column
    region = torch.from_numpy(regions)[bright].long() - 1
    spread = region[:, None].expand(-1, 3)
    low = torch.full((count, 3), max(P, h, w)).scatter_reduce(0, spread, cells, "amin")
    high = torch.zeros(count, 3, dtype=torch.long).scatter_reduce(0, spread, cells + 1, "amax")
    if not full_border:
        high = high.minimum(torch.tensor([P, h - 1, w - 1]))
    keep = (low[:, 1:] < high[:, 1:]).all(1)
    (p, y0, x0), (_, y1, x1) = low[keep].T, high[keep].T

    # +1 and -1 at the corners of a box become its area when summed along both axes.
    corners = torch.zeros(P, h + 1, w + 1, dtype=torch.long)
    one = torch.ones_like(p)
    for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        corners.index_put_((p, y, x), sign * one, accumulate=True)
    return (corners.cumsum(1).cumsum(2)[:, :h, :w] > 0).to(scores.device)


def propagate(maps: Maps, steps: Tensor, *, threshold: float = 0.79, full_border: bool = False) -> Maps:
    """Spread each map from inside its boxes along its image's transitions `steps` (B, N, N).

    New value i = Σ_j steps[i, j] · (is j inside a box?) · old value j. Raises ValueError if N is not h·w.
    """
    inside = box_mask(maps.scores, threshold=threshold, full_border=full_border)
    return spread(maps.with_scores(maps.scores * inside), steps)


def spread(maps: Maps, steps: Tensor) -> Maps:
    """Take one step: new value i = Σ_j steps[i, j] · old value j, with each image's own `steps` (B, N, N).

    Raises ValueError if N is not h·w.
    """
    P, h, w = maps.scores.shape
    if steps.shape[1:] != (h * w, h * w):
        found, n = tuple(steps.shape), h * w
        raise ValueError(f"transitions are {found}, expected (B, {n}, {n}) for maps of {h}x{w}")
    columns, place = by_column(maps, len(steps))
    return maps.with_scores(advance(columns, steps)[place].unflatten(1, (h, w)))


def by_column(maps: Maps, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Lay maps (P, h, w) out for one product a batch: (batch, most of an image, h·w), and each map's place there.

    What an image has less is 0; `columns[place]` are the maps again, (P, h·w).
    """
    slot = (maps.image[:, None] == maps.image).tril(-1).sum(1)
    columns = maps.scores.new_zeros(batch, int(slot.max()) + 1 if len(maps) else 1, prod(maps.scores.shape[1:]))
    place = (maps.image, slot)
    columns[place] = maps.scores.flatten(1)
    return columns, place


def advance(columns: Tensor, steps: Tensor) -> Tensor:
    """Multiply steps (B, N, N) with maps (B, n, N), each a column; return them laid out as they came."""
    # A CPU multiplies these layouts fastest: three maps in half the time of columns @ steps.mT.
    return (steps @ columns.mT).mT.contiguous()


def caa(
    maps: Maps,
    attention: Tensor,
    *,
    threshold: float = 0.79,
    layers: int = 6,
    affinity: Tensor | None = None,
    full_border: bool = False,
) -> Maps:
    """Refine maps with class-aware affinity: `transition` of the attention, then `propagate`.

    The result is not stretched to [0, 1]. Source: CLIP-ES, CVPR 2023; with `affinity` WeCLIP, CVPR 2024.
    """
    inside = box_mask(maps.scores, threshold=threshold, full_border=full_border)

    def take(own: Maps, images: slice) -> Tensor:
        learned = None if affinity is None else affinity[images]
        half = transition(attention[:, images], layers=layers, affinity=learned, squared=False)
        return spread(spread(own, half), half).scores  # two steps of a few maps are cheaper than a square (N, N)

    return by_image(maps.with_scores(maps.scores * inside), attention.shape[1], take)
