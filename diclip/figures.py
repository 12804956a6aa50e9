"""Make every figure that the README shows, and put the tables there: `python -m diclip.figures`."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import Image

from diclip import plots
from diclip.cam import minmax
from diclip.data import collate, open_dataset
from diclip.data.minivoc import render, scene_of
from diclip.diffusion import load_diffusion
from diclip.evaluate import choose_background
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.remember import generate_classes
from diclip.runs import pick_device, replacing
from diclip.settings import ROOT, load_settings
from diclip.tables import update_readme
from diclip.vocabulary import VOC_CLASSES

FOLDER = ROOT / "figures"


def minivoc(path: Path, *, rows: int = 4, columns: int = 8) -> None:
    """Draw the first scenes of val at their own size on one sheet."""
    pictures = [render(scene_of("val", index)).image for index in range(rows * columns)]
    with replacing(path) as temporary:
        Image.fromarray(plots.contact_sheet(pictures, columns=columns)).save(temporary, "PNG", optimize=True)


def cams(path: Path, *, count: int = 5) -> None:
    """Draw the rungs of DiCLIP on the first scenes of val that have one tag or two, not picked by hand.

    Maps are of the first tag, each stretched to [0, 1]; below are the labels of `intra` and `rar`, and the truth.
    """
    settings = load_settings(method="diclip")
    method, dataset = build_method(settings), open_dataset(settings)
    few = [i for i, name in enumerate(dataset.names) if len(dataset.tags(name)) < 3][:count]
    batch = collate([dataset[i] for i in few], image_size=settings.image_size)
    background = choose_background(settings, method)
    kinds, labels = {}, {}
    for rung, maps in method.rungs(batch):
        if rung in method.baselines:
            continue
        rule = "one_minus_max" if rung in method.refined else "fixed"
        how = {"rule": rule, "score": background[rung], "restretch": method.restretch}
        labels[rung] = pseudo_labels(maps, batch.sizes, **how)
        firsts = [next(p for p in range(len(maps)) if maps.image[p] == b) for b in range(len(batch))]
        kinds[rung] = minmax(maps.scores, (-2, -1))[firsts]
    masks = {f"labels of {rung}": labels[rung] for rung in ("intra", "rar")} | {"truth": batch.masks}
    names = [", ".join(method.vocabulary.classes[tag] for tag in tags) for tags in batch.tags]
    pictures = [dataset[i].image for i in few]
    figure = plots.rung_table(pictures, kinds, masks, names=names)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def generated(path: Path, *, count: int = 5) -> None:
    """Draw the first generated pictures of each class, those that `diclip judge` counts, not picked by hand.

    They are a column a class, shown smaller and in 256 colours to keep the file small.
    """
    settings = load_settings().model_copy(update={"memory_pictures": count})  # the same first ones as of more
    diffusion = load_diffusion(settings.diffusion_model, device=pick_device(settings.device))
    pictures = generate_classes(settings, diffusion, VOC_CLASSES)
    columns = [plots.contact_sheet(list(own), columns=1) for own in pictures.values()]
    figure = plots.picture_grid(columns, titles=list(pictures), columns=10, side=0.9 * count)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight", dpi=200)
    with replacing(path) as temporary:
        Image.open(drawn).convert("RGB").reduce(2).quantize(256).save(temporary, "PNG", optimize=True)


FIGURES = {"cams.png": cams, "generated.png": generated, "minivoc.png": minivoc}


def make_figures(folder: Path = FOLDER) -> list[Path]:
    """Write all figures into a folder; return their paths."""
    for name, draw in FIGURES.items():
        draw(folder / name)
    return [folder / name for name in FIGURES]


if __name__ == "__main__":
    make_figures()
    update_readme()
