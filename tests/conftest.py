"""What several tests share: no network, and a small folder in VOC's layout."""

import json
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", MPLBACKEND="agg")

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

settings.register_profile("diclip", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("diclip")

TAGS = {"a": ["dog", "sofa"], "b": ["cat"], "c": ["person"]}


@pytest.fixture
def voc_folder(tmp_path: Path) -> Path:
    """Write three images of different sizes with masks and tags: split train has a and b, val has c."""
    root, random = tmp_path / "voc", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, ids, (height, width) in (
        ("a", (12, 18), (30, 40)),
        ("b", (8,), (24, 24)),
        ("c", (15,), (50, 20)),
    ):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
        mask = random.choice([0, 255, *ids], size=(height, width)).astype(np.uint8)
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("c\n")
    (root / "tags.json").write_text(json.dumps(TAGS))
    return root


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a CLIP with random weights and the mini models' tokenizer: 128 px, patch 8, four narrow blocks."""
    import torch
    from transformers import CLIPTokenizer

    from diclip.pretrain.clip import build_model, export, model_config
    from diclip.pretrain.tokenizer import build_tokenizer

    folder = build_tokenizer(tmp_path_factory.mktemp("clip"))
    config = model_config(vocab_size=len(CLIPTokenizer.from_pretrained(folder)), width=64, layers=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return export(build_model(config), config, folder)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a MiniVOC of a dozen pictures; return the folder to set as data_root."""
    from diclip.data.minivoc import write_minivoc

    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 1, "tune": 4, "val": 6, "shift": 2})
        write_minivoc(root, workers=1)
    return root


@pytest.fixture(scope="session")
def facts():
    """Sample tags and places of pictures as pretraining has them, without painting any."""
    from diclip.data.minivoc import CLASSES, scene_of
    from diclip.data.minivoc.captions import PLACES

    scenes = [scene_of("pretrain", index) for index in range(300)]
    tags = np.array([[name in scene.tags for name in CLASSES] for scene in scenes])
    return tags, np.array([PLACES.index(scene.place) for scene in scenes], np.uint8)


@pytest.fixture(scope="session")
def pictures(facts):
    """Hold twelve pictures of noise with true facts."""
    from diclip.pretrain.data import Pictures

    images = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)
    return Pictures(images, *(array[:12] for array in facts))
