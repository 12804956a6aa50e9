"""Read datasets: the one that the settings name, as single samples or as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from diclip.data.voc import Sample, VOCFolder, classes_of
from diclip.settings import Settings
from diclip.vocabulary import Vocabulary


@dataclass(frozen=True)
class Batch:
    """Hold B samples: images squashed to one size, everything else at its own."""

    names: list[str]
    images: Tensor  # (B, 3, S, S) float32 in [0, 1]
    tags: list[Tensor]  # each (n,) int64, 0-based class indices, ascending
    masks: list[Tensor | None]  # each (H, W) int64, 0 background, 255 void
    sizes: list[tuple[int, int]]  # each (H, W)

    def __len__(self) -> int:
        return len(self.names)


def squash(image: Tensor, size: int) -> Tensor:
    """Resize an image (3, H, W) to (3, size, size), bilinearly, without antialiasing, whatever its shape.

    This is what ExCEL and DiCLIP do to every image they evaluate.
    """
    return F.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def collate(samples: Sequence[Sample], *, image_size: int) -> Batch:
    """Join samples to a batch of squashed images."""
    return Batch(
        names=[sample.name for sample in samples],
        images=torch.stack([squash(sample.image, image_size) for sample in samples]),
        tags=[sample.tags for sample in samples],
        masks=[sample.mask for sample in samples],
        sizes=[sample.size for sample in samples],
    )


def batches(dataset: VOCFolder, *, image_size: int, batch_size: int, workers: int = 0) -> DataLoader[Batch]:
    """Return a loader of `Batch`es in the order of the dataset; `len` of it is their number."""
    join = partial(collate, image_size=image_size)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=join, num_workers=workers)


def dataset_folder(settings: Settings) -> Path:
    """Return where the settings' dataset lives; data/README.md shows the trees."""
    folders = {"minivoc": f"minivoc-{settings.minivoc_seed}", "voc": "VOCdevkit/VOC2012", "coco": "coco"}
    return settings.data_root / folders[settings.dataset]


def dataset_vocabulary(settings: Settings) -> Vocabulary:
    """Return the classes of the settings' dataset, its classes.txt's or its usual ones, and how they are prompted."""
    return settings.vocabulary(classes_of(dataset_folder(settings), default=settings.vocabulary().classes))


def prepare(settings: Settings) -> Path:
    """Return the dataset's folder, after drawing MiniVOC if it is not there yet."""
    folder = dataset_folder(settings)
    if settings.dataset == "minivoc" and not folder.exists():
        from filelock import FileLock

        from diclip.data.minivoc import write_minivoc
        from diclip.runs import progress

        settings.data_root.mkdir(parents=True, exist_ok=True)
        with FileLock(settings.data_root / f".{folder.name}.lock"):  # two processes may want it at once
            write_minivoc(
                settings.data_root,
                seed=settings.minivoc_seed,
                progress=lambda items, total: progress(items, total=total, desc="draw MiniVOC"),
            )
    return folder


def open_dataset(settings: Settings, *, masks: bool = True) -> VOCFolder:
    """Open the split, shard and number of images that the settings name; `masks=False` reads tags alone."""
    return VOCFolder(
        prepare(settings),
        settings.split,
        class_names=dataset_vocabulary(settings).classes,
        masks=masks,
        limit=settings.limit,
        shard_index=settings.shard_index,
        num_shards=settings.num_shards,
    )
