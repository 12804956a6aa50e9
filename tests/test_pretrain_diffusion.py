"""Test the training of the mini diffusion model at tiny sizes: exact resume, averaging, export, and what it reports."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTokenizer

from diclip.data.minivoc import CLASSES
from diclip.diffusion import load_diffusion
from diclip.pretrain import diffusion as pretraining
from diclip.pretrain import pretrain, watch_diffusion
from diclip.pretrain.data import Pictures
from diclip.pretrain.diffusion import Denoiser, Stretch, average, build_unet, pretrain_diffusion, stretch_of
from diclip.pretrain.loop import train
from diclip.screen import text
from diclip.settings import load_settings


def tiny_autoencoder() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    width = {"block_out_channels": (4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    return AutoencoderKL(**blocks, **width, latent_channels=4, mid_block_add_attention=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make everything small, and checkpoints frequent."""
    stretches = Stretch(0.5, 16, (0.5, 1.0), 4), Stretch(1.0, 32, (0.85, 1.0), 2)
    monkeypatch.setattr(pretraining, "STRETCHES", stretches)
    monkeypatch.setattr(pretraining, "build_autoencoder", tiny_autoencoder)
    monkeypatch.setattr(pretraining, "build_unet", partial(build_unet, channels=(16, 16, 32), heads=(2, 2, 4)))
    monkeypatch.setattr(pretraining, "train", partial(train, save_every=2))


def learn(folder, pictures, studio=None, **options):
    usual = {"steps": 5, "autoencoder_steps": 3, "seed": 3}
    return pretrain_diffusion(folder, pictures, studio or pictures, **usual | options)


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


class Killed(Exception):
    pass


def killed_at(last: int, step: int):
    """Return a progress that raises at a step of the training that has `last` steps in all."""

    def progress(items):
        for each in items:
            if (items.stop, each) == (last, step):
                raise Killed
            yield each

    return progress


def test_a_resumed_training_is_bit_for_bit_the_same(tensors, pictures, tmp_path):
    def run(name, **options):
        torch.manual_seed(len(name))  # what was drawn before must not matter
        return learn(tmp_path / name, pictures, **options)

    run("whole")
    for last, step in ((3, 2), (5, 3)):  # in the autoencoder, then in the U-Net, between two checkpoints
        with pytest.raises(Killed):
            run("killed", progress=killed_at(last, step))
    assert checkpoint(tmp_path / "killed")["step"] == 2 and checkpoint(tmp_path / "killed/autoencoder")["step"] == 3
    (tmp_path / "killed/model.tmp").mkdir()  # what a kill while exporting leaves
    (tmp_path / "killed/model.tmp/half.json").touch()
    run("killed")
    run("another", seed=4)
    for part in ("autoencoder", "."):
        names = ("whole", "killed", "another")
        whole, killed, another = (tensors(checkpoint(tmp_path / name / part)) for name in names)
        assert len(whole) == len(killed) > 100 and all(a.equal(b) for a, b in zip(whole, killed, strict=True))
        assert not all(a.equal(b) for a, b in zip(whole, another, strict=True))
    whole, killed = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*") if file.is_file()}
        for root in (tmp_path / "whole/model", tmp_path / "killed/model")
    )
    assert whole == killed and len(whole) > 9
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        *("autoencoder", "checkpoint.pt", "metrics.jsonl", "model", "tokenizer")
    ]


@pytest.fixture
def trained(pictures, tmp_path):
    """Train a little, evaluating once; return the run's folder."""
    evaluated = []
    folder = learn(tmp_path / "run", pictures, evaluate=lambda folder: evaluated.append(folder) or {"checked": 1.0})
    assert evaluated == [folder] == [tmp_path / "run/model"]
    return tmp_path / "run"


