import base64
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from diclip.__main__ import find_notebook, main
from diclip.screen import brief, table, text
from diclip.settings import ROOT, load_settings

REPORT = {
    "ladder": {"clip": 24.06, "intra": 39.1},
    "intervals": {"clip": [22.0, 26.5], "intra": [37.0, 41.0]},
    "baselines": {"grabcut": 26.0},
    "baseline_intervals": {"grabcut": [24.0, 28.0]},
    "lost": {},
    "miou_tuned_background": {"clip": 24.06, "intra": 39.1},
    "miou_one_minus_max": {"clip": 20.0, "intra": 36.0},
    "recognition": {"single_tag_top1": None, "tag_map": 61.5},
    "classes": {"clip": {}},
    "images": 1000,
    "protocol": {"split": "val of voc, 1000 images", "scales": "1 of 320 px"},
}


@pytest.fixture
def fake(monkeypatch):
    """Stand in for modules that take minutes: return what the command passed them."""

    def install(module: str, **functions):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))

    return install


def test_module_and_console_command_are_one(tmp_path):
    done = subprocess.run([sys.executable, "-m", "diclip", "run", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("diclip: there is no notebook 'nothing' in notebooks/, which has ")
    assert done.stderr.count("\n") == 1


def test_help_lists_commands_and_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("demo", "run", "evaluate", "pretrain", "data", "tau_box", "background_words"):
        assert f"  {word} " in out
    assert "earns a box (CAA) [0.79; coco: 0.88; clip-es on mini, clip-es on voc: 0.4; clip-es on coco: 0.7]\n" in out
    assert "[clip; voc, coco: imagenet; clip-es on voc, clip-es on coco: clip]\n" in out
    assert "averages [6; clip-es: 8; diclip on mini: 2]\n" in out and "path [qq+2kk; excel: qkv]\n" in out


def test_evaluate_passes_settings_and_prints_what_fits_a_screen(fake, capsys):
    seen = []

    def evaluate(settings, progress, counts):
        assert counts is None
        seen.append(settings)
        return {**REPORT, "settings": settings.model_dump(mode="json")}

    fake("diclip.evaluate", evaluate=evaluate, silent=None)
    arguments = ["evaluate", "--preset", "voc", "--set", "split=train", "--set", "clip_pretrained=none", "--ablate"]
    assert main([*arguments, "--set", "background_words=sky,grass"]) == 0
    expected = {"split": "train", "clip_pretrained": None, "background_words": ("sky", "grass"), "ablate": True}
    assert seen == [load_settings("voc", **expected)]
    assert capsys.readouterr().out.splitlines() == [
        "method: clip",
        "protocol:",
        "  split: val of voc, 1000 images",
        "  scales: 1 of 320 px",
        "mIoU in per cent, 95 % bootstrap over images:",
        "  rung      mIoU    low   high  tuned_background  one_minus_max",
        "  clip     24.06  22.00  26.50             24.06          20.00",
        "  intra    39.10  37.00  41.00             39.10          36.00",
        "  grabcut  26.00  24.00  28.00                 –              –",
        "recognition in per cent:",
        "  single_tag_top1: –",
        "  tag_map: 61.50",
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == REPORT["classes"]


def test_a_real_report_fits_the_screen():
    evaluate = pytest.importorskip("diclip.evaluate")
    counts, fewer = (np.tile([[hits, 3, 4]], (5, 3, 1)) for hits in (2, 1))  # five images, background and two classes
    found = evaluate.Evaluation(
        settings=load_settings(),
        names=list("abcde"),
        classes=("cat", "dog"),
        ladder=("clip", "caa"),
        refined=("caa",),
        ablations=("without_caa",),
        background={"clip": 0.4, "caa": 0.5, "without_caa": 0.5},
        tuned={"clip": counts, "caa": counts, "without_caa": counts},
        one_minus_max={"clip": counts, "caa": counts, "without_caa": fewer},
        baselines={"grabcut": counts},
        similarity=np.eye(5, 2),
        tags=np.eye(5, 2, dtype=bool),
    )
    lines = text(brief(evaluate.report(found))).splitlines()
    assert lines[:3] == ["method: clip", "protocol:", "  split: val of minivoc (seed 0), 5 images"]
    lines = lines[lines.index("mIoU in per cent, 95 % bootstrap over images:") - 2 :]
    assert [line.split()[:2] for line in lines[4:7]] == [[name, "40.00"] for name in ("clip", "caa", "grabcut")]
    assert lines[7:10] == [
        "what each part is worth, paired bootstrap:",
        "  rung         mIoU lost    low   high",
        "  without_caa      23.33  23.33  23.33",
    ]


def test_pretrain_passes_the_model(fake, capsys):
    fake("diclip.pretrain", pretrain=lambda model, settings, progress: {"model": model, "seed": settings.seed})
    assert main(["pretrain", "clip", "--set", "seed=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "clip", "seed": 4}


def test_run_merges_file_parameters_and_settings(monkeypatch, tmp_path, capsys):
    seen = {}
    monkeypatch.setattr("diclip.runs.run_notebook", lambda path, given, echo: seen.update(given) or path)
    (tmp_path / "a.ipynb").write_text("{}")
    (tmp_path / "voc.yaml").write_text("preset: voc\nlimit: 5\nseed: 1\nbackground_words: [sky]\n")
    arguments = ["run", str(tmp_path / "a.ipynb"), "-f", str(tmp_path / "voc.yaml")]
    assert main([*arguments, "-p", "limit", "7", "-p", "seed", "9", "--set", "seed=2"]) == 0
    assert seen == {"preset": "voc", "limit": "7", "seed": "2", "background_words": ["sky"]}


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n- b\n", "found list, expected lines"), ("a: [1", "is no YAML")]
)
def test_run_refuses_other_yaml(tmp_path, capsys, content, message):
    (tmp_path / "a.ipynb").write_text("{}")
    (tmp_path / "bad.yaml").write_text(content)
    assert main(["run", str(tmp_path / "a.ipynb"), "-f", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("no\n  such\nthing"), FileNotFoundError("no such thing"), OSError("no such thing")]
)
def test_errors_are_one_line(fake, capsys, error):
    def evaluate(settings, progress, counts):
        raise error

    fake("diclip.evaluate", evaluate=evaluate, silent=None)
    assert main(["evaluate"]) == 2
    assert capsys.readouterr() == ("", "diclip: no such thing\n")


def test_wrong_settings_and_pairs(fake, capsys):
    fake("diclip.evaluate", evaluate=None)
    assert main(["evaluate", "--set", "bach_size=3"]) == 2
    assert capsys.readouterr().err == "diclip: unknown setting 'bach_size': did you mean 'batch_size'?\n"
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--set", "bach_size"])
    assert "found 'bach_size', expected NAME=VALUE" in capsys.readouterr().err


def test_data_check(voc_folder, capsys):
    assert main(["data", "check", str(voc_folder)]) == 0
    assert capsys.readouterr().out.endswith("problems: none\n")
    (voc_folder / "JPEGImages/a.jpg").unlink()
    assert main(["data", "check", str(voc_folder), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.endswith("JPEGImages/a.jpg: there is no such file")
    assert main(["data", "check", "--preset", "voc", "--set", f"data_root={voc_folder}"]) == 2


def test_data_minivoc(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "diclip.data.minivoc.write_minivoc",
        lambda root, *, seed, progress: (root / f"minivoc-{seed}").mkdir(),
    )
    assert main(["data", "minivoc", "--set", "minivoc_seed=5", "--set", f"data_root={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"folder: {tmp_path / 'minivoc-5'}\n"


def test_data_difficulty(fake, capsys):
    row = {"value": 0.7415, "low": 0.73, "high": 0.75, "bar": 0.77}

    def measure_difficulty(settings, progress):
        return {"difficulty": {"colour_auc": row}, "images": settings.limit, "settings": {}, "versions": {}}

    fake("diclip.difficulty", measure_difficulty=measure_difficulty)
    assert main(["data", "difficulty", "--set", "limit=7"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "images: 7",
        "95 % bootstrap over images, and the bar to stay below:",
        "  measure     value   low  high   bar",
        "  colour_auc   0.74  0.73  0.75  0.77",
    ]
    assert main(["data", "difficulty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difficulty"] == {"colour_auc": row}


def test_find_notebook(monkeypatch, tmp_path):
    monkeypatch.setattr("diclip.__main__.ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    paths = [tmp_path / f"notebooks/{name}.ipynb" for name in ("00_setup", "06_training")]
    for path in paths:
        path.touch()
    for name in ("training", "06", "06_training", str(paths[1])):
        assert find_notebook(name) == paths[1]
    with pytest.raises(FileNotFoundError, match="no notebook 'train' in notebooks/, which has 00_setup, 06_training"):
        find_notebook("train")
    with pytest.raises(FileNotFoundError, match="no notebook nowhere.ipynb"):
        find_notebook("nowhere.ipynb")


def test_text_shows_lists_and_nested_results():
    assert text({"a": {"b": 1.0, "c": ["x", "y"]}}).splitlines() == [
        "a:",
        "  b: 1.00",
        "  c: 2",
        "    x",
        "    y",
    ]
    assert table([{"name": "x", "n": 10}, {"name": "long", "n": 2}]) == ["name   n", "x     10", "long   2"]


# The demo


PNG = base64.b64encode(b"\x89PNG a picture").decode()


@pytest.fixture
def demo(fake, monkeypatch, tmp_path):
    """Return a function that runs the demo on stand-ins for notebooks and evaluation."""
    (tmp_path / "notebooks").mkdir()
    for name in ("00_setup", "02_patches", "06_training", "A1_pretrain_mini"):
        (tmp_path / f"notebooks/{name}.ipynb").touch()

    def run_notebook(path, parameters):
        folder = Path(parameters["run_dir"])
        folder.mkdir(parents=True)
        picture = new_output("display_data", data={"image/png": PNG})
        words = new_output("stream", text=str(parameters["seed"]))
        nbformat.write(new_notebook(cells=[new_code_cell(outputs=[words, picture])]), folder / path.name)
        return folder / path.name

    def run(evaluate):
        fake("diclip.evaluate", evaluate=evaluate, silent=None)
        monkeypatch.delitem(sys.modules, "diclip.demo", raising=False)
        import diclip.demo

        monkeypatch.setattr(diclip.demo, "ROOT", tmp_path)
        monkeypatch.setattr(diclip.demo, "run_notebook", run_notebook)
        monkeypatch.setattr(diclip.demo, "_pool", lambda: ThreadPoolExecutor(2))  # other processes know no stand-ins
        return diclip.demo.run_demo(load_settings(seed=2))

    return run


def test_demo_shows_the_ladder_and_replaces_only_itself(demo, tmp_path):
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/old").touch()
    (tmp_path / "runs/mine").mkdir()
    found = demo(lambda settings, progress: {"try": settings.seed})
    assert found["evaluation"] == {"try": 2}
    folder = tmp_path / "runs/demo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "00_setup",
        "02_patches",
        "figures",
        "ladder.json",
    ]
    assert json.loads((folder / "ladder.json").read_text()) == {"try": 2}
    assert found["figures"] == [str(folder / f"figures/{name}-1.png") for name in ("00_setup", "02_patches")]
    assert (folder / "figures/00_setup-1.png").read_bytes() == b"\x89PNG a picture"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == ["demo", "mine"]


def test_a_demo_that_fails_leaves_the_last_one(demo, tmp_path):
    demo(lambda settings, progress: {"try": 1})

    def fail(settings, progress):
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        demo(fail)
    assert json.loads((tmp_path / "runs/demo/ladder.json").read_text()) == {"try": 1}
    demo(lambda settings, progress: {"try": 2})
    assert json.loads((tmp_path / "runs/demo/ladder.json").read_text()) == {"try": 2}


def test_train_merges_file_flags_and_settings(fake, tmp_path, capsys):
    seen = []

    def train(settings, progress, resume):
        seen.append((settings, resume))
        return {"val_miou": 41.0, "val_interval": [40.0, 42.0], "settings": {}}

    fake("diclip.train", train=train)
    (tmp_path / "run.yaml").write_text("preset: voc\nmethod: excel\nseed: 1\n")
    arguments = ["train", "--params", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "x"), "--resume", "auto"]
    assert main([*arguments, "--method", "diclip", "--set", "max_iters=30"]) == 0
    expected = {"method": "diclip", "seed": 1, "max_iters": 30, "run_dir": str(tmp_path / "x")}
    assert seen == [(load_settings("voc", **expected), True)]
    assert capsys.readouterr().out == "val_miou: 41.00\nval_interval: 40.00–42.00\n"
    assert main(["train", "--preset", "mini"]) == 0
    assert seen[1][0].run_dir.parent == ROOT / "runs" and seen[1][1] is False
    assert main(["train", "--resume", "auto"]) == 2
    assert "found --resume auto without a run to resume: name it by --run-dir" in capsys.readouterr().err


def test_processes_beside_the_first_say_nothing(fake, tmp_path, capsys):
    fake("diclip.train", train=lambda settings, progress, resume: {})
    assert main(["train", "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "found.json").exists()


def test_a_sweep_with_failed_runs_says_so(fake, capsys):
    row = {"variant": "whole", "run": "seed=1", "state": "failed", "val_miou": None}
    failed = {"runs": [row], "means": [{"variant": "whole", "runs": 0}], "problems": ["whole/seed=1: it said 'no'"]}
    fake("diclip.sweep", run_sweep=lambda path, progress, cluster: failed)
    assert main(["sweep", "params/sweep_seeds.yaml"]) == 1
    assert "whole    seed=1  failed  –" in capsys.readouterr().out
