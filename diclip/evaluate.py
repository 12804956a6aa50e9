"""Score a system rung by rung: what is chosen is chosen on `tune`, what is reported is reported on the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from diclip import network
from diclip.baselines import grabcut
from diclip.cam import Maps
from diclip.checkpoints import with_learned
from diclip.compare import save_counts
from diclip.data import Batch, VOCFolder, batches, open_dataset
from diclip.data.images import VOID
from diclip.data.voc import has_parts, part_ids
from diclip.final import check_refinement, refiner
from diclip.labels import BackgroundSweep, Rule, pseudo_labels, soft_labels, to_labels
from diclip.methods import Method, Rungs, build_method
from diclip.network import Network
from diclip.report import recognition, report
from diclip.runs import environment
from diclip.score import Counts, image_counts, miou
from diclip.settings import Settings
from diclip.tally import Ledger, Tally
from diclip.tta import views

__all__ = ["Evaluation", "choose_background", "evaluate", "measure", "recognition", "report"]

Progress = Callable[..., Iterable[Any]]


def silent(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    """Show no progress."""
    return items


@dataclass
class Evaluation:
    """What was counted, per image, of each rung under both background rules, and of the baselines.

    `tuned` uses the background score that was best on `tune`, `one_minus_max` uses 1 - max; counts are
    (images, 1 + classes, 3). Both hold the ladder and what the system was compared with or left without; `tallies`
    hold what else was counted of the ladder under each rung's own rule. `similarity` and `tags` (images, classes)
    tell how well CLIP names the images; `masks` is where masks come from that no method of ours made. With a
    refinement by pixels, "par" or "crf" is the last rung, under 1 - max alone; `sure` are the counts of the last
    labels' pixels that are as sure as the settings' `confidence`.
    """

    settings: Settings
    names: list[str]
    classes: tuple[str, ...]
    ladder: tuple[str, ...]
    refined: tuple[str, ...]
    ablations: tuple[str, ...]
    background: dict[str, float]
    tuned: Mapping[str, Counts]
    one_minus_max: Mapping[str, Counts]
    baselines: Mapping[str, Counts]
    similarity: NDArray[np.float32] | None = None
    tags: NDArray[np.bool_] | None = None
    tallies: dict[str, Tally] = field(default_factory=dict)
    masks: str | None = None
    sure: Counts | None = None
    versions: dict[str, Any] = field(default_factory=environment)

    def rule(self, name: str) -> Mapping[str, Counts]:
        """Return the counts under a rung's own rule: the tuned score for raw rungs, 1 - max for all others."""
        raw = name in self.ladder and name not in self.refined
        return self.tuned if raw else self.one_minus_max

    def rung(self, name: str) -> Counts:
        """Return the counts of a rung under its own rule, as a ladder shows them."""
        return self.rule(name)[name]


def measure(settings: Settings, progress: Progress = silent, *, method: Method | None = None) -> Evaluation:
    """Run a system over `tune` (to choose background scores) and over the settings' split (to count).

    Memory does not grow with the images but for their counts. Raises ValueError and FileNotFoundError, in one
    line each, for data and weights that cannot be used.
    """
    check_refinement(settings)
    method = method or build_method(settings)
    if settings.trained is not None:
        settings = with_learned(settings, method)
    background = choose_background(settings, method, progress)
    dataset = open_dataset(settings)
    if not len(dataset):
        raise ValueError(f"shard {settings.shard_index} of split {settings.split!r} has no images: use fewer shards")
    classes = dataset.class_names
    counter = _Counter(settings, method, dataset, background)
    names, similarity, tags = [], [], []
    for batch in progress(loader(dataset, settings), desc=f"{settings.method} on {settings.split}"):
        parts = [part_ids(dataset, name) if has_parts(dataset) else None for name in batch.names]
        for rung, maps in views(method, batch, settings):
            counter.add(rung, maps, batch, parts)
        names += batch.names
        if settings.trained is None:
            similarity.append(class_similarity(method, batch.images))
            tags.append(_multi_hot(batch, len(classes)))
        else:  # names are CLIP's, whatever is trained
            counter.add_network(method, batch, parts)
    one_minus_max = counter.ledgers["one_minus_max"]
    baselines = {"grabcut": count_grabcut(settings, progress)} if settings.baselines else {}
    return Evaluation(
        settings=settings,
        names=names,
        classes=classes,
        ladder=counter.ladder,
        refined=counter.ladder[len(method.raw) :],
        ablations=tuple(name for name in method.ablations if name in one_minus_max),
        background={rung: background[rung] for rung in one_minus_max if rung in background},
        tuned=counter.ledgers["fixed"],
        one_minus_max=one_minus_max,
        baselines=baselines | {name: one_minus_max[name] for name in method.baselines},
        similarity=np.concatenate(similarity) if similarity else None,
        tags=np.concatenate(tags) if tags else None,
        tallies=counter.tallies,
        sure=counter.sure.get("sure"),
    )


