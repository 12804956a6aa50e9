"""Score masks that anyone made: a folder of PNG or npy files, one for each image of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diclip.data import open_dataset
from diclip.data.images import VOID, read_mask
from diclip.data.voc import has_parts, part_ids
from diclip.evaluate import Evaluation, Progress, silent
from diclip.settings import Settings, shown
from diclip.tally import Ledger, Tally

SUFFIXES = (".png", ".npy")


def measure_masks(settings: Settings, folder: str | Path, progress: Progress = silent) -> Evaluation:
    """Count a folder's masks against the settings' split, as `evaluate.measure` counts a method's.

    Each image has a mask of its own size, NAME.png (palette or grey) or NAME.npy, of class ids, 0 the background.
    Raises FileNotFoundError and ValueError, in one line, for masks that are missing or hold anything else.
    """
    dataset, folder = open_dataset(settings), Path(folder)
    files = find_masks(folder, dataset.names)
    classes = dataset.class_names
    ledger, tally = Ledger(len(classes)), Tally(len(classes))
    for index in progress(range(len(dataset)), desc=f"masks of {folder.name} on {settings.split}"):
        name = dataset.names[index]
        target = dataset.mask(name)
        mask = read_prediction(files[name], target, num_classes=len(classes))
        ledger.add("masks", tally.add(mask, target, part_ids(dataset, name) if has_parts(dataset) else None))
    return Evaluation(
        settings=settings,
        names=list(dataset.names),
        classes=classes,
        ladder=("masks",),
        refined=("masks",),
        ablations=(),
        background={},
        tuned={},
        one_minus_max=ledger,
        baselines={},
        tallies={"masks": tally},
        masks=shown(folder.resolve()),
    )


def find_masks(folder: Path, names: list[str]) -> dict[str, Path]:
    """Return each image's mask file, a PNG before a npy; raise FileNotFoundError, in one line, if some are missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(folder)}: give the one that holds the masks")
    there = {path.name: path for path in folder.iterdir()}
    files = {name: [there[name + suffix] for suffix in SUFFIXES if name + suffix in there] for name in names}
    missing = [name for name, found in files.items() if not found]
    if missing:
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        what = f"{shown(folder)} has no mask for {len(missing)} of {len(names)} images ({some})"
        raise FileNotFoundError(f"{what}: expected NAME.png or NAME.npy, for each name in the split's list")
    return {name: found[0] for name, found in files.items()}


def read_prediction(path: Path, target: Tensor, *, num_classes: int) -> Tensor:
    """Read a mask of class ids, (H, W) int64, for an image whose true mask is `target` (H, W).

    Where the target is void a prediction may be; anywhere else it has to say a class. Raises ValueError, in one line.
    """
    size = (target.shape[0], target.shape[1])
    if path.suffix == ".npy":
        mask = _read_array(path, num_classes=num_classes, size=size)
    else:
        mask = read_mask(path, num_classes=num_classes, size=size)
    undecided = int(((mask == VOID) & (target != VOID)).sum())
    if undecided:
        raise ValueError(
            f"{shown(path)}: found {undecided} pixels of {VOID}, expected a class wherever the truth has one"
        )
    return mask


def _read_array(path: Path, *, num_classes: int, size: tuple[int, int]) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:  # pickled objects, or no array at all
        reason = str(error).split(".")[0]
        raise ValueError(f"{shown(path)}: is no plain array ({reason}): save (H, W) class ids by np.save") from None
    if array.dtype.kind not in "iub" or array.shape != size:
        found = f"{array.dtype} {array.shape}"
        raise ValueError(f"{shown(path)}: found {found}, expected integer class ids {size}, as its image has")
    ids = array.astype(np.int64)
    strange = ids[((ids < 0) | (ids > num_classes)) & (ids != VOID)]
    if strange.size:
        raise ValueError(f"{shown(path)}: found {strange[0]}, expected class ids 0 to {num_classes}")
    return torch.from_numpy(ids)
