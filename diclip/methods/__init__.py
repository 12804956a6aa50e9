"""The systems: one short file each, which wires the parts of the package as the paper does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from diclip.cam import Maps
from diclip.clip import DenseCLIP, load_clip
from diclip.data import Batch
from diclip.runs import pick_device
from diclip.settings import Settings


class Method(Protocol):
    """A system: `rungs` yields its raw map, then each refinement of it, by name and in order."""

    clip: DenseCLIP
    raw: tuple[str, ...]  # rungs before any refinement
    refined: tuple[str, ...]

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]: ...


def build_method(settings: Settings, clip: DenseCLIP | None = None) -> Method:
    """Build the system that the settings name, on the CLIP that they name unless one is given.

    Raises ValueError, in one line, for weights that are absent or damaged and for a device that is not there.
    """
    from diclip.methods.clip import PlainCLIP

    clip = clip or load_clip(
        settings.clip_model,
        pretrained=settings.clip_pretrained,
        device=pick_device(settings.device),
        pixel_norm=settings.pixel_norm,
    )
    return {"clip": PlainCLIP}[settings.method](settings, clip)
