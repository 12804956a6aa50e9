"""Refine a system's last scores by the pixels of its photographs: what comes after all rungs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from diclip import crf
from diclip.data import VOCFolder
from diclip.labels import Refine
from diclip.refine import par
from diclip.settings import Settings

PAR_ITERATIONS = 20  # as ExCEL, WeCLIP and WTCLIP have it


def check_refinement(settings: Settings) -> None:
    """Raise ValueError, in one line, if what the settings refine with is not installed: before hours of work."""
    if settings.refine == "crf":
        crf.check_installed()


def refiner(settings: Settings, dataset: VOCFolder, names: Sequence[str]) -> Refine | None:
    """Return what refines the scores with background, (1 + n, H, W) each, of images at their own sizes, or None.

    It is PAR or the dense CRF (CLIP-ES's, in as many processes as the settings have `workers`), on the photographs
    themselves, not on the squashed images that a model sees.

        pseudo_labels(maps, batch.sizes, refine=refiner(settings, dataset, batch.names))
    """
    if settings.refine == "none":
        return None

    def refine(scores: list[Tensor]) -> Iterable[Tensor]:
        photographs = (dataset.image(name) for name in names)
        if settings.refine == "par":
            return par(scores, photographs, iterations=PAR_ITERATIONS, dilations=settings.par_dilations)
        return crf.dense_crf(scores, photographs, workers=settings.workers)

    return refine


def refinement(settings: Settings) -> dict[str, str]:
    """Say in words, for protocols, what refines the last rung."""
    said = dict.fromkeys(("PAR", "CRF"), "no")
    if settings.refine == "par":
        said["PAR"] = f"{PAR_ITERATIONS} iterations, dilations {', '.join(map(str, settings.par_dilations))}"
    elif settings.refine == "crf":
        said["CRF"] = f"as CLIP-ES's, {crf.PRESETS['clip-es'].iterations} iterations"
    return said
