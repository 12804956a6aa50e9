"""Pack predictions as servers want them."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from diclip import network
from diclip.checkpoints import find_weights, with_learned
from diclip.data import Batch, open_dataset
from diclip.data.minivoc import save_mask
from diclip.data.voc import VOCFolder
from diclip.evaluate import Progress, choose_background, loader, own_rule, silent
from diclip.final import check_refinement, refiner
from diclip.labels import Rule, pseudo_labels
from diclip.methods import Method, build_method
from diclip.report import protocol
from diclip.runs import create_run, environment, replacing
from diclip.settings import Settings, shown
from diclip.tta import views
from diclip.vocabulary import VOC_CLASSES

ARCHIVE = "results.tar.gz"
FREE = ("data_root", "run_dir", "workers")
"""Settings that may differ when an export is resumed: its files do not depend on them."""


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
    say so; no mask of the split is read. An export that was killed goes on with the first batch that is not whole,
    to the same bytes; one that is finished is never overwritten. Raises ValueError and FileNotFoundError, in one line,
    for classes that are not VOC's, a split without tags, a part of a split, and a folder of other settings.
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
    if settings.trained is not None:
        settings = with_learned(settings, method)
    ladder = (*method.raw, *method.refined, *([network.RUNG] if settings.trained else []))
    rung = rung or ladder[-1]
    if rung not in ladder:
        raise ValueError(f"rung is {rung!r}, expected one of {', '.join(ladder)}")
    rule: Rule = "one_minus_max" if rung == network.RUNG else own_rule(method, rung)
    inside = Path("results/VOC2012/Segmentation") / f"comp6_{settings.split}_cls"
    also = {"rung": rung, "weights": None if settings.trained is None else _digest(find_weights(settings.trained))}
    with create_run(folder, settings, free=FREE, also=also):
        score = choose_background(settings, method, progress)[rung] if rule == "fixed" else 0.0
        for batch in progress(_missing(folder / inside, dataset, settings), desc=f"predict {settings.split}"):
            refine = refiner(settings, dataset, batch.names)
            if rung == network.RUNG:
                masks = network.masks(network.probabilities(method, batch, settings, refine=refine))
            else:
                maps = dict(views(method, batch, settings))[rung]
                how = {"rule": rule, "score": score, "restretch": method.restretch, "refine": refine}
                masks = pseudo_labels(maps, batch.sizes, **how)
            for name, mask in zip(batch.names, masks, strict=True):
                with replacing(_png(folder / inside, name)) as temporary:
                    save_mask(temporary, mask.cpu().numpy().astype(np.uint8))
        pack(folder, inside, dataset.names)
    said = protocol(settings, environment(), images=len(dataset))
    if rule != "fixed":
        said["masks used for choosing"] = "none"
    return {"archive": shown((folder / ARCHIVE).resolve()), "rung": rung, "images": len(dataset), "protocol": said}


def _missing(folder: Path, dataset: VOCFolder, settings: Settings) -> Iterable[Batch]:
    """Return the batches from the first of which a picture is missing: those of a run that nobody killed."""
    for left in [*folder.glob(".*"), *folder.parents[3].glob(f".{ARCHIVE}.*")]:  # what kills have left half written
        left.unlink()
    done = sum(1 for _ in takewhile(lambda name: _png(folder, name).exists(), dataset.names))
    if done == len(dataset):
        return []
    return loader(Subset(dataset, range(done - done % settings.batch_size, len(dataset))), settings)


def pack(folder: Path, inside: Path, names: list[str]) -> None:
    """Put FOLDER/INSIDE/NAME.png of all names in FOLDER/results.tar.gz, as INSIDE/NAME.png.

    Equal pictures are an equal archive: no times and no users are kept.
    """
    with (
        replacing(folder / ARCHIVE) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in names:
            archive.add(_png(folder / inside, name), _png(inside, name).as_posix(), filter=_anyones)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _png(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _anyones(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
