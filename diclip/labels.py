"""Turn class maps into label images: background rules, pseudo labels, search for a background score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import Maps, minmax, resize

Rule = Literal["one_minus_max", "fixed"]
Refine = Callable[[list[Tensor]], Iterable[Tensor]]


def upsample(
    maps: Maps, index: int, size: tuple[int, int], *, stretch: bool = True, restretch: bool = False
) -> tuple[Tensor, Tensor]:
    """Return one image's scores at its own size (n, H, W), and its class indices (n,).

    With `stretch` each map is first stretched to [0, 1] at its own resolution (ExCEL's pseudo labels), with
    `restretch` at the image's size once more (DiCLIP's, after `rar`). Bilinear, half-pixel centres.
    """
    scores, label = maps.of(index)
    if stretch:
        scores = minmax(scores, (-2, -1), eps=1e-7)
    scores = resize(scores, tuple(size))
    return minmax(scores, (-2, -1), eps=1e-6) if restretch else scores, label


def with_background(scores: Tensor, *, rule: Rule = "one_minus_max", power: float = 1.0, score: float = 0.5) -> Tensor:
    """Put a background channel before class scores (..., n, H, W) in [0, 1]: (..., 1 + n, H, W).

    "one_minus_max": (1 - largest class score)^power (ExCEL and DiCLIP, power 1); "fixed": `score` everywhere.
    Without classes (n = 0) the background is certain. Raises ValueError for another rule.
    """
    if rule == "one_minus_max":
        background = (1 - _largest(scores)) ** power
    elif rule == "fixed":
        background = torch.full_like(_largest(scores), score)
    else:
        raise ValueError(f"background rule {rule!r} is unknown, choose one_minus_max or fixed")
    return torch.cat([background.unsqueeze(-3), scores], dim=-3)


def to_labels(scores: Tensor, label: Tensor, *, confidence: float = 0.0, ignore: int = 255) -> Tensor:
    """Return the mask (H, W), int64, of scores with background (1 + n, H, W); class index c becomes c + 1.

    The background wins ties. A pixel whose largest score is a smaller share of their sum than `confidence` is
    `ignore`: CLIP-ES's confidence-guided loss (CVPR 2023) leaves out what a dense CRF is not .95 sure of. Raises
    ValueError for a confidence outside of [0, 1].
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence}, expected 0 to 1: a share of the scores' sum")
    mask = F.pad(label + 1, (1, 0))[scores.argmax(0)]
    if not confidence:
        return mask
    return mask.masked_fill(scores.amax(0) < confidence * scores.sum(0), ignore)


