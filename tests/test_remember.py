"""Test that the memory's command builds, from generated pictures, a memory that the system reads."""

import pytest
import torch

from diclip import remember
from diclip.memory import Memory
from diclip.settings import load_settings
from diclip.vocabulary import VOC_CLASSES


@pytest.fixture
def settings(tiny_clip, tiny_diffusion, tmp_path):
    return load_settings(
        clip_model=str(tiny_clip), diffusion_model=(str(tiny_diffusion),), memory=tmp_path / "new/memory.safetensors",
        memory_pictures=2, memory_steps=1, memory_per_class=1, memory_background=3, device="cpu", batch_size=2,
    )  # fmt: skip


def test_the_memory_is_written_read_and_the_same_again(settings):
    result = remember.write_memory(settings)
    memory = Memory.load(settings.memory)
    assert memory.classes == VOC_CLASSES and memory.keys.shape == (23, 128)
    assert result["keys"] == {"background": 3, **dict.fromkeys(VOC_CLASSES, 1)}
    assert memory.keys.isfinite().all() and memory.keys.std(0).max() > 0
    before = settings.memory.read_bytes()
    remember.write_memory(settings)
    assert settings.memory.read_bytes() == before
    remember.write_memory(settings.model_copy(update={"seed": 1}))
    assert not torch.equal(Memory.load(settings.memory).keys, memory.keys)
