"""Test training crops: who takes which, what a crop is, what stays the same."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diclip.data.crops import Crops, Share, Steps, crop_batches, filled, padded, training_images
from diclip.data.voc import VOCFolder
from diclip.settings import load_settings

shares = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(shares, st.integers(0, 5), st.integers(1, 9))
def test_processes_and_parts_share_what_one_would_take(counts, first, images):
    processes, accumulate, size = counts
    batch = processes * accumulate * size
    whole = [set(positions) for positions in Steps(images, Share(batch), seed=3, first=first, stop=6)]
    parts = [
        list(Steps(images, Share(batch, accumulate, rank, processes), seed=3, first=first, stop=6))
        for rank in range(processes)
    ]
    for step, positions in enumerate(whole):
        mine = [at for part in parts for taken in part[step * accumulate : (step + 1) * accumulate] for at in taken]
        assert set(mine) == positions and len(mine) == batch
    assert len(Steps(images, Share(batch, accumulate), seed=3, first=first, stop=6)) == len(parts[0])


def test_every_pass_takes_every_image_in_an_order_of_its_own():
    taken = [at for batch in Steps(5, Share(4), seed=0, first=0, stop=10) for at in batch]
    assert [position for position, _ in taken] == list(range(40))
    passes = [tuple(index for _, index in taken[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(order) == list(range(5)) for order in passes) and len(set(passes)) > 5
    assert taken != [at for batch in Steps(5, Share(4), seed=1, first=0, stop=10) for at in batch]


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="train_batch is 6, which 2 processes x 2 accumulated parts cannot share"):
        Share(6, 2, 0, 2)


@pytest.fixture
def crops(voc_folder):
    source = VOCFolder(voc_folder, "train")
    options = {"scales": (0.5, 2.0), "seed": 0, "see_masks": False, "keep_masks": True}
    return lambda size=32, **changed: Crops(source, size, **options | changed)


def test_a_crop_depends_on_its_position_alone(crops):
    once, again = crops(), crops()
    again[9, 1]
    for at in [(0, 0), (1, 0), (2, 1)]:
        assert once[at].image.equal(again[at].image) and once[at].mask.equal(again[at].mask)
    assert not once[0, 0].image.equal(once[1, 0].image)
    assert once[0, 0].tags.tolist() == [11, 17] and once[0, 0].name == "a"
    assert not once[0, 0].image.equal(crops(seed=1)[0, 0].image)


def test_image_and_mask_are_cut_alike(crops):
    """Colour an image by its mask: after any crop the colours still say the mask."""
    seen = Counter()
    coloured = crops(scales=(1.0, 1.0))
    sample = coloured.source[0]
    colours = torch.where(sample.mask == 255, 0, sample.mask).float() / 255  # void is black, as what is padded
    coloured.source.image = lambda name: colours.expand(3, -1, -1)
    for position in range(30):
        crop = coloured[position, 0]
        assert crop.image.shape == (3, 32, 32) and crop.mask.shape == (32, 32)
        expected = torch.where(crop.mask == 255, 0, crop.mask).float() / 255
        torch.testing.assert_close(crop.image[0], expected)
        seen[tuple(crop.mask.flatten().tolist())] += 1
    assert len(seen) > 12  # moved, padded, flipped: there are 54 ways


def test_scales_are_drawn_between_their_limits(crops):
    """A square of known size tells by what factor an image was scaled."""
    white = crops(200, scales=(0.5, 2.0))
    white.source.image = lambda name: torch.ones(3, 50, 50)
    white.source.mask = lambda name, size: torch.zeros(50, 50, dtype=torch.long)
    factors = [(white[position, 0].mask == 0).sum().item() ** 0.5 / 50 for position in range(60)]
    assert 0.5 <= min(factors) < 0.65 and 1.85 < max(factors) <= 2.0 and abs(np.mean(factors) - 1.25) < 0.15


def test_what_is_padded_is_black_and_void():
    image, mask = padded(torch.ones(3, 4, 9), torch.zeros(4, 9).long(), 8, np.random.default_rng(0))
    assert image.shape == (3, 8, 9) and image.sum() == 3 * 36 and (mask == 255).sum() == 36
    assert ((mask == 0) == (image[0] == 1)).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0, 0, 1], True), ([0, 0, 1, 1], False), ([255, 255, 3, 4], False), ([255, 7], True), ([255], True)],
)
def test_filled_by_one_label(values, expected):
    assert filled(torch.tensor([values])) is expected


def test_the_parity_switch_avoids_crops_of_one_label(crops):
    """A class in one corner of a large image: chance seldom meets it, who looks at the masks often does."""
    met = []
    mask = torch.zeros(60, 60, dtype=torch.long)
    mask[:16, :16] = 5
    for see_masks in (False, True):
        looking = crops(20, scales=(1.0, 1.0), see_masks=see_masks, keep_masks=True)
        looking.source.image, looking.source.mask = (lambda name: torch.ones(3, 60, 60)), (lambda name, size: mask)
        met.append(sum(not filled(looking[position, 0].mask) for position in range(200)))
    assert met[0] < 30 and met[1] > 3 * met[0] + 10


def test_masks_are_read_only_where_they_teach(tiny_world, monkeypatch):
    settings = load_settings(data_root=str(tiny_world), image_size=64, max_iters=2, train_batch=2)
    read = []
    monkeypatch.setattr(VOCFolder, "mask", lambda self, name, size: read.append(name) or torch.zeros(size).long())
    for batch in crop_batches(settings, Share(2)):
        assert batch.masks == [None, None] and batch.images.shape == (2, 3, 64, 64) and batch.sizes == [(64, 64)] * 2
    assert not read
    (batch, _) = crop_batches(settings.model_copy(update={"supervision": "masks"}), Share(2))
    assert [mask.shape for mask in batch.masks] == [(64, 64)] * 2 and read


def test_a_later_start_sees_the_batches_of_an_earlier_one(tiny_world):
    settings = load_settings(data_root=str(tiny_world), image_size=64, max_iters=4, train_batch=2)
    state = torch.random.get_rng_state()
    whole, rest = (list(crop_batches(settings, Share(2), first=first)) for first in (0, 2))
    assert torch.random.get_rng_state().equal(state)
    assert len(whole) == 4 and len(rest) == 2
    for expected, found in zip(whole[2:], rest, strict=True):
        assert found.images.equal(expected.images) and found.names == expected.names


def test_only_the_first_images_are_taken(tiny_world):
    common = {"data_root": str(tiny_world), "image_size": 64, "max_iters": 6, "train_batch": 2}
    settings = load_settings(train_split="val", split="tune", limit=1, **common)
    everything = training_images(settings).names
    assert len(everything) == 6  # split and limit are of what is scored
    few = settings.model_copy(update={"train_images": 2})
    assert training_images(few).names == everything[:2]
    for supervision in ("tags", "masks"):
        batches = crop_batches(few.model_copy(update={"supervision": supervision}), Share(2))
        assert {name for batch in batches for name in batch.names} == set(everything[:2])
