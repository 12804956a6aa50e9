"""Train the mini diffusion model: an autoencoder, then a U-Net that denoises its latents given a caption."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel

from diclip.data.minivoc.dataset import PRETRAIN_SIDE
from diclip.pretrain.data import Pictures, augment, write_captions
from diclip.pretrain.loop import Schedule, train
from diclip.pretrain.muon import MuonAdamW
from diclip.pretrain.tokenizer import CONTEXT_LENGTH, build_tokenizer

KL_WEIGHT = 1e-3
EMPTY_RATE = 0.1  # of the captions: what "no prompt" means is learned too
AVERAGE_DECAY = 0.999


@dataclass(frozen=True)
class Stretch:
    """A part of the U-Net's training, until `until` (share of all steps)."""

    until: float
    size: int  # pixels that a crop is shown at
    crop: tuple[float, float]  # side of a crop, as a share of the picture's 128 pixels
    batch_size: int


STEPS = 6_000
SPLITS = {"pretrain": 1.0, "studio": 0.5}  # of the settings' number of pictures
# Whole things on calm ground teach shapes, scenes teach to tell things from textured ground.
STUDIO_RATE = 0.6
STRETCHES = (Stretch(0.7, 64, (0.75, 1.0), 64), Stretch(1.0, 128, (0.75, 1.0), 16))  # half the size costs a quarter


def stretch_of(step: int, steps: int) -> Stretch:
    """Return the stretch that a step (counted from 0) of a training of `steps` belongs to."""
    return next(s for s in STRETCHES if step < s.until * steps or s is STRETCHES[-1])


def build_autoencoder() -> nn.Module:
    """Build a small `AutoencoderKL` without attention: pictures of 128 pixels to latents of 4 x 32 x 32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def build_text_encoder(vocab_size: int, *, width: int = 128) -> nn.Module:
    """Build a `CLIPTextModel` of two layers; it is trained together with the U-Net."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def build_unet(*, channels: tuple[int, ...] = (48, 96, 144), heads: tuple[int, ...] = (2, 4, 6)) -> nn.Module:
    """Build a `UNet2DConditionModel` with self-attention at 8 x 8, 16 x 16 and, on the way up, 32 x 32."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=heads,  # the number of heads: diffusers' name is a historical slip
        cross_attention_dim=128,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> Any:
    """Build Stable Diffusion's noise schedule; the U-Net predicts the velocity."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """A U-Net with the text encoder that conditions it."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predict the target `(B, 4, h, w)` from noised latents, timesteps `(B,)` and token ids `(B, n)`."""
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


