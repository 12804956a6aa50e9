"""Refine scores with a fully connected conditional random field: dense CRF, by the optional pydensecrf2."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # workers import this module, and need no torch
    import torch
    from torch import Tensor

LEAST = 1e-5  # scores below it count as it: the logarithm of 0 would never be outvoted


@dataclass(frozen=True)
class CRF:
    """Hold the strength of two Potts potentials, of nearness and of nearness with likeness of colour.

    Deviations are in pixels, that of colour in steps of 0 to 255.
    """

    near_deviation: float
    near_weight: float
    alike_deviation: float
    colour_deviation: float
    alike_weight: float
    iterations: int = 10

    def __post_init__(self) -> None:
        """Refuse deviations that are not positive, and less than 0 iterations."""
        if min(self.near_deviation, self.alike_deviation, self.colour_deviation) <= 0 or self.iterations < 0:
            raise ValueError(f"found {self}, expected deviations above 0 and 0 or more iterations")


PRESETS = {
    "clip-es": CRF(1, 3, 67, 3, 4),  # CLIP-ES, ExCEL and DiCLIP, labels and segmentation; WeakCLIP on COCO
    "afa": CRF(3, 3, 64, 5, 4),  # segmentation of AFA, WeCLIP, WTCLIP
    "weakclip": CRF(3, 3, 83, 5, 3),  # WeakCLIP on VOC
    "psa": CRF(3, 3, 80, 13, 10),  # pseudo labels of PSA and DiG; WeakCLIP's boundary loss
}


def dense_crf(
    scores: Iterable[Tensor], images: Iterable[Tensor], *, preset: CRF | str = "clip-es", workers: int = 0
) -> Iterator[Tensor]:
    """Yield each image's posterior (K, H, W), float32 with sum 1, of scores (K, H, W) of at least 0.

    Scores need not sum to 1; `images` are (3, H, W) in [0, 1]. `to_labels` makes a mask of a posterior. With
    `workers` so many processes share the images, in order, and few are held at a time: both may be streams.
    Source: Krähenbühl and Koltun, NeurIPS 2011, with mean-field iterations; unary potential -log score. Raises
    ValueError for what does not fit, for streams of unequal length, and where the package is missing. As for every
    pool of processes, a script that asks for workers does so below `if __name__ == "__main__":`.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"CRF preset {preset!r} is unknown, choose one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 or more")
    check_installed()
    return _stream(scores, images, partial(_infer, preset), workers)


def check_installed() -> None:
    """Raise ValueError, in one line that says how to get it, where the package is missing."""
    if not find_spec("pydensecrf"):
        raise ValueError("found no package for the dense CRF: pip install -e '.[crf]' (it needs a C++ compiler)")


def _stream(scores: Iterable[Tensor], images: Iterable[Tensor], infer: partial, workers: int) -> Iterator[Tensor]:
    pairs = enumerate(zip_longest(scores, images))
    jobs = ((_device(index, *pair), _arrays(index, *pair)) for index, pair in pairs)
    if not workers:
        yield from (_tensor(device, infer(*arrays)) for device, arrays in jobs)
        return
    # Never forked: a fork of a process whose torch has threads, or holds a GPU, can wait for ever on their locks.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = deque()
        for device, arrays in jobs:
            waiting.append((device, pool.submit(infer, *arrays)))
            if len(waiting) > 2 * workers:  # enough to keep all busy
                yield _collect(*waiting.popleft())
        yield from (_collect(*job) for job in waiting)


def _collect(device: torch.device, future: Future) -> Tensor:
    return _tensor(device, future.result())


def _tensor(device: torch.device, posterior: NDArray[np.float32]) -> Tensor:
    import torch

    return torch.from_numpy(posterior).to(device)


def _device(index: int, scores: Tensor | None, image: Tensor | None) -> torch.device:
    """Return where an image's scores are, and its result is to be; refuse streams of which one has ended before."""
    if scores is None or image is None:
        ended, other = ("scores", "images") if scores is None else ("images", "scores")
        raise ValueError(f"found {index} {ended} and more {other}, expected as many of both")
    return scores.device


def _arrays(index: int, scores: Tensor, image: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return unary potentials (K, H, W) and pixels (H, W, 3); refuse what a CRF would silently take."""
    if scores.ndim != 3 or not scores.numel() or image.shape != (3, *scores.shape[1:]):
        found = f"scores {tuple(scores.shape)} and image {tuple(image.shape)}"
        raise ValueError(f"image {index}: found {found}, expected (K, H, W) and (3, H, W)")
    for name, x, high in (("scores", scores, float("inf")), ("pixels", image, 1.0)):
        low, top = x.min().item(), x.max().item()
        if not (0 <= low and top <= high and top < float("inf")):  # NaN fails too
            raise ValueError(f"image {index}: found {name} from {low:g} to {top:g}, expected 0 to {high:g}")
    pixels = (255 * image.detach()).round().byte().permute(1, 2, 0)
    potentials = -scores.detach().float().clamp_min(LEAST).log()
    return potentials.cpu().contiguous().numpy(), pixels.cpu().contiguous().numpy()


def _infer(crf: CRF, potentials: NDArray[np.float32], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    from pydensecrf.densecrf import DenseCRF2D

    K, height, width = potentials.shape
    field = DenseCRF2D(width, height, K)
    field.setUnaryEnergy(potentials.reshape(K, -1))
    field.addPairwiseGaussian(sxy=crf.near_deviation, compat=crf.near_weight)
    field.addPairwiseBilateral(
        sxy=crf.alike_deviation, srgb=crf.colour_deviation, rgbim=pixels, compat=crf.alike_weight
    )
    return np.array(field.inference(crf.iterations), dtype=np.float32).reshape(K, height, width)
