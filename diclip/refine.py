"""Refine class maps beyond the patch grid: recursive affinity refinement (RAR), pixel-adaptive refinement (PAR)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import hypot, log, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.affinity import advance, by_column
from diclip.cam import Maps, by_image, minmax, resize


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
    peaks = attention.amax(-2, keepdim=True).float().clamp_min(tiny)
    steps = torch.empty_like(attention, dtype=torch.float32)
    # Each core of a CPU keeps some rows in its cache through all that is done to them; a GPU takes all at once.
    rows = 64 * torch.get_num_threads() if attention.device.type == "cpu" else attention.shape[-2]
    for given, out in zip(attention.split(rows, -2), steps.split(rows, -2), strict=True):
        own = entropy_step(given.float() / peaks, rate=rate)
        torch.div(own, own.sum(-1, keepdim=True).clamp_min(tiny), out=out)
    return steps


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

    def follow(own: Maps, images: slice) -> Tensor:
        steps = sharpen(attention[images])
        # DiCLIP makes maps sum to 1 after each round. Rows of steps sum to 1, so shift and scale of a map pass
        # through them to the last stretch: stretching each round ends in the same maps, and keeps float32's digits.
        scores = minmax(own.scores.float(), (-2, -1))  # before the resizing: a constant map is then exactly 0
        columns, place = by_column(own.with_scores(resize(scores, (h, w))), len(steps))
        for _ in range(rounds):
            columns = minmax(advance(columns, steps), -1)
        del steps  # before the canvas is made
        return minmax(resize(columns[place].unflatten(1, (h, w)), (canvas, canvas)), (-2, -1))

    return by_image(maps, len(attention), follow)


@torch.no_grad()
def par(
    scores: Iterable[Tensor],
    images: Iterable[Tensor],
    *,
    iterations: int = 20,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    bandwidth: float = 0.3,
    position: float = 0.01,
    resize: Literal["image", "scores"] = "image",
    align_corners: bool = True,
    normalise: bool = False,
    held: int = 2**24,
) -> list[Tensor]:
    """Give pixels the scores of those around them that look alike: pixel-adaptive refinement (PAR).

    `scores` are each image's own (K, H, W), background and present classes, of any K and size, or (B, K, H, W);
    `images` are (3, any h, any w) in any range. A pixel has 48 neighbours, in eight directions at six distances;
    in each of the `iterations` it takes the mean of their scores, weighted by likeness of colour, in units of
    `bandwidth` times the neighbours' deviation, plus `position` times nearness. Returns each image's scores.

    Source: AFA, CVPR 2022, with 10 iterations (COCO: 15); ExCEL, WeCLIP and WTCLIP have 20. Three quirks are
    theirs. Weights sum to 1.01, so that scores grow by 1.01^iterations: `normalise` ends that. The image is
    brought to the scores' size, in AFA the scores to the image's: `resize`. That is done with `align_corners`,
    which moves things by up to half a pixel of the smaller one.

    Images with scores of one shape run together, as many as have `held` weights, 4 bytes each. Raises ValueError
    for what does not fit.
    """
    scores, images = list(scores), list(images)
    _check_par(scores, images, iterations, dilations, bandwidth, resize)
    options = {"mode": "bilinear", "align_corners": align_corners}
    groups: dict[torch.Size, list[int]] = {}
    for i, (own, image) in enumerate(zip(scores, images, strict=True)):
        own, image = own.float(), image.to(own.device, torch.float32)
        if resize == "scores" and own.shape[1:] != image.shape[1:]:
            own = F.interpolate(own[None], size=image.shape[1:], **options)[0]
        elif own.shape[1:] != image.shape[1:]:
            image = F.interpolate(image[None], size=own.shape[1:], **options)[0]
        scores[i], images[i] = own, image
        groups.setdefault(own.shape, []).append(i)
    for (_, height, width), group in groups.items():
        step = max(1, held // (8 * len(dilations) * height * width))
        for chunk in (group[start : start + step] for start in range(0, len(group), step)):
            weights = _par_weights(torch.stack([images[i] for i in chunk]), dilations, bandwidth, position)
            if normalise:
                weights.div_(1 + position)
            refined = _average(torch.stack([scores[i] for i in chunk]), weights, dilations, iterations)
            del weights  # before the next chunk's are made
            for i, own in zip(chunk, refined, strict=True):
                scores[i] = own
    return scores


def _average(scores: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """Replace scores (B, K, H, W) by the weighted sums of their neighbours' again and again."""
    for _ in range(iterations):
        new = torch.zeros_like(scores)
        for weight, neighbour in zip(weights, _neighbours(scores, dilations), strict=True):
            new.addcmul_(weight, neighbour)
        scores = new
    return scores


def _par_weights(images: Tensor, dilations: Sequence[int], bandwidth: float, position: float) -> Tensor:
    """Return the weight of each neighbour of each pixel, (neighbours, B, 1, H, W), of images (B, 3, H, W)."""
    number = 8 * len(dilations)
    # One neighbour at a time: all at once would be three times the weights, and slower.
    mean = sum(_neighbours(images, dilations)) / number
    variance = sum((x - mean).square_() for x in _neighbours(images, dilations)) / (number - 1)
    unit = bandwidth * (variance.sqrt() + 1e-8)
    weights = images.new_empty(number, len(images), 1, *images.shape[2:])
    for weight, x in zip(weights, _neighbours(images, dilations), strict=True):
        torch.mean(((x - images) / unit).square_().neg_(), 1, keepdim=True, out=weight)
    weights.sub_(weights.amax(0)).exp_()  # softmax over the neighbours, in place
    weights.div_(weights.sum(0))
    distance = images.new_tensor([d * hypot(dy, dx) for d, dy, dx in _places(dilations)])
    near = (distance / (bandwidth * (distance.std() + 1e-8))).square().neg().softmax(0)
    return weights.add_(position * near.view(-1, 1, 1, 1, 1))


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yield x (B, C, H, W) moved so that each pixel holds its neighbour, place by place; edges are repeated."""
    height, width = x.shape[-2:]
    reach = max(dilations)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    for d, dy, dx in _places(dilations):
        top, left = reach + d * dy, reach + d * dx
        yield padded[..., top : top + height, left : left + width]


def _places(dilations: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the neighbours' distances and directions (d, dy, dx)."""
    return [place for place in product(dilations, (-1, 0, 1), (-1, 0, 1)) if any(place[1:])]


def _check_par(
    scores: list[Tensor],
    images: list[Tensor],
    iterations: int,
    dilations: Sequence[int],
    bandwidth: float,
    resize: str,
) -> None:
    if len(scores) != len(images):
        raise ValueError(f"found scores of {len(scores)} images, expected those of {len(images)}")
    for name, tensors, channels in (("scores", scores, "K"), ("image", images, "3")):
        for index, x in enumerate(tensors):
            if x.ndim != 3 or not x.numel() or (name == "image" and len(x) != 3):
                raise ValueError(f"{name} {index}: found {tuple(x.shape)}, expected ({channels}, H, W)")
    if iterations < 0 or not dilations or min(dilations) < 1:
        found = f"{iterations} iterations, dilations {tuple(dilations)}"
        raise ValueError(f"found {found}, expected 0 or more, and one or more from 1 up")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, expected above 0")
    if resize not in ("image", "scores"):
        raise ValueError(f"resize is {resize!r}, expected image or scores")
