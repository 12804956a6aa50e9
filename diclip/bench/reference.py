"""The methods as their papers read: an image at a time, a formula a line. `diclip bench` compares speed with them.

Arguments and results are those of the functions of the package that compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import Maps


def surgery_cam(patches: Tensor, pooled: Tensor, texts: Tensor, *, num_classes: int, pooled_is_token: bool) -> Tensor:
    """Return what `diclip.cam.surgery_cam` does by CLIP Surgery's products of every token, text and channel."""
    x = torch.cat([pooled[:, None], patches], dim=1) if pooled_is_token else patches
    norm = x.norm(dim=1, keepdim=True)
    x, pooled = x / norm, pooled / norm[:, 0]
    w = (2 * pooled @ texts.T).softmax(-1)
    w = w / w.mean(-1, keepdim=True)
    features = x[:, :, None] * texts * w[:, None, :, None]  # (B, 1 + N, n, E)
    features = features - features.mean(2, keepdim=True)  # less what all texts share
    scores = features.sum(-1)[..., :num_classes]
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return ((scores - low) / (high - low))[:, int(pooled_is_token) :].transpose(1, 2)


def acr(correlation: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Return what `diclip.correlation` makes by `cluster` and `acr`, by the divergence as it is defined."""
    h, w = grid
    anchors = [y * w + x for y in range(0, h, max(h // 3, 1)) for x in range(0, w, max(w // 3, 1))]
    refined = []
    for D in correlation:
        r = torch.where(D == 0, 1e-6, D).T  # token by who attends to it
        a = r[anchors]
        for _ in range(5):
            p, q = (a + 1e-5)[:, None], r + 1e-5
            J = ((p - q) * (p.log() - q.log())).sum(-1) / 2  # (anchors, tokens)
            owner = J.argmin(0)
            a = torch.stack([r[owner == k].mean(0) for k in owner.unique()])
        C = (owner[:, None] == owner).float()
        refined.append(C / C.sum(-1, keepdim=True) @ D)
    return torch.stack(refined)


def caa(maps: Maps, attention: Tensor, *, threshold: float, layers: int) -> Tensor:
    """Return the scores of `diclip.affinity.caa`: steps an image at a time, boxes a class at a time."""
    scores = torch.empty_like(maps.scores)
    for image in range(attention.shape[1]):
        A = attention[-layers:, image, 1:, 1:].mean(0)
        for _ in range(3):
            A = A / A.sum(0)
            A = A / A.sum(1, keepdim=True)
        T = (A + A.T) / 2
        T = T @ T
        for p in (maps.image == image).nonzero()[:, 0].tolist():
            inside = _boxes(maps.scores[p], threshold).to(T.device)
            scores[p] = (T @ (inside * maps.scores[p]).flatten()).view_as(inside)
    return scores


def _boxes(cam: Tensor, threshold: float) -> Tensor:
    from scipy import ndimage

    (h, w), levels = cam.shape, (255 * cam.clamp(0, 1)).byte().cpu().numpy()
    regions, _ = ndimage.label(levels > int(threshold * int(levels.max())), [[1] * 3] * 3)
    inside = torch.zeros(h, w, dtype=torch.bool)
    for rows, columns in ndimage.find_objects(regions):
        inside[rows.start : min(rows.stop, h - 1), columns.start : min(columns.stop, w - 1)] = True
    return inside


def rar(maps: Maps, attention: Tensor, *, rounds: int, grid: tuple[int, int], canvas: int = 512) -> Tensor:
    """Return the scores of `diclip.refine.rar`: a matrix an image, all maps of the image as its columns."""
    scores = maps.scores.new_empty(len(maps), canvas, canvas)
    for image, T in enumerate(attention):
        T = T / T.amax(0)  # the largest of each key
        T = torch.where(T > 0, T + 0.02 * torch.log10(math.e * T), 0).clamp_min(0)
        T = T / T.sum(1, keepdim=True)
        M = _resize(maps.of(image)[0], grid).flatten(1).T  # (tokens, classes)
        M = M - M.amin(0)
        M = M / M.sum(0)
        for _ in range(rounds):
            M = T @ M
            M = M - M.amin(0)
            M = M / M.sum(0)
        large = _resize(M.T.unflatten(1, grid), (canvas, canvas)).flatten(1)
        low, high = large.amin(1, keepdim=True), large.amax(1, keepdim=True)
        scores[maps.image == image] = ((large - low) / (high - low)).view(-1, canvas, canvas)
    return scores


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def par(
    scores: Sequence[Tensor],
    images: Sequence[Tensor],
    *,
    iterations: int = 20,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> list[Tensor]:
    """Return what `diclip.refine.par` does for scores and images of one size, all neighbours at once."""
    axes = [d * math.hypot(y, x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    refined = []
    for M, image in zip(scores, images, strict=True):
        neighbours = _around(image, dilations)  # (3, 48, H, W)
        deviation = neighbours.std(1, keepdim=True) + 1e-8
        colour = -(((neighbours - image[:, None]) / (0.3 * deviation)) ** 2).mean(0)
        distance = torch.tensor(axes, device=image.device)
        position = -((distance / (0.3 * (distance.std() + 1e-8))) ** 2)
        weights = colour.softmax(0) + 0.01 * position.softmax(0)[:, None, None]
        for _ in range(iterations):
            M = (weights * _around(M, dilations)).sum(1)
        refined.append(M)
    return refined


def _around(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the neighbours of each pixel of x (C, H, W), whose edges are repeated: (C, 8 a dilation, H, W)."""
    (height, width), reach = x.shape[1:], max(dilations)
    wide = F.pad(x[None], (reach,) * 4, mode="replicate")[0]
    places = [(reach + d * y, reach + d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    return torch.stack([wide[:, top : top + height, left : left + width] for top, left in places], dim=1)
