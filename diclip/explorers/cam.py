"""Explore class activation maps: any picture, system, words and rule; a choice goes in, a picture comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from os import getpid
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diclip.cam import Maps, minmax
from diclip.data.minivoc import save_mask
from diclip.evaluate import own_rule
from diclip.explorers import pictures
from diclip.explorers.core import Photo, Pick, Studio, View, digest
from diclip.labels import pseudo_labels
from diclip.methods import Method
from diclip.runs import environment, write_json
from diclip.score import image_counts
from diclip.segment import tuned_background
from diclip.settings import ROOT, Settings, for_method

LADDERS = {  # the rungs of each system, in order
    "clip": ("clip", "intra", "caa"),
    "clip-es": ("gradcam", "caa"),
    "excel": ("clip", "intra", "tse", "caa"),
    "diclip": ("clip", "intra", "vce", "tsa", "caa", "rar"),
}
REFINEMENTS = ("none", "PAR", "dense CRF")
VIEWS = ("classes", "rungs")


@dataclass(frozen=True)
class CamChoice:
    """Say what to look at. None stands for what the settings, the system or the picture's tags say."""

    pick: Pick = field(default_factory=Pick)
    method: str = "clip"
    rung: str = "intra"
    classes: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()  # classes of one's own, always shown
    background_words: tuple[str, ...] | None = None
    attention: str | None = None
    surgery_blocks: int | None = None
    bias_strength: float | None = None
    acr: bool | None = None
    memory_weight: float | None = None
    refinement: str = "none"
    rule: Literal["one_minus_max", "fixed"] | None = None
    score: float | None = None
    beside: str = "classes"  # or the rungs up to the chosen one
    opacity: float = 0.6
    colours: str = "magma"


@dataclass(frozen=True, eq=False, repr=False)
class CamView(View):
    """Hold also what was computed."""

    classes: tuple[str, ...] = ()
    labels: Tensor | None = None  # (H, W) int64 at the picture's own size


