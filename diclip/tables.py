"""Lay out stored results as the README's tables: `python -m diclip.figures` puts them there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diclip.bench import bench_table
from diclip.bench.explorer import explorer_table
from diclip.runs import replacing
from diclip.settings import ROOT, shown

RESULTS = ROOT / "data/results"
SPLITS = {"val": "val", "val-seed7": "other scenes (`minivoc_seed=7`)", "shift": "shift: new outlines and materials"}
NOISE = ("diclip-noise0", "diclip-noise1", "diclip-noise2")  # other draws of the diffusion model's noise
RUNGS = {
    "clip": "`clip`: CLIP's own patches",
    "intra": "`intra`: + intra-correlation",
    "vce": "`vce`: + the diffusion's correlation",
    "tsa": "`tsa`: + a memory of generated pictures",
    "caa": "`caa`: + class-aware affinity",
    "rar": "`rar`: + recursive affinity",
    "gradcam": "`gradcam`: softmax Grad-CAM",
    "tse": "`tse`: + attributes in the texts",
    "par": "`par`: + pixel-adaptive refinement",
    "crf": "`crf`: + dense CRF",
}
# Each system's last raw and last refined rung.
SYSTEMS = {
    "clip": ("intra", "caa"),
    "clip-es": ("gradcam", "caa"),
    "excel": ("tse", "caa"),
    "diclip": ("tsa", "rar"),
}
BASELINES = {
    "grabcut": "saliency + GrabCut + tags",
    "clip_rar": "`clip_rar`: plain CLIP with `caa` and `rar`",
}


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """Read a stored result by its file's stem."""
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: str) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(value: float, interval: Sequence[float]) -> str:
    """Write a value with its interval."""
    return f"{value:.1f} ({interval[0]:.1f}–{interval[1]:.1f})"


def ladder(found: Sequence[dict[str, Any]]) -> list[str]:
    """Lay evaluations of one method out side by side: a head, then a row a rung and a baseline."""
    lines = [row("", *(f"{title}, {r['images']} images" for title, r in zip(SPLITS.values(), found, strict=True)))]
    lines.append("|---|" + "---|" * len(found))
    for rung in found[0]["ladder"]:
        lines.append(row(RUNGS[rung], *(spread(r["ladder"][rung], r["intervals"][rung]) for r in found)))
    for name in found[0]["baselines"]:
        lines.append(
            row(BASELINES[name], *(spread(r["baselines"][name], r["baseline_intervals"][name]) for r in found))
        )
    return lines


def clip_table(results: Path = RESULTS) -> str:
    """Lay out what plain CLIP reaches, and how hard MiniVOC is."""
    found = [read(f"clip-{name}", results) for name in SPLITS]
    lines = ladder(found)
    fair = [f"{r['miou_one_minus_max']['intra']:.1f}" for r in found]
    after = next(place for place, line in enumerate(lines) if line.startswith(f"| {RUNGS['intra']}"))
    lines.insert(after + 1, row("`intra` with `caa`'s background, one minus the maximum", *fair))
    for title, name in (
        ("top-1 of scenes with one tag, %", "single_tag_top1"),
        ("mean average precision of tags, %", "tag_map"),
    ):
        lines.append(row(title, *(f"{r['recognition'][name]:.1f}" for r in found)))
    difficulty = read("difficulty", results)["difficulty"]
    colour, patch = difficulty["colour_auc"]["value"], 100 * difficulty["body_patch"]["value"]
    hard = (
        f"How hard MiniVOC is (val): colour and texture tell *same object* with AUC {colour:.2f}, and a classifier "
        f"taught with true masks names {patch:.0f} % of single body patches."
    )
    return "\n".join([*lines, "", hard])


def diclip_table(results: Path = RESULTS) -> str:
    """Lay out DiCLIP's ladder, the gain of each step, and how much the draw of noise matters."""
    found = [read(f"diclip-{name}", results) for name in SPLITS]
    lines, rungs = ladder(found), list(found[0]["ladder"])
    runs = [read(name, results) for name in NOISE]
    noise = [each["ladder"] for each in runs]
    extra = ["gain over the step before, val", f"three draws of noise, first {runs[0]['images']} images", "---", "---"]
    for rung in rungs:
        step = next((g for name, g in found[0]["gains"].items() if name.endswith(f" to {rung}")), None)
        extra.append("" if step is None else _gain(step[0], step[1:]))
        values = [each[rung] for each in noise]
        extra.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    extra += [""] * (2 * len(lines) - len(extra))
    pairs = zip(lines, extra[::2], extra[1::2], strict=True)
    return "\n".join(
        f"{line} {gain} | {draws} |" if "---" not in gain else f"{line}---|---|" for line, gain, draws in pairs
    )


