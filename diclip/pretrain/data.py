"""Batches for the mini models: rendered pictures, random crops, captions and the facts that they state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.data.minivoc import write_pretrain
from diclip.data.minivoc.captions import (
    PLACE_RATE,
    PLACE_WORDS,
    PLACES,
    TEMPLATES,
    Caption,
    class_prompts,
    describe,
)
from diclip.data.minivoc.scene import CLASSES


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pretraining pictures in memory: `images (n, 128, 128, 3)` uint8, `tags (n, 20)` bool, `places (n,)`."""

    images: np.ndarray
    tags: np.ndarray
    places: np.ndarray

    @classmethod
    def open(cls, folder: Path, count: int) -> Pictures:
        """Open the first `count` pictures that `write_pretrain` left in `folder`.

        Raises:
            ValueError: if there are fewer.
        """
        chunks = {file.stem.split("-")[1]: file for file in sorted(Path(folder).glob("images-*.npy"))}
        files = list(chunks.values())  # by start; of chunks with the same start the longest, which comes last
        sizes = np.cumsum([len(np.load(file, mmap_mode="r")) for file in files] or [0])
        if sizes[-1] < count:
            raise ValueError(f"{folder} holds {sizes[-1]} pictures, {count} are needed: run `diclip pretrain` again")
        files = files[: int(np.searchsorted(sizes, count)) + 1]

        def read(kind: str) -> np.ndarray:
            parts = [np.load(f.with_name(f.name.replace("images", kind)), mmap_mode="r") for f in files]
            return np.concatenate(parts)[:count]

        return cls(*(read(kind) for kind in ("images", "tags", "places")))

    @classmethod
    def join(cls, *parts: Pictures) -> Pictures:
        """Put several sets of pictures one after another."""
        return cls(*(np.concatenate([getattr(p, kind) for p in parts]) for kind in ("images", "tags", "places")))

    def __len__(self) -> int:
        return len(self.tags)

    def draw(self, count: int, *, single: float, rng: np.random.Generator) -> np.ndarray:
        """Draw indices `(count,)`: a share `single` from the pictures with one tag, the rest from all."""
        alone = np.flatnonzero(self.tags.sum(1) == 1)
        return np.where(
            rng.random(count) < single, alone[rng.integers(len(alone), size=count)], rng.integers(len(self), size=count)
        )

    def take(self, indices: np.ndarray) -> Tensor:
        """Read pictures `(B, 3, 128, 128)` float32 in [0, 1]."""
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float().div_(255)


def render_pictures(root: Path, counts: Mapping[str, int], *, progress: Callable[..., Any]) -> list[Pictures]:
    """Open the first pictures of each split under `root`, as many as `counts` says; render those not there yet."""
    found = []
    for split, count in counts.items():
        folder = write_pretrain(
            root, count, split=split, progress=lambda items, total: progress(items, total=total, desc="render")
        )
        found.append(Pictures.open(folder, count))
    return found


def augment(
    images: Tensor, *, size: int, crop: tuple[float, float], generator: torch.Generator, finer: int = 1
) -> Tensor:
    """Crop squares of random side (a share of the picture within `crop`), flip, and change the light.

    `finer` samples a pixel that many times along each side, so that fine patterns become grey and not false patterns.
    Returns `(B, 3, size, size)` float32 in [0, 1].
    """

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    batch = len(images)
    side = uniform(batch, low=crop[0], high=crop[1])
    shift = (1 - side)[:, None] * uniform(batch, 2, low=-1, high=1)
    flip = torch.randint(0, 2, (batch,), generator=generator) * 2 - 1
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * flip, side, shift
    grid = F.affine_grid(theta, [batch, 3, finer * size, finer * size], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images = F.avg_pool2d(images, finer) if finer > 1 else images
    contrast, light = (uniform(batch, 1, 1, 1, low=low, high=high) for low, high in ((0.7, 1.3), (-0.12, 0.12)))
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + light).clamp_(0, 1)


def write_captions(tags: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> list[Caption]:
    """Describe each picture `(B, 20)`, `(B,)` of a batch."""
    names = np.array(CLASSES, dtype=object)
    return [describe(tuple(names[t]), PLACES[p], rng) for t, p in zip(tags, places, strict=True)]


def candidate_prompts(rng: np.random.Generator) -> list[Caption]:
    """Write what every picture of a batch is compared with: one prompt a class and one a place."""
    places = [
        Caption(str(rng.choice(TEMPLATES)).format(rng.choice(PLACE_WORDS[place])), frozenset(), place)
        for place in PLACES
    ]
    return class_prompts(rng) + places


def truths(
    captions: list[Caption], tags: np.ndarray, places: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Tell which captions hold for which pictures.

    A place is known for three pictures in ten only, as if the others' captions were silent about it; what a caption
    says of a place is then neither true nor false.

    Returns:
        `true (B, T)` bool and `known (B, T)` bool.
    """
    named = np.zeros((len(captions), len(CLASSES)), bool)
    for row, caption in enumerate(captions):
        named[row, [CLASSES.index(name) for name in caption.classes]] = True
    place = np.array([-1 if c.place is None else PLACES.index(c.place) for c in captions])
    classes_hold = (named[None] <= tags[:, None]).all(-1)
    silent = (rng.random(len(tags)) >= PLACE_RATE)[:, None]
    place_holds = (place[None] == -1) | (place[None] == places[:, None])
    known = (place[None] == -1) | ~silent | ~classes_hold
    return torch.from_numpy(classes_hold & place_holds & known), torch.from_numpy(known)
