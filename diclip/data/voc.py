"""Read a dataset in PASCAL VOC's folder layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diclip.data.images import read_image, read_mask
from diclip.settings import shown
from diclip.vocabulary import VOC_CLASSES, Vocabulary

IMAGE_FOLDER, IMAGE_SUFFIXES = "JPEGImages", (".jpg", ".png", ".jpeg")
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")  # the second for the images of SBD
PART_FOLDER = "SegmentationPart"
LIST_FOLDER = "ImageSets/Segmentation"


@dataclass(frozen=True)
class Sample:
    """Hold one image with its tags and, where masks are read, its mask."""

    name: str
    image: Tensor  # (3, H, W) float32 in [0, 1]
    tags: Tensor  # (n,) int64, 0-based class indices, ascending
    mask: Tensor | None  # (H, W) int64, 0 background, class index + 1, 255 void

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W)."""
        return self.image.shape[1], self.image.shape[2]


class VOCFolder(Dataset[Sample]):
    """Read the images of one split of a folder in VOC's layout.

        JPEGImages/NAME.jpg   SegmentationClass/NAME.png   SegmentationClassAug/NAME.png
        ImageSets/Segmentation/SPLIT.txt   tags.json   classes.txt

    Tags come from tags.json ({name: [class names]}) or, where there is none, from the boxes in
    Annotations/NAME.xml. Class names are `class_names`, or the lines of classes.txt where there is one, or
    VOC's 20. `limit` keeps the first images, of which shard i of n takes every n-th. With `masks=False` no
    mask is opened. Raises FileNotFoundError for a folder or split that is missing; items raise it for files,
    and ValueError for files that do not hold what they should.

        VOCFolder(root, "train", masks=False)[0].tags
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        masks: bool = True,
        limit: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
    ) -> None:
        self.root, self.split, self.masks = Path(root), split, masks
        self.vocabulary = Vocabulary(tuple(class_names or classes_of(self.root)))
        self.names = self._listed()[: limit or None][shard_index::num_shards]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; class index i is label i + 1 in a mask."""
        return self.vocabulary.classes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        image = self.image(name)
        size = (image.shape[1], image.shape[2])
        return Sample(name, image, self.tags(name), self.mask(name, size=size) if self.masks else None)

    def image(self, name: str) -> Tensor:
        """Read the image of that name, (3, H, W) float32 in [0, 1]."""
        return read_image(_first([self.root / IMAGE_FOLDER / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]))

    def mask(self, name: str, *, size: tuple[int, int] | None = None) -> Tensor:
        """Read the mask of that name, (H, W) int64; `size` is the image's (H, W), to be compared."""
        path = _first([self.root / folder / f"{name}.png" for folder in MASK_FOLDERS])
        return read_mask(path, num_classes=len(self.class_names), size=size)

    def tags(self, name: str) -> Tensor:
        """Return the classes that the image of that name is tagged with: (n,) int64, 0-based, ascending."""
        source, found = self._tags_of(name)
        try:
            return torch.tensor(self.vocabulary.indices(found), dtype=torch.long)
        except ValueError as error:
            raise ValueError(f"{shown(source)}: image {name}: {error}") from None

    def _tags_of(self, name: str) -> tuple[Path, list[str]]:
        if self._tag_file is None:
            source = self.root / "Annotations" / f"{name}.xml"
            if not source.is_file():
                raise FileNotFoundError(f"{shown(self.root)}: {name} has no tags: neither tags.json nor Annotations")
            boxes = _parse(source, ElementTree.fromstring).iterfind("object")
            return source, [box.findtext("name", "") for box in boxes]
        source = self.root / "tags.json"
        if name not in self._tag_file:
            raise ValueError(f"{shown(source)}: has no entry {name!r}, expected a list of class names: add it")
        return source, self._tag_file[name]

    @cached_property
    def _tag_file(self) -> dict[str, list[str]] | None:
        path = self.root / "tags.json"
        if not path.is_file():
            return None
        tags = _parse(path, json.loads)
        if not isinstance(tags, dict):
            raise ValueError(f"{shown(path)}: found a {type(tags).__name__}, expected {{name: [class names]}}")
        return tags

    def _listed(self) -> list[str]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {shown(self.root)}: data/README.md says how to get it")
        path = self.root / LIST_FOLDER / f"{self.split}.txt"
        if not path.is_file():
            have = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
            raise FileNotFoundError(f"there is no split {self.split!r} in {shown(self.root)}, which has {have}")
        lines = path.read_text(encoding="utf-8").splitlines()
        # A line is a name or, in DeepLab's lists, the paths of image and mask.
        names = [Path(line.split()[0]).stem for line in lines if line.strip()]
        if not names:
            raise ValueError(f"{shown(path)}: found no image, expected a name a line: copy the file again")
        return names


def classes_of(root: Path, *, default: tuple[str, ...] = VOC_CLASSES) -> tuple[str, ...]:
    """Return the class names in a folder's classes.txt, or the default ones where there is no such file."""
    path = root / "classes.txt"
    return tuple(path.read_text(encoding="utf-8").strip().splitlines()) if path.is_file() else default


def has_parts(dataset: VOCFolder) -> bool:
    """Tell whether a dataset says which pixels are an object's discriminative part and which its body."""
    return (dataset.root / PART_FOLDER).is_dir()


def part_ids(dataset: VOCFolder, name: str) -> Tensor:
    """Read MiniVOC's part mask (H, W): 0 nothing, 1 the discriminative part, 2 the body of an object."""
    return read_mask(dataset.root / PART_FOLDER / f"{name}.png", num_classes=2)


def _first(paths: Sequence[Path]) -> Path:
    """Return the first path that is there, or else the first."""
    return next(filter(Path.is_file, paths), paths[0])


def _parse(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{shown(path)}: cannot be read ({error}): copy the file again") from None
