"""The mini CLIP's training as a whole: schedule, checkpoints, exact resume, export."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from diclip.clip import load_clip
from diclip.pretrain import clip as pretraining
from diclip.pretrain.clip import build_model, pretrain_clip
from diclip.pretrain.data import Pictures
from diclip.pretrain.loop import Schedule, train
from diclip.pretrain.muon import parameter_groups
from diclip.vocabulary import VOC


def test_schedule_warms_up_and_comes_down():
    schedule = Schedule(1000, 2.0, warmup=100)
    rates = [schedule(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2.0
    assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))
    assert rates[550] == pytest.approx(1.0) and 0 < rates[-1] < 1e-4


def test_matrices_alone_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, free = parameter_groups(model.parameters(), 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 3 and free["weight_decay"] == 0.0


def toy(folder, *, steps=260, **options):
    """Fit a line with the loop; return its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)

    def loss(step):
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    optimizer = torch.optim.AdamW(model.parameters())
    options = {"schedule": Schedule(steps, 0.05, warmup=10), "optimizer": optimizer} | options
    done = train(model, loss, folder=folder, **options)
    return done, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_learns_saves_and_records(tmp_path):
    evaluated = []
    done, found = toy(tmp_path, evaluate=lambda step: evaluated.append(step) or {"extra": step}, evaluate_every=100)
    assert done == 260 and evaluated == [100, 200, 260]
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.0]), atol=0.05, rtol=0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [50, 100, 150, 200, 250, 260]
    assert records[-1]["loss"] < 0.01 * records[0]["loss"] + 1e-6 and [r.get("extra") for r in records] == [
        *(None, 100, None, 200, None, 260)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
    assert toy(tmp_path, evaluate=lambda step: pytest.fail("it was finished"))[0] == 260


def test_time_is_up_and_training_goes_on_later(tmp_path):
    expected = toy(tmp_path / "whole")[1]
    for done in (1, 2, 3):
        assert toy(tmp_path / "parts", max_minutes=1e-9)[0] == done
    done, found = toy(tmp_path / "parts")
    assert done == 260 and found.equal(expected)


class Killed(Exception):
    pass


def killed_after(steps):
    def progress(items):
        for step in items:
            if step == steps:
                raise Killed
            yield step

    return progress


def test_a_resumed_clip_is_bit_for_bit_the_same(tensors, monkeypatch, pictures, tmp_path):
    monkeypatch.setattr(pretraining, "train", partial(train, save_every=2))
    small = {"steps": 5, "batch_size": 4, "width": 32, "layers": 2, "seed": 3}

    def run(name, **options):
        torch.manual_seed(hash(name) % 1000)  # what was drawn before must not matter
        return pretrain_clip(tmp_path / name, pictures, **small | options)

    run("whole")
    with pytest.raises(Killed):
        run("killed", progress=killed_after(3))  # the checkpoint is of step 2
    assert torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"] == 2
    shutil.copytree(tmp_path / "killed", tmp_path / "copied")
    shutil.copy(tmp_path / "copied/checkpoint.pt", tmp_path / "copied/checkpoint.123.tmp")  # killed while saving
    run("killed")
    run("copied")
    run("other", seed=4)
    states = {n: torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "killed", "other")}
    whole, killed, other = (tensors(state) for state in states.values())
    assert len(whole) == len(killed) > 100 and all(a.equal(b) for a, b in zip(whole, killed, strict=True))
    assert not all(a.equal(b) for a, b in zip(whole, other, strict=True))
    weights = [(tmp_path / n / "model/open_clip_model.safetensors").read_bytes() for n in ("whole", "killed", "copied")]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize(("done", "pool"), [(1, "avg"), (4, "tok")])
def test_the_export_is_the_trained_model(pictures, tmp_path, done, pool):
    evaluated = []
    folder = pretrain_clip(
        tmp_path,
        pictures,
        steps=4,
        batch_size=4,
        width=32,
        layers=2,
        max_minutes=1e-9 if done == 1 else 0,  # the first phase averages, the last has a class token
        evaluate=lambda folder: evaluated.append(folder) or {"checked": 1.0},
    )
    assert evaluated == [folder] == [tmp_path / "model"] and not list(folder.glob("*.tmp"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["checked"] == 1
    trained = build_model(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    trained.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    clip, images, texts = load_clip(folder), pictures.take(np.arange(3)), VOC.prompts()
    assert clip.pooled_is_token == (pool == "tok")
    with torch.no_grad():
        pairs = (
            (trained.encode_image((images - clip.mean) / clip.std), clip.encode(images, surgery_blocks=0).pooled),
            (trained.encode_text(clip.tokenizer(texts), normalize=True), clip.encode_text(texts)),
        )
    for expected, found in pairs:
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, atol=5e-3 * expected.abs().max().item(), rtol=0)


def test_the_tokenizer_stays_with_what_has_been_learned(pictures, tmp_path):
    """Another order of the words would turn a resumed model's words into others."""
    small = {"batch_size": 4, "width": 32, "layers": 1}
    pretrain_clip(tmp_path, pictures, steps=2, max_minutes=1e-9, **small)
    file = tmp_path / "model/tokenizer.json"
    file.write_text(file.read_text() + "\n")
    before = file.read_bytes()
    pretrain_clip(tmp_path, pictures, steps=2, **small)
    assert file.read_bytes() == before


def test_training_lowers_the_loss(facts, tmp_path):
    """On pictures whose colour names their class, a few steps must already help."""
    tags, places = np.eye(20, dtype=bool)[[6, 7]].repeat(6, 0), np.zeros(12, np.uint8)
    images = np.where(tags[:, [6]], 40, 210).astype(np.uint8)[:, None, None] * np.ones((1, 128, 128, 3), np.uint8)
    pretrain_clip(
        tmp_path, Pictures(images, tags, places), steps=80, batch_size=8, width=32, layers=1, learning_rate=5e-3
    )
    clip = load_clip(tmp_path / "model")
    two = torch.from_numpy(images[[0, 6]]).permute(0, 3, 1, 2) / 255
    pooled = clip.encode(two, surgery_blocks=0).pooled
    likeness = nn.functional.normalize(pooled, dim=-1) @ clip.encode_text(["a photo of a car.", "a photo of a cat."]).T
    assert likeness[0, 0] > likeness[0, 1] and likeness[1, 1] > likeness[1, 0]
