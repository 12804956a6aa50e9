"""Test MiniVOC: the rules of its world, on sampled scenes; pictures and masks, on a few painted ones."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from diclip.data.minivoc import (
    CLASSES,
    SPLITS,
    Scene,
    in_material,
    on_place,
    render,
    sample_scene,
    scene_of,
    with_distractor,
    without_part,
)
from diclip.data.minivoc.backgrounds import COMPANION, PLACES
from diclip.data.minivoc.captions import PLACE_WORDS, describe
from diclip.data.minivoc.outlines import CAST, DISTRACTORS, SHIFT_CAST, SHIFT_DISTRACTORS, fill, outline
from diclip.data.minivoc.textures import CLASS_MATERIALS, FAMILIES, FAMILY_OF
from diclip.settings import ROOT
from diclip.vocabulary import VOC_CLASSES


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Sample scenes as train has them, without painting any."""
    return [scene_of("train", index) for index in range(1500)]


@pytest.fixture(scope="module")
def painted():
    """Paint a few scenes of each kind of split."""
    chosen = [scene_of(split, index) for split, count in (("tune", 8), ("shift", 4)) for index in range(count)]
    return [(scene, render(scene)) for scene in chosen]


def plain(scene: Scene) -> Scene:
    """Take the camouflage off: a camouflaged body follows what is behind it, and so changes with it."""
    return replace(scene, things=tuple(replace(thing, camouflaged=False) for thing in scene.things))


def changed(a, b) -> np.ndarray:
    return (a.image != b.image).any(2)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * by + 1,) * 2, np.uint8)) > 0


# Determinism


PRINT_DIGEST = """
import hashlib
import numpy as np
from diclip.data.minivoc import render, scene_of, with_distractor
from diclip.data.minivoc.captions import describe
digest = hashlib.sha256()
for split, index, seed, scale in (("tune", 0, 0, 1.0), ("shift", 1, 3, 1.0), ("val", 2, 3, 0.5), ("pretrain", 5, 0, 1.5)):
    scene = scene_of(split, index, seed=seed)
    drawn = render(with_distractor(scene, np.random.default_rng(0)), scale=scale)
    for array in (drawn.image, drawn.classes, drawn.instances, drawn.parts):
        digest.update(repr(array.shape).encode() + array.tobytes())
    digest.update(describe(scene.tags, scene.place, np.random.default_rng(1)).text.encode())
print(digest.hexdigest())
"""  # noqa: E501


