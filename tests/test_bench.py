"""Test the benchmark at tiny sizes: its references, its rows, its table, and what it refuses."""

import json
import os

import pytest
import torch
import torch.nn.functional as F

import diclip.bench
from diclip.__main__ import main
from diclip.affinity import caa
from diclip.bench import STAGES, bench, bench_table, reference
from diclip.bench.measure import Unequal, _once, measure, measure_reference
from diclip.bench.stages import build, pictures, prepare
from diclip.bench.weights import random_clip
from diclip.cam import Maps, surgery_cam
from diclip.correlation import acr, cluster
from diclip.refine import par, rar
from diclip.screen import brief, text
from diclip.settings import load_settings

COLUMNS = set(
    "stage seconds_per_image reference_seconds_per_image ratio peak_mb reference_peak_mb device batch".split()
)
COMPARED = ("cam", "acr", "caa", "rar", "par")


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def maps() -> Maps:
    """Four maps on a grid of 6 x 7 of three images, out of their order; the second image has none."""
    blobs = F.interpolate(some(4, 1, 3, 3), size=(6, 7), mode="bilinear")[:, 0]
    return Maps(blobs, torch.tensor([2, 0, 2, 2]), torch.tensor([4, 0, 2, 7]))


@pytest.mark.parametrize("is_token", [True, False])
def test_reference_of_the_surgery_cam(is_token):
    given = some(3, 12, 8) - 0.5, some(3, 8, seed=1) - 0.5, F.normalize(some(7, 8, seed=2) - 0.5, dim=-1)
    how = {"num_classes": 4, "pooled_is_token": is_token}
    torch.testing.assert_close(reference.surgery_cam(*given, **how), surgery_cam(*given, **how), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(6, 7), (2, 2), (9, 4)])
def test_reference_of_acr(grid):
    n = grid[0] * grid[1]
    correlation = (4 * some(3, n, n)).softmax(-1)
    correlation[:, :, 1] = 0
    ours = acr(correlation, cluster(correlation, grid=grid))
    torch.testing.assert_close(reference.acr(correlation, grid=grid), ours)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.79, 1.0])
def test_reference_of_caa(maps, threshold):
    attention = (3 * some(8, 3, 43, 43)).softmax(-1)
    how = {"threshold": threshold, "layers": 5}
    ours = caa(maps, attention, **how).scores
    torch.testing.assert_close(reference.caa(maps, attention, **how), ours)
    assert bool(ours.any()) == (threshold < 1)


@pytest.mark.parametrize("rounds", [0, 3])
def test_reference_of_rar(maps, rounds):
    attention = (3 * some(3, 42, 42)).softmax(-1)
    attention[0, 3, 5] = 0
    how = {"rounds": rounds, "grid": (6, 7), "canvas": 20}
    ours = rar(maps, attention, **how).scores
    torch.testing.assert_close(reference.rar(maps, attention, **how), ours, atol=1e-5, rtol=0)


def test_reference_of_par():
    scores, images, how = some(2, 3, 11, 9), some(2, 3, 11, 9, seed=1), {"iterations": 4, "dilations": (1, 3, 12)}
    for plain, ours in zip(reference.par(scores, images, **how), par(scores, images, **how), strict=True):
        torch.testing.assert_close(plain, ours, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def settings(tiny_clip, tiny_diffusion):
    """Give settings of the smallest models, on the CPU."""
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion)}
    return load_settings(**models, bench_images=2, bench_repeats=2, device="cpu")


