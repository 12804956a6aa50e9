"""The systems: one short file each, which wires the parts of the package as the paper does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from diclip.cam import Maps
from diclip.clip import DenseCLIP, load_clip
from diclip.data import Batch, dataset_vocabulary
from diclip.runs import pick_device
from diclip.settings import Settings
from diclip.vocabulary import Vocabulary


class Rungs(Protocol):
    """What yields maps of a batch by name, in order; `restretch` is how labels are made (`diclip.labels.upsample`)."""

    restretch: bool

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]: ...


class Method(Rungs, Protocol):
    """A system: `rungs` yields its raw map, then each refinement of it, by name and in order.

    After these it yields what it is to be compared with, and, if the settings say `ablate`, itself without each
    of its parts.
    """

    clip: DenseCLIP
    raw: tuple[str, ...]  # rungs before any refinement
    refined: tuple[str, ...]
    baselines: tuple[str, ...]
    ablations: tuple[str, ...]


def build_clip(settings: Settings) -> DenseCLIP:
    """Load the CLIP that the settings name, to their device; raises ValueError as `build_method` does."""
    return load_clip(
        settings.clip_model,
        pretrained=settings.clip_pretrained,
        device=pick_device(settings.device),
        pixel_norm=settings.pixel_norm,
    )


def build_method(settings: Settings, clip: DenseCLIP | None = None, *, vocabulary: Vocabulary | None = None) -> Method:
    """Build the system that the settings name, on the CLIP that they name unless one is given.

    With `trained` in the settings it is a `diclip.methods.trained.System`, which segments without tags too. A
    `vocabulary` stands in for the dataset's: classes of one's own. DiCLIP then leaves its memory out, which knows other
    classes. Raises ValueError, in one line, for weights that are absent or damaged, for a device that is not there, and
    for trained parts and a vocabulary together.
    """
    if settings.trained is not None:
        if vocabulary is not None:
            raise ValueError("trained parts know the classes that they learned: leave `trained` or the words out")
        from diclip.methods.trained import load_system

        return load_system(settings, clip)
    # Small files come first: a typo in a name must not cost the time that models take to load.
    if settings.method == "excel":
        from diclip.attributes import read_attributes

        attributes = read_attributes(settings.attributes, (vocabulary or dataset_vocabulary(settings)).classes)
    if settings.method == "diclip":
        from diclip.memory import Memory

        own = vocabulary is not None and vocabulary.classes != dataset_vocabulary(settings).classes
        memory = None if own else Memory.load(settings.memory)
    clip = clip or build_clip(settings)
    if settings.method == "clip":
        from diclip.methods.clip import PlainCLIP

        return PlainCLIP(settings, clip, vocabulary=vocabulary)
    if settings.method == "excel":
        from diclip.methods.excel import ExCEL

        return ExCEL(settings, clip, vocabulary=vocabulary, attributes=attributes)
    if settings.method == "clip-es":
        from diclip.methods.clip_es import CLIPES

        return CLIPES(settings, clip, vocabulary=vocabulary)
    from diclip.diffusion import load_diffusion
    from diclip.methods.diclip import DiCLIP

    diffusion = load_diffusion(settings.diffusion_model, device=pick_device(settings.device))
    return DiCLIP(settings, clip, diffusion, memory, vocabulary=vocabulary)
