"""Test that predictions are packed as PASCAL VOC's server wants them, and that they are the evaluator's."""

import multiprocessing
import os
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.__main__ import main
from diclip.clip import load_clip
from diclip.data.minivoc import palette
from diclip.evaluate import measure
from diclip.export import export_voc
from diclip.methods import build_method
from diclip.outside import measure_masks
from diclip.settings import load_settings


@pytest.fixture
def settings(tiny_world, tiny_clip):
    return load_settings(
        data_root=str(tiny_world), clip_model=str(tiny_clip), device="cpu", baselines=False, batch_size=4
    )


@pytest.fixture
def method(settings, tiny_clip):
    return build_method(settings, load_clip(tiny_clip))


def picture_size(settings) -> tuple[int, int]:
    with Image.open(settings.data_root / "minivoc-0/JPEGImages/val_00000.jpg") as image:
        return image.size


INSIDE = "results/VOC2012/Segmentation/comp6_val_cls"


def test_the_archive_is_what_the_server_wants(settings, method, tmp_path):
    found = export_voc(settings, tmp_path, method=method)
    assert found["images"] == 6 and found["rung"] == "caa" and found["archive"].endswith("results.tar.gz")
    assert found["protocol"]["masks used for choosing"] == "none"  # caa needs no background score
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "sent", filter="data")
    assert names == [f"{INSIDE}/val_{index:05d}.png" for index in range(6)]
    with Image.open(tmp_path / "sent" / names[0]) as image:
        assert image.mode == "P" and image.size == picture_size(settings)
        assert image.getpalette()[:63] == palette()[:21].ravel().tolist()
        assert np.array(image).max() <= 20


@pytest.mark.parametrize("rung", ["intra", "caa"])
def test_exported_masks_score_as_the_rung_does(settings, method, tmp_path, rung):
    settings = settings.model_copy(update={"flip": True})
    found = export_voc(settings, tmp_path, rung=rung, method=method)
    assert found["protocol"]["masks used for choosing"] == ("none" if rung == "caa" else "tune, for background scores")
    again = measure_masks(settings, tmp_path / INSIDE)
    counts = measure(settings, method=method).rung(rung)
    np.testing.assert_array_equal(again.one_minus_max["masks"], counts)


def test_no_mask_of_the_split_is_read(settings, method, tiny_world, tmp_path):
    world = shutil.copytree(tiny_world, tmp_path / "world")
    for path in (world / "minivoc-0/SegmentationClass").glob("val_*"):
        path.unlink()
    settings = settings.model_copy(update={"data_root": world})
    assert export_voc(settings, tmp_path / "out", method=method)["images"] == 6


def export_slowly(settings: dict, folder) -> None:
    """Export in a process of its own, with time for a kill after each batch."""

    def slowly(batches, **_):
        for batch in batches:
            yield batch
            time.sleep(0.2)

    torch.set_num_threads(1)
    settings = load_settings(**settings)
    export_voc(settings, folder, slowly, method=build_method(settings, load_clip(settings.clip_model)))


def test_three_kills_change_nothing(settings, tmp_path):
    """Kill -9 an export of three batches before, between and after its pictures; go on each time."""
    context, given = multiprocessing.get_context("forkserver"), settings.model_dump(mode="json") | {"batch_size": 2}
    context.set_forkserver_preload(["test_export"])
    for pictures in (0, 3, 6):
        process = context.Process(target=export_slowly, args=(given, tmp_path / "killed"))
        process.start()
        while process.is_alive() and not _reached(tmp_path / "killed", pictures):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed/results.tar.gz").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / INSIDE).iterdir()}
    for name in ("killed", "whole"):
        process = context.Process(target=export_slowly, args=(given, tmp_path / name))
        process.start()
        process.join()
        assert process.exitcode == 0 and (tmp_path / name / "finished.json").exists()
    assert len(kept) == 6 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for name in ("results.tar.gz", *(f"{INSIDE}/val_{index:05d}.png" for index in range(6))):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _reached(folder, pictures: int) -> bool:
    return (folder / "settings.json").exists() and len(list((folder / INSIDE).glob("val_*.png"))) >= pictures


def test_a_finished_export_is_kept_and_what_a_kill_has_left_is_done_again(settings, method, tmp_path):
    export_voc(settings, tmp_path / "whole", method=method)
    with pytest.raises(ValueError, match="holds a finished export: choose another folder"):
        export_voc(settings, tmp_path / "whole", method=method)
    left, inside = shutil.copytree(tmp_path / "whole", tmp_path / "left"), tmp_path / "left" / INSIDE
    for name in ("results.tar.gz", "finished.json", f"{INSIDE}/val_00005.png"):
        (left / name).unlink()
    for half in (left / ".results.tar.gz.123", inside / ".val_00005.png.123"):
        half.write_bytes(b"half a")
    with pytest.raises(ValueError, match="holds a run of other settings .*rung was 'caa', now 'intra'"):
        export_voc(settings, left, rung="intra", method=method)
    export_voc(settings, left, method=method)
    assert (left / "results.tar.gz").read_bytes() == (tmp_path / "whole/results.tar.gz").read_bytes()
    assert len(list(inside.iterdir())) == 6 and not list(left.glob(".results*"))


def test_faults_are_one_line(settings, tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DICLIP_HEADLESS", "1")
    world = shutil.copytree(tiny_world, tmp_path / "world")
    base = ["--set", f"data_root={world}", "--set", f"clip_model={settings.clip_model}", "--set", "device=cpu"]

    def complaint(*arguments):
        assert main(["evaluate", *arguments, *base]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("diclip: ") and err.count("\n") == 1
        return err

    out = str(tmp_path / "out")
    assert "export format is 'coco', expected voc: --export voc FOLDER" in complaint("--export", "coco", out)
    assert "rung is 'rar', expected one of clip, intra, caa" in complaint("--export", "voc", out, "--rung", "rar")
    assert "num_shards is 2, expected 1" in complaint("--export", "voc", out, "--set", "num_shards=2")
    (world / "minivoc-0/ImageSets/Segmentation/test.txt").write_text("val_00000\nval_00001\n")
    (world / "minivoc-0/tags.json").write_text("{}")
    assert "has no entry 'val_00000'" in complaint("--export", "voc", out, "--split", "test")
    assert not (tmp_path / "out/results.tar.gz").exists()
    (world / "minivoc-0/classes.txt").write_text("cat\ndog\n")
    assert "minivoc has 2 classes of its own, expected VOC's 20" in complaint("--export", "voc", out)
