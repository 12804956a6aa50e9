"""ExCEL and DiCLIP with training: a decoder on frozen CLIP's tokens, taught by labels that are made from tags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diclip.adapter import KVAdapter
from diclip.affinity import pair_logits
from diclip.cam import Maps, normalise
from diclip.checkpoints import find_weights, load_weights
from diclip.clip import DenseCLIP
from diclip.data import Batch
from diclip.diffusion import Diffusion
from diclip.heads import Segmenter
from diclip.losses import balanced_cross_entropy, diversity_loss, over_processes, pair_targets
from diclip.memory import Memory
from diclip.methods import build_clip, build_method
from diclip.methods.diclip import DiCLIP
from diclip.methods.teachers import DiCLIPTeacher, ExCELTeacher, Learned, MaskTeacher, Teacher, View, tokens_of
from diclip.settings import Settings, shown


@dataclass(frozen=True)
class Decoded:
    """Hold what the trained parts say of a batch, with gradients; the last two where its maps are made."""

    logits: Tensor  # (B, 1 + C, h, w), background first
    affinity: Tensor  # (B, N, N) in [0, 1], sigmoid of `pair_logits` of the features
    pairs: Tensor  # (B, M, M), `pair_logits`, M = N unless labels are made at another scale
    adapted: Tensor | None  # (B, 1 + C, h', w')


class System(nn.Module):
    """Learn a decoder from labels that a teacher makes of tags, and segment without tags.

    Parameters are those of the `Segmenter` alone: CLIP, the diffusion model and the memory are frozen and no part of
    the state. It is a `Method` too: `rungs` yields the trained maps, `dynamic`, and their refinements. Without a
    teacher it only segments. A `step` counts from 0; None is the end of the training.
    """

    baselines: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()

    def __init__(self, settings: Settings, clip: DenseCLIP, segmenter: Segmenter, teacher: Teacher | None) -> None:
        super().__init__()
        self.settings, self.clip, self._teacher = settings, clip, teacher
        self.segmenter = segmenter.to(clip.device)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Return what sides of an image are multiples of."""
        return self.clip.patch_size

    @property
    def teacher(self) -> Teacher:
        """Return what makes the labels; raise ValueError if the system was built only to segment."""
        if self._teacher is None:
            raise ValueError("this system only segments, it has no maps and labels: build it with labels=True")
        return self._teacher

    def loss(
        self, batch: Batch, *, step: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return scalars: "loss", to be minimised, and its parts, "seg", "div" and, in DiCLIP, "adapter".

        The parts are detached and not weighted. In training mode dropout draws from `generator`, and nothing is dropped
        without one. Sources: ExCEL, CVPR 2025; DiCLIP, IEEE TIP 2026, training objectives.
        """
        settings, view = self.settings, self._look(batch, step)
        decoded = self._decode(view, generator=generator, together=True)
        labels = self._labels(batch, view, decoded, step)
        with self._exact():
            own = labels
            if self._reached(settings.own_labels_from, step):
                logits = decoded.logits.detach().float()
                own = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
            targets = pair_targets(own, view.seen.grid, radius=settings.pair_radius)
            parts = {
                "seg": balanced_cross_entropy(decoded.logits, labels),
                "div": diversity_loss(decoded.affinity, targets),
            }
            total = parts["seg"] + settings.pair_weight * parts["div"]
            if decoded.adapted is not None:
                parts["adapter"] = balanced_cross_entropy(decoded.adapted, labels)
                total = total + settings.adapter_weight * parts["adapter"]
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}

    @torch.no_grad()
    def segment(self, images: Tensor) -> Tensor:
        """Return logits (B, 1 + C, h, w), background first, of images (B, 3, H, W) in [0, 1], without tags.

        Sides are multiples of CLIP's patch size, not necessarily those of the training. No diffusion model is used.
        """
        encoded = tokens_of(self.settings, self.clip, images)
        return self.segmenter(encoded.tokens, encoded.grid)[1]

    @torch.no_grad()
    def pseudo_labels(self, batch: Batch, step: int | None = None) -> Tensor:
        """Return the labels (B, H, W), int64, that a step learns from, at the size of the batch's images."""
        view = self._look(batch, step)
        return self._labels(batch, view, self._decode(view), step)

    @torch.no_grad()
    def compared_labels(self, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        """Return `pseudo_labels` and before them what the same rule makes without anything learnt, of one look."""
        view = self._look(batch, step)
        with self._exact():
            static = self.teacher.labels(batch, view, Learned(None, None, None))
        return {"training-free labels": static, "pseudo labels": self._labels(batch, view, self._decode(view), step)}

    @torch.no_grad()
    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield `dynamic`, the maps that the trained parts join, and each refinement, as at the end of the training."""
        view = self._look(batch, None)
        yield from self.teacher.rungs(batch, view, self._learned(self._decode(view), None))

    def cam(self, batch: Batch) -> Maps:
        """Return the trained maps of each image's tags, (P, h, w) in [0, 1], before any refinement."""
        if not self.raw:
            raise ValueError("a decoder taught by true masks has no class maps: set supervision to tags")
        return next(self.rungs(batch))[1]

    @property
    def raw(self) -> tuple[str, ...]:
        """Return the rungs before any refinement."""
        return self.teacher.raw

    @property
    def refined(self) -> tuple[str, ...]:
        """Return the other rungs."""
        return self.teacher.refined

    @property
    def restretch(self) -> bool:
        """Tell how labels are made of the last rung: see `diclip.labels.upsample`."""
        return self.teacher.restretch

    @property
    def diffusion(self) -> Diffusion | None:
        """Return the diffusion model that maps need, for whom image sizes depend on it."""
        method = getattr(self._teacher, "method", None)
        return getattr(method, "diffusion", None)

    @torch.no_grad()
    def _look(self, batch: Batch, step: int | None) -> View:
        with self._exact():
            return self.teacher.look(batch, step=step)

    @torch.no_grad()
    def _labels(self, batch: Batch, view: View, decoded: Decoded, step: int | None) -> Tensor:
        with self._exact():
            return self.teacher.labels(batch, view, self._learned(decoded, step))

    def _decode(self, view: View, *, generator: torch.Generator | None = None, together: bool = False) -> Decoded:
        """Run the trained parts, as one of the processes that train `together` or alone."""
        settings, encoded = self.settings, view.encoded
        features, logits = self.segmenter(view.seen.tokens, view.seen.grid, generator=generator)
        total = {"total": over_processes} if together else {}
        with self._exact():
            own = pairs = pair_logits(features.float(), mean=settings.pair_mean, **total)
        if view.seen is not encoded:
            with torch.no_grad():
                features, _ = self.segmenter(encoded.tokens, encoded.grid)
                with self._exact():
                    pairs = pair_logits(features.float(), mean=settings.pair_mean, **total)
        adapted = None
        if self.segmenter.adapter is not None:
            how = {"pooled_is_token": self.clip.pooled_is_token, "norm_dim": settings.norm_dim}
            patches, _ = normalise(encoded.patches, encoded.pooled, **how)
            adapted = self.segmenter.adapter(patches, generator=generator).unflatten(-1, encoded.grid)
        return Decoded(logits, own.sigmoid(), pairs, adapted)

    def _learned(self, decoded: Decoded, step: int | None) -> Learned:
        """Return what the teacher may use at a step."""
        dynamic = self._reached(self.settings.dynamic_from, step)
        affinity = decoded.pairs.detach().sigmoid() if self._reached(self.settings.affinity_from, step) else None
        pairs, adapted = (
            x.detach().float() if dynamic and x is not None else None for x in (decoded.pairs, decoded.adapted)
        )
        return Learned(pairs, adapted, affinity)

    def _reached(self, share: float, step: int | None) -> bool:
        """Tell whether a step lies in what follows a share of the training, which after the whole is nothing."""
        return share < 1 and (step is None or step >= round(share * self.settings.max_iters))

    def _exact(self) -> torch.autocast:
        """Keep float32 where mixed precision would move thresholds, means and losses."""
        return torch.autocast(self.clip.device.type, enabled=False)


def build_system(settings: Settings, clip: DenseCLIP | None = None, *, labels: bool = True) -> System:
    """Build the settings' method to be trained, `excel` or `diclip`, with new weights drawn from their seed.

    Without `labels` it only segments: no diffusion model and no attributes are loaded. With `supervision="masks"` true
    masks teach the decoder. Raises ValueError, in one line, for a method that does not train, and as `build_method`.
    """
    if settings.method not in ("excel", "diclip"):
        raise ValueError(f"method {settings.method!r} has nothing to train, expected excel or diclip")
    clip = clip or build_clip(settings)
    tags = settings.supervision == "tags"
    teacher: Teacher | None = None
    if labels and tags:
        method = build_method(settings.model_copy(update={"trained": None}), clip)
        teacher = DiCLIPTeacher(settings, method) if isinstance(method, DiCLIP) else ExCELTeacher(settings, method)
    elif labels:
        teacher = MaskTeacher(settings, clip)
    memory = Memory.load(settings.memory) if tags and settings.method == "diclip" else None
    return System(settings, clip, build_segmenter(settings, clip, memory), teacher)


def load_system(settings: Settings, clip: DenseCLIP | None = None, *, labels: bool = True) -> System:
    """Build the settings' method with the trained parts that their `trained` names, ready to be used.

    What the weights remember of their training takes the place of the settings. Without `labels` it only segments.
    Raises ValueError and FileNotFoundError, in one line, for weights of another method or model.
    """
    path = find_weights(settings.trained)
    weights, about = load_weights(path)
    if about.pop("method") != settings.method or about.pop("preset") != settings.preset:
        raise ValueError(f"{shown(path)} holds other weights than those of {settings.method} on {settings.preset}")
    settings = settings.model_copy(update={name: about[name] for name in about if name in Settings.model_fields})
    system = build_system(settings, clip, labels=labels)
    try:
        system.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{shown(path)} holds weights of another CLIP, memory or number of classes") from None
    return system.eval()


def build_segmenter(settings: Settings, clip: DenseCLIP, memory: Memory | None) -> Segmenter:
    """Build the trained parts for a CLIP, on its CPU or GPU, with an adapter where there is a memory."""
    if settings.decoder_width % settings.decoder_heads:
        found = f"{settings.decoder_width} channels, {settings.decoder_heads} heads"
        raise ValueError(f"the decoder has {found}, expected a multiple: set decoder_width or decoder_heads")
    with torch.random.fork_rng(devices=[]):  # torch's initialisations draw from the global generator
        torch.default_generator.manual_seed(settings.seed)
        adapter = None
        if memory is not None:
            rate, spread = settings.adapter_dropout, settings.adapter_spread
            adapter = KVAdapter(memory, slots=settings.adapter_slots, spread=spread, rate=rate)
        return Segmenter(
            len(clip.blocks),
            clip.model.visual.transformer.width,
            len(settings.vocabulary().classes),
            dim=settings.decoder_width,
            layers=settings.decoder_layers,
            heads=settings.decoder_heads,
            rate=settings.decoder_dropout,
            adapter=adapter,
        ).to(clip.device)
