"""Run ViT-B/16, with random weights, through the functions that the mini model runs through, at 320 px."""

import resource
import time

import pytest
import torch

from diclip.bench.weights import random_clip
from diclip.clip import DenseCLIP
from diclip.data import Batch, squash
from diclip.labels import pseudo_labels
from diclip.methods.clip import PlainCLIP
from diclip.settings import load_settings
from diclip.vocabulary import Vocabulary

WORDS = Vocabulary(("dog", "sofa", "person"), ("grass", "wall"))


def peak() -> float:
    """Return the process's largest memory so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(scope="module")
def vit() -> DenseCLIP:
    return random_clip()


def test_vit_b_16_at_320_pixels(vit, photograph, record_property):
    size = (photograph.shape[1], photograph.shape[2])
    tags = [torch.tensor([0, 2])]
    batch = Batch(["photograph"], squash(photograph, 320)[None], tags, [None], [size])
    method = PlainCLIP(load_settings("voc"), vit, vocabulary=WORDS)
    before, start = peak(), time.perf_counter()
    found = dict(method.rungs(batch))
    seconds, after = time.perf_counter() - start, peak()
    assert list(found) == ["clip", "intra", "caa"]
    for maps in found.values():
        assert maps.scores.shape == (2, 20, 20) and maps.scores.isfinite().all() and maps.scores.std() > 0
    (mask,) = pseudo_labels(found["caa"], [size])
    assert tuple(mask.shape) == size and set(mask.unique().tolist()) <= {0, 1, 3}
    record_property("peak of its process, MiB", round(after))
    record_property("three rungs, s", round(seconds, 2))
    # Twelve blocks' attention is 12 x 401 x 401 floats, 7.4 MiB: no rung may keep it for each head or class.
    assert after - before < 600


def test_every_block_at_320_pixels(vit, photograph):
    image = squash(photograph, 320)[None]
    encoded = vit.encode(image)
    assert vit.pooled_is_token and encoded.grid == (20, 20)
    assert encoded.tokens.shape == (12, 1, 401, 768) and encoded.attention.shape == (12, 1, 401, 401)
    assert encoded.patches.shape == encoded.plain_patches.shape == (1, 400, 512) and encoded.pooled.shape == (1, 512)
    tensors = (encoded.tokens, encoded.attention, encoded.patches, encoded.plain_patches, encoded.pooled)
    assert all(tensor.isfinite().all() for tensor in tensors)
    mass = encoded.attention.sum(-1)
    torch.testing.assert_close(mass[:9], torch.ones_like(mass[:9]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mass[9:], torch.full_like(mass[9:], 12.0), atol=1e-3, rtol=0)
