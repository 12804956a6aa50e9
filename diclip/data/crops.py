"""Cut the crops that a network is trained on: the same at each step, whoever was killed or shares the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diclip.data import Batch, collate, open_dataset
from diclip.data.images import VOID
from diclip.data.voc import Sample, VOCFolder
from diclip.settings import Settings

ORDER, CUT = 1, 2  # what a random stream is for


@dataclass(frozen=True)
class Share:
    """Say which crops are whose: step t takes crops t * batch to (t + 1) * batch - 1 of an endless series.

    Of these, process `rank` of `processes` takes an equal run, in `accumulate` equal runs one after another.
    Raises ValueError for a batch that cannot be divided so.
    """

    batch: int
    accumulate: int = 1
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.processes * self.accumulate):
            parts = f"{self.processes} processes x {self.accumulate} accumulated parts"
            raise ValueError(f"train_batch is {self.batch}, which {parts} cannot share: make it a multiple")

    @property
    def size(self) -> int:
        """Return the number of crops at a time."""
        return self.batch // (self.processes * self.accumulate)

    def positions(self, step: int, part: int) -> range:
        """Return the crops of a step's part that this process takes."""
        first = step * self.batch + (self.rank * self.accumulate + part) * self.size
        return range(first, first + self.size)


class Steps(Sampler[list[tuple[int, int]]]):
    """Yield batches of (position, index) from a step on: each pass over the images has an order of its own.

    The order depends on the seed and the pass alone, so that the step is all the state there is.
    """

    def __init__(self, images: int, share: Share, *, seed: int, first: int, stop: int) -> None:
        self.images, self.share, self.seed, self.first, self.stop = images, share, seed, first, stop

    def __len__(self) -> int:
        return (self.stop - self.first) * self.share.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        for step in range(self.first, self.stop):
            for part in range(self.share.accumulate):
                positions = self.share.positions(step, part)
                passes = {position // self.images for position in positions}
                orders = {n: orders[n] if n in orders else self._order(n) for n in passes}
                yield [(at, int(orders[at // self.images][at % self.images])) for at in positions]

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, ORDER, number]).permutation(self.images)


class Crops(Dataset[Sample]):
    """Cut a crop for each (position, index): the image by its index, the chance by its position in the series.

    An image is scaled by a factor from `scales`, flipped in half of the cases, padded with black, and cut to
    (3, size, size); it keeps the tags of the whole (ExCEL, CVPR 2025, and DiCLIP, IEEE TIP 2026). Masks are cut alike
    and padded with void. With `see_masks` up to ten crops are tried until no label fills three quarters of what is
    not void: what the released code of both does, and pixel supervision.
    """

    def __init__(
        self, source: VOCFolder, size: int, *, scales: tuple[float, float], seed: int, see_masks: bool, keep_masks: bool
    ) -> None:
        self.source, self.size, self.scales, self.seed = source, size, scales, seed
        self.see_masks, self.keep_masks = see_masks, keep_masks

    def __getitem__(self, at: tuple[int, int]) -> Sample:
        position, index = at
        sample, rng = self.source[index], np.random.default_rng([self.seed, CUT, position])
        image, mask = resized(sample, rng.uniform(*self.scales))
        if rng.random() < 0.5:
            image, mask = image.flip(-1), None if mask is None else mask.flip(-1)
        image, mask = padded(image, mask, self.size, rng)
        for _ in range(10 if self.see_masks else 1):
            window = window_of(image, self.size, rng)
            if mask is None or not filled(mask[window]):
                break
        kept = mask[window].contiguous() if mask is not None and self.keep_masks else None
        return replace(sample, image=image[:, *window].contiguous(), mask=kept)


def resized(sample: Sample, factor: float) -> tuple[Tensor, Tensor | None]:
    """Scale a sample's image, bilinearly and antialiased, and its mask, by nearest pixels."""
    size = [max(1, round(side * factor)) for side in sample.size]
    image = F.interpolate(sample.image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    if sample.mask is None:
        return image, None
    mask = F.interpolate(sample.mask[None, None].float(), size=size, mode="nearest-exact")
    return image, mask[0, 0].long()


def padded(image: Tensor, mask: Tensor | None, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
    """Lay an image smaller than `size` somewhere on black, its mask on void."""
    pad: list[int] = []
    for side in (image.shape[2], image.shape[1]):
        lack = max(0, size - side)
        before = int(rng.integers(lack + 1))
        pad += [before, lack - before]
    return F.pad(image, pad), None if mask is None else F.pad(mask, pad, value=VOID)


def window_of(image: Tensor, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draw a window of (size, size) pixels."""
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[1:])
    return slice(top, top + size), slice(left, left + size)


def filled(mask: Tensor) -> bool:
    """Tell whether one label has three quarters or more of the pixels that are not void, or nothing else is there."""
    counts = mask[mask != VOID].bincount()
    return not len(counts) or bool(counts.max() >= 0.75 * counts.sum())


def training_images(settings: Settings, *, masks: bool = False) -> VOCFolder:
    """Open what a network is trained on: the first `train_images` of `train_split`, or all; `masks` reads them too."""
    changes = {"split": settings.train_split, "limit": settings.train_images, "shard_index": 0, "num_shards": 1}
    return open_dataset(settings.model_copy(update=changes), masks=masks)


def crop_batches(settings: Settings, share: Share, *, first: int = 0) -> DataLoader[Batch]:
    """Return a loader of the crops that a process trains on, `share.accumulate` batches for each step from `first` on.

    Batches have masks only under the supervision of masks. Raises ValueError and FileNotFoundError for data that
    cannot be read.
    """
    keep = settings.supervision == "masks"
    source = training_images(settings, masks=keep or settings.parity_crops_see_masks)
    crops = Crops(
        source,
        settings.image_size,
        scales=settings.crop_scales,
        seed=settings.seed,
        see_masks=settings.parity_crops_see_masks,
        keep_masks=keep,
    )
    steps = Steps(len(source), share, seed=settings.seed, first=first, stop=settings.max_iters)
    join = partial(collate, image_size=settings.image_size)
    return DataLoader(
        crops,
        batch_sampler=steps,
        collate_fn=join,
        num_workers=settings.workers,
        pin_memory=False,
        generator=torch.Generator(),  # or a loader would draw from the generator of everyone
    )
