"""Build TSA's memory: generate pictures of each class, mask them with the method itself, keep what CLIP saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import normalise
from diclip.clip import Encoded, load_clip
from diclip.data import Batch, open_dataset
from diclip.diffusion import Diffusion, load_diffusion
from diclip.evaluate import Progress, loader, silent
from diclip.labels import pseudo_labels
from diclip.memory import Memory, build_memory, pooled_keys
from diclip.methods.diclip import DiCLIP
from diclip.runs import pick_device
from diclip.settings import Settings, shown


def generate_classes(
    settings: Settings, diffusion: Diffusion, classes: Sequence[str], *, progress: Progress = silent
) -> dict[str, Tensor]:
    """Generate the settings' number of pictures (n, 3, S, S), float32 in [0, 1], of each class, from its own seed."""
    pictures = {}
    for index, name in enumerate(progress(classes, desc="generate")):
        pictures[name] = diffusion.generate(
            [settings.memory_prompt.format(name)] * settings.memory_pictures,
            size=settings.image_size,
            steps=settings.memory_steps,
            guidance=settings.memory_guidance,
            generator=torch.Generator().manual_seed(settings.seed * 1000 + index),
            batch_size=settings.batch_size,
        )
    return pictures


def key_features(method: DiCLIP, encoded: Encoded) -> Tensor:
    """Return the surgery path's patches (B, N, E), normalised as the memory's keys are."""
    how = {"pooled_is_token": method.clip.pooled_is_token, "norm_dim": method.settings.norm_dim}
    return normalise(encoded.patches, encoded.pooled, **how)[0]


def class_keys(method: DiCLIP, pictures: Tensor, label: int, *, name: str) -> tuple[Tensor, Tensor]:
    """Return a key of the object (n, E) and one of the rest (m, E) for each picture of one class in which it is found.

    The masks are the method's own, without its memory; the features carry the diffusion's bias.
    """
    size, settings = tuple(pictures.shape[2:]), method.settings
    inside, outside = [], []
    for start in range(0, len(pictures), settings.batch_size):
        images = pictures[start : start + settings.batch_size].to(method.clip.device)
        numbers = range(start, start + len(images))
        tags = [torch.tensor([label])] * len(images)
        batch = Batch([f"{name} {n}" for n in numbers], images, tags, [None] * len(images), [size] * len(images))
        seen = method.look(batch)
        masks = pseudo_labels(method.map(seen, batch, without=("tsa",)), batch.sizes, restretch=method.restretch)
        features = key_features(method, seen.biased)
        foreground, background, valid = pooled_keys(features, torch.stack(masks) > 0, grid=seen.biased.grid)
        inside.append(foreground[valid[0]].cpu())
        outside.append(background[valid[1]].cpu())
    return torch.cat(inside), torch.cat(outside)


def remember_crops(method: DiCLIP, *, progress: Progress = silent) -> Memory:
    """Sum up the objects in `train`'s true masks to a memory: what generated pictures with true masks would give.

    It is a ceiling to compare with, not a method: it learns from masks.
    """
    settings = method.settings.model_copy(update={"split": "train", "limit": 0, "shard_index": 0, "num_shards": 1})
    foreground: dict[str, list[Tensor]] = {name: [] for name in method.vocabulary.classes}
    background: list[Tensor] = []
    for batch in progress(loader(open_dataset(settings), settings), desc="true objects"):
        encoded = method.look(batch).biased
        features = key_features(method, encoded)
        for own, mask, tags in zip(features, batch.masks, batch.tags, strict=True):
            mask = F.interpolate(mask[None, None].float(), batch.images.shape[2:], mode="nearest")[0, 0].to(own.device)
            for label in (-1, *tags.tolist()):
                key, _, valid = pooled_keys(own[None], (mask == label + 1)[None], grid=encoded.grid)
                kept = background if label < 0 else foreground[method.vocabulary.classes[label]]
                kept.append(key[valid[0]].cpu())
    return build_memory(
        {name: torch.cat([background[0][:0], *keys]) for name, keys in foreground.items()},
        torch.cat(background),
        per_class=settings.memory_per_class,
        background_centres=settings.memory_background,
        seed=settings.seed,
    )


def remember(method: DiCLIP, pictures: dict[str, Tensor], *, progress: Progress = silent) -> Memory:
    """Sum up pictures of each class to a memory (DiCLIP, text semantic augmentation)."""
    settings, foreground, background = method.settings, {}, []
    for label, name in enumerate(progress(method.vocabulary.classes, desc="remember")):
        foreground[name], rest = class_keys(method, pictures[name], label, name=name)
        background.append(rest)
    return build_memory(
        foreground,
        torch.cat(background),
        per_class=settings.memory_per_class,
        background_centres=settings.memory_background,
        seed=settings.seed,
    )


def write_memory(settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Generate, mask, sum up, and write the settings' memory file: what `diclip memory` does."""
    device = pick_device(settings.device)
    clip = load_clip(
        settings.clip_model, pretrained=settings.clip_pretrained, device=device, pixel_norm=settings.pixel_norm
    )
    method = DiCLIP(settings, clip, load_diffusion(settings.diffusion_model, device=device), None)
    pictures = generate_classes(settings, method.diffusion, method.vocabulary.classes, progress=progress)
    memory = remember(method, pictures, progress=progress)
    settings.memory.parent.mkdir(parents=True, exist_ok=True)
    memory.save(settings.memory)
    counts = memory.values.sum(0).int().tolist()
    return {"memory": shown(settings.memory), "keys": dict(zip(("background", *memory.classes), counts, strict=True))}