def average(slow: list[Tensor], fast: list[Tensor], count: Tensor | int) -> None:
    """Move averaged weights towards the present ones: quickly at first, by a thousandth a step later."""
    decay = min(AVERAGE_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(slow, fast, 1 - decay)


def autoencoder_loss(autoencoder: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Compare pictures `(B, 3, H, W)` in [0, 1] with what their latents keep of them: colours and edges."""
    images = images * 2 - 1
    posterior = autoencoder.encode(images).latent_dist
    difference = autoencoder.decode(posterior.sample(generator)).sample - images
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    pixel = difference.abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return {"loss": pixel + edges + KL_WEIGHT * kl, "pixel": pixel, "kl": kl}


def inner_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Choose what Muon is for: matrices and kernels inside the model, not embeddings, first and last layers."""
    outer = ("embed", "conv_in", "conv_out", "quant_conv")
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 4) and not any(part in name for part in outer):
            yield parameter


@torch.no_grad()
def encode(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Encode pictures `(B, 3, H, W)` in [0, 1] to the latents `(B, 4, H / 4, W / 4)` that the U-Net sees."""
    return autoencoder.encode(images * 2 - 1).latent_dist.mean * autoencoder.config.scaling_factor


def train_autoencoder(
    autoencoder: nn.Module, folder: Path, pictures: Pictures, *, steps: int, seed: int, device: str, **limits: Any
) -> int:
    """Train on crops of half a picture; set the scaling factor that gives latents unit deviation."""

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = np.random.default_rng([seed, step, 1]), torch.Generator().manual_seed(seed * 10**9 + step)
        images = pictures.take(rng.integers(len(pictures), size=32))
        images = augment(images, size=64, crop=(0.4, 0.6), generator=generator).to(device)
        return autoencoder_loss(autoencoder, images.contiguous(memory_format=torch.channels_last), generator)

    peak = 2e-3
    optimizer = MuonAdamW(autoencoder, inner_matrices(autoencoder), lr=peak, decay=0.0)
    done = train(autoencoder, loss, folder=folder, schedule=Schedule(steps, peak), optimizer=optimizer, **limits)
    autoencoder.register_to_config(scaling_factor=1.0)
    some = pictures.take(np.arange(min(len(pictures), 128))).to(device)
    autoencoder.register_to_config(scaling_factor=round(1 / encode(autoencoder, some).std().item(), 5))
    return done


def take(
    pictures: Pictures, studio: Pictures, stretch: Stretch, *, rng: np.random.Generator, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Draw a batch (B, 3, size, size), first those of the studio, and its captions, of which some are empty."""
    images, captions = [], []
    calm = round(stretch.batch_size * STUDIO_RATE)
    for source, count in ((studio, calm), (pictures, stretch.batch_size - calm)):
        rows = rng.integers(len(source), size=count)
        images.append(source.take(rows))
        captions += [c.text for c in write_captions(source.tags[rows], source.places[rows], rng)]
    finer = PRETRAIN_SIDE // stretch.size
    images = augment(torch.cat(images), size=stretch.size, crop=stretch.crop, finer=finer, generator=generator)
    return images, ["" if rng.random() < EMPTY_RATE else text for text in captions]


def pretrain_diffusion(
    folder: Path,
    pictures: Pictures,
    studio: Pictures,
    *,
    steps: int,
    autoencoder_steps: int = 1500,
    learning_rate: float = 1e-3,
    seed: int = 0,
    max_minutes: float = 0,
    half: bool = True,
    device: str = "cpu",
    evaluate: Callable[[Path], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
    progress: Callable[[range], object] = lambda steps: steps,
) -> Path | None:
    """Train both parts, resuming what `folder` holds, and export a `StableDiffusionPipeline` to `folder/model`.

    `half` computes the U-Net's matrix products in bfloat16; the averaged weights are exported. Every step draws from
    generators seeded by `seed` and its own number. Returns None if `max_minutes` ended it before there was a model.
    """
    from transformers import CLIPTokenizer

    started = time.monotonic()
    torch.manual_seed(seed)
    autoencoder = build_autoencoder().to(device)
    how = {"max_minutes": max_minutes, "progress": progress, "seed": seed, "device": device}
    done = train_autoencoder(autoencoder, folder / "autoencoder", pictures, steps=autoencoder_steps, **how)
    if done < autoencoder_steps:
        return None
    autoencoder.eval().requires_grad_(False)

    tokenizer = CLIPTokenizer.from_pretrained(build_tokenizer(folder / "tokenizer"))
    now = Denoiser(build_unet(), build_text_encoder(len(tokenizer))).to(device)
    model = nn.ModuleDict({"now": now, "average": AveragedModel(now, multi_avg_fn=average).requires_grad_(False)})
    optimizer = MuonAdamW(
        now, inner_matrices(now), lr=learning_rate, decay=0.05, ratio=6.0, scaling="spectral", iterations=3
    )
    scheduler = build_scheduler()
    context = {"padding": "max_length", "max_length": CONTEXT_LENGTH, "truncation": True, "return_tensors": "pt"}

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10**9 + step)
        stretch = stretch_of(step, steps)
        images, captions = take(pictures, studio, stretch, rng=rng, generator=generator)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            latents = encode(autoencoder, images.to(device, memory_format=torch.channels_last)).float()
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, noise.shape[:1], generator=generator)
        timesteps = timesteps.to(device)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            found = now(noisy, timesteps, tokenizer(captions, **context).input_ids.to(device))
        return {"loss": F.mse_loss(found.float(), scheduler.get_velocity(latents, noise, timesteps))}

    def export_and_evaluate(step: int) -> dict[str, float]:
        best = model["average"].module
        target = export(folder / "model", autoencoder, best.unet, best.text_encoder, tokenizer, scheduler)
        return evaluate(target) if evaluate else {}

    left = max(max_minutes - (time.monotonic() - started) / 60, 1e-9) if max_minutes else 0
    train(
        model, loss, folder=folder, schedule=Schedule(steps, learning_rate), optimizer=optimizer,
        after_step=lambda: model["average"].update_parameters(now), evaluate=export_and_evaluate,
        evaluate_every=evaluate_every, max_minutes=left, progress=progress,
    )  # fmt: skip
    return folder / "model"


def export(
    folder: Path, autoencoder: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any
) -> Path:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` loads, weights in half precision, by a rename."""
    from diffusers import StableDiffusionPipeline

    halves = {name: copy.deepcopy(part).half() for name, part in (("vae", autoencoder), ("unet", unet))}
    pipeline = StableDiffusionPipeline(
        **halves,
        text_encoder=text_encoder,  # in single precision: transformers would load it in half, and the U-Net not
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    scratch, old = (folder.with_name(f"{folder.name}.{end}") for end in ("tmp", "old.tmp"))
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(scratch)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
