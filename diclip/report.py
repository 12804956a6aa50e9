"""Lay out what was measured: for JSON, and for every printed table the protocol that it was measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diclip.final import refinement
from diclip.score import Counts, interval, miou, paired_interval, summary, tag_average_precision
from diclip.settings import Settings, shown
from diclip.tally import extremes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diclip.evaluate import Evaluation


def report(found: Evaluation) -> dict[str, Any]:
    """Lay an evaluation out for JSON: ladder, intervals, gains from rung to rung, baselines, what went wrong where."""

    def rng() -> np.random.Generator:
        return np.random.default_rng(found.settings.seed)

    rungs = {name: found.rung(name) for name in found.ladder}
    # Ablations stop before any refinement by pixels, and so does what they are compared with.
    whole = rungs[[name for name in found.ladder if name != found.settings.refine][-1]]
    spread = {name: interval(counts, generator=rng()) for name, counts in rungs.items()}
    gains = {}
    for before, after in zip(found.ladder, found.ladder[1:], strict=False):
        rule = found.rule(after)  # for both, or a change of rule would count as a gain
        gains[f"{before} to {after}"] = paired_interval(rule[before], rule[after], generator=rng())
    baselines = {name: interval(counts, generator=rng()) for name, counts in found.baselines.items()}
    lost = {name: paired_interval(found.rung(name), whole, generator=rng()) for name in found.ablations}
    return {
        "protocol": protocol(found.settings, found.versions, images=len(found.names), masks=found.masks),
        "ladder": {name: round(x.value, 2) for name, x in spread.items()},
        "intervals": {name: [round(x.low, 2), round(x.high, 2)] for name, x in spread.items()},
        "gains": {name: [round(v, 2) for v in x] for name, x in gains.items()},
        "baselines": {name: round(x.value, 2) for name, x in baselines.items()},
        "baseline_intervals": {name: [round(x.low, 2), round(x.high, 2)] for name, x in baselines.items()},
        "lost": {name: [round(v, 2) for v in x] for name, x in lost.items()},
        "sure": sure(found, rungs[found.ladder[-1]]),
        "recognition": recognised(found),
        "background_on_tune": found.background,
        "miou_tuned_background": _mious(found.tuned),
        "miou_one_minus_max": _mious(found.one_minus_max),
        "classes": {name: _round(summary(c, found.classes, generator=rng())["classes"]) for name, c in rungs.items()},
        **details(found, rungs),
        "images": len(found.names),
        "settings": found.settings.model_dump(mode="json"),
        "versions": found.versions,
    }


def details(found: Evaluation, rungs: dict[str, Counts]) -> dict[str, Any]:
    """Return what the rungs' tallies say, a table each, and of the last rung the confusion and the extreme images."""
    each = {name: tally.report(rungs[name], found.classes) for name, tally in found.tallies.items()}
    tables = {what: {name: x[what] for name, x in each.items()} for what in ("rates", "errors", "sizes", "confusions")}
    last = found.ladder[-1]
    if last not in found.tallies:
        return tables
    tally = found.tallies[last]
    confusion = {"rung": last, "truth by prediction": tally.confusion.tolist()}
    return {
        **tables,
        "confusion": confusion,
        **{
            name: {"rung": last, "images": rows}
            for name, rows in extremes(found.names, rungs[last], tally.errors).items()
        },
    }


def sure(found: Evaluation, counts: Counts) -> dict[str, float]:
    """Return what share of the last labels' pixels, `counts`, is as sure as was asked for, and their mIoU alone.

    Leaving out what is hard makes any score better: this is how good labels are to learn from, not a result.
    """
    if found.sure is None:
        return {}
    spread = interval(found.sure, generator=np.random.default_rng(found.settings.seed))
    kept = 100 * found.sure[..., 2].sum() / counts[..., 2].sum()
    rates = {"pixels kept": kept, "mIoU of these": spread.value, "low": spread.low, "high": spread.high}
    return {"confidence": found.settings.confidence, **{name: round(float(x), 2) for name, x in rates.items()}}


