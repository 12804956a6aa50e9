import ast
import json
import os
import random
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from diclip.runs import (
    create_run,
    environment,
    locked,
    pick_device,
    progress,
    replacing,
    run_notebook,
    setup,
    write_json,
)
from diclip.settings import ROOT, load_settings

PARAMETERS = 'preset: str = "mini"  # settings\nseed: int = 0\nlimit: int = 8\nimage_size: int = 128'


# Small things


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/result.json"
    value = {"path": ROOT / "data", "array": np.arange(3), "tensor": torch.ones(2), "mean": np.float32(0.5)}
    write_json(path, value)
    expected = {"path": "data", "array": [0, 1, 2], "tensor": [1, 1], "mean": 0.5}
    assert json.loads(path.read_text()) == expected
    for bad, error in (({"a": float("nan")}, ValueError), ({"a": object()}, TypeError)):
        with pytest.raises(error):
            write_json(path, bad)
    with pytest.raises(OSError, match="disk"), replacing(path) as temporary:
        temporary.write_text("half of i")
        raise OSError("disk is full")
    assert json.loads(path.read_text()) == expected
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_progress_yields_everything(monkeypatch, capsys):
    for headless in ("", "1"):
        monkeypatch.setenv("DICLIP_HEADLESS", headless)
        assert list(progress(range(5), desc="count")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("ab"), total=2)) == ["a", "b"]


def test_progress_is_silent_in_short_headless_loops(monkeypatch, capsys):
    monkeypatch.setenv("DICLIP_HEADLESS", "1")
    list(progress(range(100)))
    assert capsys.readouterr() == ("", "")


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:2' is not on this machine"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine, which has cpu: set device to auto"):
        pick_device("cuda")


def test_environment_names_versions_and_commit():
    found = environment()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found["command"]
    if found["commit"]:
        assert len(found["commit"]) == 40


# Run folders


def test_a_run_leaves_its_record_and_is_never_overwritten(tmp_path):
    settings = load_settings(seed=3)
    with create_run(tmp_path / "run", settings) as folder:
        assert not (folder / "finished.json").exists()
    assert json.loads((folder / "settings.json").read_text()) == settings.model_dump(mode="json")
    assert json.loads((folder / "environment.json").read_text())["python"]
    assert json.loads((folder / "finished.json").read_text())["seconds"] >= 0
    with (
        pytest.raises(ValueError, match="finished run and is never overwritten"),
        create_run(folder, settings),
    ):
        pass


def test_a_run_that_failed_is_resumed_with_the_same_settings_only(tmp_path):
    with pytest.raises(RuntimeError), create_run(tmp_path, load_settings()) as folder:
        (folder / "checkpoint").write_text("step 7")
        raise RuntimeError("killed")
    with pytest.raises(ValueError, match="seed was 0, now 1"), create_run(tmp_path, load_settings(seed=1)):
        pass
    with create_run(tmp_path, load_settings()):
        assert (tmp_path / "checkpoint").read_text() == "step 7"
    assert (tmp_path / "finished.json").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(ValueError, match="holds files that are no run's"),
        create_run(tmp_path, load_settings()),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_locked_until_its_process_dies(tmp_path):
    code = "import sys, time; from pathlib import Path; from diclip.runs import locked\n"
    code += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="is in use"), create_run(tmp_path, load_settings()):
        pass
    other.kill()
    other.communicate()
    with (
        create_run(tmp_path, load_settings()),
        pytest.raises(ValueError, match="is in use"),
        locked(tmp_path),
    ):
        pass


# Parameters of notebooks


def kernel(*cells: str) -> dict:
    """Return the globals that a kernel has while it runs the last of some cells."""
    namespace: dict = {"__name__": "__main__", "In": [""]}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_setup_reads_the_parameters_cell_and_seeds():
    settings = setup(kernel("import math", PARAMETERS, "pass"))
    assert (settings.limit, settings.seed, settings.device) == (8, 0, "cpu")
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    setup(kernel(PARAMETERS, "pass"))
    assert drawn == [random.random(), np.random.rand(), float(torch.rand(()))]


