"""Segment a folder of one's own pictures into one's own classes: what `diclip segment` does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diclip import network
from diclip.coco import coco
from diclip.data import Batch, dataset_vocabulary, squash
from diclip.data.images import MAX_SIDE, decode_image, pictures_in
from diclip.data.minivoc import save_mask
from diclip.doubts import CURE, doubt_words, is_small
from diclip.evaluate import Progress, own_rule, silent
from diclip.final import check_refinement, refiner
from diclip.labels import pseudo_labels
from diclip.methods import Method, build_method
from diclip.methods.trained import load_system
from diclip.network import Network
from diclip.runs import environment, locked, replacing, write_json
from diclip.settings import ROOT, Settings, load_settings, shown
from diclip.tta import views
from diclip.vocabulary import Vocabulary

Predict = Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]
"""Makes masks (H, W) int64 of a batch and its photographs (3, H, W): class index + 1, 0 the background, 255 unsure."""

FREE = ("batch_size", "data_root", "device", "run_dir", "workers")
"""Settings that may differ when a folder is gone on with: masks do not depend on them."""


class Picture(NamedTuple):
    """Hold a picture that could be read."""

    path: Path
    image: Tensor  # (3, H, W) float32 in [0, 1], upright


def segment_folder(
    settings: Settings,
    folder: str | Path,
    classes: Sequence[str],
    out: str | Path,
    *,
    tags: str | Path | None = None,
    rung: str | None = None,
    method: Method | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write OUT/masks, OUT/overlays, annotations.json (COCO, RLE) and manifest.json; return the manifest.

    Masks are palette PNGs at the pictures' own sizes, upright as EXIF has it: label k is the k-th class, 0 the
    background. `tags` is a CSV file, a head `image,tags`, tags apart by semicolons; of a picture that it does not name
    CLIP says what is there (`likely_tags`). `rung` is where the system stops, by default its last. With `trained` in
    the settings the network segments, without tags, into those of the classes that it learned (all if none is named). A
    picture that cannot be read is listed and skipped, and tried again next time; what is done is not done again. Raises
    ValueError and FileNotFoundError, in one line, for a folder without pictures, tags that are no classes, classes that
    the network has not learned, and an OUT that holds masks made otherwise.
    """
    check_refinement(settings)
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if settings.trained is not None:
        if tags or rung not in (None, network.RUNG):
            raise ValueError("trained parts segment without tags and rungs: leave tags and rung out, or trained")
        classes = classes or dataset_vocabulary(settings).classes
    words = tuple(word for word in settings.background_words if word not in classes)
    settings = settings.model_copy(update={"background_words": words})
    vocabulary = settings.vocabulary(tuple(classes))
    files = pictures_in(folder)
    known = read_tags(Path(tags), vocabulary, files) if tags else {}
    if settings.trained is not None:
        theirs = dataset_vocabulary(settings)
        learned = [theirs.indices((name,))[0] for name in classes]  # in their own order
        method = method or load_system(settings, labels=False)
        predict, rung, background = by_network(settings, method, learned), network.RUNG, {}
    else:
        method = method or build_method(settings, vocabulary=vocabulary)
        ladder = (*method.raw, *method.refined)
        if rung is not None and rung not in ladder:
            raise ValueError(f"rung is {rung!r}, expected one of {', '.join(ladder)}")
        rung = rung or ladder[-1]
        predict, background = training_free(settings, method, rung), background_of(settings, method, rung)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        kept = {name: value for name, value in settings.model_dump(mode="json").items() if name not in FREE}
        request = {"classes": list(classes), "rung": rung, "background": background, "tags": known, "settings": kept}
        _agree(out, request)
        done = _done(out)
        new = [path for path in files if path.name not in done]
        log = out / "images.jsonl"
        parts = [new[start : start + settings.batch_size] for start in range(0, len(new), settings.batch_size)]
        for batch in progress(parts, desc=f"segment {folder.name}"):
            for record in _segment(batch, known, settings, method, vocabulary, predict, out):
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return _finish(out, request, vocabulary, method)


