"""Test what is loaded as a diffusion model, and what is refused and how."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diclip.diffusion import Diffusion, load_diffusion


@pytest.fixture(scope="module")
def diffusion(saved) -> Diffusion:
    return load_diffusion(saved)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def complaint(model, **changed) -> str:
    with pytest.raises(ValueError) as error:
        load_diffusion(model, **changed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def test_loads_silently_and_leaves_the_libraries_as_they_were(saved, capfd, caplog):
    import diffusers
    import transformers

    logs = diffusers.utils.logging, transformers.utils.logging
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    diffusion = load_diffusion(saved)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs] == before
    assert diffusion.pipeline.safety_checker is None and diffusion.unet.dtype == torch.float32


def test_weights_are_the_saved_ones_also_in_half_precision(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: weight.half() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    loaded = load_diffusion(folder).unet
    assert loaded.dtype == torch.float32 and weights.keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert weight.equal(weights[name].half().float())


def rename(path: Path, *changes: tuple[str, str]) -> None:
    def new(name: str) -> str:
        for old, other in changes:
            name = name.replace(old, other)
        return name

    weights = load_file(path)
    assert {new(name) for name in weights} != weights.keys()
    save_file({new(name): weight for name, weight in weights.items()}, path, metadata={"format": "pt"})


def test_reads_the_names_of_stable_diffusions_own_files(folder, diffusion):
    old = (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn."))
    rename(folder / "vae/diffusion_pytorch_model.safetensors", *old)
    text = folder / "text_encoder/model.safetensors"
    save_file({f"text_model.{name}": w for name, w in load_file(text).items()}, text, metadata={"format": "pt"})
    loaded = load_diffusion(folder)
    for part in ("vae", "text_encoder"):
        found, expected = getattr(loaded, part).state_dict(), getattr(diffusion, part).state_dict()
        assert found.keys() == expected.keys() and all(w.equal(expected[name]) for name, w in found.items())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "incomplete", "misshaped", "folder"])
def test_damaged_weights_say_what_to_do(folder, part, damage, capfd, caplog):
    path = next((folder / part).glob("*.safetensors"))
    if damage in ("incomplete", "misshaped"):
        weights = load_file(path)
        name = min(weights)
        del weights[name]
        if damage == "misshaped":
            weights[name] = torch.zeros(2, 3, 5)
        save_file(weights, path, metadata={"format": "pt"})
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "pickle":
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    elif damage == "missing":
        path.unlink()
    else:
        shutil.rmtree(folder / part)
    found = complaint(folder)
    assert str(folder) in found and "git checkout" in found and "diclip pretrain diffusion" in found
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", None, "no model_index.json"),
        ("model_index.json", "{", "not a valid JSON"),
        ("tokenizer/tokenizer.json", None, "no tokenizer.json"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json"),
    ],
)
def test_damaged_folder_says_what_to_do(folder, file, text, message):
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    assert message in complaint(folder)


def test_first_candidate_that_loads_is_taken(folder, saved, tmp_path):
    (folder / "model_index.json").unlink()
    assert load_diffusion((tmp_path / "none", folder, saved)).unet.dtype == torch.float32
    found = complaint([folder, "hf-hub:nobody/no-such-model", "nobody/another"])
    assert f"{folder} (no model_index.json)" in found and "nobody/another (" in found
    assert "p.download('nobody/no-such-model', use_safetensors=True)" in found and "local folder" in found
    assert "no name was given" in complaint([])
    assert f"{tmp_path}/none (neither a folder nor a hub id)" in complaint(tmp_path / "none")


def test_hub_ids_are_downloaded_as_safetensors_only(saved, caplog):
    asked = []

    def download(name, **arguments):
        asked.append((name, arguments["use_safetensors"], arguments["safety_checker"]))
        return str(saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "download", download)
        load_diffusion("hf-hub:owner/name")
        load_diffusion(["owner/other", saved])
    assert asked == [("owner/name", True, None), ("owner/other", True, None)]
    assert "nobody/none (" in complaint("nobody/none") and not caplog.records


def test_inpainting_models_are_refused(folder, tiny_stable_diffusion):
    tiny_stable_diffusion(in_channels=9).unet.save_pretrained(folder / "unet")
    assert json.loads((folder / "unet/config.json").read_text())["in_channels"] == 9
    assert "U-Net takes 9 channels, expected its VAE's 4" in complaint(folder)