class _Counter:
    """Count all maps of a method's batches under both background rules, those of the ladder closely under its own."""

    def __init__(self, settings: Settings, method: Method, dataset: VOCFolder, background: Mapping[str, float]) -> None:
        self.settings, self.method, self.dataset, self.background = settings, method, dataset, background
        self.classes = len(dataset.class_names)
        by_pixels = () if settings.refine == "none" else (settings.refine,)
        self.trained = (network.RUNG,) if settings.trained else ()
        self.ladder = (*method.raw, *method.refined, *self.trained, *by_pixels)
        self.ledgers = {rule: Ledger(self.classes) for rule in ("fixed", "one_minus_max")}
        self.tallies = {name: Tally(self.classes) for name in self.ladder}
        self.sure = Ledger(self.classes)

    def add(self, rung: str, maps: Maps, batch: Batch, parts: Sequence[torch.Tensor | None]) -> None:
        for rule, ledger in self.ledgers.items():
            how = {"score": self.background[rung], "restretch": self.method.restretch}
            masks = pseudo_labels(maps, batch.sizes, rule=rule, **how)
            close = rung in self.tallies and rule == own_rule(self.method, rung)
            for mask, truth, ids in zip(masks, batch.masks, parts, strict=True):
                if close:
                    ledger.add(rung, self.tallies[rung].add(mask.cpu(), truth, ids))
                else:
                    ledger.add(rung, image_counts(mask.cpu(), truth, num_classes=self.classes))
        if rung == (*self.method.raw, *self.method.refined)[-1] and not self.trained:
            self.finish(rung, maps, batch, parts)

    def add_network(self, system: Network, batch: Batch, parts: Sequence[torch.Tensor | None]) -> None:
        """Count what a trained network says without tags, plain and as the settings refine it."""
        scores = network.probabilities(system, batch, self.settings)
        found = {network.RUNG: scores}
        if self.settings.refine != "none":
            found[self.settings.refine] = list(refiner(self.settings, self.dataset, batch.names)(scores))
        for rung, own in found.items():
            for mask, truth, ids in zip(network.masks(own), batch.masks, parts, strict=True):
                self.ledgers["one_minus_max"].add(rung, self.tallies[rung].add(mask.cpu(), truth, ids))
        if confidence := self.settings.confidence:
            for mask, truth in zip(network.masks(own, confidence=confidence), batch.masks, strict=True):
                self._add_sure(mask.cpu(), truth)

    def finish(self, rung: str, maps: Maps, batch: Batch, parts: Sequence[torch.Tensor | None]) -> None:
        """Count the last rung's labels after refinement by pixels, and the sure ones alone, as the settings ask for."""
        chosen = self.settings
        if chosen.refine == "none" and not chosen.confidence:
            return
        how = {"rule": own_rule(self.method, rung), "score": self.background[rung], "restretch": self.method.restretch}
        soft = soft_labels(maps, batch.sizes, refine=refiner(chosen, self.dataset, batch.names), **how)
        for (scores, label), truth, ids in zip(soft, batch.masks, parts, strict=True):
            if chosen.refine != "none":
                counts = self.tallies[chosen.refine].add(to_labels(scores, label).cpu(), truth, ids)
                self.ledgers["one_minus_max"].add(chosen.refine, counts)
            if chosen.confidence:
                self._add_sure(to_labels(scores, label, confidence=chosen.confidence).cpu(), truth)

    def _add_sure(self, mask: torch.Tensor, truth: torch.Tensor) -> None:
        truth = truth.masked_fill(mask == VOID, VOID)
        self.sure.add("sure", image_counts(mask, truth, num_classes=self.classes))