class CamExplorer:
    """Turn choices into views, and compute each stage again only when something changes that it depends on."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def view(self, choice: CamChoice, *, side: int = pictures.SIDE) -> CamView:
        """Draw a choice, each panel's longer side `side` pixels; raise ValueError, in one line, for a wrong one."""
        studio, photo = self.studio, self.studio.photo(choice.pick)
        settings = self.settings(choice)
        system = studio.system(settings, choice.words)
        classes = self.classes(choice, photo, system)
        found = self.rungs(choice, photo, settings, system, classes)
        labels, rule, score = self.labels(choice, photo, system, found[choice.rung])
        own = [word for word in choice.background_words or () if word not in self.studio.settings.background_words]
        background = "one minus the largest map" if rule == "one_minus_max" else f"fixed at {score:.2f}"
        line = f"{photo.name} · {choice.method}, {choice.rung} · background {background}"
        if choice.classes is None and not photo.tags:
            line += " · no tags: the likeliest classes are shown"
        panels = list(self.panels(choice, photo, system, found, labels, side))
        return CamView(
            pictures.table(panels),
            line,
            studio.doubts(photo, (*choice.words, *own)),
            classes,
            labels,
        )

    def settings(self, choice: CamChoice) -> Settings:
        """Return the settings of a choice; raise ValueError for a system, rung or value that does not exist."""
        if choice.rung not in LADDERS.get(choice.method, ()):
            known = "; ".join(f"{method}: {', '.join(rungs)}" for method, rungs in LADDERS.items())
            raise ValueError(f"{choice.method} has no rung {choice.rung!r}, expected one of {known}")
        if choice.words and choice.rung == "tsa":
            raise ValueError("DiCLIP's memory knows the dataset's classes alone: clear the box or take another rung")
        for name, value, known in (
            ("refinement", choice.refinement, REFINEMENTS),
            ("beside", choice.beside, VIEWS),
            ("colours", choice.colours, pictures.HEATS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        names = ("background_words", "attention", "surgery_blocks", "bias_strength", "acr", "memory_weight")
        changed = {name: getattr(choice, name) for name in names if getattr(choice, name) is not None}
        return for_method(self.studio.settings, choice.method).model_copy(update=changed)

    def classes(self, choice: CamChoice, photo: Photo, system: Method) -> tuple[str, ...]:
        """Return the classes shown: those chosen, or the tags, or the three likeliest; then one's own words."""
        names = system.vocabulary.classes[: len(system.vocabulary.classes) - len(choice.words)]
        chosen = choice.classes
        if chosen is None:
            chosen = photo.tags or (() if choice.words else self._likeliest(photo, names))
        unknown = sorted(set(chosen) - set(names))
        if unknown:
            raise ValueError(f"{', '.join(unknown)} are no classes: write them into the box for own words")
        return (*(name for name in names if name in chosen), *choice.words)

    def _likeliest(self, photo: Photo, names: tuple[str, ...], *, count: int = 3) -> tuple[str, ...]:
        batch = self.studio.batch(photo, (), names)
        pooled = self.studio.clip.encode(batch.images, surgery_blocks=0, tokens=None, need_attention=False).pooled
        prompts = self.studio.settings.vocabulary(names).prompts()[: len(names)]
        texts = self.studio.clip.encode_text(prompts)
        best = (F.normalize(pooled, dim=-1) @ texts.T)[0].topk(min(count, len(names))).indices
        return tuple(names[index] for index in best.tolist())

    def rungs(
        self, choice: CamChoice, photo: Photo, settings: Settings, system: Method, classes: tuple[str, ...]
    ) -> dict[str, Maps]:
        """Return a system's maps of the classes, rung by rung up to the chosen one."""
        batch = self.studio.batch(photo, classes, system.vocabulary.classes)
        key = (settings.model_dump_json(), choice.words, photo.name, *digest(batch.images), classes, choice.rung)

        def climb() -> dict[str, Maps]:
            found = {}
            for rung, maps in system.rungs(batch):
                found[rung] = maps
                if rung == choice.rung:
                    break
            return found

        return self.studio.memo("rungs", key, climb)

    def labels(self, choice: CamChoice, photo: Photo, system: Method, maps: Maps) -> tuple[Tensor, str, float]:
        """Return the mask (H, W) that maps give, with the background's rule and score."""
        rule = choice.rule or own_rule(system, choice.rung)
        score = self.background(choice) if choice.score is None else choice.score
        if not 0 <= score <= 1:
            raise ValueError(f"the background's score is {score}, expected 0 to 1")
        refine = {"none": None, "PAR": self._par, "dense CRF": self._crf}[choice.refinement]
        key = (*digest(maps.scores, maps.label, photo.image), rule, score, choice.refinement)

        def make() -> Tensor:
            chosen = None if refine is None else lambda scores: refine(scores, photo)
            how = {"rule": rule, "score": score, "restretch": system.restretch}
            return pseudo_labels(maps, [photo.size], refine=chosen, **how)[0].cpu()

        return self.studio.memo("labels", key, make), rule, score

    def background(self, choice: CamChoice) -> float:
        """Return the background score that was best on `tune` where data/results says it, else the settings'."""
        tuned = self.studio.memo(
            "tuned", choice.method, lambda: tuned_background(for_method(self.studio.settings, choice.method))
        )
        return tuned.get(choice.rung, self.studio.settings.background_score)

    def _par(self, scores: list[Tensor], photo: Photo) -> list[Tensor]:
        from diclip.refine import par

        return par(scores, [photo.image])

    def _crf(self, scores: list[Tensor], photo: Photo) -> list[Tensor]:
        from diclip.crf import dense_crf

        return list(dense_crf([own.cpu() for own in scores], [photo.image]))

    def panels(
        self,
        choice: CamChoice,
        photo: Photo,
        system: Method,
        found: dict[str, Maps],
        labels: Tensor,
        side: int,
    ) -> Iterator[pictures.Panel]:
        """Yield image, labels and truth, then the maps."""
        names, base = system.vocabulary.classes, pictures.fit(photo.image, side=side)
        iou = class_iou(labels, photo.mask, len(self.studio.classes))
        yield pictures.Panel(photo.name, base)
        mean = f" · IoU {100 * np.mean(list(iou.values())):.0f} % in the mean" if iou else ""
        yield pictures.Panel(f"labels{mean}", pictures.painted(labels, base.shape))
        lacking = "There is no true mask of this picture, so nothing can be said of how right the labels are."
        truth = pictures.note(lacking, base.shape) if photo.mask is None else pictures.painted(photo.mask, base.shape)
        yield pictures.Panel("truth", truth)
        shown = found if choice.beside == "rungs" else {choice.rung: found[choice.rung]}
        for index in range(len(found[choice.rung])):
            label = int(found[choice.rung].label[index])
            for rung, maps in shown.items():
                title = f"{names[label]} · {rung}"
                if rung == choice.rung and label + 1 in iou:
                    title += f" · IoU {100 * iou[label + 1]:.0f} %"
                heat = minmax(maps.scores[index], (-2, -1))
                pixels = pictures.overlay(base, heat, opacity=choice.opacity, colours=choice.colours)
                yield pictures.Panel(title, pixels, pictures.colour_of(label))

    def save(self, choice: CamChoice, folder: str | Path | None = None) -> Path:
        """Write labels.png (ids in VOC's palette), figure.png and manifest.json to a new folder; return it.

        By default that is runs/explorer/NAME-1, -2 and so on: nothing is overwritten.
        """
        view, photo = self.view(choice, side=2 * pictures.SIDE), self.studio.photo(choice.pick)
        folder = _fresh(ROOT / "runs" / "explorer", Path(photo.name).stem) if folder is None else Path(folder)
        scratch = folder.with_name(f".{folder.name}.{getpid()}")
        scratch.mkdir(parents=True)
        save_mask(scratch / "labels.png", view.labels.numpy().astype(np.uint8))
        Image.fromarray(view.pixels).save(scratch / "figure.png")
        upload = choice.pick.upload and choice.pick.upload[0]
        said = asdict(replace(choice, pick=replace(choice.pick, upload=None)))
        names = dict(enumerate(("background", *self.studio.classes, *choice.words)))
        write_json(
            scratch / "manifest.json",
            {
                "picture": photo.name,
                "upload": upload,
                "choice": said,
                "shown": view.line,
                "doubts": view.doubts,
                "labels": {str(index): name for index, name in names.items()},
                "settings": self.settings(choice).model_dump(mode="json"),
                "environment": environment(),
            },
        )
        scratch.rename(folder)
        return folder


def refinements() -> tuple[str, ...]:
    """Return the refinements of pixels that can run here."""
    return REFINEMENTS if find_spec("pydensecrf") else REFINEMENTS[:2]


def class_iou(labels: Tensor, truth: Tensor | None, classes: int) -> dict[int, float]:
    """Return the IoU of every label 0 to `classes` that prediction or truth (H, W) hold; of none without a truth.

    Of a word of one's own the truth says nothing: where it is predicted, the background and the classes lose.
    """
    if truth is None:
        return {}
    own = int(labels.max())
    hits, predicted, true = image_counts(labels, truth, num_classes=max(own, classes)).T[:, : classes + 1]
    union = predicted + true - hits
    return {int(label): float(hits[label] / union[label]) for label in np.nonzero(union)[0]}


def _fresh(parent: Path, stem: str) -> Path:
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def words_of(text: str) -> tuple[str, ...]:
    """Read words apart by commas or line ends, each once, in their order."""
    found: dict[str, Any] = dict.fromkeys(" ".join(word.split()) for word in text.replace("\n", ",").split(","))
    return tuple(word for word in found if word)
