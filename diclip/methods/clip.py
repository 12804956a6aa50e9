"""Plain CLIP, and what intra-correlation makes of it: the training-free base that every other system builds on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from diclip.affinity import caa
from diclip.cam import Maps, pack, surgery_cam
from diclip.clip import DenseCLIP, Encoded
from diclip.data import Batch, dataset_vocabulary
from diclip.settings import Attention, Settings
from diclip.vocabulary import Vocabulary


class PlainCLIP:
    """Rungs `clip` (patches of CLIP's own path), `intra` (the surgery path), `caa` (spread along attention).

    Sources: CLIP Surgery (feature surgery), ExCEL, CVPR 2025 (intra-correlation), CLIP-ES, CVPR 2023 (CAA).
    """

    raw = ("clip", "intra")
    refined = ("caa",)
    baselines: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    restretch = False

    def __init__(self, settings: Settings, clip: DenseCLIP, *, vocabulary: Vocabulary | None = None) -> None:
        self.settings, self.clip = settings, clip
        self.vocabulary = vocabulary or dataset_vocabulary(settings)
        self.texts = clip.encode_text(self.vocabulary.prompts())

    def cam(self, patches: Tensor, pooled: Tensor, grid: tuple[int, int], *, texts: Tensor | None = None) -> Tensor:
        """Score patches (B, N, E) against texts (the method's own): (B, C, h, w) in [0, 1]."""
        maps = surgery_cam(
            patches,
            pooled,
            self.texts if texts is None else texts,
            num_classes=len(self.vocabulary.classes),
            pooled_is_token=self.clip.pooled_is_token,
            norm_dim=self.settings.norm_dim,
        )
        return maps.unflatten(-1, grid)

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield `clip`, `intra` and `caa` of a batch, from one pass through the encoder."""
        encoded = self.encode(batch)
        yield "clip", pack(self.cam(encoded.plain_patches, encoded.pooled, encoded.grid), batch.tags)
        intra = pack(self.cam(encoded.patches, encoded.pooled, encoded.grid), batch.tags)
        yield "intra", intra
        yield "caa", self.spread(intra, encoded)

    def encode(
        self,
        batch: Batch,
        *,
        attention: Attention | None = None,
        bias: Tensor | None = None,
        need_attention: bool = True,
    ) -> Encoded:
        """Run CLIP with its surgery path, the settings' or another `attention`, and a correlation (B, N, N) in it."""
        return self.clip.encode(
            batch.images,
            attention=attention or self.settings.attention,
            surgery_blocks=self.settings.surgery_blocks,
            bias=bias,
            tokens=None,
            need_attention=need_attention,
        )

    def spread(self, maps: Maps, encoded: Encoded) -> Maps:
        """Spread maps by class-aware affinity along CLIP's attention, of as many blocks as it has."""
        layers = min(self.settings.caa_layers, len(encoded.attention))
        return caa(maps, encoded.attention, threshold=self.settings.tau_box, layers=layers)
