"""Test that predictions are packed as PASCAL VOC's server wants them, and that they are the evaluator's."""

import shutil
import tarfile

import numpy as np
import pytest
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


def test_a_finished_export_is_kept_and_an_unfinished_one_done_again(settings, method, tmp_path):
    (tmp_path / INSIDE).mkdir(parents=True)
    (tmp_path / INSIDE / "val_00000.png").write_bytes(b"half a pict")
    export_voc(settings, tmp_path, method=method)
    with Image.open(tmp_path / INSIDE / "val_00000.png") as image:
        assert image.size == picture_size(settings)
    with pytest.raises(ValueError, match="holds a finished export: choose another folder"):
        export_voc(settings, tmp_path, method=method)


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
