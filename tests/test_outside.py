"""Test scoring of masks that others made: what counts, and that anything else is told in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.__main__ import main
from diclip.compare import compare_results
from diclip.data import open_dataset
from diclip.data.minivoc import save_mask
from diclip.outside import find_masks, measure_masks, read_prediction
from diclip.report import report
from diclip.score import image_counts
from diclip.settings import load_settings


@pytest.fixture
def settings(tiny_world):
    return load_settings(data_root=str(tiny_world), device="cpu")


@pytest.fixture
def masks(settings, tmp_path):
    """Write masks for val that are right in their upper half and background below, void where the truth is."""
    folder, dataset = tmp_path / "masks", open_dataset(settings)
    folder.mkdir()
    for index, name in enumerate(dataset.names):
        mask = dataset.mask(name).clone()
        mask[64:] = torch.where(mask[64:] == 255, 255, 0)
        ids = mask.numpy().astype(np.uint8)
        if index % 3 == 0:
            save_mask(folder / f"{name}.png", ids)
        elif index % 3 == 1:
            Image.fromarray(ids).save(folder / f"{name}.png")  # grey
        else:
            np.save(folder / f"{name}.npy", ids.astype(np.int32))
    return folder


def test_masks_are_counted_as_a_methods_are(settings, masks):
    found = measure_masks(settings, masks)
    dataset = open_dataset(settings)
    for sample, counts in zip(dataset, found.one_minus_max["masks"], strict=True):
        guess = sample.mask.clone()
        guess[64:] = 0
        np.testing.assert_array_equal(counts, image_counts(guess, sample.mask, num_classes=20))
    said = json.loads(json.dumps(report(found), allow_nan=False))
    assert list(said["ladder"]) == ["masks"] and said["images"] == 6 and said["recognition"] == {}
    errors = said["errors"]["masks"]
    assert (
        errors["background taken for object"] == errors["object taken for another class"] == 0 < errors["object missed"]
    )
    assert {"part recall", "body recall", "boundary IoU"} < set(said["rates"]["masks"])
    assert said["protocol"]["masks"] == str(masks) and said["protocol"]["scales"] == "not known"
    assert said["confusion"]["truth by prediction"][0][0] > 0 and len(said["worst"]["images"]) == 5


def test_the_truth_scores_100(settings, tiny_world):
    found = measure_masks(settings, tiny_world / "minivoc-0/SegmentationClass")
    assert report(found)["ladder"]["masks"] == 100
    assert {rates["boundary IoU"] for rates in report(found)["rates"].values()} == {100}


def test_the_command_scores_and_stores(settings, masks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DICLIP_HEADLESS", "1")
    base = ["evaluate", "--masks", str(masks), "--set", f"data_root={settings.data_root}"]
    assert main([*base, "--json", str(tmp_path / "half.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"method: {masks}" and "  split: val of minivoc (seed 0), 6 images" in lines
    assert {"  flip: not known", "  CRF: not known", "  masks used for choosing: not known"} < set(lines)
    shutil.copytree(masks, tmp_path / "worse")
    for path in (tmp_path / "worse").glob("*.png"):
        with Image.open(path) as image:
            empty = np.zeros_like(np.array(image))
        save_mask(path, empty)
    base[2] = str(tmp_path / "worse")
    assert main([*base, "--json", str(tmp_path / "worse.json")]) == 0
    (row,) = list(compare_results(tmp_path / "worse.json", tmp_path / "half.json").values())[-1]
    assert row["B - A"] > 0 and row["A is"] == row["B is"] == "masks"


def test_a_shard_needs_only_its_masks(settings, masks):
    half = settings.model_copy(update={"num_shards": 2, "shard_index": 1})
    found = measure_masks(half, masks)
    (masks / "val_00000.png").unlink()
    assert measure_masks(half, masks).names == found.names == ["val_00001", "val_00003", "val_00005"]
    assert "shard 1 of 2" in report(found)["protocol"]["split"]


# Faults


@pytest.fixture
def complaint(settings, masks, capsys, monkeypatch):
    """Return a function that scores a folder, must fail, and returns the line on stderr."""
    monkeypatch.setenv("DICLIP_HEADLESS", "1")

    def call(folder=masks):
        assert main(["evaluate", "--masks", str(folder), "--set", f"data_root={settings.data_root}"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("diclip: ") and err.count("\n") == 1 and len(err) < 500
        return err

    return call


def test_missing_masks(complaint, masks, tmp_path):
    (masks / "val_00000.png").unlink()
    (masks / "val_00002.npy").unlink()
    found = complaint()
    assert "has no mask for 2 of 6 images (val_00000, val_00002): expected NAME.png or NAME.npy" in found
    assert "there is no folder" in complaint(tmp_path / "nowhere")
    assert find_masks(masks, ["val_00001"]) == {"val_00001": masks / "val_00001.png"}


def test_other_sizes(complaint, masks):
    with Image.open(masks / "val_00003.png") as image:
        ids = np.array(image)
    height, width = ids.shape
    save_mask(masks / "val_00003.png", ids[:-8])
    assert f"val_00003.png: found {width}x{height - 8} pixels, expected {width}x{height}" in complaint()
    (masks / "val_00003.png").unlink()
    np.save(masks / "val_00003.npy", ids[None])
    assert f"found uint8 {ids[None].shape}, expected integer class ids {ids.shape}" in complaint()


def test_colours_scores_and_strange_ids(complaint, masks):
    path = masks / "val_00000.png"
    with Image.open(path) as image:
        ids, size = np.array(image), image.size
        image.convert("RGB").save(path)
    assert "found colours (mode RGB), expected class ids" in complaint()
    Image.new("L", size, 38).save(path)
    assert "found 38, expected class ids 0 to 20" in complaint()
    path.unlink()
    for strange, found in ((np.full_like(ids, 21), "21"), (np.full(ids.shape, -1), "-1")):
        np.save(path.with_suffix(".npy"), strange)
        assert f"val_00000.npy: found {found}, expected class ids 0 to 20" in complaint()
    np.save(path.with_suffix(".npy"), ids.astype(np.float32))
    assert f"found float32 {ids.shape}, expected integer class ids" in complaint()


def test_what_is_no_array(complaint, masks):
    path = masks / "val_00000.npy"
    (masks / "val_00000.png").unlink()
    np.save(path, np.array([{"keys": 1}], dtype=object))
    assert "val_00000.npy: is no plain array (" in complaint()
    path.write_bytes(b"")
    assert "val_00000.npy: is no plain array (" in complaint()


def test_undecided_pixels(masks):
    target = torch.zeros(8, 8, dtype=torch.long)
    target[0] = 255
    path = masks / "x.png"
    save_mask(path, np.full((8, 8), 255, np.uint8))
    with pytest.raises(ValueError, match="found 56 pixels of 255, expected a class wherever the truth has one"):
        read_prediction(path, target, num_classes=20)
    save_mask(path, np.where(target == 255, 255, 1).astype(np.uint8))
    assert read_prediction(path, target, num_classes=20).unique().tolist() == [1, 255]