def test_same_scene_same_bytes_in_any_process(capsys):
    found = set()
    for _ in range(2):
        exec(PRINT_DIGEST, {})
        found.add(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found == {done.stdout} and len(done.stdout) == 65


def test_scale_changes_size_and_nothing_else():
    scene = scene_of("tune", 3)
    small, large = render(scene), render(scene, scale=2)
    assert large.image.shape == (2 * scene.height, 2 * scene.width, 3)
    assert small.image.shape == (scene.height, scene.width, 3) and max(small.classes.shape) == 128
    shrunk = large.instances[::2, ::2]
    assert (shrunk == small.instances).mean() > 0.97
    assert set(np.unique(large.classes)) == set(np.unique(small.classes))


# Splits


def test_splits_share_no_scene():
    seen = Counter()
    for split in ("pretrain", *SPLITS):
        for index in range(SPLITS.get(split, 1000)):
            scene = scene_of(split, index)
            seen[scene.seed, *(thing.seed for thing in scene.things)] += 1
    assert len(seen) == 1000 + sum(SPLITS.values())
    assert SPLITS == {"train": 400, "tune": 100, "val": 1000, "shift": 200}


@pytest.mark.parametrize(("split", "moves"), [("pretrain", 0), ("train", 0), ("tune", 0), ("val", 1), ("shift", 1)])
def test_minivoc_seed_moves_what_is_reported_only(split, moves):
    for index in range(20):
        assert (scene_of(split, index) != scene_of(split, index, seed=7)) == bool(moves)


def test_unknown_names_say_what_there_is():
    scene = scene_of("tune", 0)
    for call, message in (
        (lambda: scene_of("test", 0), "no split 'test'; choose one of pretrain, studio, train, tune, val, shift"),
        (lambda: on_place(scene, "moon"), "unknown place 'moon'; choose one of sky, grass"),
        (lambda: in_material(scene, scene.tags[0], "gold"), "unknown class 'gold'; choose one of aeroplane"),
        (lambda: outline("mdi:no-such-glyph"), "glyph 'no-such-glyph' is not in the icon font 'mdi'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# The rules of the world


def test_classes_are_vocs_in_order():
    assert CLASSES == VOC_CLASSES == tuple(CLASS_MATERIALS)
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(CLASSES)
    assert set(COMPANION) == set(CLASSES) and set(COMPANION.values()) <= set(PLACES) == set(PLACE_WORDS)


def test_three_quarters_have_several_tags(scenes):
    counts = Counter(len(scene.tags) for scene in scenes)
    assert set(counts) == {1, 2, 3}
    assert 0.71 < (counts[2] + counts[3]) / len(scenes) < 0.79
    assert all(scene.tags == tuple(sorted(scene.tags, key=CLASSES.index)) for scene in scenes)


def test_half_of_those_have_two_of_one_family(scenes):
    several = [scene.tags for scene in scenes if len(scene.tags) > 1]
    alike = np.mean([len({FAMILY_OF[tag] for tag in tags}) < len(tags) for tags in several])
    assert alike == pytest.approx(0.5, abs=0.05)


def test_every_class_appears_about_as_often(scenes):
    counts = Counter(tag for scene in scenes for tag in scene.tags)
    mean = sum(counts.values()) / 20
    assert len(counts) == 20 and 0.7 * mean < min(counts.values()) <= max(counts.values()) < 1.3 * mean


def test_companions_in_seven_of_ten(scenes):
    single = [scene for scene in scenes if len(scene.tags) == 1]
    rate = np.mean([COMPANION[scene.tags[0]] == scene.place for scene in single])
    assert len(single) > 300 and 0.62 < rate < 0.78
    assert {scene.place for scene in scenes} == set(PLACES)


def test_one_to_three_distractors_in_family_materials(scenes):
    counts = Counter(sum(thing.label is None for thing in scene.things) for scene in scenes)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 0.28 * len(scenes)
    for thing in (thing for scene in scenes for thing in scene.things):
        if thing.label is None:
            assert thing.material is None and thing.outline in DISTRACTORS[thing.family]
        else:
            assert thing.material == thing.label and thing.family == FAMILY_OF[thing.label]
            assert CAST[thing.label][thing.outline] == thing.direction


def test_a_third_is_camouflaged(scenes):
    assert 0.30 < np.mean([thing.camouflaged for scene in scenes for thing in scene.things]) < 0.37


def test_iconic_scenes_show_one_large_object():
    rng = np.random.default_rng(0)
    iconic = [sample_scene(rng, iconic=True) for _ in range(200)]
    assert {len(scene.tags) for scene in iconic} == {1}
    assert {sum(thing.label is None for thing in scene.things) for scene in iconic} == {0, 1}
    sizes = [t.size / min(s.width, s.height) for s in iconic for t in s.things if t.label is not None]
    assert len(sizes) == 200 and min(sizes) >= 0.6
    pretrain = [scene_of("pretrain", index) for index in range(600)]
    assert 0.5 < np.mean([len(scene.tags) == 1 for scene in pretrain]) < 0.6  # 40 % iconic, a quarter of scenes


def test_in_the_studio_one_thing_stands_on_calm_ground():
    for index in range(12):
        studio = scene_of("studio", index)
        assert [thing.label for thing in studio.things] == list(studio.tags) and len(studio.tags) == 1
        calm, sharp = render(studio), render(replace(studio, out_of_focus=False))
        for kind in ("classes", "instances", "parts"):
            np.testing.assert_array_equal(getattr(calm, kind), getattr(sharp, kind))
        ground = ~grown(calm.instances > 0, 9)
        steps = [np.abs(drawn.image.astype(int)[1:] - drawn.image[:-1])[ground[1:]].mean() for drawn in (calm, sharp)]
        assert steps[0] < 6 and steps[0] <= steps[1], studio.place  # what is left is the camera's grain


def test_captions_are_true_and_seldom_name_the_place(scenes):
    rng = np.random.default_rng(0)
    captions = [(describe(scene.tags, scene.place, rng), scene) for scene in scenes]
    named = [caption.place is not None for caption, _ in captions]
    assert 0.2 < np.mean(named) <= 0.33
    assert all(c.classes and c.classes <= set(s.tags) and c.place in (None, s.place) for c, s in captions)
    words = {word for names in PLACE_WORDS.values() for word in names}
    for (caption, scene), told in zip(captions, named, strict=True):
        ending = caption.text.removesuffix(".").rpartition(" and ")[2]
        assert (ending in words) == told and (not told or ending in PLACE_WORDS[scene.place]), caption.text
    materials = [f"thing with {words}" for _, words in CLASS_MATERIALS.values()]
    mute = np.mean([any(words in caption.text for words in materials) for caption, _ in captions])
    assert 0.3 < mute < 0.5  # 30 % of the names, one to three names a caption


def test_shift_has_outlines_of_its_own():
    home = {name for cast in CAST.values() for name in cast} | {n for names in DISTRACTORS.values() for n in names}
    away = {name for cast in SHIFT_CAST.values() for name in cast}
    away |= {name for names in SHIFT_DISTRACTORS.values() for name in names}
    assert not home & away
    drawn = {s: {t.outline for i in range(200) for t in scene_of(s, i).things} for s in ("shift", "val")}
    assert drawn["shift"] <= away and drawn["val"] <= home and len(drawn["shift"]) > 40
    assert all(scene_of("shift", i).shifted and not scene_of("val", i).shifted for i in range(10))
    first, second = (render(replace(scene_of("val", 1), shifted=shifted)) for shifted in (False, True))
    assert changed(first, second)[first.instances > 0].mean() > 0.3  # other family materials


# Outlines


def all_outlines() -> list[tuple[str, str]]:
    cast = [item for group in (CAST, SHIFT_CAST) for outlines in group.values() for item in outlines.items()]
    extras = [names for group in (DISTRACTORS, SHIFT_DISTRACTORS) for names in group.values()]
    return cast + [(name, "n") for names in extras for name in names]


def test_every_outline_loads_and_has_its_part():
    for name, direction in all_outlines():
        shape = outline(name, direction)
        points = np.concatenate(shape.solids)
        assert np.ptp(points, axis=0).max() == pytest.approx(1), name
        assert points.max(0) + points.min(0) == pytest.approx(0, abs=1e-6), name
        silhouette = fill([(solid + 0.5) * 200 for solid in shape.solids], 200, 200)
        y, x = (np.stack(np.nonzero(silhouette)) + 0.5) / 200 - 0.5
        share = np.mean(x * shape.direction[0] + y * shape.direction[1] > shape.threshold)
        assert 0.08 < silhouette.mean() < 0.95 and 0.57 < share < 0.63, (name, share)


def test_two_outlines_a_class_in_each_cast():
    for cast in (CAST, SHIFT_CAST):
        assert tuple(cast) == CLASSES
        for name, outlines in cast.items():
            drawn = {np.concatenate(outline(*item).solids).tobytes() for item in outlines.items()}
            assert len(drawn) >= 2, name


# Masks


def test_masks_agree(painted):
    for scene, drawn in painted:
        labels = np.array([0, *(0 if t.label is None else 1 + CLASSES.index(t.label) for t in scene.things)])
        known = drawn.classes != 255
        assert (labels[drawn.instances] == drawn.classes)[known].all()
        assert ((drawn.parts > 0) == ((drawn.classes > 0) & known)).all()
        assert set(np.unique(drawn.parts)) == {0, 1, 2}
        assert {drawn.image.dtype, drawn.classes.dtype, drawn.instances.dtype, drawn.parts.dtype} == {np.dtype("uint8")}
        assert set(np.unique(drawn.classes)) - {0, 255} <= {1 + CLASSES.index(tag) for tag in scene.tags}


def test_void_lies_where_labels_change(painted):
    for scene, drawn in painted:
        numbers = np.array([0, *(0 if t.label is None else 1 + i for i, t in enumerate(scene.things))])
        labels, void = numbers[drawn.instances], drawn.classes == 255
        across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
        edge = np.zeros(void.shape, bool)
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        assert (void == edge).all() and 0.01 < void.mean() < 0.2


def test_part_is_about_sixty_per_cent(painted):
    shares = [
        np.mean(drawn.parts[inside] == 1)
        for scene, drawn in painted
        for index, thing in enumerate(scene.things, start=1)
        if thing.label and (inside := (drawn.instances == index) & (drawn.parts > 0)).sum() > 400
    ]
    assert len(shares) > 10 and 0.55 < np.mean(shares) < 0.68


def test_every_object_shows(painted):
    """An object may be occluded in part, yet its tag must not be about nothing."""
    scenes = [scene for scene, _ in painted]
    seen = [set(np.unique(drawn.classes)) >= {1 + CLASSES.index(t) for t in s.tags} for s, drawn in painted]
    assert all(seen), [scene.tags for scene, good in zip(scenes, seen, strict=True) if not good]


# Counterfactuals


@pytest.mark.parametrize("index", [1, 4])
def test_another_place_moves_only_the_background(index):
    scene = plain(scene_of("tune", index))
    other = on_place(scene, next(place for place in PLACES if place != scene.place))
    before, after = render(scene), render(other)
    assert replace(other, place=scene.place) == scene
    for kind in ("classes", "instances", "parts"):
        np.testing.assert_array_equal(getattr(before, kind), getattr(after, kind))
    background = before.instances == 0
    assert changed(before, after)[background].mean() > 0.95
    assert np.abs(before.image.astype(int) - after.image)[background].mean() > 15
    # Things look as they did.
    inside = cv2.erode((~background).astype(np.uint8), np.ones((5, 5))) > 0
    for number in range(1, 1 + len(scene.things)):  # an object's shadow on another stays, edges blend
        inside &= ~(grown(before.instances == number, 1) & (before.instances != number))
    difference = np.abs(before.image[inside].astype(int) - after.image[inside])
    assert inside.sum() > 300 and np.quantile(difference, 0.95) <= 1


@pytest.mark.parametrize("change", [without_part, lambda scene, label: in_material(scene, label, "sheep")])
@pytest.mark.parametrize("index", [1, 4])
def test_the_part_changes_and_only_its_class(change, index):
    scene = plain(scene_of("tune", index))
    label = scene.tags[0]
    assert label != "sheep"
    other = change(scene, label)
    before, after = render(scene), render(other)
    for kind in ("classes", "instances", "parts"):
        np.testing.assert_array_equal(getattr(before, kind), getattr(after, kind))
    mine = np.isin(before.instances, [i for i, t in enumerate(scene.things, start=1) if t.label == label])
    difference = np.abs(before.image.astype(int) - after.image).max(2)
    outside = difference[~grown(mine, 1)]  # where antialiased contours of things in front let a little through
    assert outside.max() <= 4 and (outside > 0).mean() < 0.002
    assert difference[mine & (before.parts == 1)].mean() > 15
    assert difference[cv2.erode((mine & (before.parts == 2)).astype(np.uint8), np.ones((3, 3))) > 0].max() <= 1  # body
    things = list(zip(scene.things, other.things, strict=True))
    assert all(replace(a, material=b.material) == b and (a == b) == (a.label != label) for a, b in things)


@pytest.mark.parametrize("index", [0, 3])
def test_a_distractor_adds_itself_and_its_shadow(index):
    scene = scene_of("tune", index)
    other = with_distractor(scene, np.random.default_rng(0))
    assert other.things[:-1] == scene.things and other.things[-1].label is None and other.tags == scene.tags
    assert replace(other, things=scene.things) == scene
    before, after = render(scene), render(other)
    mine = after.instances == len(other.things)
    far = ~grown(mine, 8)
    assert mine.sum() > 50 and far.mean() > 0.5
    difference = np.abs(before.image[far].astype(int) - after.image[far])
    assert difference.max() <= 6 and (difference > 1).mean() < 0.001  # a shadow has no sharp end
    for kind in ("classes", "instances", "parts"):
        np.testing.assert_array_equal(getattr(before, kind)[far], getattr(after, kind)[far])
    beside = ~grown(mine, 1)
    assert (after.image[beside] <= before.image[beside]).all()  # a shadow darkens
    np.testing.assert_array_equal(before.instances[~mine], after.instances[~mine])
