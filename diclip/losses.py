"""Measure how far a decoder is from labels: balanced cross-entropy, and which patches belong together.

Sums and counts run over the whole batch, in all processes: halves of a batch in two processes have the loss, and
with gradients averaged over processes the gradients, of that batch in one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def over_processes(sums: Tensor) -> Tensor:
    """Add a tensor up over the processes that train together, with its gradient; alone, return it."""
    return _Total.apply(sums) if dist.is_available() and dist.is_initialized() else sums


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, sums: Tensor) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Total.forward(context, gradient)  # each process's loss depends on what every process adds


def balanced_cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = 255) -> Tensor:
    """Return ½ (mean over background pixels + mean over object pixels) of the cross-entropy, a scalar.

    Logits (B, 1 + C, h, w), background first, are resized bilinearly to the labels (B, H, W), int64 with `ignore`. A
    set without pixels gives 0, and the other half stays a half (ExCEL, CVPR 2025, whose 1e-6 in the denominators is
    kept; WeCLIP, CVPR 2024, divides by 0 there). Raises ValueError for shapes that do not fit.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        found = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits and labels are {found}, expected (B, 1 + C, h, w) and (B, H, W)")
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    each = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")  # (B, H, W)
    sets = torch.stack([labels == 0, (labels != 0) & (labels != ignore)])
    counts = sets.flatten(1).sum(1).to(each)
    sums = (sets * each).flatten(1).sum(1)
    sums, counts = over_processes(torch.stack([sums, counts]))
    return (sums / (counts + 1e-6)).mean()


def pair_targets(labels: Tensor, grid: tuple[int, int], *, radius: int = 8, ignore: int = 255) -> Tensor:
    """Say of each pair of cells whether they are of one class: (B, N, N) uint8, 1 yes, 0 no, 255 not asked.

    Labels (B, H, W) are reduced to the grid's N = h·w cells by their top left pixels. Background is a class, a cell is
    paired with itself. Not asked are pairs more than `radius` rows or columns apart, and pairs with `ignore` (WeCLIP,
    CVPR 2024; ExCEL; DiCLIP: 8 of 20). Raises ValueError for labels that are not (B, H, W).
    """
    if labels.ndim != 3:
        raise ValueError(f"labels are {tuple(labels.shape)}, expected (B, H, W)")
    h, w = grid
    cells = F.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1).long()  # (B, N)
    rows, columns = torch.arange(h, device=labels.device), torch.arange(w, device=labels.device)
    place = torch.stack([rows.repeat_interleave(w), columns.repeat(h)])  # (2, N)
    near = ((place[:, :, None] - place[:, None]).abs() <= radius).all(0)
    known = cells != ignore
    same = (cells[:, :, None] == cells[:, None]).to(torch.uint8)
    return same.masked_fill(~(near & known[:, :, None] & known[:, None]), 255)


def diversity_loss(affinity: Tensor, targets: Tensor) -> Tensor:
    """Return ½ Σ(1 - a) / (n + 1) over pairs of one class + ½ Σ a / (m + 1) over the others, a scalar.

    `affinity` (B, N, N) in [0, 1] is a `pair_affinity`, `targets` are `pair_targets`, n and m the numbers of pairs in
    the batch; without pairs it is 0 (ExCEL, CVPR 2025, diversity loss; DiCLIP; WeCLIP's affinity loss). Raises
    ValueError for shapes that differ.
    """
    if affinity.shape != targets.shape:
        raise ValueError(f"affinity and targets are {tuple(affinity.shape)} and {tuple(targets.shape)}, expected one")
    affinity = affinity.float()
    alike, other = targets == 1, targets == 0
    sums = torch.stack([(alike * (1 - affinity)).sum(), (other * affinity).sum()])
    counts = torch.stack([alike.sum(), other.sum()]).to(affinity)
    sums, counts = over_processes(torch.stack([sums, counts]))
    return (sums / (counts + 1)).mean()
