"""Write masks as COCO does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def coco(out: Path, made: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return masks in COCO's format: one annotation for each class of each picture, its region as RLE."""
    images, annotations = [], []
    for number, record in enumerate(made, 1):
        labels = np.asarray(Image.open(out / record["mask"]))
        images.append({"id": number, "file_name": record["file"], "height": labels.shape[0], "width": labels.shape[1]})
        for label in np.unique(labels[(labels > 0) & (labels < 255)]).tolist():
            region = labels == label
            rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": 1}
            annotation |= {"segmentation": rle(region), "area": int(region.sum()), "bbox": [int(x) for x in box]}
            annotations.append(annotation)
    categories = [{"id": index, "name": name} for index, name in enumerate(classes, 1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def rle(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Encode a mask (H, W) as COCO does, uncompressed: runs down the columns, the first of zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [True]]).astype(np.int8)
    changes = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    runs = runs[:-1] if runs[-1] == 0 else runs
    return {"size": list(mask.shape), "counts": runs.tolist()}
