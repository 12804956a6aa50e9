"""Run a U-Net and a VAE of Stable Diffusion 2.1's sizes, with random weights, through one noised step
on a real photograph, squashed to 320 px, and through what is made of it."""

import resource
import time

import pytest
import torch

from diclip.bench.weights import random_diffusion
from diclip.cam import Maps
from diclip.correlation import acr, cluster, correlate
from diclip.data import squash
from diclip.diffusion import Diffusion
from diclip.labels import pseudo_labels
from diclip.refine import rar
from diclip.settings import load_settings
from diclip.taps import attentions, diclip_layers


def peak() -> float:
    """Return the process's largest memory so far in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return random_diffusion()


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
