"""Test the training loop on a small network that learns from real masks: resume, processes, records."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from toy_training import Toy, plain, run, run_together

from diclip.checkpoints import load_weights
from diclip.compare import compare_results
from diclip.learner import warm_linear
from diclip.runs import locked
from diclip.settings import load_settings
from diclip.train import train

LAST, BEST = "checkpoints/last/model.safetensors", "checkpoints/best/model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Draw eight pictures to train on, four to choose by, five to report on."""
    from diclip.data.minivoc import write_minivoc

    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 8, "tune": 4, "val": 5})
        write_minivoc(root, workers=1)
    return root


@pytest.fixture
def chosen(world):
    """Return settings of a training of a second, as the command line has them."""
    base = {"supervision": "masks", "max_iters": 12, "warmup_iters": 2, "learning_rate": 0.02, "device": "cpu"}
    often = {"validate_every": 5, "save_every": 2, "log_every": 1}
    return lambda folder, **changes: {
        "data_root": str(world), "run_dir": str(folder), "image_size": 64, **base, **often, **changes
    }  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    """Start processes that need not import everything again; what optimisers import late is the largest part."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training", "accelerate", "torch._dynamo"])
    return context


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in records(folder)]


def test_the_rate_warms_up_and_comes_down_in_a_line():
    rates = [warm_linear(step, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == 1e-6 and rates[5] == pytest.approx(0.5, abs=1e-5)
    assert rates[10] == 0.9 and rates[60] == pytest.approx(0.4) and rates[99] == pytest.approx(0.01)
    assert warm_linear(0, steps=5, warmup=0) == 1


def test_a_training_learns_and_leaves_its_record(chosen, tmp_path):
    settings = load_settings(**chosen(tmp_path / "run", max_iters=30, validate_every=10, log_every=5))
    before = torch.random.get_rng_state()
    found = train(settings, build=Toy)
    assert torch.random.get_rng_state().equal(before)
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(5, 31, 5))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    best = max((line for line in lines if "tune_miou" in line), key=lambda line: line["tune_miou"])
    assert (found["tune_miou"], found["best_step"]) == (pytest.approx(best["tune_miou"], abs=0.006), best["step"])
    assert 0 < found["val_interval"][0] <= found["val_miou"] <= found["val_interval"][1] <= 100
    assert found["full_supervision_miou"] == found["val_miou"] and found["pseudo_miou"] is None
    assert (
        found["images_per_second"] > 30 * 4 / found["seconds"] > 0
        and found["peak_mb"] > 0
        and found["train_images"] == 8
        and load_settings(**found["settings"]) == settings
    )
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == found
    assert {"settings.json", "environment.json", "finished.json", "val.json", "val.npz"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert compare_results(tmp_path / "run/val.json", tmp_path / "run/val.json", rung=None)
    weights, about = load_weights(tmp_path / "run" / LAST)
    assert set(weights) == set(Toy(settings).state_dict()) and about["step"] == 30
    assert load_weights(tmp_path / "run" / BEST)[1]["step"] == found["best_step"]
    assert sorted(path.name for path in (tmp_path / "run" / LAST).parent.iterdir()) == [
        "model.safetensors", "state-30.pt",
    ]  # fmt: skip


def test_the_network_that_is_scored_may_be_the_best(chosen, tmp_path):
    settings = load_settings(**chosen(tmp_path, scored_checkpoint="best", learning_rate=0.5, validate_every=3))
    found = train(settings, build=Toy)
    assert found["protocol"]["checkpoint"] == f"best on tune, step {found['best_step']}" and found["best_step"] < 12
    network = Toy(settings).eval()
    network.load_state_dict(load_weights(tmp_path / BEST)[0])
    scored = train(load_settings(**chosen(tmp_path / "none", learning_rate=1e-9, max_iters=1)), build=lambda _: network)
    assert scored["val_miou"] == pytest.approx(found["val_miou"], abs=0.02)


def test_folders_are_never_overwritten(chosen, tmp_path):
    settings = load_settings(**chosen(tmp_path, max_iters=2))
    first = train(settings, build=Toy)
    stamp = (tmp_path / LAST).stat().st_mtime_ns
    assert train(settings, resume=True, build=pytest.fail) == first
    other = settings.model_copy(update={"max_minutes": 3.0, "workers": 1})
    assert train(other, resume=True, build=pytest.fail) == first
    with pytest.raises(ValueError, match="finished run and is never overwritten"):
        train(settings, build=Toy)
    with pytest.raises(ValueError, match="another|other settings.*max_iters was 2, now 3"):
        train(settings.model_copy(update={"max_iters": 3}), resume=True, build=Toy)
    (tmp_path / "finished.json").unlink()
    with pytest.raises(ValueError, match="not finished: go on with --resume auto"):
        train(settings, build=Toy)
    with locked(tmp_path), pytest.raises(ValueError, match="is in use"):
        train(settings, resume=True, build=Toy)
    assert (tmp_path / LAST).stat().st_mtime_ns == stamp


def test_time_runs_out_and_goes_on(chosen, tmp_path):
    seen = []

    def watch(record, system):
        seen.append((record["step"], system.training, system.segment(torch.rand(1, 3, 64, 64)).shape))

    whole = train(load_settings(**chosen(tmp_path / "whole")), build=Toy, watch=watch)
    assert seen == [(step, False, (1, 21, 16, 16)) for step in range(1, 13)]
    short = load_settings(**chosen(tmp_path / "parts", max_minutes=1e-9))
    for step in (1, 2, 3):
        found = train(short, resume=True, build=Toy)
        assert found["steps"] == step and "--resume auto" in found["unfinished"]
    found = train(load_settings(**chosen(tmp_path / "parts")), resume=True, build=Toy)
    assert found["val_miou"] == whole["val_miou"] and untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert (tmp_path / "parts" / LAST).read_bytes() == (tmp_path / "whole" / LAST).read_bytes()


def test_three_kills_change_nothing(chosen, processes, tmp_path):
    """Kill -9 whenever another line is logged, early, in the middle and late; go on each time."""
    settings = chosen(tmp_path / "killed", max_iters=60)
    for lines in (1, 20, 45):
        process = processes.Process(target=run, args=(settings,))
        process.start()
        while process.is_alive() and not _logged(tmp_path / "killed", lines):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed/finished.json").exists()
    for name in ("killed", "whole"):
        process = processes.Process(target=run, args=(chosen(tmp_path / name, max_iters=60),))
        process.start()
        process.join()
        assert process.exitcode == 0 and (tmp_path / name / "finished.json").exists()
    for weights in (LAST, BEST):
        assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    assert len(list((tmp_path / "killed/checkpoints/last").iterdir())) == 2


def _logged(folder: Path, lines: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= lines


def test_two_processes_learn_what_one_does(chosen, processes, tmp_path):
    one = chosen(tmp_path / "one", train_batch=4)
    train(load_settings(**one), build=plain)
    assert run_together(processes, {**one, "run_dir": str(tmp_path / "two")}, build=plain) == [0, 0]
    pairs = list(zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True))
    assert len(pairs) == 12
    for alone, both in pairs:
        assert both["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [x["processes"] for x in found] == [1, 2]
    assert found[0]["val_miou"] == pytest.approx(found[1]["val_miou"], abs=0.1)


def test_mixed_precision_is_near(chosen, processes, tmp_path):
    for name in ("no", "bf16"):  # in processes of their own: accelerate chooses once
        settings = chosen(tmp_path / name, mixed_precision=name, max_iters=4, learning_rate=1e-3)
        process = processes.Process(target=run, args=(settings,), kwargs={"build": plain})
        process.start()
        process.join()
        assert process.exitcode == 0
    for exact, near in zip(records(tmp_path / "no"), records(tmp_path / "bf16"), strict=True):
        assert near["loss"] == pytest.approx(exact["loss"], rel=0.02) and near["loss"] != exact["loss"]


def test_parts_of_a_step_add_up(chosen, tmp_path):
    """Where the loss is a mean over crops, a step in two parts is the step in one."""

    class Mean(Toy):
        def loss(self, batch, *, step, generator):
            self.step = step
            return {"loss": self.logits(batch.images).square().mean()}

    curves = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        train(load_settings(**chosen(folder, accumulate=parts)), build=lambda s: Mean(s, dropout=0))
        curves.append([line["loss"] for line in records(folder)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][-1] < 0.5 * curves[0][0]


def test_a_loss_that_is_no_number_stops(chosen, tmp_path):
    class Broken(Toy):
        def loss(self, batch, *, step, generator):
            found = super().loss(batch, step=step, generator=generator)
            return {"loss": found["loss"] * (float("nan") if step == 5 else 1)}

    with pytest.raises(ValueError, match="step 6: found loss nan, expected numbers: try a learning_rate below 0.02"):
        train(load_settings(**chosen(tmp_path)), build=Broken)
    assert load_weights(tmp_path / LAST)[1]["step"] == 5  # what came before is kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_batch": 3, "accumulate": 2}, "train_batch is 3, which 1 processes x 2 accumulated parts cannot share"),
        ({"val_split": "test"}, "there is no split 'test'"),
        ({"reference_run": "nowhere"}, "nowhere/metrics.json: there is no such file"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16, which cpu has not: set it to bf16 or no"),
    ],
)
def test_what_cannot_be_is_found_at_once(chosen, tmp_path, changed, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(load_settings(**chosen(tmp_path, **changed)), build=Toy)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(chosen, tmp_path):
    settings = load_settings(**chosen(tmp_path, max_minutes=1e-9))
    train(settings, build=Toy)

    class Wider(Toy):
        def __init__(self, settings):
            super().__init__(settings)
            self.extra = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="another model in the checkpoint: choose another run_dir"):
        train(settings, resume=True, build=Wider)


def test_tags_alone_reach_the_system_and_a_reference_is_reported(chosen, tmp_path):
    train(load_settings(**chosen(tmp_path / "masks", max_iters=2)), build=Toy)
    seen = []

    class FromTags(Toy):
        def loss(self, batch, *, step, generator):
            self.step = step
            seen.extend(batch.masks)
            present = torch.zeros(len(batch), 20)
            for row, tags in zip(present, batch.tags, strict=True):
                row[tags] = 1
            logits = self.logits(batch.images)[:, 1:].amax((2, 3))
            return {"loss": torch.nn.functional.binary_cross_entropy_with_logits(logits, present)}

    changes = {"supervision": "tags", "parity_crops_see_masks": True, "reference_run": str(tmp_path / "masks")}
    found = train(load_settings(**chosen(tmp_path / "tags", **changes)), build=FromTags)
    assert len(seen) == 48 and set(seen) == {None}
    assert found["full_supervision_miou"] == json.loads((tmp_path / "masks/metrics.json").read_text())["val_miou"]
    assert 0 < found["pseudo_miou"] <= 100 and found["pseudo_interval"][0] <= found["pseudo_miou"]
    assert found["protocol"]["supervision"] == "tags, crops chosen by masks"
