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


def pytest_terminal_summary(terminalreporter):
    """List what tests measured (memory and seconds at real sizes) at the end of a run."""
    reports = terminalreporter.stats.get("passed", [])
    measured = {report.nodeid: dict(report.user_properties) for report in reports if report.user_properties}
    if measured:
        terminalreporter.section("measured")
    for test, values in measured.items():
        terminalreporter.write_line(f"{test}: " + ", ".join(f"{name} {value}" for name, value in values.items()))


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
def photograph():
    """Read a real photograph, (3, H, W) in [0, 1]: the first that DICLIP_PHOTOS names, or matplotlib's sample."""
    from matplotlib.cbook import get_sample_data

    from diclip.data.images import read_image

    folder = os.environ.get("DICLIP_PHOTOS")
    found = sorted(Path(folder).glob("**/*.jpg")) if folder else []
    return read_image(found[0] if found else Path(get_sample_data("grace_hopper.jpg", asfileobj=False)))


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
def tiny_diffusion(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a diffusion model with random weights, narrow but laid out as the mini model: 8 x 8 to 32 x 32 tokens."""
    import torch
    from transformers import CLIPTokenizer

    from diclip.pretrain.diffusion import build_autoencoder, build_scheduler, build_text_encoder, build_unet, export

    tokenizer, folder = CLIPTokenizer.from_pretrained(tiny_clip), tmp_path_factory.mktemp("diffusion") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet(channels=(16, 16, 32), heads=(2, 2, 4))
        return export(
            folder, build_autoencoder(), unet, build_text_encoder(len(tokenizer)), tokenizer, build_scheduler()
        )


@pytest.fixture(scope="session")
def tiny_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a memory of random keys for the tiny CLIP: three of the background, two of each class."""
    import torch

    from diclip.memory import Memory
    from diclip.vocabulary import VOC_CLASSES

    owner = torch.tensor([0] * 3 + [*range(1, 21)] * 2)
    keys = 0.1 * torch.randn(len(owner), 128, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    Memory(keys, torch.eye(21)[owner], VOC_CLASSES).save(path)
    return path


@pytest.fixture(scope="session")
def tiny_stable_diffusion(tmp_path_factory: pytest.TempPathFactory):
    """Return a builder of pipelines with random weights and Stable Diffusion's layout, but three narrow levels.

    Its arguments change the U-Net.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from diclip.pretrain.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's

    def build(**unet):
        tokenizer = CLIPTokenizer.from_pretrained(build_tokenizer(folder))
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        width = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **width, **ids)
        vae = {"block_out_channels": (4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        shape = {"sample_size": 32, "block_out_channels": (4, 8, 8), "norm_num_groups": 2}
        kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
        attention = {"attention_head_dim": (2, 4, 4), "cross_attention_dim": 8, "use_linear_projection": True}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return StableDiffusionPipeline(
                text_encoder=CLIPTextModel(text),
                vae=AutoencoderKL(**vae, **blocks),
                unet=UNet2DConditionModel(**shape, **kinds, **attention, **unet),
                tokenizer=tokenizer,
                scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )

    return build


@pytest.fixture(scope="session")
def saved(tiny_stable_diffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Stable Diffusion as diffusers does."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def tensors():
    """Return a function that lists the tensors of nested dictionaries, lists and tuples, as checkpoints are."""
    import torch

    def found(state) -> list[torch.Tensor]:
        if isinstance(state, torch.Tensor):
            return [state]
        values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
        return [tensor for value in values for tensor in found(value)]

    return found


@pytest.fixture(scope="module")
def models(tiny_clip, tiny_world):
    """Name a tiny CLIP and a small world, for explorers."""
    return {"clip_model": str(tiny_clip), "data_root": str(tiny_world), "device": "cpu"}


@pytest.fixture(scope="module")
def studio(models, tmp_path_factory):
    """Return a studio without a diffusion model and a memory."""
    from diclip.explorers import Studio
    from diclip.settings import load_settings

    nowhere = tmp_path_factory.mktemp("nowhere")
    lacking = {"diffusion_model": str(nowhere / "diffusion"), "memory": str(nowhere / "memory.safetensors")}
    return Studio(load_settings(**models, **lacking))


@pytest.fixture(scope="module")
def full_studio(models, tiny_diffusion, tiny_memory):
    """Return a studio with all that DiCLIP needs, tiny."""
    from diclip.explorers import Studio
    from diclip.settings import load_settings

    return Studio(load_settings(**models, diffusion_model=str(tiny_diffusion), memory=str(tiny_memory)))
