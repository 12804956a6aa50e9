"""Score a system rung by rung: what is chosen is chosen on `tune`, what is reported is reported on the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from diclip.baselines import grabcut
from diclip.data import Batch, batches, open_dataset
from diclip.labels import BackgroundSweep, pseudo_labels
from diclip.methods import Method, Rungs, build_method
from diclip.runs import environment
from diclip.score import Counts, image_counts, interval, miou, paired_interval, summary, tag_average_precision
from diclip.settings import Settings

Progress = Callable[..., Iterable[Any]]


def silent(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    """Show no progress."""
    return items


@dataclass
class Evaluation:
    """What was counted, per image, of each rung under both background rules, and of the baselines.

    `tuned` uses the background score that was best on `tune`, `one_minus_max` uses 1 - max; counts are
    (images, 1 + classes, 3). Both hold the ladder and what the system was compared with or left without.
    `similarity` and `tags` (images, classes) tell how well CLIP names the images.
    """

    settings: Settings
    names: list[str]
    classes: tuple[str, ...]
    ladder: tuple[str, ...]
    refined: tuple[str, ...]
    ablations: tuple[str, ...]
    background: dict[str, float]
    tuned: dict[str, Counts]
    one_minus_max: dict[str, Counts]
    baselines: dict[str, Counts]
    similarity: NDArray[np.float64]
    tags: NDArray[np.bool_]
    versions: dict[str, Any] = field(default_factory=environment)

    def rule(self, name: str) -> dict[str, Counts]:
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
    method = method or build_method(settings)
    background = choose_background(settings, method, progress)
    dataset = open_dataset(settings)
    if not len(dataset):
        raise ValueError(f"shard {settings.shard_index} of split {settings.split!r} has no images: use fewer shards")
    classes = dataset.class_names
    counted: dict[str, dict[str, list[Counts]]] = {"tuned": {}, "one_minus_max": {}}
    names, similarity, tags = [], [], []
    for batch in progress(loader(dataset, settings), desc=f"{settings.method} on {settings.split}"):
        for rung, maps in method.rungs(batch):
            for kind, rule in (("tuned", "fixed"), ("one_minus_max", "one_minus_max")):
                score = background[rung]
                masks = pseudo_labels(maps, batch.sizes, rule=rule, score=score, restretch=method.restretch)
                counted[kind].setdefault(rung, []).append(_count(masks, batch, len(classes)))
        names += batch.names
        similarity.append(class_similarity(method, batch.images))
        tags.append(_multi_hot(batch, len(classes)))
    kinds = {kind: {rung: np.concatenate(c) for rung, c in rungs.items()} for kind, rungs in counted.items()}
    baselines = {"grabcut": count_grabcut(settings, progress)} if settings.baselines else {}
    return Evaluation(
        settings=settings,
        names=names,
        classes=classes,
        ladder=(*method.raw, *method.refined),
        refined=method.refined,
        ablations=tuple(name for name in method.ablations if name in kinds["tuned"]),
        background={rung: background[rung] for rung in kinds["tuned"]},
        **kinds,
        baselines=baselines | {name: kinds["one_minus_max"][name] for name in method.baselines},
        similarity=np.concatenate(similarity),
        tags=np.concatenate(tags),
    )


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
        for rung, maps in method.rungs(batch):
            sweep = sweeps.setdefault(rung, BackgroundSweep(len(dataset.class_names)))
            sweep.update(maps, batch.masks, restretch=method.restretch)
    return sweeps


def swept(sweep: BackgroundSweep) -> NDArray[np.float64]:
    """Return the mIoU in per cent at each of a sweep's background scores."""
    confusion = sweep.confusion().numpy()  # (scores, truth, prediction)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    return miou(np.stack([hits, confusion.sum(1), confusion.sum(2)], -1))


