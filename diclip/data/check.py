"""Check a whole dataset before a long run does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from diclip.data.voc import LIST_FOLDER, VOCFolder
from diclip.runs import progress
from diclip.settings import shown

TRAINING, HELD_OUT = ("train", "train_aug"), ("val", "test")


def check_folder(
    root: str | Path, *, splits: Sequence[str] | None = None, class_names: Sequence[str] | None = None
) -> list[str]:
    """Open every file that the splits (by default all) of a folder in VOC's layout name; return the problems.

    One line a problem: files that are missing or unreadable, absurd images, masks that hold no class ids or
    have another size than their image, images without tags, tags outside the vocabulary, a training split
    that shares images with a held-out one. An empty list is good news. Raises FileNotFoundError for no such
    folder.
    """
    found = sorted(path.stem for path in (Path(root) / LIST_FOLDER).glob("*.txt"))
    folders = {name: VOCFolder(root, name, class_names=class_names) for name in splits or found or TRAINING}
    problems = []
    for train in (name for name in TRAINING if name in folders):
        for held in (name for name in HELD_OUT if name in folders):
            shared = set(folders[train].names) & set(folders[held].names)
            if shared:
                what = f"{train} and {held} share {len(shared)} images, such as {min(shared)}"
                problems.append(f"{shown(root)}: {what}")
    images = {name: folder for folder in folders.values() for name in folder.names}
    for name, folder in progress(images.items(), desc="check"):
        problems += _problems(folder, name)
    return problems


def _problems(folder: VOCFolder, name: str) -> list[str]:
    problems: list[str] = []

    def attempt(read: Callable[[], object]) -> object:
        try:
            return read()
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            return None

    image = attempt(partial(folder.image, name))
    attempt(partial(folder.mask, name, size=None if image is None else tuple(image.shape[1:])))
    tags = attempt(partial(folder.tags, name))
    if tags is not None and not len(tags):
        problems.append(f"{shown(folder.root)}: image {name} has no tags")
    return problems
