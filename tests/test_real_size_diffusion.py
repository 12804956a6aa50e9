"""Run a U-Net and a VAE of Stable Diffusion 2.1's sizes, with random weights, through one noised step
on a real photograph, squashed to 320 px, and through what is made of it."""

import resource
import time

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diclip.cam import Maps
from diclip.correlation import acr, cluster, correlate
from diclip.data import squash
from diclip.diffusion import Diffusion
from diclip.labels import pseudo_labels
from diclip.pretrain.tokenizer import build_tokenizer
from diclip.refine import rar
from diclip.settings import load_settings
from diclip.taps import attentions, diclip_layers

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


def peak() -> float:
    """Return the process's largest memory so far in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def filled(kind: type, config: dict) -> torch.nn.Module:
    """Make a model without its own slow initialisation: weights repeat a million normal numbers, over √fan-in."""
    with torch.device("meta"):
        model = kind(**config)
    numbers = torch.randn(999_983, generator=torch.Generator().manual_seed(0))
    for name, weight in model.to_empty(device="cpu").named_parameters():
        flat = weight.data.view(-1)
        for chunk in flat.split(len(numbers)):
            chunk.copy_(numbers[: len(chunk)])
        flat *= weight[0].numel() ** -0.5 if weight.ndim > 1 else 0
        if "norm" in name and name.endswith("weight"):
            flat += 1
    return model


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Diffusion:
    tokenizer = CLIPTokenizer.from_pretrained(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    text = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pipeline = StableDiffusionPipeline(
        unet=filled(UNet2DConditionModel, UNET),
        vae=filled(AutoencoderKL, VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **text, **ids)),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Diffusion(pipeline)


def test_stable_diffusion_2_1_at_320_pixels(diffusion, photograph, record_property):
    assert sum(p.numel() for p in diffusion.unet.parameters()) == 865_910_724
    layers, (coarse, fine) = attentions(diffusion.unet), diclip_layers(diffusion.unet)
    assert len(layers) == 32 and len(diffusion.self_attentions()) == 16
    assert coarse == "up_blocks.1.attentions.2.transformer_blocks.0.attn1" and layers[coarse] == (20, 4)
    assert fine == "up_blocks.3.attentions.1.transformer_blocks.0.attn1" and layers[fine] == (5, 1)
    for settings in map(load_settings, ("voc", "coco")):
        assert (settings.coarse_layer, settings.fine_layer) == (coarse, fine)
        assert settings.coarse_heads == settings.fine_heads == (1, 2) and settings.diffusion_timesteps == (101,)

    image = squash(photograph, 320)[None]
    before, start = peak(), time.perf_counter()
    latents = diffusion.encode(image)
    arguments = {"coarse": coarse, "fine": fine, "generator": torch.Generator().manual_seed(0)}
    taps = diffusion.capture(image, timestep=diffusion.timestep_at(45), latents=latents, **arguments)
    seconds, after = time.perf_counter() - start, peak()
    walked = correlate(taps.coarse_q, taps.coarse_k, source=taps.coarse_grid, grid=(20, 20), heads=(1, 2))
    correlation = acr(walked, cluster(walked, grid=(20, 20)))
    scores = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(2))
    coarse_map = Maps(scores, torch.tensor([0]), torch.tensor([3]))
    (mask,) = pseudo_labels(rar(coarse_map, taps.fine, rounds=10, grid=taps.fine_grid), [(480, 320)], restretch=True)
    refined = time.perf_counter() - start - seconds

    assert latents.shape == (1, 4, 40, 40) and diffusion.timestep_at(45) == 101
    assert taps.coarse_grid == (10, 10) and taps.coarse_q.shape == taps.coarse_k.shape == (1, 20, 100, 64)
    assert taps.fine_grid == (40, 40) and taps.fine.shape == (1, 1600, 1600)
    assert all(each.isfinite().all() and each.std() > 0 for each in (taps.coarse_q, taps.coarse_k, taps.fine))
    torch.testing.assert_close(taps.fine.sum(-1), torch.ones(1, 1600), atol=1e-4, rtol=0)
    assert correlation.shape == (1, 400, 400) and correlation.isfinite().all() and correlation.std() > 0
    assert mask.shape == (480, 320) and mask.unique().tolist() == [0, 4]
    record_property("VAE, U-Net and taps, s", round(seconds, 1))
    record_property("correlation, ACR and RAR, s", round(refined, 1))
    record_property("peak of its process, GiB", round(after, 2))
    assert after - before < 1
