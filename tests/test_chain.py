"""Notebooks run headless with parameters of another kind, and leave what a run should."""

import json

import yaml

from diclip.__main__ import main
from diclip.checkpoints import load_weights
from diclip.settings import ROOT


def test_a_chain_of_notebooks_with_other_parameters(tmp_path, capsys):
    chain = (
        ("00", ["-p", "split", "shift"]),
        ("02", ["-p", "limit", "48", "-p", "split", "tune", "--set", "attention=qkv"]),
    )
    for notebook, parameters in chain:
        folder = tmp_path / notebook
        assert main(["run", notebook, *parameters, "-p", "run_dir", str(folder)]) == 0, capsys.readouterr().err
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["split"] == parameters[parameters.index("split") + 1]
        assert (folder / "finished.json").exists()
        executed = json.loads(next(folder.glob("*.ipynb")).read_text())
        outputs = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not (ROOT / "notebooks/runs").exists()


def test_training_and_evaluation_follow_a_file_of_another_seed_and_batch(tmp_path, capsys):
    chosen = {"seed": 3, "train_batch": 2, "batch_size": 5, "max_iters": 6, "warmup_iters": 1, "validate_every": 3}
    chosen |= {"validate_images": 4, "limit": 20, "method": "excel", "systems": ["clip", "excel"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(chosen))
    for notebook in ("training", "evaluation"):
        folder = tmp_path / notebook
        arguments = ["run", notebook, "-f", str(tmp_path / "params.yaml"), "-p", "run_dir", str(folder)]
        assert main(arguments) == 0, capsys.readouterr().err
        settings = json.loads((folder / "settings.json").read_text())
        assert {name: settings[name] for name in chosen} == chosen and (folder / "finished.json").exists()
    (last,) = (tmp_path / "training").glob("**/checkpoints/last/model.safetensors")
    weights, about = load_weights(last)
    assert about["step"] == 6 and about["method"] == "excel" and all(x.isfinite().all() for x in weights.values())
    assert not (ROOT / "notebooks/runs").exists()


def test_an_unknown_parameter_is_refused_before_a_kernel_starts(tmp_path, capsys):
    assert main(["run", "02", "-p", "limits", "4", "-p", "run_dir", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown setting 'limits'" in error and "did you mean 'limit'" in error