def test_the_export_is_an_ordinary_pipeline(trained):
    (record,) = (json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines())
    assert (record["step"], record["checked"]) == (5, 1.0) and np.isfinite(record["loss"])
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "model")
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    made = pipeline("a cat", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 128, 128, 3) and np.isfinite(made).all() and made.std() > 0.01
    diffusion, settings = load_diffusion(trained / "model"), load_settings()
    assert diffusion.scheduler.config.prediction_type == "v_prediction"
    taps = diffusion.capture(
        torch.rand(1, 3, 128, 128),
        timestep=101,
        coarse=settings.coarse_layer,
        fine=settings.fine_layer,
        fine_heads=settings.fine_heads,
        generator=torch.Generator(),
    )
    assert (taps.coarse_grid, taps.fine_grid) == ((32, 32), (32, 32))
    assert len(list((trained / "model").rglob("*.safetensors"))) == 3 and not list((trained / "model").rglob("*.bin"))


def test_the_averaged_weights_are_exported(trained):
    state = checkpoint(trained)["model"]
    for part, file, kept in (
        ("unet", "unet/diffusion_pytorch_model", torch.float16),
        ("text_encoder", "text_encoder/model", torch.float32),
    ):
        exported = load_file(trained / "model" / f"{file}.safetensors")
        gaps = []
        for name, weight in exported.items():
            averaged, now = (state[f"{which}.{part}.{name}"] for which in ("average.module", "now"))
            assert weight.dtype == kept and weight.equal(averaged.to(kept))
            gaps.append((averaged - now).abs().max())
        assert max(gaps) > 1e-5, part
    autoencoder = load_file(trained / "model/vae/diffusion_pytorch_model.safetensors")
    learned = checkpoint(trained / "autoencoder")["model"]
    assert autoencoder.keys() == learned.keys() and all(w.equal(learned[n].half()) for n, w in autoencoder.items())


def test_average():
    """The first time it is the weights themselves, later it forgets them by a tenth to a thousandth a step."""
    fast = torch.nn.Linear(1, 1, bias=False)
    slow, expected = AveragedModel(fast, multi_avg_fn=average), None
    for count, value in enumerate((5.0, 1.0, 3.0, 2.0)):
        torch.nn.init.constant_(fast.weight, value)
        slow.update_parameters(fast)
        keep = (1 + count) / (10 + count)
        expected = value if expected is None else keep * expected + (1 - keep) * value
        assert slow.module.weight.item() == pytest.approx(expected)
    late = [torch.zeros(2), torch.zeros(1)]
    average(late, [torch.ones(2), torch.full((1,), 2.0)], torch.tensor(10**6))
    torch.testing.assert_close(torch.cat(late), torch.tensor([0.001, 0.001, 0.002]))


def test_prompts_are_captions_and_a_tenth_is_empty(monkeypatch, pictures, tmp_path):
    seen = []

    def forward(self, latents, timesteps, ids):
        seen.append((latents.shape, timesteps, ids))
        return latents * self.unet.conv_in.weight.mean()

    monkeypatch.setattr(Denoiser, "forward", forward)
    monkeypatch.setattr(pretraining, "STRETCHES", (Stretch(0.5, 16, (0.5, 1.0), 96), Stretch(1.0, 32, (0.9, 1.0), 32)))
    learn(tmp_path, pictures, steps=8, autoencoder_steps=1)
    assert [shape for shape, *_ in seen] == [(96, 4, 4, 4)] * 4 + [(32, 4, 8, 8)] * 4
    timesteps, ids = (torch.cat([each[place] for each in seen]) for place in (1, 2))
    assert 0 <= timesteps.min() < 20 and 980 < timesteps.max() < 1000 and len(timesteps.unique()) > 350
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert ids.shape == (512, 24) and 0.05 < sum(not text for text in texts) / 512 < 0.15
    tags = {tuple(np.flatnonzero(row)) for row in pictures.tags}
    assert len(set(texts)) > 3 * len(tags)  # written anew each time