@pytest.fixture(scope="module")
def inputs(settings, tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DICLIP_PHOTOS", raising=False)
        path = str(tmp_path_factory.mktemp("bench") / "inputs.safetensors")
        assert prepare(settings, path) == ["MiniVOC val 0", "MiniVOC val 1"]
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_measured(settings, inputs, stage):
    if stage == "crf":
        pytest.importorskip("pydensecrf", reason="the dense CRF's package is not installed (pydensecrf2)")
    row = measure(stage, settings, inputs)
    assert row.keys() >= COLUMNS and (row["stage"], row["device"], row["batch"]) == (stage, "cpu", 2)
    assert 0 < row["seconds_per_image"] < 60 and row["repeats"] == 2
    if stage in COMPARED:
        assert row["ratio"] == pytest.approx(row["reference_seconds_per_image"] / row["seconds_per_image"])
        assert measure_reference(stage, settings, inputs) >= 0
    else:
        assert row["ratio"] is row["reference_seconds_per_image"] is None
        assert measure_reference(stage, settings, inputs) is None
    if stage == "crf":
        assert 1 <= row["workers"] <= 2 and row["workers_seconds_per_image"] > 0


def test_results_that_differ_are_refused(settings, inputs, monkeypatch):
    plain = reference.caa
    monkeypatch.setattr(reference, "caa", lambda *given, **how: 1.001 * plain(*given, **how))
    with pytest.raises(Unequal, match="^stage caa: ours and the plain reference are up to .* apart, .* expected 100 %"):
        measure("caa", settings, inputs)
    monkeypatch.setattr(reference, "caa", lambda *given, **how: torch.nan * plain(*given, **how))
    with pytest.raises(Unequal):
        measure("caa", settings, inputs)


def test_one_call_stands_for_all_where_time_is_short(settings, inputs):
    row = measure("encoder", settings.model_copy(update={"bench_seconds": 0.0}), inputs)
    assert row["repeats"] == 1 and row["seconds_per_image"] > 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are reset on Linux alone")
def test_peak_is_that_of_the_call():
    del (before := {"larger": torch.ones(100_000_000)})["larger"]
    seconds, peak, result = _once(lambda: torch.ones(25_000_000).sum().item(), torch.device("cpu"))
    assert not before and result == 25_000_000 and seconds > 0
    assert 95 < peak < 130


def test_the_command_runs_stages_in_their_order(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DICLIP_PHOTOS", raising=False)
    file = tmp_path / "bench.json"
    options = [f"--set={name}={getattr(settings, name)}" for name in ("clip_model", "bench_images", "bench_repeats")]
    command = ["bench", "--stages", "rar,acr,rar", "--set=device=cpu", *options, "--json", str(file)]
    assert main(command) == 0
    result = json.loads(file.read_text())
    assert [row["stage"] for row in result["rows"]] == ["rar", "acr"] and not result["skipped"]
    for row in result["rows"]:
        assert row.keys() >= COLUMNS
        assert row["ratio"] > 0 and row["peak_mb"] >= 0 and row["reference_peak_mb"] >= 0
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert result["images"] == ["MiniVOC val 0", "MiniVOC val 1"] and result["settings"]["bench_images"] == 2
    out = capsys.readouterr().out
    assert "2 MiniVOC scenes of 128 px at a time" in out and "reference_seconds_per_image" in out


@pytest.fixture
def together(monkeypatch):
    """Run stages in this process."""
    monkeypatch.setattr(diclip.bench, "_apart", lambda name, call, *given: call(*given))
    monkeypatch.delenv("DICLIP_PHOTOS", raising=False)


def test_what_cannot_run_is_skipped_unless_it_was_named(settings, together, monkeypatch, tmp_path):
    monkeypatch.setattr("diclip.crf.find_spec", lambda name: None)
    monkeypatch.setattr(diclip.bench, "STAGES", ("diffusion", "caa", "crf"))
    lacking = settings.model_copy(update={"diffusion_model": (str(tmp_path / "none"),)})
    result = bench(lacking, lambda stages, **_: stages)
    assert [row["stage"] for row in result["rows"]] == ["caa"]
    assert list(result["skipped"]) == ["diffusion", "crf"] and "pip install -e" in result["skipped"]["crf"]
    assert "skipped:" in text(brief(result))
    for stage, message in (("diffusion", "could not be loaded"), ("crf", "pip install -e")):
        with pytest.raises(ValueError, match=message) as error:
            bench(lacking.model_copy(update={"bench_stages": (stage,)}), lambda stages, **_: stages)
        assert "\n" not in str(error.value)


def test_unequal_is_never_skipped(settings, together, monkeypatch):
    monkeypatch.setattr(reference, "acr", lambda correlation, grid: 2 * correlation)
    monkeypatch.setattr(diclip.bench, "STAGES", ("acr",))
    with pytest.raises(Unequal):
        bench(settings, lambda stages, **_: stages)


def test_a_killed_process_is_said_in_one_line():
    with pytest.raises(ValueError, match="^stage cam: its process was killed, perhaps for want of memory$"):
        diclip.bench._apart("cam", os._exit, 1)


def test_photographs_of_a_folder(voc_folder, monkeypatch):
    monkeypatch.setenv("DICLIP_PHOTOS", str(voc_folder))
    names, images = pictures(load_settings(bench_images=3, image_size=64))
    assert names == ["a.jpg", "b.jpg", "c.jpg"] and images.shape == (3, 3, 64, 64)
    with pytest.raises(ValueError, match="has 3 files \\*.jpg, expected 4 or more"):
        pictures(load_settings())


def test_inputs_have_the_settings_size_and_classes(settings, inputs):
    made = build("par", settings, inputs)
    assert [own.shape for own in made.ours()] == [(4, 128, 128)] * 2  # background and three classes


def test_bad_arguments_are_said_in_one_line(capsys):
    for command, message in (
        (["--stages", "cam,sinkhorn"], "'bench_stages' is 'sinkhorn', but it should be 'encoder', 'cam'"),
        (["--set", "bench_tags=21"], "less than or equal to 20"),
        (["--set", "bench_images=0"], "greater than or equal to 1"),
        (["--set", "device=cuda:99"], "is not on this machine"),
    ):
        assert main(["bench", *command]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="random weights are for a model of open_clip's.* --preset voc"):
        random_clip("data/mini/clip")


RESULT = {
    "rows": [
        {
            "stage": "cam",
            "seconds_per_image": 0.00081234,
            "reference_seconds_per_image": 0.0912345,
            "ratio": 112.3,
            "peak_mb": 2.4,
            "reference_peak_mb": 297.6,
            "device": "cpu",
            "batch": 4,
        },
        {
            "stage": "crf",
            "seconds_per_image": 1.0,
            "reference_seconds_per_image": None,
            "ratio": None,
            "peak_mb": None,
            "reference_peak_mb": None,
            "device": "cpu",
            "batch": 4,
            "workers": 2,
            "workers_seconds_per_image": 0.5432,
        },
    ],
    "skipped": {},
    "images": ["1.jpg"] * 4,
    "environment": {"device": "x86_64", "threads": 1, "packages": {"torch": "2.11.0"}},
    "settings": {
        "bench_images": 4,
        "bench_tags": 3,
        "image_size": 320,
        "clip_model": "ViT-B-16-quickgelu",
        "random_weights": True,
    },
}


def test_table():
    lines = bench_table(RESULT).splitlines()
    assert lines[0] == "| stage | s an image | plain reference | faster | peak, MB | reference's, MB |"
    assert lines[2] == "| `cam` | 0.00081 | 0.0912 | 112× | 2 | 298 |"
    assert lines[3] == "| `crf` | 1.00 | – | – | – | – |"
    assert lines[5].startswith("4 photographs of 320 px at a time, 3 classes present in each; ViT-B-16-quickgelu with")
    assert "random weights; cpu: x86_64, 1 thread(s), torch 2.11.0." in lines[5]
    assert lines[5].endswith("`crf` runs in one process; in 2: 0.543 s.")
    assert "  cam    0.00081" in text(brief(RESULT))
