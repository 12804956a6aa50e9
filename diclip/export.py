"""Pack predictions as servers want them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from diclip.data import open_dataset
from diclip.data.minivoc import save_mask
from diclip.evaluate import Progress, choose_background, loader, own_rule, silent
from diclip.final import check_refinement, refiner
from diclip.labels import pseudo_labels
from diclip.methods import Method, build_method
from diclip.report import protocol
from diclip.runs import environment, replacing
from diclip.settings import Settings, shown
from diclip.tta import views
from diclip.vocabulary import VOC_CLASSES

ARCHIVE = "results.tar.gz"


def export_voc(
    settings: Settings,
    folder: str | Path,
    progress: Progress = silent,
    *,
    rung: str | None = None,
    method: Method | None = None,
) -> dict[str, Any]:
    """Predict the settings' split and pack it for PASCAL VOC's server; return where, and by which protocol.

    FOLDER/results/VOC2012/Segmentation/comp6_SPLIT_cls/NAME.png are palette PNGs of class ids at the images' own
    sizes, and FOLDER/results.tar.gz holds them under the same path (comp6: what was learnt from other data too). The
    labels are those of `rung`, by default the last, by its own background rule, refined by pixels if the settings
    say so; no mask of the split is read. An export that was killed starts over; one that is finished is never
    overwritten. Raises ValueError and FileNotFoundError, in one line, for classes that are not VOC's, a split without
    tags, and a part of a split.
    """
    check_refinement(settings)
    folder = Path(folder)
    if (folder / ARCHIVE).exists():
        raise ValueError(f"{shown(folder.resolve())} holds a finished export: choose another folder")
    if settings.num_shards > 1:
        raise ValueError(f"num_shards is {settings.num_shards}, expected 1: an export packs a whole split")
    dataset = open_dataset(settings, masks=False)
    if dataset.class_names != VOC_CLASSES:
        raise ValueError(f"{settings.dataset} has {len(dataset.class_names)} classes of its own, expected VOC's 20")
    method = method or build_method(settings)
    ladder = (*method.raw, *method.refined)
    rung = rung or ladder[-1]
    if rung not in ladder:
        raise ValueError(f"rung is {rung!r}, expected one of {', '.join(ladder)}")
    rule = own_rule(method, rung)
    score = choose_background(settings, method, progress)[rung] if rule == "fixed" else 0.0
    inside = Path("results/VOC2012/Segmentation") / f"comp6_{settings.split}_cls"
    (folder / inside).mkdir(parents=True, exist_ok=True)
    for batch in progress(loader(dataset, settings), desc=f"predict {settings.split}"):
        maps = dict(views(method, batch, settings))[rung]
        refine = refiner(settings, dataset, batch.names)
        masks = pseudo_labels(maps, batch.sizes, rule=rule, score=score, restretch=method.restretch, refine=refine)
        for name, mask in zip(batch.names, masks, strict=True):
            save_mask(folder / inside / f"{name}.png", mask.cpu().numpy().astype(np.uint8))
    pack(folder, inside, dataset.names)
    said = protocol(settings, environment(), images=len(dataset))
    if rule != "fixed":
        said["masks used for choosing"] = "none"
    return {"archive": shown((folder / ARCHIVE).resolve()), "rung": rung, "images": len(dataset), "protocol": said}


def pack(folder: Path, inside: Path, names: list[str]) -> None:
    """Put FOLDER/INSIDE/NAME.png of all names in FOLDER/results.tar.gz, as INSIDE/NAME.png."""
    with replacing(folder / ARCHIVE) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for name in names:
            archive.add(folder / inside / f"{name}.png", (inside / f"{name}.png").as_posix())