def protocol(settings: Settings, versions: dict[str, Any], *, images: int, masks: str | None = None) -> dict[str, str]:
    """Return in words how a number came about: what has to stand beside it, wherever it is shown.

    `masks` is where somebody else's masks come from, of which nothing else is known.
    """
    where = origin(settings, versions, images=images)
    run = {"versions": where.pop("versions")}
    if masks is not None:
        unknown = dict.fromkeys(("scales", "flip", "PAR", "CRF", "seeds", "masks used for choosing"), "not known")
        return {**where, "masks": masks, **unknown, **run}
    own = " (the images that are scored)" if settings.tune_split == settings.split else ""
    chosen = f"{settings.tune_split}{own}, for background scores"
    return {
        **where,
        "tags": "given to maps, not to the network" if settings.trained else "given",
        **({"trained": shown(settings.trained), "supervision": supervision(settings)} if settings.trained else {}),
        "scales": f"{', '.join(f'{scale:g}' for scale in settings.scales)} of {settings.image_size} px",
        "flip": settings.flip_join if settings.flip else "no",
        **refinement(settings),
        "seeds": f"{settings.seed} (one run)",
        "masks used for choosing": chosen if settings.background == "sweep" else "none",
        **run,
    }


def supervision(settings: Settings) -> str:
    """Return in words what a network learned from."""
    return settings.supervision + (", crops chosen by masks" if settings.parity_crops_see_masks else "")


def origin(settings: Settings, versions: dict[str, Any], *, images: int) -> dict[str, str]:
    """Return in words which images a number is of, and which versions made it."""
    world = f"minivoc (seed {settings.minivoc_seed})" if settings.dataset == "minivoc" else settings.dataset
    shard = f", shard {settings.shard_index} of {settings.num_shards}" if settings.num_shards > 1 else ""
    packages = versions.get("packages", {})
    state = (versions.get("commit") or "no commit")[:7] + (" with changes" if versions.get("changed") else "")
    return {
        "split": f"{settings.split} of {world}, {images} images{shard}",
        "versions": f"diclip {versions.get('diclip')} ({state}), torch {packages.get('torch')}",
    }


def on_screen(result: dict[str, Any]) -> dict[str, Any]:
    """Keep of a report what fits a screen."""
    settings, rows = result["settings"], []
    for kind, spread in (("ladder", "intervals"), ("baselines", "baseline_intervals")):
        for name, value in result[kind].items():
            low, high = result[spread][name]
            both = {rule: result[f"miou_{rule}"].get(name) for rule in ("tuned_background", "one_minus_max")}
            rows.append({"rung": name, "mIoU": value, "low": low, "high": high, **both})
    lost = [
        {"rung": name, "mIoU lost": value, "low": low, "high": high}
        for name, (value, low, high) in result["lost"].items()
    ]
    return {
        "method": result["protocol"].get("masks", settings["method"]),
        "protocol": result["protocol"],
        "mIoU in per cent, 95 % bootstrap over images": rows,
        **({"what each part is worth, paired bootstrap": lost} if lost else {}),
        **({"labels that are sure, in per cent": result["sure"]} if result.get("sure") else {}),
        **closely(result),
        **({"recognition in per cent": result["recognition"]} if result["recognition"] else {}),
    }


def closely(result: dict[str, Any]) -> dict[str, Any]:
    """Lay out what went wrong: rates, sizes, errors, and the worst images."""
    rates, sizes = result.get("rates", {}), result.get("sizes", {})
    ious = {name: {f"{size} IoU": x["IoU"] for size, x in sizes[name].items()} for name in rates}
    tables = {
        "means over classes in per cent; small: below 5 % of its image, large: from 20 %": [
            {"rung": name, **row, **ious[name]} for name, row in rates.items()
        ],
        "what went wrong, per cent of all pixels": [
            {"rung": name, **row} for name, row in result.get("errors", {}).items()
        ],
    }
    last = list(result["ladder"])[-1]
    tables[f"classes that {last} takes for another, per cent of their pixels"] = [
        *result.get("confusions", {}).get(last, [])[:5]
    ]
    if "worst" in result:
        tables[f"worst images of {result['worst']['rung']}"] = result["worst"]["images"]
    return {title: rows for title, rows in tables.items() if rows}


def recognised(found: Evaluation) -> dict[str, float | None]:
    """Return `recognition` rounded, or nothing where no model named the images."""
    if found.similarity is None:
        return {}
    rates = recognition(found.similarity, found.tags)
    return {name: None if rate is None else round(rate, 2) for name, rate in rates.items()}


def recognition(similarity: NDArray[np.floating], tags: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return, in per cent, how often the best class is an image's only tag, and the tags' mean average precision."""
    single = tags.sum(1) == 1
    top = similarity[single].argmax(1)
    right = tags[single][np.arange(len(top)), top]
    accuracy = float(100 * right.mean()) if len(top) else None
    return {"single_tag_top1": accuracy, "tag_map": tag_average_precision(similarity, tags)}


def _mious(counts: Any) -> dict[str, float]:
    return {name: round(float(miou(c.sum(0))), 2) for name, c in counts.items()}


def _round(classes: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    return {name: {k: None if v is None else round(v, 2) for k, v in rates.items()} for name, rates in classes.items()}
