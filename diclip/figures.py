"""Make every figure and table that the README shows: `python -m diclip.figures`."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from diclip import plots
from diclip.cam import minmax
from diclip.data import collate, open_dataset
from diclip.data.minivoc import render, scene_of
from diclip.evaluate import choose_background
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.runs import replacing
from diclip.settings import ROOT, load_settings

FOLDER = ROOT / "figures"
RESULTS = ROOT / "data/results"
COLUMNS = {"val": "val", "val-seed7": "other scenes (`minivoc_seed=7`)", "shift": "shift: new outlines and materials"}
RUNGS = {
    "clip": "`clip`: CLIP's own patches",
    "intra": "`intra`: + intra-correlation",
    "caa": "`caa`: + class-aware affinity",
}


def minivoc(path: Path, *, rows: int = 4, columns: int = 8) -> None:
    """Draw the first scenes of val at their own size on one sheet."""
    pictures = [render(scene_of("val", index)).image for index in range(rows * columns)]
    with replacing(path) as temporary:
        Image.fromarray(plots.contact_sheet(pictures, columns=columns)).save(temporary, "PNG", optimize=True)


def cams(path: Path, *, count: int = 5) -> None:
    """Draw the rungs of plain CLIP on the first scenes of val that have one tag or two, not picked by hand.

    Maps are of the first tag, each stretched to [0, 1]; below are the labels of `intra`, and the truth.
    """
    settings = load_settings()
    method, dataset = build_method(settings), open_dataset(settings)
    few = [i for i, name in enumerate(dataset.names) if len(dataset.tags(name)) < 3][:count]
    batch = collate([dataset[i] for i in few], image_size=settings.image_size)
    background = choose_background(settings, method)
    kinds, labels = {}, {}
    for rung, maps in method.rungs(batch):
        rule = "one_minus_max" if rung in method.refined else "fixed"
        labels[rung] = pseudo_labels(maps, batch.sizes, rule=rule, score=background[rung])
        firsts = [next(p for p in range(len(maps)) if maps.image[p] == b) for b in range(len(batch))]
        kinds[rung] = minmax(maps.scores, (-2, -1))[firsts]
    masks = {"labels of intra": labels["intra"], "truth": batch.masks}
    names = [", ".join(method.vocabulary.classes[tag] for tag in tags) for tags in batch.tags]
    pictures = [dataset[i].image for i in few]
    figure = plots.rung_table(pictures, kinds, masks, names=names)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


FIGURES = {"cams.png": cams, "minivoc.png": minivoc}


def make_figures(folder: Path = FOLDER) -> list[Path]:
    """Write all figures into a folder; return their paths."""
    for name, draw in FIGURES.items():
        draw(folder / name)
    return [folder / name for name in FIGURES]


def readme_table(results: Path = RESULTS) -> str:
    """Lay out the stored evaluations of `make results` as the README's Markdown table."""
    found = [json.loads((results / f"clip-{name}.json").read_text(encoding="utf-8")) for name in COLUMNS]
    difficulty = json.loads((results / "difficulty.json").read_text(encoding="utf-8"))["difficulty"]

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def spread(value: float, interval: list[float]) -> str:
        return f"{value:.1f} ({interval[0]:.1f}–{interval[1]:.1f})"

    lines = [row("", [f"{title}, {r['images']} images" for title, r in zip(COLUMNS.values(), found, strict=True)])]
    lines.append("|---|" + "---|" * len(found))
    for rung, meaning in RUNGS.items():
        lines.append(row(meaning, [spread(r["ladder"][rung], r["intervals"][rung]) for r in found]))
    fair = [f"{r['miou_one_minus_max']['intra']:.1f}" for r in found]
    lines.insert(-1, row("`intra` with `caa`'s background, one minus the maximum", fair))
    guess = [spread(r["baselines"]["grabcut"], r["baseline_intervals"]["grabcut"]) for r in found]
    lines.append(row("saliency + GrabCut + tags", guess))
    lines.append(row("top-1 of scenes with one tag, %", [f"{r['recognition']['single_tag_top1']:.1f}" for r in found]))
    lines.append(row("mean average precision of tags, %", [f"{r['recognition']['tag_map']:.1f}" for r in found]))
    colour, patch = difficulty["colour_auc"]["value"], 100 * difficulty["body_patch"]["value"]
    hard = (
        f"How hard MiniVOC is (val): colour and texture tell *same object* with AUC {colour:.2f}, and a classifier "
        f"taught with true masks names {patch:.0f} % of single body patches."
    )
    return "\n".join([*lines, "", hard])


def update_readme(path: Path = ROOT / "README.md") -> None:
    """Put the table between the README's two `ladder` comments."""
    before, rest = path.read_text(encoding="utf-8").split("<!-- ladder -->")
    after = rest.split("<!-- /ladder -->")[1]
    text = f"{before}<!-- ladder -->\n{readme_table()}\n<!-- /ladder -->{after}"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    make_figures()
    update_readme()
