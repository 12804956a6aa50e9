"""The scene composer: what is chosen stands in the picture, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest

from diclip.data.minivoc import CLASSES, render
from diclip.explorers import SceneChoice, SceneExplorer, Studio, explore_scenes
from diclip.explorers.composer import HIDDEN, SHOWN, SIDE, WITH_DIFFUSION, Piece, compose
from diclip.explorers.pictures import GAP, TITLE
from diclip.settings import load_settings

PAIR = SceneChoice((Piece("sheep", x=38, size=70), Piece("dog", x=92, size=64)), distractors=2, seed=3)


@pytest.fixture(scope="module")
def explorer(tiny_clip, tmp_path_factory):
    nowhere = str(tmp_path_factory.mktemp("nowhere") / "model")
    settings = load_settings(clip_model=str(tiny_clip), diffusion_model=nowhere, memory=nowhere, device="cpu")
    return SceneExplorer(Studio(settings))


def first(choice: SceneChoice, **change) -> SceneChoice:
    return replace(choice, pieces=(replace(choice.pieces[0], **change), *choice.pieces[1:]))


def test_objects_stand_before_distractors():
    scene = compose(PAIR)
    assert [thing.label for thing in scene.things] == [None, None, "sheep", "dog"]
    assert scene.tags == ("dog", "sheep") and (scene.things[2].x, scene.things[3].size) == (38, 64)


def test_another_place_moves_nothing():
    before, after = (render(compose(choice)) for choice in (PAIR, replace(PAIR, place="snow")))
    for kind in ("classes", "instances", "parts"):
        assert np.array_equal(getattr(before, kind), getattr(after, kind))
    assert (before.image != after.image)[before.instances == 0].mean() > 0.5


@pytest.mark.parametrize("material", [HIDDEN, "bus"])
def test_another_material_changes_the_part_alone(material):
    before, after = (render(compose(choice)) for choice in (PAIR, first(PAIR, material=material)))
    assert np.array_equal(before.classes, after.classes) and np.array_equal(before.parts, after.parts)
    changed = np.abs(before.image.astype(int) - after.image).max(-1) > 8
    sheep = before.classes == 1 + CLASSES.index("sheep")
    assert changed[sheep & (before.parts == 1)].mean() > 0.5
    assert changed[sheep & (before.parts == 2)].mean() < 0.05


def test_every_distractor_is_one_more():
    counts = [len(np.unique(render(compose(replace(PAIR, distractors=n))).instances)) for n in (0, 4)]
    assert counts[0] == 3 and counts[1] > 3
    assert [t for t in compose(replace(PAIR, distractors=1)).things if t.label] == list(compose(PAIR).things[2:])


def test_every_system_has_its_map(explorer):
    view = explorer.view(PAIR)
    assert "dog, sheep on grass" in view.line and view.doubts == ()
    made = explorer.studio.memo.made
    assert made["scene"] == 1 and made["rungs"] == len(SHOWN) and made["clip"] == 3  # three systems, three attentions
    again = explorer.view(replace(PAIR, opacity=0.1))
    assert made["scene"] == 1 and made["rungs"] == len(SHOWN)
    assert again.pixels.shape == view.pixels.shape and not np.array_equal(again.pixels, view.pixels)


def test_diclip_joins_in_where_it_can(explorer, tiny_clip, tiny_diffusion, tiny_memory):
    models = {"diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory), "clip_model": str(tiny_clip)}
    full = SceneExplorer(Studio(load_settings(**models, device="cpu"), clip=explorer.studio.frozen))
    panels = (3 + len(SHOWN), 3 + len(SHOWN) + len(WITH_DIFFUSION))
    heights = [-(-count // 3) * (SIDE + TITLE + GAP) - GAP for count in panels]
    assert [one.view(PAIR).pixels.shape[0] for one in (explorer, full)] == heights


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (replace(PAIR, place="moon"), "place is 'moon', expected one of sky, grass"),
        (first(PAIR, label="zebra"), "found 'zebra' in material 'its own', expected one of aeroplane"),
        (first(PAIR, material="gold"), "found 'sheep' in material 'gold'"),
        (replace(PAIR, look_for="zebra"), "'zebra' is no class"),
    ],
)
def test_what_minivoc_has_not_is_said_in_one_line(explorer, choice, message):
    with pytest.raises(ValueError, match=message):
        explorer.view(choice)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("place", "snow"),
        ("distractors", 3),
        ("seed", 8),
        ("look_for", "bus"),
        ("label 1", "cat"),
        ("label 2", "dog"),
        ("x 1", 30),
        ("size 1", 50),
        ("material 1", HIDDEN),
        ("camouflaged 1", True),
        ("outline 1", 1),
        ("opacity", 0.1),
    ],
)
def test_every_widget_changes_the_picture(explorer, name, value):
    board = explore_scenes(explorer.studio)
    before = board.picture.value
    board[name].value = value
    assert board.picture.value != before and "b00020" not in board.line.value
