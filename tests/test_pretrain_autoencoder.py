"""Test the mini diffusion model's autoencoder: its loss, what it learns, and the scale of its latents."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diclip.pretrain.diffusion import autoencoder_loss, build_autoencoder, encode, train_autoencoder


@pytest.fixture
def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_autoencoder()


def test_loss_by_hand():
    random = torch.Generator().manual_seed(0)
    images, moments = torch.rand(2, 3, 8, 8, generator=random), torch.randn(2, 8, 2, 2, generator=random)
    back = torch.rand(2, 3, 8, 8, generator=random)
    fake = SimpleNamespace(
        encode=lambda x: SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments)),
        decode=lambda latents: SimpleNamespace(sample=2 * back - 1),
    )
    found = autoencoder_loss(fake, images, random)
    gap = (2 * (back - images)).double()
    down, right = gap[:, :, 1:] - gap[:, :, :-1], gap[..., 1:] - gap[..., :-1]
    kl = DiagonalGaussianDistribution(moments).kl().sum() / moments[:, :4].numel()
    edges, pixel = (down.abs().mean() + right.abs().mean()).item(), gap.abs().mean().item()
    expected = {"loss": pixel + edges + 1e-3 * kl.item(), "pixel": pixel, "kl": kl.item()}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_plain_pictures_are_learned(autoencoder):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 1, 2, generator=random).repeat_interleave(8, 3).expand(-1, -1, 16, -1)  # two halves
    optimizer, losses = torch.optim.Adam(autoencoder.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = autoencoder_loss(autoencoder, images, random)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    one_colour = (2 * (images - images.median())).abs().mean().item()  # the best that knows no picture
    assert losses[-1] < 0.75 * one_colour < losses[0]


def test_latents_have_unit_deviation(autoencoder, pictures, tmp_path):
    before = [p.detach().clone() for p in autoencoder.parameters()]
    assert train_autoencoder(autoencoder, tmp_path / "run", pictures, steps=1, seed=0, device="cpu") == 1
    assert any(not p.equal(old) for p, old in zip(autoencoder.parameters(), before, strict=True))
    images = pictures.take(np.arange(12))
    latents = encode(autoencoder, images)
    assert latents.shape == (12, 4, 32, 32) and latents.std().item() == pytest.approx(1, abs=1e-3)
    autoencoder.save_pretrained(tmp_path / "saved")
    factor = json.loads((tmp_path / "saved/config.json").read_text())["scaling_factor"]
    mean = autoencoder.encode(2 * images - 1).latent_dist.mean
    assert factor == pytest.approx(1 / mean.std().item(), abs=1e-4)
