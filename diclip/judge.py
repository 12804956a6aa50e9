"""Tell how recognisable generated pictures are: a small classifier, taught on real ones, names them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diclip.data import open_dataset, squash
from diclip.diffusion import load_diffusion
from diclip.evaluate import Progress, silent
from diclip.pretrain.data import Pictures, augment, render_pictures
from diclip.pretrain.loop import Schedule
from diclip.remember import generate_classes
from diclip.runs import environment, pick_device
from diclip.score import interval, mean
from diclip.settings import Settings
from diclip.vocabulary import VOC_CLASSES

PICTURES, STEPS = 10_000, 2_000
BATCH, LEARNING_RATE, SMOOTHING = 32, 3e-3, 0.1
CROP, CROPPED = (0.7, 1.0), 0.6  # crops for that share of the steps, then whole pictures, as it is to judge them
SIDE, WIDTHS = 128, (32, 64, 128, 256)


def build_judge(num_classes: int) -> nn.Module:
    """Build the classifier: images (B, 3, 128, 128) in [0, 1] to logits (B, num_classes), 0.4 million parameters.

    Four convolutions with batch norm, each seeing half as many pixels as the one before, and a global mean.
    """
    stages, before = [nn.BatchNorm2d(3)], 3
    for width in WIDTHS:
        stride = 2 if before == 3 else 1
        convolution = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        stages += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


def train_judge(
    pictures: Pictures,
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> nn.Module:
    """Teach a judge the classes of the pictures with exactly one tag; return it frozen, in eval mode.

    It sees crops, in the end whole pictures, mirror images and changes of light. Every step draws from generators
    seeded by `seed` and its own number; the global generator is left as it was. Matrix products are in bfloat16.
    Raises ValueError if no picture has exactly one tag.
    """
    if not (pictures.tags.sum(1) == 1).any():
        raise ValueError(f"none of {len(pictures)} pictures has exactly one tag: the judge needs more pictures")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = build_judge(pictures.tags.shape[1])
    judge = judge.to(device, memory_format=torch.channels_last).train()  # with bfloat16, a third of the time on a CPU
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = Schedule(steps, LEARNING_RATE, warmup=steps // 10)
    for step in progress(range(steps), desc="teach the judge"):
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**9 + step)
        rows = pictures.draw(BATCH, single=1, rng=rng)
        crop = CROP if step < CROPPED * steps else (1.0, 1.0)
        images = augment(pictures.take(rows), size=SIDE, crop=crop, generator=generator)
        labels = torch.from_numpy(pictures.tags[rows].argmax(1)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = judge(images.to(device, memory_format=torch.channels_last))
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING).backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def name_pictures(judge: nn.Module, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return how probable a judge finds each class in images (B, 3, H, W), float in [0, 1]: (B, C) on the CPU.

    Images of other sizes are resized to the side that it has learned. Raises ValueError for other tensors.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        found = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images are {found}, expected at least one, float (B, 3, H, W) in [0, 1]: divide by 255")
    device, named = next(judge.parameters()).device, []
    for part in images.split(batch_size):
        if part.shape[2:] != (SIDE, SIDE):
            part = F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        named.append(judge(part.to(device)).softmax(1).cpu())
    return torch.cat(named)


def real_pictures(settings: Settings) -> tuple[Tensor, Tensor]:
    """Read the images of the settings' split that have exactly one tag: (n, 3, S, S) and classes (n,).

    Raises ValueError if there are none.
    """
    dataset = open_dataset(settings, masks=False)
    tags = {name: dataset.tags(name) for name in dataset.names}
    alone = [name for name, found in tags.items() if len(found) == 1]
    if not alone:
        found = f"none of {len(tags)} images of split {settings.split!r} has exactly one tag"
        raise ValueError(f"{found}: take more of them or another split")
    return torch.stack([squash(dataset.image(name), settings.image_size) for name in alone]), torch.cat(
        [tags[name] for name in alone]
    )


def judge_generated(settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Measure, ready for JSON, how many of the pictures that a memory is built from are recognised: `diclip judge`.

    The judge is taught on MiniVOC's pretraining pictures, `PICTURES` of them and half as many of the studio, for
    `STEPS` steps unless the settings say otherwise, and scored itself on the split's images with one tag, its
    `pictures`. Shares are in per cent, with 95 % bootstrap intervals over pictures; `null` is the mean share over
    shuffled labels. Raises ValueError for datasets other than MiniVOC and for data and models that cannot be used.
    """
    if settings.dataset != "minivoc":
        raise ValueError(f"dataset is {settings.dataset!r}, expected 'minivoc': the judge learns its pictures alone")
    count = settings.pretrain_pictures if "pretrain_pictures" in settings.model_fields_set else PICTURES
    chosen = {"pretrain_pictures": count, "pretrain_steps": settings.pretrain_steps or STEPS}
    settings, device = settings.model_copy(update=chosen), pick_device(settings.device)
    diffusion, (images, truth) = load_diffusion(settings.diffusion_model, device=device), real_pictures(settings)
    pictures = open_pictures(settings, progress)
    judge = train_judge(pictures, steps=settings.pretrain_steps, seed=settings.seed, device=device, progress=progress)
    generated = generate_classes(settings, diffusion, VOC_CLASSES, progress=progress)
    named = torch.stack([name_pictures(judge, own).argmax(1) for own in generated.values()]).numpy()  # (C, pictures)
    labels = np.arange(len(named))[:, None].repeat(named.shape[1], 1)
    right = named == labels
    rng = np.random.default_rng(settings.seed)
    shuffled = [100 * (named.flat == rng.permutation(labels.flat)).mean() for _ in range(1000)]
    own = share(name_pictures(judge, images).argmax(1).eq(truth).numpy(), seed=settings.seed)
    return {
        "recognised": share(right.ravel(), seed=settings.seed),
        "classes": {name: round(100 * float(row.mean()), 2) for name, row in zip(generated, right, strict=True)},
        "judge": {
            "accuracy": own["value"],
            "low": own["low"],
            "high": own["high"],
            "images": len(images),
            "steps": settings.pretrain_steps,
            "pictures": int((pictures.tags.sum(1) == 1).sum()),
            "parameters": sum(weights.numel() for weights in judge.parameters()),
        },
        "null": round(float(np.mean(shuffled)), 2),
        "pictures_per_class": settings.memory_pictures,
        "steps": settings.memory_steps,
        "guidance": settings.memory_guidance,
        "settings": settings.model_dump(mode="json"),
        "versions": environment(),
    }


def open_pictures(settings: Settings, progress: Progress = silent) -> Pictures:
    """Open the settings' number of pretraining pictures and half as many of the studio's; render what is not there."""
    counts = {"pretrain": settings.pretrain_pictures, "studio": settings.pretrain_pictures // 2}
    return Pictures.join(*render_pictures(settings.data_root, counts, progress=progress))


def share(right: NDArray[np.bool_], *, seed: int) -> dict[str, float]:
    """Return the share of True in per cent, with its 95 % bootstrap interval: value, low, high."""
    counts = np.stack([right, np.ones_like(right)], 1).astype(np.int64)
    found = interval(counts, generator=np.random.default_rng(seed), metric=mean)
    return {name: round(100 * rate, 2) for name, rate in found._asdict().items()}