def training_free(settings: Settings, method: Method, rung: str) -> Predict:
    """Return what makes masks of a rung's maps, by its own background rule, refined by pixels if the settings say so.

    Tags of the batch are classes of the method's vocabulary.
    """
    how = {**background_of(settings, method, rung), "restretch": method.restretch}

    def predict(batch: Batch, photographs: Sequence[Tensor]) -> list[Tensor]:
        maps = dict(views(method, batch, settings))[rung]
        refine = refiner(settings, _Photographs(dict(zip(batch.names, photographs, strict=True))), batch.names)
        return pseudo_labels(maps, batch.sizes, refine=refine, **how)

    return predict


def by_network(settings: Settings, system: Network, learned: Sequence[int]) -> Predict:
    """Return what makes masks by a trained network that may name only some of its classes (n,): label k is the k-th."""
    kept = torch.tensor([0, *(index + 1 for index in learned)])

    def predict(batch: Batch, photographs: Sequence[Tensor]) -> list[Tensor]:
        refine = refiner(settings, _Photographs(dict(zip(batch.names, photographs, strict=True))), batch.names)
        scores = network.probabilities(system, batch, settings)
        some = [own[kept.to(own.device)] / own[kept.to(own.device)].sum(0) for own in scores]
        return network.masks(list(some if refine is None else refine(some)))

    return predict


def background_of(settings: Settings, method: Method, rung: str) -> dict[str, Any]:
    """Return a rung's background rule, with its score: the best on `tune` where it is stored, else the settings'."""
    return {
        "rule": own_rule(method, rung),
        "score": tuned_background(settings).get(rung, settings.background_score),
    }


class _Photographs(dict):
    def image(self, name: str) -> Tensor:
        return self[name]


def tuned_background(settings: Settings) -> dict[str, float]:
    """Return by rung the background scores of the settings' method that were best on `tune`, if they are stored."""
    path = ROOT / "data" / "results" / f"{settings.method}-val.json"
    if settings.preset != "mini" or not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8")).get("background_on_tune", {})


def likely_tags(method: Method, images: Tensor, *, share: float) -> list[Tensor]:
    """Return the classes (n,) int64, ascending, that CLIP finds in images (B, 3, S, S): at least one each.

    It is every class whose probability, among classes and background words, is at least `share` of the likeliest
    class's. A class's probability is the softmax of the cosines times CLIP's own scale.
    """
    encoded = method.clip.encode(images, surgery_blocks=0, tokens=None, need_attention=False)
    logits = F.normalize(encoded.pooled, dim=-1) @ method.texts.T * method.clip.model.logit_scale.exp()
    found = logits.softmax(-1)[:, : len(method.vocabulary.classes)]
    return [row.nonzero()[:, 0].cpu() for row in found >= share * found.amax(1, keepdim=True)]


