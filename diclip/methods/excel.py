"""ExCEL without training: class texts enriched with attributes, patches that attend to their like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diclip.attributes import attribute_bank, enrich, read_attributes
from diclip.cam import Maps, pack
from diclip.clip import DenseCLIP, Encoded
from diclip.data import Batch
from diclip.methods.clip import PlainCLIP
from diclip.settings import Settings
from diclip.vocabulary import Vocabulary

PARTS = ("svc", "tse", "caa")


class ExCEL(PlainCLIP):
    """Rungs `clip`, `intra` (static visual calibration: the surgery path), `tse` (text semantic enrichment), `caa`.

    `without_svc` … leave one part out of the whole. `attributes` are each class's sentences, by default those of the
    settings' file; `bank` (B, E) stands in the place of what is made of them. What comes after `caa` in the paper,
    pixel-adaptive refinement, works on scores with background at the image's size (`labels.with_background`), not
    on maps. Source: ExCEL, CVPR 2025, without its decoder.
    """

    ablations = tuple(f"without_{part}" for part in PARTS)
    raw = ("clip", "intra", "tse")
    refined = ("caa",)

    def __init__(
        self,
        settings: Settings,
        clip: DenseCLIP,
        *,
        vocabulary: Vocabulary | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
        bank: Tensor | None = None,
    ) -> None:
        super().__init__(settings, clip, vocabulary=vocabulary)
        if bank is None:
            attributes = attributes or read_attributes(settings.attributes, self.vocabulary.classes)
            bank = attribute_bank(settings, clip, self.vocabulary, attributes)
        self.bank, self.enriched = bank, self.enrich(bank)

    def enrich(self, bank: Tensor) -> Tensor:
        """Return the texts (C + n, E): classes with a bank's attributes, background words as they are."""
        classes, background = self.texts.tensor_split([len(self.vocabulary.classes)])
        how = {"share": self.settings.attribute_share, "weight": self.settings.attribute_weight}
        return torch.cat([enrich(classes, bank.to(classes), **how), background])

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield the ladder's maps of a batch and, if the settings say so, those of the ablation."""
        encoded = self.encode(batch)
        yield "clip", self.map(encoded, batch, without=PARTS)
        yield "intra", self.map(encoded, batch, without=("tse", "caa"))
        yield "tse", self.map(encoded, batch, without=("caa",))
        yield "caa", self.map(encoded, batch)
        if self.settings.ablate:
            for part in PARTS:
                yield f"without_{part}", self.map(encoded, batch, without=(part,))

    def map(self, encoded: Encoded, batch: Batch, *, without: tuple[str, ...] = ()) -> Maps:
        """Make the class maps of a batch with all parts but some of `PARTS`."""
        patches = encoded.plain_patches if "svc" in without else encoded.patches
        texts = self.texts if "tse" in without else self.enriched
        maps = pack(self.cam(patches, encoded.pooled, encoded.grid, texts=texts), batch.tags)
        return maps if "caa" in without else self.spread(maps, encoded)
