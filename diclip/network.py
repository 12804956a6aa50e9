"""Segment with a trained network: no tags, no diffusion model, images of any size."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.data import Batch
from diclip.labels import Refine, to_labels
from diclip.settings import Settings
from diclip.tta import resized

RUNG = "network"
"""What the network's labels are called beside the rungs of maps."""


class Network(Protocol):
    """What `diclip.methods.trained.System` is for those who only segment."""

    patch_size: tuple[int, int]

    def segment(self, images: Tensor) -> Tensor: ...


def predict(network: Network, images: Tensor, settings: Settings) -> Tensor:
    """Return logits (B, 1 + C, h, w), background first, of images (B, 3, H, W) in [0, 1], as wide as patches are.

    Averaged over the settings' `scales` and, with `flip`, mirror images, at the size of the largest (DiCLIP and ExCEL
    average logits; CRF or not comes after it: see `masks`).
    """
    found = []
    for scale in settings.scales:
        scaled = resized(images, scale, step=network.patch_size)
        logits = network.segment(scaled)
        if settings.flip:
            logits = (logits + network.segment(scaled.flip(-1)).flip(-1)) / 2
        found.append(logits)
    size = max((logits.shape[2:] for logits in found), key=lambda shape: shape[0] * shape[1])
    return torch.stack([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in found]).mean(0)


def probabilities(network: Network, batch: Batch, settings: Settings, *, refine: Refine | None = None) -> list[Tensor]:
    """Return (1 + C, H, W) for each image at its own size, background first, sums of 1, refined if there is a `refine`.

    See `diclip.final.refiner`. The batch's tags and masks are not looked at.
    """
    logits = predict(network, batch.images, settings)
    full = (
        F.interpolate(own[None], size=size, mode="bilinear", align_corners=False)[0].softmax(0)
        for own, size in zip(logits, batch.sizes, strict=True)
    )
    return list(full) if refine is None else list(refine(list(full)))


def masks(scores: list[Tensor], *, confidence: float = 0.0) -> list[Tensor]:
    """Return a mask (H, W), int64, of each image's probabilities; what is less sure than `confidence` is 255."""
    classes = [torch.arange(len(own) - 1, device=own.device) for own in scores]
    return [to_labels(own, label, confidence=confidence) for own, label in zip(scores, classes, strict=True)]
