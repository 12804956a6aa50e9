"""MiniVOC on disk: VOC's layout, written once and whole."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from diclip.data.minivoc import (
    CLASSES,
    minivoc_folder,
    palette,
    render,
    scene_of,
    write_minivoc,
    write_pretrain,
)
from diclip.data.minivoc.captions import PLACE_WORDS
from diclip.data.voc import VOCFolder


def test_palette_is_vocs():
    expected = [
        *((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)),
        *((128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128)),
        *((64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)),
    ]
    assert palette().dtype == np.uint8 and palette().shape == (256, 3)
    assert [tuple(colour) for colour in palette()[:21].tolist()] == expected
    assert palette()[255].tolist() == [224, 224, 192]


def test_what_is_written_is_what_was_painted(monkeypatch, tmp_path):
    monkeypatch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 1, "tune": 1, "val": 2, "shift": 1})
    seen = []

    def watch(items, total):
        seen.append((total, minivoc_folder(tmp_path, seed=3).exists()))
        return items

    folder = write_minivoc(tmp_path, seed=3, workers=1, progress=watch)
    assert seen == [(5, False)]  # the folder appears when all is in it
    assert folder == tmp_path / "minivoc-3" and [path.name for path in tmp_path.iterdir()] == ["minivoc-3"]
    captions = json.loads((folder / "captions.json").read_text())
    for split, count in (("train", 1), ("tune", 1), ("val", 2), ("shift", 1)):
        dataset = VOCFolder(folder, split)
        assert dataset.names == [f"{split}_{index:05d}" for index in range(count)]
        for index, sample in enumerate(dataset):
            scene = scene_of(split, index, seed=3)
            drawn = render(scene)
            np.testing.assert_array_equal(sample.mask, drawn.classes)
            assert [CLASSES[tag] for tag in sample.tags] == list(scene.tags) and captions[sample.name]
            pixels = sample.image.permute(1, 2, 0).numpy() * 255
            assert np.abs(pixels - drawn.image).mean() < 4  # JPEG
            for kind in ("Object", "Part"):
                with Image.open(folder / f"Segmentation{kind}/{sample.name}.png") as mask:
                    own = drawn.instances if kind == "Object" else drawn.parts
                    np.testing.assert_array_equal(np.asarray(mask), own)
                    assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]


def test_an_existing_folder_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 1})
    (tmp_path / "minivoc-0").mkdir()
    (tmp_path / "minivoc-0/mine.txt").write_text("kept")
    assert write_minivoc(tmp_path, workers=1) == tmp_path / "minivoc-0"
    assert [path.name for path in tmp_path.rglob("*")] == ["minivoc-0", "mine.txt"]


def test_a_killed_writer_leaves_no_half_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("diclip.data.minivoc.dataset.SPLITS", {"train": 2})

    def kill(items, total):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_minivoc(tmp_path, workers=1, progress=kill)
    assert not list(tmp_path.iterdir())
    assert VOCFolder(write_minivoc(tmp_path, workers=1), "train").names == ["train_00000", "train_00001"]


@pytest.mark.parametrize("split", ["pretrain", "studio"])
def test_pretraining_pictures_come_in_chunks(tmp_path, split):
    folder = write_pretrain(tmp_path, 3, split=split, workers=1)
    assert folder == tmp_path / f"minivoc-{split}"
    images, tags, places = (np.load(folder / f"{kind}-000000-000003.npy") for kind in ("images", "tags", "places"))
    assert images.shape == (3, 128, 128, 3) and images.dtype == np.uint8 and tags.dtype == bool
    for index in range(3):
        scene = scene_of(split, index)
        assert [CLASSES[i] for i in np.flatnonzero(tags[index])] == list(scene.tags)
        assert tuple(PLACE_WORDS)[places[index]] == scene.place
    before = {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in folder.iterdir()}
    todo = []
    write_pretrain(tmp_path, 3, split=split, workers=1, progress=lambda items, total: todo.append(total) or items)
    assert todo == [0] and before.keys() == set(folder.iterdir())
    assert all(path.stat().st_mtime_ns == time for path, (time, _) in before.items())
