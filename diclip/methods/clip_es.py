"""CLIP-ES without training: where gradients of the tags' probabilities point, spread along attention."""

from __future__ import annotations

from collections.abc import Iterator

from diclip.cam import Maps
from diclip.data import Batch
from diclip.gradcam import softmax_gradcam
from diclip.methods.clip import PlainCLIP


class CLIPES(PlainCLIP):
    """Rungs `gradcam` (softmax Grad-CAM of the tags, against background words), `caa` (class-aware affinity).

    The setting `gradcam_pool` says what stands for the image in the probabilities whose gradients are taken:
    "patches", the mean of the patches in the joint space, is the published one and that of the presets `voc` and
    `coco`; "model" is the feature that the model was trained to match with texts, the class token in OpenAI's CLIP
    and in the mini one, whose preset has it. Images come squashed to one size; the release gives each at its own,
    rounded up to whole patches. Source: CLIP-ES, CVPR 2023, before its dense CRF.
    """

    raw = ("gradcam",)
    refined = ("caa",)

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield `gradcam` and `caa` of a batch, from one pass through the encoder."""
        encoded = self.clip.encode(batch.images, surgery_blocks=0)
        explained = softmax_gradcam(
            self.clip,
            encoded.tokens[-2],
            self.texts,
            batch.tags,
            num_classes=len(self.vocabulary.classes),
            grid=encoded.grid,
            pool=self.settings.gradcam_pool,
        )
        yield "gradcam", explained.maps
        yield "caa", self.spread(explained.maps, encoded)
