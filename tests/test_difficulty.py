import json

import numpy as np
import pytest
import torch
from PIL import Image

from diclip import difficulty
from diclip.data import VOCFolder
from diclip.settings import load_settings

CAT, DOG = 8, 12  # labels in masks


@pytest.fixture
def settings(tmp_path):
    """Write eight pictures in MiniVOC's layout: a cat on the left of each, grey elsewhere, its upper half the part."""
    root, random = tmp_path / "minivoc-0", np.random.default_rng(0)
    names = [f"p{index}" for index in range(8)]
    for folder in ("JPEGImages", *(f"Segmentation{kind}" for kind in ("Class", "Object", "Part"))):
        (root / folder).mkdir(parents=True)
    for name in names:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = CAT
        objects = np.where(mask > 0, 1, 2 * (np.indices(mask.shape)[1] > 48)).astype(np.uint8)
        parts = np.where(mask > 0, 1 + (np.indices(mask.shape)[0] >= 32), 0).astype(np.uint8)
        mask[:, 31:33] = 255
        picture = random.integers(100, 110, (64, 64, 3)).astype(np.uint8)
        picture[:, :32] = (220, 30, 30)
        Image.fromarray(picture).save(root / f"JPEGImages/{name}.png")
        for kind, ids in (("Class", mask), ("Object", objects), ("Part", parts)):
            Image.fromarray(ids).save(root / f"Segmentation{kind}/{name}.png")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, of_split in (("train", names[:4]), ("val", names[4:])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(of_split))
    (root / "tags.json").write_text(json.dumps({name: ["cat"] for name in names}))
    return load_settings(data_root=tmp_path, image_size=64)


def test_majority_lets_the_border_vote_only_where_nothing_else_does():
    labels = torch.zeros(16, 32, dtype=torch.long)
    labels[:8, :5], labels[:8, 5:8] = 3, 4  # 3 wins its patch
    labels[:8, 8:16] = 255
    labels[:8, 16:24] = 255
    labels[0, 16] = 7  # a single vote against a border
    assert difficulty.majority(labels, (2, 4)).tolist() == [[3, 255, 7, 0], [0, 0, 0, 0]]
    twice = labels.repeat_interleave(2, 0).repeat_interleave(3, 1)  # squashed to the same grid
    assert difficulty.majority(twice, (2, 4)).tolist() == [[3, 255, 7, 0], [0, 0, 0, 0]]


def test_object_ids_forget_things_without_a_label(settings):
    ids = difficulty.object_ids(VOCFolder(settings.data_root / "minivoc-0", "val"), "p4")
    assert ids.unique().tolist() == [0, 1, 255]
    assert (ids[:, :31] == 1).all() and (ids[:, 31:33] == 255).all() and not ids[:, 33:].any()


def test_colour_tells_objects_of_one_colour(settings):
    counts = difficulty.colour_auc(settings)
    assert counts.shape == (4, 2) and (counts[:, 1] == 1).all()
    assert (counts[:, 0] > 0.95).all()


def test_pairs_count_in_both_directions_together(settings):
    """What is left of the middle is one object, what is right of it the background."""
    left = (torch.arange(64) % 8 < 4).float()
    same = left[:, None] * left + (1 - left[:, None]) * (1 - left)  # (N, N)
    one_way = 2 * same.triu() - 0.5
    for affinity, expected in ((same, 1.0), (one_way, 1.0), (one_way.T, 1.0), (-same, 0.0), (0 * same, 0.5)):
        counts = difficulty.same_object_auc(settings, lambda batch, a=affinity: a.expand(len(batch), 64, 64))
        assert counts.tolist() == [[expected, 1.0]] * 4
    doubtful = same.clone()
    doubtful[0, 1] = doubtful[1, 0] = -1  # one of the 992 pairs that are alike is last
    counts = difficulty.same_object_auc(settings, lambda batch: doubtful.expand(len(batch), 64, 64))
    assert counts[:, 0] == pytest.approx(1 - 1 / 992)


def test_patches_are_pure_and_in_place(settings):
    dataset = VOCFolder(settings.data_root / "minivoc-0", "val")
    pixels, classes, parts = difficulty.patches(dataset, "p4")
    assert pixels.shape == (32, 8, 8, 3)  # 4 of 8 columns; of the fourth one pixel column is border
    assert (classes == CAT - 1).all() and [(parts == kind).sum() for kind in (1, 2)] == [16, 16]
    expected = dataset.image("p4").permute(1, 2, 0)[8:16, 16:24]
    np.testing.assert_array_equal(pixels[6], expected)  # row by row: second row, third column
    assert difficulty.describe(pixels).shape == (32, 192 + 40 + 6)


def test_patch_accuracy_counts_part_and_body(settings):
    root = settings.data_root / "minivoc-0"
    for name in ("p2", "p3"):  # half of the teachers say that the lower half's colour is a dog
        mask = np.array(Image.open(root / f"SegmentationClass/{name}.png"))
        image = np.array(Image.open(root / f"JPEGImages/{name}.png"))
        mask[mask == CAT] = DOG
        image[:, :32] = (20, 200, 40)
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
        Image.fromarray(image).save(root / f"JPEGImages/{name}.png")
    image = np.array(Image.open(root / "JPEGImages/p4.png"))
    image[32:, :32] = (20, 200, 40)  # the body of this cat looks like a dog
    Image.fromarray(image).save(root / "JPEGImages/p4.png")
    found = difficulty.patch_accuracy(settings)
    assert found["part"].tolist() == [[16, 16]] * 4
    assert found["body"].tolist() == [[0, 16], [16, 16], [16, 16], [16, 16]]
    only_cats = difficulty.patch_accuracy(settings, teachers=2)
    assert only_cats["body"].tolist() == [[16, 16]] * 4


def test_the_report_is_ready_for_json(settings):
    found = json.loads(json.dumps(difficulty.measure_difficulty(settings)))
    assert found["images"] == 4
    rows = found["difficulty"]
    assert list(rows) == ["grabcut", "colour_auc", "body_patch", "part_patch"]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert rows["body_patch"]["value"] == 1 and rows["part_patch"]["bar"] is None
