"""Put something simple in the place of each part of DiCLIP, and of ExCEL's text enrichment: their nulls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diclip.attributes import attribute_bank, hunt, mix, read_attributes
from diclip.baselines import place_affinity
from diclip.cam import Maps, pack
from diclip.clip import Encoded
from diclip.data import Batch
from diclip.diffusion import Diffusion
from diclip.memory import Memory
from diclip.methods.diclip import DiCLIP, Seen
from diclip.methods.excel import ExCEL

STRENGTHS = (1.0, 3.0, 9.0, 20.0)  # of a bias, tried for each null
NULLS = ("colour", "colour clustered", "place", "untrained", "clusters", "no clusters")
RAW = (
    "clip",
    "intra",
    "identity",
    "vce",
    "vce published",
    *(f"vce {name}" for name in NULLS),
    "tsa",
    "tsa shuffled",
    "tsa true crops",
)
REFINED = ("caa", "rar", "clip caa", "clip rar")


def untrained(diffusion: Diffusion, *, seed: int) -> Diffusion:
    """Return a diffusion model like another, whose U-Net has learned nothing."""
    parts = dict(diffusion.pipeline.components)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = type(diffusion.unet).from_config(diffusion.unet.config)
    parts["unet"] = torch.nn.Module.to(unet, diffusion.device, diffusion.unet.dtype)
    return Diffusion(type(diffusion.pipeline)(**parts, requires_safety_checker=False))


def shuffled(memory: Memory, *, seed: int) -> Memory:
    """Return a memory whose keys of each class stand for another class; the background's stay."""
    owner = misnamed(len(memory.classes), seed=seed)
    return Memory(memory.keys, memory.values[:, [0, *(1 + owner)]], memory.classes)


def misnamed(count: int, *, seed: int) -> NDArray[np.int64]:
    """Give each of `count` classes another one; no class keeps its own (of two or more)."""
    order = np.random.default_rng(seed).permutation(count)
    owner = np.empty(count, int)
    owner[order] = np.roll(order, 1)  # a single cycle
    return owner


def enrichments(method: ExCEL, *, seed: int) -> dict[str, Tensor]:
    """Return ExCEL's texts (C + n, E), its plain ones, and those of its nulls, by name.

    "shuffled sentences": the bank is made of each class's prompt followed by another class's sentences; "shuffled
    attributes": each class takes up what another one hunted; "mean attribute": all take up the same, the bank's mean,
    which is nearly what a softmax at temperature 1 hunts.
    """
    settings, vocabulary, bank = method.settings, method.vocabulary, method.bank.to(method.texts)
    owner = misnamed(len(vocabulary.classes), seed=seed)
    own = read_attributes(settings.attributes, vocabulary.classes)
    others = {name: own[vocabulary.classes[other]] for name, other in zip(own, owner, strict=True)}
    classes, background = method.texts.tensor_split([len(owner)])
    hunted = hunt(classes, bank, share=settings.attribute_share)

    def mixed(attributes: Tensor) -> Tensor:
        return torch.cat([mix(classes, attributes, weight=settings.attribute_weight), background])

    return {
        "enriched": method.enriched,
        "plain names": method.texts,
        "shuffled sentences": method.enrich(attribute_bank(settings, method.clip, vocabulary, others)),
        "shuffled attributes": mixed(hunted[torch.from_numpy(owner)]),
        "mean attribute": mixed(bank.mean(0)),
    }


class Beside:
    """Yield DiCLIP's maps and those of its nulls on a batch, by name: `RAW` before any refinement, then `REFINED`.

    `memories` stand in the place of the method's own. A null's bias comes at each of its `strengths`, and is named
    without it where there is one.
    """

    restretch = DiCLIP.restretch

    def __init__(self, method: DiCLIP, untrained: Diffusion, memories: Mapping[str, Memory]) -> None:
        self.method, self.untrained, self.memories = method, untrained, memories
        self.strengths = dict.fromkeys(NULLS, STRENGTHS)

    def title(self, null: str, strength: float) -> str:
        """Name the map of a null at a strength."""
        return f"vce {null}" if len(self.strengths[null]) == 1 else f"vce {null} x {strength}"

    def rungs(self, batch: Batch) -> Iterator[tuple[str, Maps]]:
        """Yield all maps; the two frozen models run once a batch and bias."""
        method = self.method

        def biased(bias: Tensor) -> Encoded:
            return method.encode(batch, bias=bias, need_attention=False)

        coarse, fine, fine_grid = method.walked(batch)
        biases = self.biases(batch, coarse)
        plain, own = method.encode(batch), biases["clusters" if method.settings.acr else "no clusters"]
        seen = Seen(plain, biased(method.settings.bias_strength * own), fine, fine_grid)
        clip = pack(method.cam(plain.plain_patches, plain.pooled, plain.grid), batch.tags)
        yield "clip", clip
        yield "intra", self.map(plain, batch)
        yield "identity", self.map(method.encode(batch, attention="identity", need_attention=False), batch)
        yield "vce", self.map(seen.biased, batch)
        yield "vce published", self.map(biased(biases["clusters"]), batch)
        for null, bias in biases.items():
            for strength in self.strengths[null]:
                yield self.title(null, strength), self.map(biased(strength * bias), batch)
        tsa = method.map(seen, batch, without=("caa", "rar"))
        yield "tsa", tsa
        cam = method.cam(seen.biased.patches, seen.biased.pooled, seen.biased.grid)
        for name, memory in self.memories.items():
            yield f"tsa {name}", pack(method.remember(seen.biased, cam, memory=memory), batch.tags)
        for name, maps in (("", tsa), ("clip ", clip)):
            spread = method.refine(maps, seen, without=("rar",))
            yield f"{name}caa", spread
            yield f"{name}rar", method.refine(spread, seen, without=("caa",))

    def biases(self, batch: Batch, coarse: Tensor) -> dict[str, Tensor]:
        """Return what stands in the place of the correlation, and itself with clusters and without: (B, N, N) each."""
        method = self.method
        colour = method.walked_colours(batch)
        return {
            "colour": colour,
            "colour clustered": method.clustered(colour, method.grid(batch)),
            "place": place_affinity(method.grid(batch)).expand(len(batch), -1, -1).to(coarse),
            "untrained": method.walked(batch, diffusion=self.untrained)[0],
            "clusters": method.clustered(coarse, method.grid(batch)),
            "no clusters": coarse,
        }

    def map(self, encoded: Encoded, batch: Batch) -> Maps:
        """Score the surgery path's patches against the texts."""
        return pack(self.method.cam(encoded.patches, encoded.pooled, encoded.grid), batch.tags)
