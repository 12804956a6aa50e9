"""Models of published sizes with random weights: what needs their speed and memory, or their shapes, only."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from diclip.clip import DenseCLIP
from diclip.diffusion import Diffusion

UNET = {  # stabilityai/stable-diffusion-2-1-base, as its mirrors have it
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),  # the numbers of heads, in diffusers' naming
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def random_clip(name: str = "ViT-B-16-quickgelu", *, seed: int = 0, device: str | torch.device = "cpu") -> DenseCLIP:
    """Build one of open_clip's models, a ViT, with random weights; ValueError for a name that it does not know."""
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"random weights are for a model of open_clip's, found {name!r}: choose --preset voc")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name, device=device)
    return DenseCLIP(model, open_clip.get_tokenizer(name))


def random_diffusion(*, seed: int = 0, device: str | torch.device = "cpu") -> Diffusion:
    """Build Stable Diffusion 2.1-base with random weights but for its text encoder, of which one layer is there."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diclip.pretrain.tokenizer import build_tokenizer

    with TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer.from_pretrained(build_tokenizer(Path(folder)))
    text = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **text, **ids))
    pipeline = StableDiffusionPipeline(
        unet=_filled(UNet2DConditionModel, UNET, seed),
        vae=_filled(AutoencoderKL, VAE, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    half = torch.device(device).type == "cuda"  # as `load_diffusion` does
    return Diffusion(pipeline.to(device, torch.float16) if half else pipeline.to(device))


def _filled(kind: type[nn.Module], config: dict[str, Any], seed: int) -> nn.Module:
    """Make a model without its own slow initialisation: weights repeat a million normal numbers, over √fan-in."""
    with torch.device("meta"):
        model = kind(**config)
    numbers = torch.randn(999_983, generator=torch.Generator().manual_seed(seed))
    for name, weight in model.to_empty(device="cpu").named_parameters():
        flat = weight.data.view(-1)
        for chunk in flat.split(len(numbers)):
            chunk.copy_(numbers[: len(chunk)])
        flat *= weight[0].numel() ** -0.5 if weight.ndim > 1 else 0
        if "norm" in name and name.endswith("weight"):
            flat += 1
    return model
