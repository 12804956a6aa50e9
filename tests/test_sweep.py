"""Test sweeps: which runs there are, what is skipped, what is listed."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from diclip import sweep as sweeps
from diclip.__main__ import main
from diclip.settings import ROOT, load_settings
from diclip.sweep import differences, means, read_sweep, run_sweep
from diclip.tally import rows_of
from diclip.vocabulary import VOC_CLASSES

PARAMS = sorted((ROOT / "notebooks/params").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    content = {
        "run_dir": str(tmp_path / "runs"),
        "base": {"preset": "mini", "method": "diclip"},
        "variants": {"whole": {}, "without_vce": {"bias_strength": 0}},
        "grid": {"seed": [0, 1]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def trainings(monkeypatch):
    """Stand in for the processes: train what is no seed 1 of `without_vce`, until that is mended."""
    called = SimpleNamespace(arguments=[], broken=True)

    def train(arguments, *, stdout, stderr, env):
        given = yaml.safe_load(Path(arguments[-1]).read_text())
        called.arguments.append([*arguments[:-1], given])
        assert env["PYTHONPATH"].split(":")[0] == str(ROOT)
        folder = Path(given["run_dir"])
        folder.mkdir(exist_ok=True)
        if called.broken and given["seed"] == 1 and "bias_strength" in given:
            stdout.write("diclip: the disk is full\n")
            return SimpleNamespace(returncode=2)
        score = 40 + 2 * given["seed"] + 5 * ("bias_strength" not in given)
        own = {"settings": {"supervision": "tags", "method": given["method"]}, "train_images": 10 + given["seed"]}
        measured = {"val_miou": score, "pseudo_miou": None, "seconds": 9.0}
        (folder / "metrics.json").write_text(json.dumps({**own, **measured}))
        (folder / "finished.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweeps.subprocess, "run", train)
    return called


def test_failed_runs_are_listed_and_run_again_finished_ones_skipped(file, trainings, tmp_path):
    found = run_sweep(file)
    assert len(trainings.arguments) == 4
    command, given = trainings.arguments[0][:-1], trainings.arguments[0][-1]
    assert command == [sys.executable, "-m", "diclip", "train", "--resume", "auto", "--params"]
    assert given == {
        **{"preset": "mini", "method": "diclip", "seed": 0},
        "run_dir": str(tmp_path / "runs/whole/seed=0"),
    }
    assert [row["state"] for row in found["runs"]] == ["finished"] * 3 + ["failed"]
    assert [row["val_miou"] for row in found["runs"]] == [45, 47, 40, None]
    (problem,) = found["problems"]
    assert problem.startswith("without_vce/seed=1: it said 'diclip: the disk is full' (exit code 2); see ")
    assert json.loads((tmp_path / "runs/table.json").read_text()) == found
    trainings.broken = False
    found = run_sweep(file)
    assert len(trainings.arguments) == 5 and not found["problems"]
    assert [row["val_miou"] for row in found["runs"]] == [45, 47, 40, 42]
    whole, without = found["means"]
    assert (whole["variant"], whole["runs"], whole["val_miou"]) == ("whole", 2, 46)
    assert (whole["method"], whole["supervision"], whole["train_images"]) == ("diclip", "tags", None)
    assert whole["± val_miou"] == pytest.approx(2**0.5) and without["val_miou"] == 41 and whole["pseudo_miou"] is None
    run_sweep(file)
    assert len(trainings.arguments) == 5


def test_without_ray_a_cluster_is_refused_before_anything_runs(file, trainings, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = file.with_name("asked.yaml")
    asked.write_text(file.read_text() + "cluster: true\n")
    for arguments in ([str(file), "--cluster"], [str(asked)]):
        assert main(["sweep", *arguments]) == 2
        hint = "diclip: found no Ray to run a sweep on a cluster: pip install -e '.[cluster]'\n"
        assert capsys.readouterr().err == hint
    assert not trainings.arguments and not (tmp_path / "runs").exists()


def test_runs_are_ray_tasks(tmp_path, tiny_world, tiny_clip):
    """Two trainings at once, of which one cannot be; mended, it alone runs again."""
    pytest.importorskip("ray")
    (tmp_path / "sentences.yaml").write_text("".join(f"{name}: [it is a thing.]\n" for name in VOC_CLASSES))
    short = {
        "max_iters": 2,
        "limit": 2,
        "validate_every": 0,
        "image_size": 64,
        "par_rounds": 1,
        "attribute_clusters": 1,
    }
    files = {"data_root": tiny_world, "clip_model": tiny_clip, "attributes": tmp_path / "sentences.yaml"}
    base = {"preset": "mini", "method": "excel", "device": "cpu", **short, **{k: str(v) for k, v in files.items()}}
    narrow = {"decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1}
    content = {"run_dir": str(tmp_path / "runs"), "base": base | narrow, "cluster": True, "gpu_share": 0.5}
    path, runs = tmp_path / "sweep.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(content | {"variants": {"good": {}, "odd": {"decoder_heads": 3}}}))
    found = run_sweep(path)
    assert [row["state"] for row in found["runs"]] == ["finished", "failed"] and found["runs"][0]["val_miou"] >= 0
    assert "odd/run: it said 'diclip: the decoder has 16 channels, 3 heads" in found["problems"][0]
    stamp = (runs / "good/run/metrics.json").stat().st_mtime_ns
    shutil.rmtree(runs / "odd")
    path.write_text(yaml.safe_dump(content | {"variants": {"good": {}, "odd": {"decoder_heads": 4}}}))
    found = run_sweep(path)
    assert not found["problems"] and [row["state"] for row in found["runs"]] == ["finished"] * 2
    assert (runs / "good/run/metrics.json").stat().st_mtime_ns == stamp


def test_variants_are_compared_image_by_image(file, tmp_path):
    """Write counts of three images, two seeds: A gets half of an object, B all of it, and both the background."""
    sweep, rows = read_sweep(file), []
    names = {"names": np.array(["x", "y", "z"]), "classes": np.array(["cat"])}
    for variant, hits in (("whole", 5), ("without_vce", 10)):
        for seed in (0, 1):
            folder = sweep.folder(variant, f"seed={seed}")
            folder.mkdir(parents=True)
            counts = np.array([[[90, 100 - hits, 90], [hits, hits, 10]]] * 3)  # hits, predicted, true
            (folder / "val.json").write_text('{"ladder": {"pseudo labels": 1, "network": 2}}')
            np.savez(folder / "val.npz", **names, **{"counts/network": rows_of(counts)})
            rows.append({"variant": variant, "run": f"seed={seed}", "state": "finished"})
    (found,) = differences(sweep, rows)
    assert (found["A is"], found["B is"], found["runs"]) == ("whole", "without_vce", 2)
    half = (90 / 95 + 5 / 10) / 2
    assert found["A"] == pytest.approx(100 * half, abs=0.006) and found["B"] == 100
    assert found["low"] == found["B - A"] == found["high"] == pytest.approx(100 - 100 * half, abs=0.006)
    rows[2]["state"] = rows[3]["state"] = "failed"
    assert differences(sweep, rows) == []


def test_one_run_has_no_deviation():
    row = {"variant": "a", "run": "run", "state": "finished", **dict.fromkeys(sweeps.MEASURED, 1.0)}
    (found,) = means([row])
    assert found["val_miou"] == 1 and found["± val_miou"] is None


def test_a_sweep_of_notebooks_runs_them(file, trainings):
    content = yaml.safe_load(file.read_text()) | {"notebook": "training", "grid": {"seed": [0]}, "variants": {"a": {}}}
    file.write_text(yaml.safe_dump(content))
    run_sweep(file)
    assert trainings.arguments[0][:-1] == [sys.executable, "-m", "diclip", "run", "training", "-f"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "sweep.yaml: grids: Extra inputs are not permitted"),
        ({"variants": {}}, "sweep.yaml: variants: .* at least 1 item"),
        ({"grid": {"sead": [1]}}, "unknown setting 'sead': did you mean 'seed'"),
        ({"base": {"preset": "maxi"}}, "preset is 'maxi', expected one of"),
    ],
)
def test_what_cannot_run_is_found_before_anything_does(file, trainings, change, message):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        run_sweep(file)
    assert not trainings.arguments


def test_a_sweep_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no sweep nothing.yaml, neither here nor in notebooks/"):
        read_sweep("nothing.yaml")


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_parameter_files_are_settings(path):
    if path.stem.startswith("sweep"):
        runs = list(read_sweep(f"params/{path.name}").runs())
        assert len({given["run_dir"] for *_, given in runs}) == len(runs) > 1
    else:
        settings = load_settings(**yaml.safe_load(path.read_text()))
        assert path.stem == f"{settings.preset}_{settings.method}".replace("-", "_")
        assert path.name in path.read_text()


def test_every_system_has_a_file_for_every_preset():
    assert len([path for path in PARAMS if not path.stem.startswith("sweep")]) == 12