def systems_table(results: Path = RESULTS) -> str:
    """Lay all systems out side by side, those that are stored: the last raw rung, the last refined, then by pixels.

    Raises FileNotFoundError, in one line, if none is there, and ValueError if they are of different images.
    """
    found = {name: read(f"{name}-val", results) for name in SYSTEMS if (results / f"{name}-val.json").is_file()}
    if not found:
        raise FileNotFoundError(f"{shown(results)} holds no result of any system: write them with `make results`")
    sizes = {f"{r['settings']['split']}, {r['images']} images" for r in found.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"{shown(results)} holds results of {' and of '.join(sorted(sizes))}: evaluate all on the same"
        )
    by_pixels = [rung for rung in ("par", "crf") if any(rung in r["ladder"] for r in found.values())]
    titles = {"par": "then PAR", "crf": "then dense CRF"}
    lines = [row(f"system; {sizes.pop()}", "last raw rung", "last refined rung", *map(titles.get, by_pixels))]
    lines.append("|---|---|---|" + "---|" * len(by_pixels))
    for name, result in found.items():
        cells = [f"`{rung}` {_reached(result, rung)}" for rung in SYSTEMS[name]]
        lines.append(row(f"`{name}`", *cells, *(_reached(result, rung) for rung in by_pixels)))
    return "\n".join(lines)


def _reached(result: dict[str, Any], rung: str) -> str:
    ladder = result["ladder"]
    return spread(ladder[rung], result["intervals"][rung]) if rung in ladder else "–"


def effects_table(results: Path = RESULTS) -> str:
    """Lay out each idea's effect against its strongest null."""
    titles = ("idea", "measured as", "with", "without", "gain", "strongest null", "gain over it")
    lines = [row(*titles), "|---|" + "---|" * (len(titles) - 1)]
    for idea, effect in read("effects", results).items():
        own, without, null = effect["with"], effect["without"], effect["null"]
        cells = [f"{own:.1f}", f"{without:.1f} ({effect['without_is']})", _gain(own - without, effect["over_without"])]
        beside = (
            ["–"] * 2 if null is None else [f"{null:.1f} ({effect['null_is']})", _gain(own - null, effect["interval"])]
        )
        lines.append(row(idea, effect["metric"], *cells, *beside))
    return "\n".join(lines)


def _gain(value: float, interval: Sequence[float]) -> str:
    return f"{value:+.1f} ({interval[0]:+.1f} to {interval[1]:+.1f})"


def training_table(results: Path = RESULTS) -> str:
    """Lay out what networks reach that need no tags: labels and network as means ± deviations over seeds.

    The ceiling is the network that learned from the true masks of the most images.
    """
    found = read("training", results)["means"]
    masks = [line for line in found if line["supervision"] == "masks"]
    ceiling = max(masks, key=lambda line: line["train_images"])["val_miou"]
    titles = ("learned from", "its labels, nothing learned", "its labels, given tags", "network, no tags")
    lines = [row("", *titles, "of its ceiling", "seconds"), "|---|" + "---|" * 6]
    for line in found:
        name = f"`{line['method']}`" if line["supervision"] == "tags" else "the same decoder"
        taught = f"{line['supervision']} of {line['train_images']} images, {line['runs']} seeds"
        reached = (deviating(line, rung) for rung in ("training_free_miou", "pseudo_miou", "val_miou"))
        lines.append(row(name, taught, *reached, f"{100 * line['val_miou'] / ceiling:.0f} %", f"{line['seconds']:.0f}"))
    return "\n".join(lines)


ABLATIONS = {
    "whole": "DiCLIP",
    "without_vce": "without the diffusion's correlation (VCE)",
    "without_tsa": "without the memory and its adapter (TSA)",
    "without_both": "without both",
    "with_caa": "labels spread by CAA and five rounds of RAR, as published",
    "parity": "with the released code's ways",
    "masks": "taught by true masks",
}


def ablations_table(results: Path = RESULTS) -> str:
    """Lay out what a training loses without DiCLIP's parts: means ± deviations over seeds, paired differences."""
    found = read("ablations", results)
    (differences,) = (value for name, value in found.items() if name.startswith("B - A"))
    against = {line["B is"]: line for line in differences}
    lines = [row("", "its labels, given tags", "network, no tags", "difference of the networks"), "|---|---|---|---|"]
    for line in found["means"]:
        other = against.get(line["variant"])
        gain = _gain(other["B - A"], (other["low"], other["high"])) if other else "–"
        reached = (deviating(line, rung) for rung in ("pseudo_miou", "val_miou"))
        lines.append(row(ABLATIONS[line["variant"]], *reached, gain))
    return "\n".join(lines)


def deviating(line: dict[str, Any], name: str) -> str:
    """Write a mean of a sweep with its standard deviation over runs."""
    mean, deviation = line[name], line[f"± {name}"]
    if mean is None:
        return "–"
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def speed_table(results: Path = RESULTS) -> str:
    """Lay out what `diclip bench` measured at real size."""
    return bench_table(read("bench", results))


def answers_table(results: Path = RESULTS) -> str:
    """Lay out how soon the explorers answer."""
    return explorer_table(read("bench-explorer", results))


TABLES: dict[str, Callable[[], str]] = {
    "ladder": clip_table,
    "systems": systems_table,
    "diclip": diclip_table,
    "effects": effects_table,
    "training": training_table,
    "ablations": ablations_table,
    "speed": speed_table,
    "explorer": answers_table,
}


def update_readme(path: Path = ROOT / "README.md") -> None:
    """Put each table between the two comments of its name."""
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- /{name} -->")[1]
        text = f"{before}<!-- {name} -->\n{table()}\n<!-- /{name} -->{after}"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
