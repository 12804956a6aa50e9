"""What is timed: each stage's input, our function and, where there is one, the plain reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from diclip.affinity import caa
from diclip.baselines import colour_texture_affinity
from diclip.bench import reference
from diclip.bench.weights import random_clip, random_diffusion
from diclip.cam import Maps, pack, surgery_cam
from diclip.clip import DenseCLIP, Encoded, load_clip
from diclip.correlation import acr, cluster, walk
from diclip.crf import dense_crf
from diclip.data import squash
from diclip.data.images import read_image
from diclip.diffusion import Diffusion, load_diffusion
from diclip.labels import upsample, with_background
from diclip.refine import par, rar
from diclip.runs import pick_device
from diclip.settings import Settings

Inputs = dict[str, Tensor]
Results = Tensor | Sequence[Tensor]


class Stage(NamedTuple):
    """Hold the calls of a stage; those that are compared return tensors."""

    ours: Callable[[], Any]
    reference: Callable[[], Results] | None = None
    tolerance: float = 0.0  # largest difference, relative to the largest value
    share: float = 1.0  # of the values, which have to lie within it
    workers: int = 0
    in_processes: Callable[[], Any] | None = None  # ours, by so many workers


def pictures(settings: Settings) -> tuple[list[str], Tensor]:
    """Return names and images (B, 3, S, S): photographs of the folder DICLIP_PHOTOS, else scenes drawn for it.

    Raises ValueError if the folder has too few.
    """
    count, size, folder = settings.bench_images, settings.image_size, os.environ.get("DICLIP_PHOTOS")
    if folder:
        paths = sorted(Path(folder).glob("**/*.jpg"))[:count]
        if len(paths) < count:
            raise ValueError(f"DICLIP_PHOTOS={folder} has {len(paths)} files *.jpg, expected {count} or more")
        images = [read_image(path) for path in paths]
        names = [path.name for path in paths]
    else:
        from diclip.data.minivoc import render, scene_of

        scenes = [render(scene_of("val", index), scale=size / 128).image for index in range(count)]
        images = [torch.from_numpy(scene).permute(2, 0, 1).float() / 255 for scene in scenes]
        names = [f"MiniVOC val {index}" for index in range(count)]
    return names, torch.stack([squash(image, size) for image in images])


def encoder(settings: Settings, device: torch.device) -> DenseCLIP:
    """Build the settings' CLIP, with its own weights or with random ones."""
    if settings.random_weights:
        return random_clip(settings.clip_model, seed=settings.seed, device=device)
    how = {"pretrained": settings.clip_pretrained, "pixel_norm": settings.pixel_norm}
    return load_clip(settings.clip_model, device=device, **how)


def diffusion_model(settings: Settings, device: torch.device) -> Diffusion:
    """Build the settings' diffusion model, with its own weights, or one of Stable Diffusion's size."""
    if settings.random_weights:
        return random_diffusion(seed=settings.seed, device=device)
    return load_diffusion(settings.diffusion_model, device=device)


def encode(settings: Settings, clip: DenseCLIP, images: Tensor) -> Encoded:
    """Encode as DiCLIP does before it has a diffusion model's bias."""
    how = {"attention": settings.attention, "surgery_blocks": settings.surgery_blocks}
    return clip.encode(images, **how, tokens=None)