def read_tags(path: Path, vocabulary: Vocabulary, files: Sequence[Path]) -> dict[str, list[str]]:
    """Read a CSV file of tags: by file name, the classes in the vocabulary's order.

    An image is named with or without its suffix; several lines of one image add up, no tags mean that none of the
    classes is there. Raises ValueError and FileNotFoundError, in one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: there is no such file: expected a CSV file with the head image,tags")
    names = {key: file.name for file in files for key in (file.stem, file.name)}
    found: dict[str, set[str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"image", "tags"} <= set(reader.fieldnames):
            raise ValueError(f"{shown(path)}: found the head {reader.fieldnames}, expected image,tags")
        for row in reader:
            name, tags = (row["image"] or "").strip(), (row["tags"] or "").split(";")
            if name not in names:
                raise ValueError(f"{shown(path)}, line {reader.line_num}: the folder has no picture {name!r}")
            found.setdefault(names[name], set()).update(tag.strip() for tag in tags if tag.strip())
    return {name: [vocabulary.classes[i] for i in vocabulary.indices(sorted(tags))] for name, tags in found.items()}


def _segment(
    paths: Sequence[Path],
    known: Mapping[str, list[str]],
    settings: Settings,
    method: Method,
    vocabulary: Vocabulary,
    predict: Predict,
    out: Path,
) -> Iterator[dict[str, Any]]:
    """Write masks and overlays of some pictures; yield a record of each, of one that cannot be read the reason."""
    read: list[Picture] = []
    for path in paths:
        try:
            image = decode_image(path.read_bytes(), name=path.name, most=MAX_SIDE)
        except (ValueError, OSError) as error:
            yield {"file": path.name, "skipped": " ".join(str(error).split())}
            continue
        read.append(Picture(path, image))
    if not read:
        return
    images = torch.stack([squash(each.image, settings.image_size) for each in read])
    if settings.trained is not None:
        tags = [torch.tensor([], dtype=torch.long)] * len(read)
    else:
        tags = likely_tags(method, images, share=settings.tag_share)
    for index, each in enumerate(read):
        if each.path.name in known:
            tags[index] = torch.tensor(vocabulary.indices(known[each.path.name]), dtype=torch.long)
    names = [each.path.name for each in read]
    sizes = [(each.image.shape[1], each.image.shape[2]) for each in read]
    batch = Batch(names, images, tags, [None] * len(read), sizes)
    for each, mask, own in zip(read, predict(batch, [each.image for each in read]), tags, strict=True):
        labels = mask.cpu().numpy().astype(np.uint8)
        _overlay(each.image, labels, out / "overlays" / f"{each.path.name}.jpg")
        target = out / "masks" / f"{each.path.name}.png"
        with replacing(target) as temporary:
            save_mask(temporary, labels)
        if settings.trained is not None:
            own, source = mask.unique()[mask.unique() > 0] - 1, "network"
        else:
            source = "file" if each.path.name in known else "CLIP"
        said = [vocabulary.classes[index] for index in own.tolist()]
        yield {"file": each.path.name, "mask": f"masks/{target.name}", "size": labels.shape, "tags": said, "by": source}


def _overlay(image: Tensor, labels: NDArray[np.uint8], path: Path) -> None:
    from diclip.data.minivoc import palette

    pixels = image.permute(1, 2, 0).numpy() * 255
    mixed = np.where((labels > 0)[..., None], 0.45 * pixels + 0.55 * palette()[labels], 0.8 * pixels)
    with replacing(path) as temporary:
        Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)).save(temporary, "JPEG", quality=90)


def _agree(out: Path, request: dict[str, Any]) -> None:
    """Write down what is asked for; raise ValueError where something else was."""
    path = out / "request.json"
    if not path.exists():
        if any(entry.name[0] != "." for entry in out.iterdir()):
            raise ValueError(f"{shown(out.resolve())} holds other files: choose another --out")
        write_json(path, request)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    pairs = chain(
        ((name, before.get(name), request[name]) for name in ("classes", "rung", "background", "tags")),
        ((name, before["settings"].get(name), value) for name, value in request["settings"].items()),
    )
    if changed := [f"{name} was {old!r}, now {new!r}" for name, old, new in pairs if old != new]:
        raise ValueError(f"{shown(out.resolve())} holds masks made otherwise ({changed[0]}): choose another --out")


def _records(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each picture."""
    path = out / "images.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["file"]: record for record in map(json.loads, lines)}


def _done(out: Path) -> set[str]:
    """Return the names of the pictures that have masks; take a last line that a kill cut off out of the log."""
    path = out / "images.jsonl"
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
        with replacing(path) as temporary:
            temporary.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return {name for name, record in _records(out).items() if "mask" in record and (out / record["mask"]).exists()}


def _finish(out: Path, request: dict[str, Any], vocabulary: Vocabulary, method: Method) -> dict[str, Any]:
    """Write annotations.json of all masks, and the manifest; return this."""
    records = _records(out)
    made = [record for record in records.values() if "mask" in record]
    write_json(out / "annotations.json", coco(out, made, vocabulary.classes))
    doubts: tuple[str, ...] = ()
    if is_small(method.clip):
        only = f"The mini CLIP has only ever seen MiniVOC's drawings: of other pictures its masks mean little. {CURE}."
        usual = load_settings(request["settings"]["preset"]).background_words
        own = (word for word in vocabulary.background if word not in usual)
        doubts = (*doubt_words((*vocabulary.classes, *own)), only)
    manifest = {
        **request,
        "labels": dict(enumerate(("background", *vocabulary.classes))),
        "images": made,
        "skipped": {name: record["skipped"] for name, record in records.items() if "skipped" in record},
        "doubts": doubts,
        "environment": environment(),
    }
    write_json(out / "manifest.json", manifest)
    return manifest