def own_rule(method: Method, rung: str) -> Rule:
    """Return the background rule that a rung is shown under: the score chosen on `tune` for raw maps, or 1 - max."""
    return "fixed" if rung in method.raw else "one_minus_max"


def choose_background(settings: Settings, method: Method, progress: Progress = silent) -> dict[str, float]:
    """Return for each rung the fixed background score with the best mIoU on the settings' `tune_split`.

    With the rule "fixed" it is the settings' own score for all rungs, and nothing is read.
    """
    if settings.background == "fixed":
        others = (*method.baselines, *method.ablations)
        return dict.fromkeys((*method.raw, *method.refined, *others), settings.background_score)
    sweeps = tune_sweeps(settings, method, progress)
    return {rung: round(float(sweep.scores[int(swept(sweep).argmax())]), 4) for rung, sweep in sweeps.items()}


def tune_sweeps(settings: Settings, method: Rungs, progress: Progress = silent) -> dict[str, BackgroundSweep]:
    """Count each rung's labels on all of the settings' `tune_split`, for every background score."""
    chosen = settings.model_copy(update={"split": settings.tune_split, "shard_index": 0, "num_shards": 1})
    dataset = open_dataset(chosen)
    sweeps: dict[str, BackgroundSweep] = {}
    for batch in progress(loader(dataset, chosen), desc=f"background on {chosen.split}"):
        for rung, maps in views(method, batch, settings):
            sweep = sweeps.setdefault(rung, BackgroundSweep(len(dataset.class_names)))
            sweep.update(maps, batch.masks, restretch=method.restretch)
    return sweeps


def swept(sweep: BackgroundSweep) -> NDArray[np.float64]:
    """Return the mIoU in per cent at each of a sweep's background scores."""
    confusion = sweep.confusion().numpy()  # (scores, truth, prediction)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    return miou(np.stack([hits, confusion.sum(1), confusion.sum(2)], -1))


def class_similarity(method: Method, images: torch.Tensor) -> NDArray[np.float32]:
    """Return the cosine of images (B, 3, H, W) and class prompts, (B, C): what names an image without tags."""
    encoded = method.clip.encode(images, surgery_blocks=0, tokens=None, need_attention=False)
    texts = method.texts[: len(method.vocabulary.classes)]
    return (F.normalize(encoded.pooled, dim=-1) @ texts.T).cpu().float().numpy()


def count_grabcut(settings: Settings, progress: Progress = silent) -> Counts:
    """Count what saliency, GrabCut and tags reach on the settings' split, without any learning."""
    dataset, counts = open_dataset(settings), []
    for index in progress(range(len(dataset)), desc="GrabCut with tags"):
        sample = dataset[index]
        image = (sample.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        rng = np.random.default_rng([settings.seed, *sample.name.encode()])  # the same in whatever shard
        mask = torch.from_numpy(grabcut(image, sample.tags.tolist(), rng=rng)).long()
        counts.append(image_counts(mask, sample.mask, num_classes=len(dataset.class_names)))
    return np.stack(counts)


def evaluate(settings: Settings, progress: Progress = silent, *, counts: Path | None = None) -> dict[str, Any]:
    """Measure and report: what `diclip evaluate` does; `counts` is a file for per-image counts, for `compare`."""
    return finish(measure(settings, progress), counts)


def finish(found: Evaluation, counts: Path | None) -> dict[str, Any]:
    """Report an evaluation, and keep its per-image counts if there is a file to keep them in."""
    if counts is not None:
        save_counts(counts, found)
    return report(found)


def loader(dataset: Any, settings: Settings) -> Iterable[Batch]:
    """Read a dataset in the settings' batches."""
    return batches(dataset, image_size=settings.image_size, batch_size=settings.batch_size, workers=settings.workers)


def _multi_hot(batch: Batch, classes: int) -> NDArray[np.bool_]:
    tags = np.zeros((len(batch), classes), bool)
    for row, found in zip(tags, batch.tags, strict=True):
        row[found.numpy()] = True
    return tags