def soft_labels(
    maps: Maps,
    sizes: Sequence[tuple[int, int]],
    *,
    rule: Rule = "one_minus_max",
    power: float = 1.0,
    score: float = 0.5,
    stretch: bool = True,
    restretch: bool = False,
    refine: Refine | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each image's scores with background (1 + n, H, W) at its own size, and its class indices (n,).

    They are what `to_labels` takes; `refine` is as `pseudo_labels` has it.
    """
    full, labels = [], []
    for index, size in enumerate(sizes):
        scores, label = upsample(maps, index, size, stretch=stretch, restretch=restretch)
        full.append(with_background(scores, rule=rule, power=power, score=score))
        labels.append(label)
    yield from zip(full if refine is None else refine(full), labels, strict=True)


def pseudo_labels(
    maps: Maps,
    sizes: Sequence[tuple[int, int]],
    *,
    rule: Rule = "one_minus_max",
    power: float = 1.0,
    score: float = 0.5,
    stretch: bool = True,
    restretch: bool = False,
    confidence: float = 0.0,
    refine: Refine | None = None,
) -> list[Tensor]:
    """Return a mask (H, W), int64, for each image at its own (height, width); without tags all background.

    With `confidence` pixels that are less sure are 255, for training: see `to_labels`. `refine` gets all images'
    scores with background, (1 + n, H, W) each, and returns them refined, in order:

        pseudo_labels(maps, sizes, refine=lambda scores: par(scores, images))
        pseudo_labels(maps, sizes, refine=lambda scores: dense_crf(scores, photographs))  # images at `sizes`
    """
    how = {"rule": rule, "power": power, "score": score, "stretch": stretch, "restretch": restretch}
    soft = soft_labels(maps, sizes, refine=refine, **how)
    return [to_labels(scores, label, confidence=confidence) for scores, label in soft]


class BackgroundSweep:
    """Count the confusion of pseudo labels for many fixed background scores in one pass over the images.

    A pixel's class is the one with the largest score, whatever the background; only whether it beats the
    background depends on the score. So it is enough to count pixels by truth, winner and the number of
    background scores that the winner beats. "one_minus_max" is covered too: with power 1 it is a fixed score
    of 0.5, with power p the m that solves m = (1 - m)^p.

        sweep = BackgroundSweep(20); sweep.update(maps, masks); sweep.confusion()   # (101, 21, 21)
    """

    def __init__(self, num_classes: int, *, scores: Sequence[float] | None = None, ignore: int = 255) -> None:
        """Prepare to try `scores`, ascending; by default 0, 0.01 … 1."""
        tried = torch.arange(101) / 100 if scores is None else torch.tensor(scores)
        if tried.ndim != 1 or not len(tried) or (tried.diff() <= 0).any():
            raise ValueError(f"background scores are {tried.tolist()}, expected one or more, ascending")
        self.scores, self.ignore = tried.float(), ignore
        self._counts = torch.zeros(num_classes + 1, num_classes + 1, len(tried) + 1, dtype=torch.long)

    def update(self, maps: Maps, masks: Sequence[Tensor], *, stretch: bool = True, restretch: bool = False) -> None:
        """Count a batch's maps against its true masks (H, W); raise ValueError for a label out of range."""
        for index, mask in enumerate(masks):
            scores, label = upsample(maps, index, tuple(mask.shape), stretch=stretch, restretch=restretch)
            mask = mask.to(scores.device, torch.long)
            known = mask != self.ignore
            if (mask[known] >= len(self._counts)).any():
                worst, top = int(mask[known].max()), len(self._counts) - 1
                raise ValueError(f"mask {index} holds label {worst}, expected 0 to {top} or {self.ignore}")
            if not len(label):
                scores, label = scores.new_zeros(1, *mask.shape), label.new_full((1,), -1)  # background alone
            # An image has few classes: to count among these costs the same whatever the dataset has.
            truth = mask[known].bincount(minlength=len(self._counts)).nonzero()[:, 0]
            place = torch.zeros(len(self._counts), dtype=torch.long, device=mask.device)
            place[truth] = torch.arange(len(truth), device=mask.device)
            beaten = torch.bucketize(scores.amax(0), self.scores.to(scores.device))
            shape = (len(truth), len(label), self._counts.shape[2])
            cell = (place[mask[known]] * shape[1] + scores.argmax(0)[known]) * shape[2] + beaten[known]
            counts = cell.bincount(minlength=shape[0] * shape[1] * shape[2]).view(shape).cpu()
            self._counts.index_put_((truth.cpu()[:, None], (label + 1).cpu()), counts, accumulate=True)

    def confusion(self) -> Tensor:
        """Return the pixel counts (scores tried, truth, prediction)."""
        total = self._counts.sum(-1, keepdim=True)
        background = self._counts.cumsum(-1)[..., :-1]  # winner does not beat score k
        confusion = (total - background).permute(2, 0, 1).contiguous()
        confusion[:, :, 0] += background.sum(1).T
        return confusion


def _largest(scores: Tensor) -> Tensor:
    return scores.amax(-3) if scores.shape[-3] else scores.new_zeros(scores.shape[:-3] + scores.shape[-2:])
