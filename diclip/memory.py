"""Remember what classes look like in generated pictures, and retrieve it patch by patch (TSA without training)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import minmax, normalise, surgery_scores
from diclip.runs import replacing
from diclip.settings import shown


@dataclass(frozen=True)
class Memory:
    """Hold U visual keys and what each stands for: background (column 0) or a class (column 1 + index).

    Raises ValueError for values that are not one-hot or do not fit keys and classes.
    """

    keys: Tensor  # (U, E), means of features that `normalise` returned; no unit rows
    values: Tensor  # (U, 1 + C), one-hot
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = (len(self.keys), 1 + len(self.classes))
        if self.keys.ndim != 2 or self.values.shape != expected:
            found = f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            raise ValueError(f"keys and values are {found}, expected (U, E) and (U, {expected[1]})")
        if not (((self.values == 0) | (self.values == 1)).all() and (self.values.sum(1) == 1).all()):
            raise ValueError("values are not one-hot, expected one 1 a key: its class, or column 0 for background")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; the names of the classes are its metadata."""
        from safetensors.torch import save_file

        tensors = {"keys": self.keys.detach().cpu().contiguous(), "values": self.values.detach().cpu().contiguous()}
        with replacing(path) as scratch:
            save_file(tensors, scratch, metadata={"classes": json.dumps(self.classes)})
            scratch.chmod(0o644)  # safetensors writes for the owner alone

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Read what `save` wrote; raise ValueError for a file that is absent, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        remedy = "build one with `diclip memory` and the same --preset"
        if not Path(path).is_file():
            raise ValueError(f"there is no memory at {shown(path)}: {remedy}")
        try:
            with safe_open(path, "pt") as file:
                classes = json.loads((file.metadata() or {})["classes"])
                return cls(file.get_tensor("keys"), file.get_tensor("values"), tuple(classes))
        except (SafetensorError, KeyError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{shown(path)} is not a memory ({reason}): {remedy}") from error


def pooled_keys(patches: Tensor, masks: Tensor, *, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Average patches inside and outside of each image's mask: two keys (B, E), and which count, bool (2, B).

    `patches` (B, N, E) come from `normalise`; `masks` (B, any H, any W), bool, are reduced to the grid's N cells
    by their nearest pixels. An empty mask gives no key, since its outside holds the object; a full mask gives no
    outside (DiCLIP, text semantic augmentation). Keys that do not count are 0. Raises ValueError for shapes
    that do not fit.
    """
    if patches.shape[:2] != (len(masks), prod(grid)) or masks.ndim != 3:
        found = f"{tuple(patches.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"patches and masks are {found}, expected (B, {prod(grid)}, E) and (B, H, W)")
    inside = F.interpolate(masks[:, None].to(patches), size=tuple(grid), mode="nearest").flatten(1)  # (B, N)
    weights = torch.stack([inside, 1 - inside])  # (2, B, N)
    count = weights.sum(-1)
    keys = (weights[:, :, None] @ patches)[:, :, 0] / count.clamp_min(1)[..., None]
    valid = (count > 0) & (count[0] > 0)
    foreground, background = keys * valid[..., None]
    return foreground, background, valid


def build_memory(
    foreground: Mapping[str, Tensor],
    background: Tensor,
    *,
    per_class: int,
    background_centres: int,
    seed: int = 0,
) -> Memory:
    """Sum up pooled keys by k-means: those of each class (n, E), and all of the background (n, E) together.

    `foreground` names the classes in their order; who has fewer distinct keys than centres gets one centre a
    key, who has none is never retrieved. The background comes first (DiCLIP: 10 a class and 25 on VOC, 5
    and 25 on COCO). Raises ValueError for keys that differ in width or are not finite.
    """
    if not foreground or per_class < 1 or background_centres < 1:
        found = f"{len(foreground)} classes, {per_class} and {background_centres} centres"
        raise ValueError(f"found {found}, expected 1 or more of each")
    groups = {"background": background, **{f"class {name}": keys for name, keys in foreground.items()}}
    for name, keys in groups.items():
        if keys.ndim != 2 or keys.shape[1] != background.shape[-1] or not keys.isfinite().all():
            raise ValueError(f"keys of {name} are {tuple(keys.shape)}, expected finite (n, {background.shape[-1]})")
    wanted = [background_centres] + [per_class] * len(foreground)
    found = [centres(keys, count, seed=seed) for keys, count in zip(groups.values(), wanted, strict=True)]
    counts = torch.tensor([len(own) for own in found])
    values = torch.eye(len(found))[torch.arange(len(found)).repeat_interleave(counts)]
    return Memory(torch.cat(found), values, tuple(foreground))


def retrieve(
    patches: Tensor,
    pooled: Tensor,
    memory: Memory,
    texts: Tensor,
    *,
    pooled_is_token: bool,
    norm_dim: Literal["token", "channel"] = "token",
    value_mode: Literal["masked_text_softmax", "onehot"] = "masked_text_softmax",
    affinity: Literal["relu_surgery", "exp"] = "relu_surgery",
    beta: float = 5.5,
) -> Tensor:
    """Return how much each patch resembles the memory's keys of each class: (B, C, N) in [0, 1].

    `patches`, `pooled` and `texts` are those of `surgery_cam`: the memory's classes first, background words
    after. Keys are compared by `surgery_scores` above 0 or, with "exp", by exp(-beta (1 - cosine)) as in
    Tip-Adapter (ECCV 2022). A class's likeness is the sum over its own keys, weighted by the softmax of their
    products with its text (background: with its words' mean) or, with "onehot", equally. Each is stretched to
    [0, 1], times 1 - background, and stretched again (DiCLIP, text semantic augmentation, static retrieval).
    Raises ValueError for unknown modes and shapes that do not fit.
    """
    keys, values, classes = memory.keys.to(patches), memory.values.to(patches), len(memory.classes)
    if not patches.shape[-1] == pooled.shape[-1] == keys.shape[1] == texts.shape[-1]:
        found = ", ".join(str(tuple(x.shape)) for x in (patches, pooled, keys, texts))
        raise ValueError(f"patches, pooled, keys and texts are {found}, expected all of one width")
    if len(texts) < classes:
        raise ValueError(f"found {len(texts)} texts, expected those of the memory's {classes} classes first")
    patches, pooled = normalise(patches, pooled, pooled_is_token=pooled_is_token, norm_dim=norm_dim)
    if affinity == "relu_surgery":
        likeness = surgery_scores(patches, pooled, keys)[0].relu()  # (B, N, U)
    elif affinity == "exp":
        likeness = (beta * (F.normalize(patches, dim=-1) @ F.normalize(keys, dim=-1).T - 1)).exp()
    else:
        raise ValueError(f"affinity is {affinity!r}, expected relu_surgery or exp")
    if value_mode == "masked_text_softmax":
        words = texts[classes:].sum(0, keepdim=True) / max(len(texts) - classes, 1)
        # Over all keys, not only a class's own: that scales its column, which the stretch takes out again.
        values = values * (keys @ torch.cat([words, texts[:classes]]).T).softmax(0)  # (U, 1 + C)
    elif value_mode != "onehot":
        raise ValueError(f"value_mode is {value_mode!r}, expected masked_text_softmax or onehot")
    found = minmax(likeness @ values, 1)  # (B, N, 1 + C)
    return minmax(found[..., 1:] * (1 - found[..., :1]), 1).transpose(1, 2)


def fuse(cam: Tensor, retrieved: Tensor, *, weight: float = 0.5) -> Tensor:
    """Add `weight` times what was retrieved to class maps, both (B, C, N), and stretch each class to [0, 1].

    A constant sum gives 0. Raises ValueError for shapes that differ. Source: DiCLIP (0.5 without training).
    """
    if cam.shape != retrieved.shape:
        raise ValueError(f"maps are {tuple(cam.shape)}, retrieved ones {tuple(retrieved.shape)}, expected the same")
    return minmax(cam + weight * retrieved, -1)


def centres(points: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Sum points (n, E) up to at most `count` centres by k-means, on the CPU; where no more differ, to themselves."""
    import numpy as np
    from sklearn.cluster import KMeans

    points = points.detach().float().cpu().numpy()
    count = min(count, len(np.unique(points, axis=0)))
    if count == len(points):
        return torch.from_numpy(points)
    found = KMeans(count, random_state=seed).fit(points)
    return torch.from_numpy(found.cluster_centers_).float()