def test_papermill_wins_and_its_strings_convert():
    settings = setup(kernel(PARAMETERS, '# Parameters\nlimit = "20"\ntau_box = "0.5"\nbaselines = False\n', "pass"))
    assert (settings.limit, settings.tau_box, settings.baselines) == (20, 0.5, False)


def test_a_preset_decides_what_the_notebook_leaves_at_its_default():
    settings = setup(kernel(PARAMETERS, '# Parameters\npreset = "voc"\n', "pass"))
    assert (settings.image_size, settings.limit, settings.clip_pretrained) == (320, 8, "openai")
    settings = setup(kernel(PARAMETERS, '# Parameters\npreset = "voc"\nimage_size = 128\n', "pass"))
    assert settings.image_size == 128


@pytest.mark.parametrize("source", ["# Parameters\nbach_size = 4\n", PARAMETERS + "\nbach_size = 4"])
def test_an_unknown_parameter_fails_in_one_line(source):
    with pytest.raises(ValueError, match="^unknown setting 'bach_size': did you mean 'batch_size'.$"):
        setup(kernel(PARAMETERS, source, "pass"))


def test_other_cells_are_no_parameters():
    """Running the set-up cell again must neither pick up nor refuse the notebook's own variables."""
    later = ["layer = 3", "split = 'all of them'\nprint", "for seed in range(3): pass", "1 +", "%time x"]
    namespace = kernel(PARAMETERS, "pass")
    namespace["In"][-1:-1] = later
    namespace.update(layer=3, split="all of them")
    assert setup(namespace) == setup(kernel(PARAMETERS, "pass"))


def test_a_corrected_parameters_cell_replaces_the_one_before():
    wrong = PARAMETERS.replace("limit", "limmit")
    assert setup(kernel(wrong, "# Parameters\nfoo = 1", PARAMETERS, "pass")).limit == 8


def test_the_set_up_cell_needs_the_parameters_cell():
    with pytest.raises(ValueError, match="run the cell tagged parameters"):
        setup(kernel("import math", "pass"))


@pytest.mark.parametrize("kept", [{}, {"In": [""], "Out": {}}])
def test_setup_works_without_a_history_of_cells(kept):
    """Such are a script, and a kernel that nbval runs."""
    namespace = {"preset": "mini", "limit": "4", "__doc__": "", "_i": "", "np": np, **kept}
    assert setup(namespace).limit == 4
    with pytest.raises(ValueError, match="unknown setting 'bach_size'"):
        setup({**namespace, "bach_size": 4})


# Notebooks


@pytest.fixture
def notebook(tmp_path):
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell("from diclip.runs import setup\ncfg = setup(globals())"),
        new_code_cell("import os\nprint([cfg.limit, cfg.image_size, os.environ['DICLIP_HEADLESS']])"),
        new_code_cell("assert cfg.seed != 13, 'unlucky'"),
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "00_small.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)
    return path


def test_a_notebook_runs_in_a_folder_of_its_own(notebook, tmp_path):
    run = tmp_path / "run"
    executed = run_notebook(notebook, {"preset": "voc", "limit": "3", "run_dir": run})
    assert executed == run / "00_small.ipynb"
    (output,) = [cell.outputs[0].text for cell in nbformat.read(executed, 4).cells if cell.get("outputs")]
    assert ast.literal_eval(output) == [3, 320, "1"]
    assert "DICLIP_HEADLESS" not in os.environ
    assert json.loads((run / "settings.json").read_text())["limit"] == 3
    assert (run / "finished.json").exists()


def test_a_notebook_that_fails_says_where_and_keeps_what_ran(notebook, tmp_path):
    with pytest.raises(ValueError, match="00_small.ipynb failed in cell .*AssertionError: unlucky; see .*run/00_small"):
        run_notebook(notebook, {"seed": 13, "run_dir": tmp_path / "run"})
    assert not (tmp_path / "run/finished.json").exists()
    assert "[8, 128, '1']" in (tmp_path / "run/00_small.ipynb").read_text()


def test_wrong_parameters_are_found_before_a_kernel_starts(notebook, tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'sead': did you mean 'seed'"):
        run_notebook(notebook, {"sead": 1, "run_dir": tmp_path / "run"})
    assert not (tmp_path / "run").exists()