@torch.no_grad()
def prepare(settings: Settings, path: str) -> list[str]:
    """Write the inputs of all stages to a safetensors file; return the images' names.

    Each stage gets what the one before makes of the images, but for what would come from a diffusion model: the
    likeness of colour and texture stands in for its self-attention, so that only the stage `diffusion` needs one.
    """
    names, images = pictures(settings)
    clip = encoder(settings, torch.device("cpu"))
    encoded = encode(settings, clip, images)
    random = torch.Generator().manual_seed(settings.seed)
    vocabulary = settings.vocabulary()
    C = len(vocabulary.classes)
    if settings.random_weights:
        n, E = len(vocabulary.prompts()), encoded.pooled.shape[1]
        texts = F.normalize(torch.randn(n, E, generator=random), dim=-1)
    else:
        texts = clip.encode_text(vocabulary.prompts())
    is_token = clip.pooled_is_token
    cam = surgery_cam(encoded.patches, encoded.pooled, texts, num_classes=C, pooled_is_token=is_token)
    tags = [torch.randperm(C, generator=random)[: settings.bench_tags].sort().values for _ in images]
    maps = pack(cam.unflatten(-1, encoded.grid), tags)
    size = tuple(images.shape[2:])
    scores = [with_background(upsample(maps, index, size)[0]) for index in range(len(images))]

    fine_grid = (2 * encoded.grid[0], 2 * encoded.grid[1])
    coarse, fine = (colour_texture_affinity(images, grid) for grid in (encoded.grid, fine_grid))
    correlation = walk(torch.stack([coarse, coarse], 1), threshold=settings.correlation_threshold)
    found = {
        "images": images,
        "patches": encoded.patches,
        "pooled": encoded.pooled,
        "is_token": torch.tensor(is_token),
        "texts": texts,
        "attention": encoded.attention,
        "maps": maps.scores,
        "image": maps.image,
        "label": maps.label,
        "correlation": correlation,
        "fine": fine / fine.sum(-1, keepdim=True),
        "grid": torch.tensor(encoded.grid),
        "scores": torch.stack(scores),
    }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)
    return names


def build(stage: str, settings: Settings, path: str) -> Stage:
    """Load a stage's inputs, and its model if it has one; ValueError if that or an optional package is not there."""
    device = pick_device(settings.device)
    inputs = {name: tensor.clone().to(device) for name, tensor in load_file(path).items()}  # not mapped from the file
    return {
        "encoder": _encoder,
        "cam": _cam,
        "diffusion": _diffusion,
        "acr": _acr,
        "caa": _caa,
        "rar": _rar,
        "par": _par,
        "crf": _crf,
    }[stage](settings, inputs, device)


def _encoder(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    clip = encoder(settings, device)
    return Stage(lambda: encode(settings, clip, inputs["images"]))


def _diffusion(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    model = diffusion_model(settings, device)
    layers = {"coarse": settings.coarse_layer, "fine": settings.fine_layer, "fine_heads": settings.fine_heads}
    timestep = settings.diffusion_timesteps[0]

    def look() -> Any:
        generator = torch.Generator().manual_seed(settings.seed)
        return model.capture(inputs["images"], timestep=timestep, generator=generator, **layers)

    return Stage(look)


def _cam(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    given = inputs["patches"], inputs["pooled"], inputs["texts"]
    how = {"num_classes": len(settings.vocabulary().classes), "pooled_is_token": bool(inputs["is_token"])}
    return Stage(lambda: surgery_cam(*given, **how), lambda: reference.surgery_cam(*given, **how), 1e-5)


def _acr(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    correlation, grid = inputs["correlation"], tuple(inputs["grid"].tolist())
    # A token that is as far from two clusters, but for rounding, may fall to either.
    return Stage(
        lambda: acr(correlation, cluster(correlation, grid=grid)),
        lambda: reference.acr(correlation, grid=grid),
        1e-4,
        share=0.99,
    )


def _maps(inputs: Inputs) -> Maps:
    return Maps(inputs["maps"], inputs["image"], inputs["label"])


def _caa(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    maps, attention = _maps(inputs), inputs["attention"]
    how = {"threshold": settings.tau_box, "layers": min(settings.caa_layers, len(attention))}
    return Stage(lambda: caa(maps, attention, **how).scores, lambda: reference.caa(maps, attention, **how), 1e-5)


def _rar(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    maps, fine, (h, w) = _maps(inputs), inputs["fine"], inputs["grid"].tolist()
    how = {"rounds": settings.rar_rounds, "grid": (2 * h, 2 * w)}
    return Stage(lambda: rar(maps, fine, **how).scores, lambda: reference.rar(maps, fine, **how), 1e-4)


def _par(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    given = inputs["scores"], inputs["images"]
    return Stage(lambda: par(*given), lambda: reference.par(*given), 1e-4)


def _crf(settings: Settings, inputs: Inputs, device: torch.device) -> Stage:
    given = inputs["scores"], inputs["images"]
    workers = min(os.cpu_count() or 1, len(given[0]))
    dense_crf(*given)  # raises here if its package is missing
    return Stage(
        lambda: list(dense_crf(*given)),
        workers=workers,
        in_processes=lambda: list(dense_crf(*given, workers=workers)),
    )
