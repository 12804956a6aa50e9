import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diclip.data import batches, open_dataset, prepare, squash
from diclip.data.check import check_folder
from diclip.data.images import read_image, read_mask
from diclip.data.voc import VOCFolder
from diclip.settings import load_settings
from diclip.vocabulary import COCO_CLASSES, VOC_CLASSES

PHOTOS = os.environ.get("DICLIP_PHOTOS")


def save(path: Path, array, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(np.asarray(array))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


# Samples and batches


def test_samples(voc_folder):
    dataset = VOCFolder(voc_folder, "train")
    assert [sample.name for sample in dataset] == ["a", "b"]
    sample = dataset[0]
    assert sample.size == (30, 40) == tuple(sample.mask.shape)
    assert (sample.image.dtype, sample.mask.dtype, sample.tags.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )
    assert sample.image.shape == (3, 30, 40) and 0 <= sample.image.min() < sample.image.max() <= 1
    assert [VOC_CLASSES[tag] for tag in sample.tags] == ["dog", "sofa"]
    assert set(sample.mask.unique().tolist()) == {0, 12, 18, 255}
    with Image.open(voc_folder / "SegmentationClass/a.png") as mask:
        np.testing.assert_array_equal(sample.mask, np.asarray(mask))


def test_masks_may_stay_closed(voc_folder):
    shutil.rmtree(voc_folder / "SegmentationClass")
    assert VOCFolder(voc_folder, "train", masks=False)[0].mask is None
    with pytest.raises(FileNotFoundError, match=r"SegmentationClass/a\.png: there is no such file"):
        VOCFolder(voc_folder, "train")[0]


def test_batches_squash_images_and_keep_labels(voc_folder):
    dataset = VOCFolder(voc_folder, "train")
    (batch,) = batches(dataset, image_size=16, batch_size=4)
    assert batch.images.shape == (2, 3, 16, 16) and len(batch) == 2
    assert [tuple(mask.shape) for mask in batch.masks] == batch.sizes == [(30, 40), (24, 24)]
    assert [tags.tolist() for tags in batch.tags] == [[11, 17], [7]]
    expected = F.interpolate(dataset[1].image[None], (16, 16), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(batch.images[1], expected)


def test_squash_neither_antialiases_nor_aligns_corners():
    ramp = torch.arange(8.0).expand(3, 8, 8)
    torch.testing.assert_close(squash(ramp, 4)[0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    spike = torch.zeros(3, 8, 8)
    spike[:, :, 0] = 1  # an antialiased filter would spread it further
    torch.testing.assert_close(squash(spike, 2)[0, 0], torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_part_the_limited_images(voc_folder, shards):
    (voc_folder / "ImageSets/Segmentation/all.txt").write_text("a\nb\nc\na\nb\nc\n")
    parts = [
        VOCFolder(voc_folder, "all", limit=5, shard_index=index, num_shards=shards).names for index in range(shards)
    ]
    assert sorted(sum(parts, [])) == ["a", "a", "b", "b", "c"]


def test_the_settings_open_a_dataset(voc_folder, tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    shutil.copytree(voc_folder, root)
    settings = load_settings("voc", data_root=tmp_path, split="train", limit=1)
    assert [sample.name for sample in open_dataset(settings)] == ["a"]
    assert prepare(settings) == root


# Variants of the layout


def test_augmented_masks_and_lists_of_paths(voc_folder):
    (voc_folder / "SegmentationClassAug").mkdir()
    (voc_folder / "SegmentationClass/b.png").rename(voc_folder / "SegmentationClassAug/b.png")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in "ab"]
    (voc_folder / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(lines))
    dataset = VOCFolder(voc_folder, "train_aug")
    assert [int(sample.mask[sample.mask < 255].max()) for sample in dataset] == [18, 8]


def test_tags_from_boxes(voc_folder):
    (voc_folder / "tags.json").unlink()
    (voc_folder / "Annotations").mkdir()
    boxes = "".join(f"<object><name>{name}</name></object>" for name in ("sofa", "dog", "dog"))
    (voc_folder / "Annotations/a.xml").write_text(f"<annotation>{boxes}</annotation>")
    dataset = VOCFolder(voc_folder, "train")
    assert dataset.tags("a").tolist() == [11, 17]
    with pytest.raises(FileNotFoundError, match="b has no tags"):
        dataset.tags("b")
    (voc_folder / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"b\.xml: cannot be read"):
        dataset.tags("b")


def test_own_classes(voc_folder):
    (voc_folder / "classes.txt").write_text("sofa\ndog\npolar bear\n")
    (voc_folder / "tags.json").write_text(json.dumps({"a": ["polar bear", "sofa"]}))
    dataset = VOCFolder(voc_folder, "train")
    assert dataset.class_names == ("sofa", "dog", "polar bear")
    assert dataset.tags("a").tolist() == [0, 2]
    with pytest.raises(ValueError, match="expected class ids 0 to 3 and 255"):
        dataset.mask("a")


def test_coco_needs_no_list_of_its_classes(voc_folder, tmp_path):
    (tmp_path / "coco").symlink_to(voc_folder)
    settings = load_settings("coco", data_root=str(tmp_path), split="train")
    assert open_dataset(settings, masks=False).class_names == COCO_CLASSES
    (voc_folder / "classes.txt").write_text("sofa\ndog\n")
    assert open_dataset(settings, masks=False).class_names == ("sofa", "dog")


# What is wrong with a folder


def test_missing_folders_and_splits_say_what_there_is(voc_folder):
    with pytest.raises(FileNotFoundError, match="data/README.md"):
        VOCFolder(voc_folder / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="no split 'trian' in .* which has train, val"):
        VOCFolder(voc_folder, "trian")
    (voc_folder / "ImageSets/Segmentation/empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="found no image"):
        VOCFolder(voc_folder, "empty")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"b": ["cat"]}, "has no entry 'a'"),
        ({"a": ["dgo"]}, "image a: tag 'dgo' is not one of the 20 classes; did you mean 'dog'"),
        (["dog"], "found a list, expected {name:"),
    ],
)
def test_wrong_tags(voc_folder, tags, message):
    (voc_folder / "tags.json").write_text(json.dumps(tags))
    with pytest.raises(ValueError, match="tags.json") as error:
        VOCFolder(voc_folder, "train").tags("a")
    assert message in str(error.value)


def test_a_good_folder_has_no_problems(voc_folder):
    assert check_folder(voc_folder) == []


def test_every_problem_is_found_once(voc_folder):
    (voc_folder / "ImageSets/Segmentation/val.txt").write_text("c\nb\nghost\n")
    (voc_folder / "tags.json").write_text(json.dumps({"a": ["unicorn"], "b": [], "ghost": ["cat"]}))
    (voc_folder / "JPEGImages/a.jpg").write_bytes(b"")
    save(voc_folder / "SegmentationClass/b.png", np.full((24, 24), 38, np.uint8))
    save(voc_folder / "SegmentationClass/c.png", np.zeros((9, 9), np.uint8))
    problems = check_folder(voc_folder)
    expected = [
        "train and val share 1 images, such as b",
        "a.jpg: found 0 bytes",
        "image a: tag 'unicorn'",
        "b.png: found 38, expected class ids",
        "image b has no tags",
        "c.png: found 9x9 pixels, expected 20x50",
        "has no entry 'c'",
        "ghost.jpg: there is no such file",
        "ghost.png: there is no such file",
    ]
    for message in expected:
        assert sum(message in problem for problem in problems) == 1, message
    assert len(problems) == len(expected)
    assert all("\n" not in problem for problem in problems)


# Images


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "png"), ("RGB", "jpg"), ("L", "jpg"), ("P", "png"), ("1", "png")])
def test_ordinary_images(tmp_path, pixels, mode, suffix):
    path = save(tmp_path / f"image.{suffix}", pixels, mode)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")) / np.float32(255)
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0), expected)


