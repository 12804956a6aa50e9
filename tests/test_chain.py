"""Notebooks run headless with parameters of another kind, and leave what a run should."""

import json

from diclip.__main__ import main
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


def test_an_unknown_parameter_is_refused_before_a_kernel_starts(tmp_path, capsys):
    assert main(["run", "02", "-p", "limits", "4", "-p", "run_dir", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown setting 'limits'" in error and "did you mean 'limit'" in error