def class_similarity(method: Method, images: torch.Tensor) -> NDArray[np.float64]:
    """Return the cosine of images (B, 3, H, W) and class prompts, (B, C): what names an image without tags."""
    encoded = method.clip.encode(images, surgery_blocks=0, tokens=None, need_attention=False)
    texts = method.texts[: len(method.vocabulary.classes)]
    return (F.normalize(encoded.pooled, dim=-1) @ texts.T).cpu().double().numpy()


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


def recognition(similarity: NDArray[np.float64], tags: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return, in per cent, how often the best class is an image's only tag, and the tags' mean average precision."""
    single = tags.sum(1) == 1
    top = similarity[single].argmax(1)
    right = tags[single][np.arange(len(top)), top]
    accuracy = float(100 * right.mean()) if len(top) else None
    return {"single_tag_top1": accuracy, "tag_map": tag_average_precision(similarity, tags)}


def report(found: Evaluation) -> dict[str, Any]:
    """Lay an evaluation out for JSON: ladder, intervals, gains from rung to rung, baselines, what was chosen."""

    def rng() -> np.random.Generator:
        return np.random.default_rng(found.settings.seed)

    rungs = {name: found.rung(name) for name in found.ladder}
    whole = rungs[found.ladder[-1]]
    spread = {name: interval(counts, generator=rng()) for name, counts in rungs.items()}
    gains = {}
    for before, after in zip(found.ladder, found.ladder[1:], strict=False):
        rule = found.rule(after)  # for both, or a change of rule would count as a gain
        gains[f"{before} to {after}"] = paired_interval(rule[before], rule[after], generator=rng())
    baselines = {name: interval(counts, generator=rng()) for name, counts in found.baselines.items()}
    lost = {name: paired_interval(found.rung(name), whole, generator=rng()) for name in found.ablations}
    return {
        "ladder": {name: round(x.value, 2) for name, x in spread.items()},
        "intervals": {name: [round(x.low, 2), round(x.high, 2)] for name, x in spread.items()},
        "gains": {name: [round(v, 2) for v in x] for name, x in gains.items()},
        "baselines": {name: round(x.value, 2) for name, x in baselines.items()},
        "baseline_intervals": {name: [round(x.low, 2), round(x.high, 2)] for name, x in baselines.items()},
        "lost": {name: [round(v, 2) for v in x] for name, x in lost.items()},
        "recognition": {
            k: None if v is None else round(v, 2) for k, v in recognition(found.similarity, found.tags).items()
        },
        "background_on_tune": found.background,
        "miou_tuned_background": _mious(found.tuned),
        "miou_one_minus_max": _mious(found.one_minus_max),
        "classes": {name: _round(summary(c, found.classes, generator=rng())["classes"]) for name, c in rungs.items()},
        "images": len(found.names),
        "settings": found.settings.model_dump(mode="json"),
        "versions": found.versions,
    }


def evaluate(settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Measure and report: what `diclip evaluate` does."""
    return report(measure(settings, progress))


def loader(dataset: Any, settings: Settings) -> Iterable[Batch]:
    """Read a dataset in the settings' batches."""
    return batches(dataset, image_size=settings.image_size, batch_size=settings.batch_size, workers=settings.workers)


def _count(masks: Sequence[torch.Tensor], batch: Batch, classes: int) -> Counts:
    pairs = zip(masks, batch.masks, strict=True)
    return np.stack([image_counts(mask.cpu(), truth, num_classes=classes) for mask, truth in pairs])


def _multi_hot(batch: Batch, classes: int) -> NDArray[np.bool_]:
    tags = np.zeros((len(batch), classes), bool)
    for row, found in zip(tags, batch.tags, strict=True):
        row[found.numpy()] = True
    return tags


def _mious(counts: dict[str, Counts]) -> dict[str, float]:
    return {name: round(float(miou(c.sum(0))), 2) for name, c in counts.items()}


def _round(classes: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    return {name: {k: None if v is None else round(v, 2) for k, v in rates.items()} for name, rates in classes.items()}