def test_most_pictures_are_from_the_studio(monkeypatch, pictures, tmp_path):
    """Known by their captions: in the studio stand chairs, elsewhere what `pictures` shows."""
    seen = []

    def forward(self, latents, timesteps, ids):
        seen.append(ids)
        return latents * self.unet.conv_in.weight.mean()

    monkeypatch.setattr(Denoiser, "forward", forward)
    monkeypatch.setattr(pretraining, "STRETCHES", (Stretch(1.0, 16, (0.5, 1.0), 50),))
    chairs = np.zeros_like(pictures.tags)
    chairs[:, CLASSES.index("chair")] = True
    boats = np.roll(chairs, CLASSES.index("boat") - CLASSES.index("chair"), 1)
    sources = (Pictures(pictures.images, tags, pictures.places) for tags in (boats, chairs))
    learn(tmp_path, *sources, steps=2, autoencoder_steps=1)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for ids in seen:
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        where = {name: {row for row, text in enumerate(texts) if name in text} for name in ("chair", "boat")}
        assert len(where["chair"]) > 5 and len(where["boat"]) > 2
        assert max(where["chair"]) < 30 <= min(where["boat"])  # captions with attributes alone name neither


def test_stretches():
    assert [stretch_of(step, 10).size for step in (0, 4, 5, 9, 12)] == [16, 16, 32, 32, 32]


# The command


@pytest.fixture
def settings(tiny_world, facts, tmp_path, monkeypatch):
    """Return settings of a training on 64 pictures of noise, beside a small MiniVOC to watch it on."""
    shutil.copytree(tiny_world, tmp_path / "data")
    folder = tmp_path / "data/minivoc-pretrain"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
    for kind, array in (("images", noise), ("tags", facts[0][:64]), ("places", facts[1][:64])):
        np.save(folder / f"{kind}-000000-000064.npy", array)
    shutil.copytree(folder, tmp_path / "data/minivoc-studio")
    for file in (tmp_path / "data/minivoc-studio").iterdir():  # half as many
        np.save(file.with_name(file.name.replace("64", "32")), np.load(file)[:32])
    monkeypatch.setattr(pretraining, "pretrain_diffusion", partial(pretrain_diffusion, autoencoder_steps=2))
    return load_settings(
        data_root=tmp_path / "data", run_dir=tmp_path / "run", pretrain_pictures=64, pretrain_steps=2, device="cpu"
    )


def silent(items, **_):
    return items


def test_the_command_trains_and_watches(settings):
    done = pretrain("diffusion", settings, silent)
    assert done["model"] == str(settings.run_dir / "model") and done.keys() == {"model", "minutes"}
    (record,) = (json.loads(line) for line in (settings.run_dir / "metrics.jsonl").read_text().splitlines())
    assert record["step"] == 2 and 0 < record["same_object_auc"] < 1
    watched = partial(watch_diffusion, model=settings.run_dir / "model")
    assert watched(settings) == {"same_object_auc": record["same_object_auc"]}
    assert watched(settings.model_copy(update={"batch_size": 1})) == pytest.approx(watched(settings), abs=2e-4)
    assert watched(settings.model_copy(update={"seed": 1})) != watched(settings)


def test_time_may_end_before_there_is_a_model(settings):
    short = settings.model_copy(update={"max_minutes": 1e-9})
    done = pretrain("diffusion", short, silent)
    assert done["model"] is None and "run the same command again" in text(done)
    assert not (settings.run_dir / "model").exists() and not (settings.run_dir / "checkpoint.pt").exists()
    assert checkpoint(settings.run_dir / "autoencoder")["step"] == 1
    done = pretrain("diffusion", short, silent)  # the autoencoder's last step, and the U-Net's first
    assert done["model"] == str(settings.run_dir / "model") and checkpoint(settings.run_dir)["step"] == 1
    assert pretrain("diffusion", settings, silent)["model"] and checkpoint(settings.run_dir)["step"] == 2
