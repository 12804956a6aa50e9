"""Read from a diffusion model's self-attention which patches belong together, and even it out by clusters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def likeness(
    q: Tensor,
    k: Tensor,
    *,
    source: tuple[int, int],
    grid: tuple[int, int],
    heads: Sequence[int],
    softmax: bool = False,
) -> Tensor:
    """Compare each head's queries with its keys on another grid: (B, len(heads), N, N), query by key, float32.

    `q` and `k` (B, all heads, n, d) lie row by row on the grid `source` of n tokens and are resized,
    bilinearly, to the N = h·w tokens of `grid`; then L = q kᵀ, without scale and softmax (DiCLIP), or with both:
    the attention's probabilities on that grid. `heads` counts from 0.
    Raises ValueError for shapes and heads that do not fit.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[2] != prod(source):
        found, expected = f"{tuple(q.shape)} and {tuple(k.shape)}", f"(B, heads, {prod(source)}, d)"
        raise ValueError(f"queries and keys are {found}, expected {expected} for {source[0]}x{source[1]} tokens")
    if not heads or not all(0 <= head < q.shape[1] for head in heads):
        raise ValueError(f"heads are {list(heads)}, expected one or more of 0 to {q.shape[1] - 1}")

    def resized(x: Tensor) -> Tensor:
        maps = x[:, list(heads)].float().transpose(2, 3).flatten(1, 2).unflatten(2, source)  # (B, heads · d, h, w)
        maps = F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False)
        return maps.flatten(2).unflatten(1, (len(heads), -1)).transpose(2, 3)  # (B, heads, N, d)

    like = resized(q) @ resized(k).transpose(2, 3)
    return (like * q.shape[3] ** -0.5).softmax(-1) if softmax else like


def correlate(
    q: Tensor,
    k: Tensor,
    *,
    source: tuple[int, int],
    grid: tuple[int, int],
    heads: Sequence[int],
    threshold: float = 0.2,
    softmax: bool = False,
) -> Tensor:
    """Return the diffusion correlation D (B, N, N), float32, of a self-attention layer; rows sum to at most 1.

    It is the `walk` along the `likeness` of the chosen heads (DiCLIP, visual correlation enhancement, of heads 1
    and 2, without `softmax`). Of several draws of noise, average D. Raises ValueError for what does not fit.
    """
    return walk(likeness(q, k, source=source, grid=grid, heads=heads, softmax=softmax), threshold=threshold)


def walk(like: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Turn heads' likeness (B, heads, N, N), of any scale, into the product of their steps (B, N, N).

    Each head is divided by its largest value of each key, cut to 0 below `threshold`, and its rows are divided
    by their sums; the first head is on the left. A key that resembles no query and a query that resembles no
    key give zeros. Raises ValueError for a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}, expected 0 to 1: values are relative to the largest")
    # A negative maximum would turn the most unlike query into the most like one.
    like = like / (like.amax(-2, keepdim=True).clamp_min(0) + 1e-5)
    like = like.masked_fill(like < threshold, 0)
    steps = like / (like.sum(-1, keepdim=True) + 1e-5)
    return reduce(torch.matmul, steps.unbind(1))


def cluster(correlation: Tensor, *, grid: tuple[int, int], anchors: int = 3, rounds: int = 5) -> Tensor:
    """Group tokens that the same tokens attend to: ids (B, N), long, numbered by first appearance.

    k-means of the columns of `correlation` (B, N, N), values at least 0, with the symmetric Kullback-Leibler
    divergence. It starts from every ⌊h / anchors⌋-th row and ⌊w / anchors⌋-th column of the grid, which can be
    more than anchors² tokens (16 on 20x20), and assigns `rounds` times; clusters that lose all members
    vanish (DiCLIP, attention clustering refinement; DiffSeg, CVPR 2024). Five rounds are not convergence.
    Raises ValueError for what does not fit.
    """
    (h, w), N = grid, prod(grid)
    if correlation.shape[1:] != (N, N):
        raise ValueError(f"correlation is {tuple(correlation.shape)}, expected (B, {N}, {N}) for {h}x{w} tokens")
    if anchors < 1 or rounds < 1:
        raise ValueError(f"anchors and rounds are {anchors} and {rounds}, expected 1 or more")
    columns = correlation.float().transpose(1, 2)  # (B, token, who attends to it)
    columns = columns.masked_fill(columns == 0, 1e-6)
    shifted = (columns + 1e-5).transpose(1, 2)  # (B, who attends, token)
    reference = shifted[..., :1].log()  # J does not change; without it, sums that nearly cancel lose their digits
    logs = shifted.log() - reference

    rows = torch.arange(0, h, max(h // anchors, 1), device=columns.device)
    start = (rows[:, None] * w + torch.arange(0, w, max(w // anchors, 1), device=columns.device)).flatten()
    centres = columns[:, start]  # (B, A, N)
    alive = torch.ones_like(centres[..., 0], dtype=torch.bool)
    for _ in range(rounds):
        near = centres + 1e-5
        near_logs = near.log() - reference.transpose(1, 2)
        # 2 J(a, r) = Σ a log a - a · log r - r · log a + Σ r log r; the last term is the same for all anchors.
        gap = (near * near_logs).sum(-1, keepdim=True) - near @ logs - near_logs @ shifted  # (B, A, N)
        owner = gap.masked_fill(~alive[..., None], torch.inf).argmin(1)  # (B, N)
        member = F.one_hot(owner, len(start)).transpose(1, 2).to(columns)  # (B, A, N)
        size = member.sum(-1, keepdim=True)
        alive = size[..., 0] > 0
        centres = member @ columns / size.clamp_min(1)
    first = member.argmax(-1).masked_fill(~alive, N)  # the token in which each cluster appears
    return first.argsort(-1).argsort(-1).gather(1, owner)


def alike(affinity: Tensor) -> Tensor:
    """Compare the rows of an affinity (B, N, N) by their cosine: (B, N, N), symmetric; of a row of zeros 0.

    Rows that sum to one make an affinity small where much is alike, as in a background. Their cosine does not: two
    patches are as like as what they are like.
    """
    rows = F.normalize(affinity, dim=-1)
    return rows @ rows.transpose(1, 2)


def acr(correlation: Tensor, clusters: Tensor) -> Tensor:
    """Replace each row of `correlation` (B, N, N) by the mean row of its cluster; ids are (B, N), long.

    Source: DiCLIP, attention clustering refinement. Doing it again changes nothing. Raises ValueError for shapes
    that do not fit.
    """
    if correlation.ndim != 3 or clusters.shape != correlation.shape[:2]:
        found = f"{tuple(correlation.shape)} and {tuple(clusters.shape)}"
        raise ValueError(f"correlation and clusters are {found}, expected (B, N, N) and (B, N)")
    member = F.one_hot(clusters).transpose(1, 2).to(correlation)  # (B, clusters, N)
    means = member @ correlation / member.sum(-1, keepdim=True).clamp_min(1)
    return means.gather(1, clusters[..., None].expand_as(correlation))