def test_cmyk(tmp_path):
    red = read_image(save(tmp_path / "red.jpg", np.full((8, 8, 3), (255, 0, 0), np.uint8), "CMYK", quality=95))
    assert red[0].min() > 0.9 and red[1:].max() < 0.1


def test_sixteen_bits_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = read_image(save(tmp_path / "ramp.png", ramp))
    np.testing.assert_allclose(image[1], ramp / 65535, atol=1e-6)


def test_transparency_is_white(tmp_path, pixels):
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10] = 255
    image = read_image(save(tmp_path / "image.png", np.concatenate([pixels, alpha], -1)))
    assert (image[:, 10:] == 1).all()
    np.testing.assert_array_equal(image[:, :10].permute(1, 2, 0), pixels[:10] / np.float32(255))


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "film.gif")[:, 8, 8].tolist() == [1, 0, 0]


def test_absurd_images_are_refused(tmp_path, pixels):
    cases = {
        "one.png": (Image.new("RGB", (1, 1)), "found 1x1 pixels, expected sides of 8 to 10000"),
        "long.png": (Image.new("1", (20_000, 10)), "found 20000x10 pixels"),
        "vast.png": (Image.new("1", (14_000, 14_000)), "found too many pixels"),
        "float.tiff": (Image.new("F", (9, 9)), "found floating-point pixels"),
    }
    for name, (image, message) in cases.items():
        image.save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_image(tmp_path / name)
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: is no readable image .*: copy the file again"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: there is no such file"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif"])
def test_damaged_files_never_raise_anything_else(tmp_path, pixels, suffix):
    path = save(tmp_path / f"image.{suffix}", pixels)
    good, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for cut in range(1, len(good), max(1, len(good) // 60)):
        noisy = bytearray(good)
        noisy[int(random.integers(len(good)))] ^= 1 << int(random.integers(8))
        for damaged in (good[:cut], bytes(noisy)):
            path.write_bytes(damaged)
            try:
                read_image(path)
            except ValueError as error:
                refused += 1
                assert str(error).count("\n") == 0 and path.name in str(error)
    assert refused > 30  # most truncations; a flipped bit may still decode


# Masks


def test_masks_hold_ids(tmp_path):
    ids = np.array([[0, 1, 20, 255]] * 8, np.uint8).repeat(2, 1)
    for path in (save(tmp_path / "palette.png", ids, "P"), save(tmp_path / "grey.png", ids)):
        np.testing.assert_array_equal(read_mask(path, num_classes=20, size=(8, 8)), ids)


def test_masks_of_colours_are_refused(tmp_path, pixels):
    ids = np.zeros((8, 8), np.uint8)
    ids[2:] = 15
    mask = Image.fromarray(ids).convert("P")
    mask.putpalette([0, 0, 0] * 15 + [192, 128, 128])
    mask.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", num_classes=20).unique().tolist() == [0, 15]
    for mode, message in (
        ("RGB", "found colours .mode RGB., expected class ids"),
        ("L", "found 147, expected class"),
    ):
        mask.convert(mode).save(tmp_path / "wrong.png")
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / "wrong.png", num_classes=20)


def test_masks_have_the_size_of_their_image(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((8, 12), np.uint8))
    with pytest.raises(ValueError, match="found 12x8 pixels, expected 8x12 as its image has"):
        read_mask(path, num_classes=20, size=(12, 8))


# MiniVOC and photographs


def test_minivoc_is_drawn_once_even_if_two_want_it(tmp_path, monkeypatch):
    drawn = []

    def draw(root, *, seed, progress):
        if not (root / f"minivoc-{seed}").exists():
            time.sleep(0.2)  # long enough for the other to come by
            (root / f"minivoc-{seed}").mkdir()
            drawn.append(seed)

    monkeypatch.setattr("diclip.data.minivoc.write_minivoc", draw)
    settings = load_settings(data_root=tmp_path, minivoc_seed=3)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(prepare, [settings] * 3)) == [tmp_path / "minivoc-3"] * 3
    assert drawn == [3]


@pytest.mark.skipif(not PHOTOS, reason="DICLIP_PHOTOS names no folder with VOCdevkit/VOC2012")
def test_photographs():
    root = Path(PHOTOS) / "VOCdevkit/VOC2012"
    for split in ("train", "val"):
        dataset = VOCFolder(root, split, limit=20)
        for batch in batches(dataset, image_size=320, batch_size=5):
            assert batch.images.shape == (5, 3, 320, 320) and batch.images.std() > 0.1
            assert all(len(tags) for tags in batch.tags)
    assert check_folder(root, splits=["val"]) == []
