"""Explorers without a browser: a choice makes a picture, a widget's value another, and an error one line."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.clip import load_clip
from diclip.data import open_dataset
from diclip.data.images import read_mask
from diclip.doubts import known_words
from diclip.explorers import pictures
from diclip.explorers.cam import CamChoice, CamExplorer, class_iou, words_of
from diclip.explorers.cam_board import explore_cams
from diclip.explorers.core import Memo, Pick, RememberingCLIP, RememberingDiffusion, Studio
from diclip.explorers.patch_board import explore_patches
from diclip.methods import build_method
from diclip.settings import load_settings

widgets = pytest.importorskip("ipywidgets")


def passes(studio: Studio) -> int:
    return sum(studio.memo.made[stage] for stage in ("clip", "hidden", "diffusion", "latents"))


# One picture a choice


@pytest.mark.parametrize(
    "change",
    [
        {"opacity": 0.2},
        {"colours": "gray"},
        {"score": 0.9},
        {"rule": "one_minus_max"},
        {"refinement": "PAR"},
        {"beside": "rungs"},
        {"classes": ("cat", "dog")},
        {"words": ("little bird",)},
        {"background_words": ("sky",)},
        {"rung": "clip"},
        {"rung": "caa"},
    ],
    ids=str,
)
def test_what_needs_no_forward_pass_has_none(studio, change):
    explorer, choice = CamExplorer(studio), CamChoice(Pick(index=1))
    first = explorer.view(choice)
    before = passes(studio)
    assert not np.array_equal(explorer.view(replace(choice, **change)).pixels, first.pixels)
    assert passes(studio) == before


@pytest.mark.parametrize("change", [{"attention": "vv"}, {"surgery_blocks": 1}, {"pick": Pick(index=2)}], ids=str)
def test_what_needs_a_pass_has_one_and_only_once(studio, change):
    explorer, choice = CamExplorer(Studio(studio.settings, clip=studio.frozen)), CamChoice(Pick(index=1))
    first, before = explorer.view(choice), passes(explorer.studio)
    again = [explorer.view(replace(choice, **change)).pixels for _ in range(2)]
    assert passes(explorer.studio) == before + 1
    assert np.array_equal(*again) and not np.array_equal(first.pixels, again[0])


@pytest.mark.parametrize("method", ["clip", "clip-es", "excel"])
def test_maps_and_labels_are_the_systems(studio, method):
    settings = load_settings(**{**_models_of(studio), "method": method})
    system, dataset = build_method(settings), open_dataset(settings)
    explorer = CamExplorer(studio)
    batch = studio.batch(studio.photo(Pick(index=2)), studio.photo(Pick(index=2)).tags, dataset.class_names)
    for rung, maps in system.rungs(batch):
        choice = CamChoice(Pick(index=2), method=method, rung=rung, rule="one_minus_max")
        chosen = explorer.settings(choice)
        photo, own = studio.photo(choice.pick), studio.system(chosen)
        found = explorer.rungs(choice, photo, chosen, own, photo.tags)
        torch.testing.assert_close(found[rung].scores, maps.scores, atol=1e-5, rtol=1e-4)
        assert found[rung].label.equal(maps.label)
        view = explorer.view(choice)
        assert view.labels.shape == dataset[2].mask.shape
        assert set(view.labels.unique().tolist()) <= {0, *(maps.label + 1).tolist()}


def _models_of(studio: Studio) -> dict[str, str]:
    return {name: str(getattr(studio.settings, name)) for name in ("clip_model", "data_root", "device")}


def test_classes_are_the_tags_until_they_are_chosen(studio):
    explorer, photo = CamExplorer(studio), studio.photo(Pick(index=0))
    assert explorer.view(CamChoice()).classes == photo.tags
    assert explorer.view(CamChoice(classes=("dog", "cat"), words=("zebra",))).classes == ("cat", "dog", "zebra")
    nothing = explorer.view(CamChoice(classes=()))
    assert nothing.classes == () and not nothing.labels.any()


def test_words_and_pictures_that_the_model_cannot_know_are_doubted(studio, tmp_path):
    explorer = CamExplorer(studio)
    assert {"sheep", "feathers", "grass"} <= known_words()
    assert explorer.view(CamChoice(words=("little bird", "thing with woolly curls"))).doubts == ()
    (doubt,) = explorer.view(CamChoice(words=("zebra",), background_words=("savanna",))).doubts
    assert "zebra, savanna" in doubt and 'load_settings("voc")' in doubt
    Image.new("RGB", (40, 30), "red").save(tmp_path / "mine.png")
    view = explorer.view(CamChoice(Pick(folder=str(tmp_path))))
    assert len(view.doubts) == 1 and 'load_settings("voc")' in view.doubts[0] and "\n" not in view.doubts[0]
    assert len(view.classes) == 3 and "the likeliest classes are shown" in view.line and view.labels.shape == (30, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sam"}, "sam has no rung 'intra', expected one of clip: clip, intra, caa"),
        ({"rung": "rar"}, "clip has no rung 'rar'"),
        ({"method": "diclip", "rung": "vce"}, "there is no diffusion model in .*diclip pretrain diffusion"),
        ({"refinement": "magic"}, "refinement is 'magic', expected one of none, PAR"),
        ({"score": 2.0}, "score is 2.0, expected 0 to 1"),
        ({"colours": "jet"}, "colours is 'jet', expected one of magma"),
        ({"beside": "all"}, "beside is 'all', expected one of classes, rungs"),
        ({"classes": ("zebra",)}, "zebra are no classes: write them into the box"),
        ({"words": ("sky",)}, "sky cannot be class and background"),
        ({"words": ("dog",)}, "found twice: dog"),
        ({"attention": "kv"}, "found attention 'kv'"),
        ({"surgery_blocks": 99}, "surgery_blocks is 99"),
        ({"pick": Pick(index=10_000)}, "index is 10000, expected 0 to"),
        ({"pick": Pick(split="test")}, "there is no split 'test'"),
        ({"pick": Pick(folder="/none/such")}, "there is no folder"),
    ],
)
def test_wrong_choices_get_one_line(studio, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        CamExplorer(studio).view(replace(CamChoice(), **change))
    assert "\n" not in str(error.value)


def test_iou_is_of_the_classes_alone():
    truth = torch.tensor([[0, 0, 3, 255]])
    found = class_iou(torch.tensor([[0, 3, 3, 21]]), truth, 20)
    assert found == {0: 0.5, 3: 0.5}
    assert class_iou(torch.tensor([[21, 0, 3, 1]]), truth, 20) == {0: 0.5, 3: 1.0}
    assert class_iou(truth, None, 20) == {}


def test_words_are_read_apart():
    assert words_of(" little  bird, sky\nsky,, car ,") == ("little bird", "sky", "car")


def test_masks_and_figure_are_saved_and_nothing_is_overwritten(studio, tmp_path):
    explorer = CamExplorer(studio)
    choice = CamChoice(Pick(index=1), words=("zebra",))
    folder = explorer.save(choice, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "labels.png", "manifest.json"]
    assert read_mask(folder / "labels.png", num_classes=21).equal(explorer.view(choice).labels)
    said = json.loads((folder / "manifest.json").read_text())
    assert said["labels"]["21"] == "zebra" and said["choice"]["words"] == ["zebra"] and said["doubts"]
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(OSError):
        explorer.save(choice, tmp_path / "out")
    assert (folder / "manifest.json").read_bytes() == before


# Models that remember


def test_what_two_threads_want_is_made_once():
    memo, begun, go = Memo(), Event(), Event()

    def make() -> object:
        begun.set()
        assert go.wait(60)
        return object()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(memo, "model", "same", make)
        assert begun.wait(60)
        second = threads.submit(memo, "model", "same", make)
        assert memo("model", "another", lambda: 1) == 1  # nobody else waits
        go.set()
        assert first.result(60) is second.result(60) and memo.made["model"] == 2
    with pytest.raises(ValueError, match="at first"):
        memo("model", "third", lambda: int("at first"))
    assert memo("model", "third", lambda: 3) == 3


def test_a_remembering_clip_says_what_the_clip_says(studio):
    memo = Memo(keep=2)
    clip, images = RememberingCLIP(studio.frozen, memo), torch.rand(1, 3, 128, 128)
    for how in ({}, {"attention": "vv", "tokens": None}, {"bias": torch.rand(1, 256, 256), "need_attention": False}):
        found, expected = clip.encode(images, **how), studio.frozen.encode(images, **how)
        assert found.patches.equal(expected.patches) and clip.encode(images.clone(), **how) is found
    assert memo.made["clip"] == 3
    assert clip.encode(images) is not clip.encode(images + 0.001)  # the first was forgotten, the second is another
    prompts = ["a cat.", "a dog.", "a cat."]
    torch.testing.assert_close(clip.encode_text(prompts), studio.frozen.encode_text(prompts), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no prompts"):
        clip.encode_text([])


def test_a_remembering_diffusion_draws_on(full_studio):
    plain = full_studio.diffusion._diffusion
    memo = Memo()
    diffusion, images = RememberingDiffusion(plain, memo), torch.rand(1, 3, 128, 128)
    layer = full_studio.settings.coarse_layer
    for _ in range(2):
        ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        for step in range(2):  # the second draw is another one
            how = {"timestep": 101, "coarse": layer, "fine": None}
            found = diffusion.capture(images, generator=[ours], **how)
            expected = plain.capture(images, generator=[theirs], **how)
            assert found.coarse_q.equal(expected.coarse_q) and ours.get_state().equal(theirs.get_state()), step
    assert memo.made["diffusion"] == 2


# DiCLIP, on tiny models


@pytest.mark.parametrize(
    "change", [{"bias_strength": 3.0}, {"acr": True}, {"memory_weight": 2.0}, {"rung": "rar"}], ids=str
)
def test_diclip_is_explored_where_there_are_models(full_studio, change):
    explorer, choice = CamExplorer(full_studio), CamChoice(method="diclip", rung="tsa")
    first, looked = explorer.view(choice), full_studio.memo.made["diffusion"]
    assert not np.array_equal(explorer.view(replace(choice, **change)).pixels, first.pixels)
    assert full_studio.memo.made["diffusion"] == looked > 0
    with pytest.raises(ValueError, match="knows the dataset's classes alone"):
        explorer.view(replace(choice, words=("zebra",)))
    own = explorer.view(replace(choice, rung="vce", words=("zebra",)))
    assert own.classes[-1] == "zebra" and "zebra" in own.doubts[0]


def test_what_lacks_is_said_and_switched_off(studio, full_studio):
    assert "diclip pretrain diffusion" in studio.lacks and full_studio.lacks is None
    boards = explore_cams(studio), explore_patches(studio)
    assert "diclip" not in boards[0]["method"].options and "biased" not in boards[1]["kind"].options
    assert all(boards[1][name].disabled for name in ("layer", "layer_head", "timestep", "seed"))
    for board in boards:
        said = [x.value for x in board.box.children[1].children if isinstance(x, widgets.HTML)]
        assert sum("is off: there is no diffusion model" in text for text in said) == 1
    board = explore_cams(full_studio, CamChoice(method="diclip", rung="vce"))
    assert not board["bias_strength"].disabled and not board["memory_weight"].disabled
    before = board.picture.value
    board["bias_strength"].value = 3.5
    assert board.picture.value != before and "b00020" not in board.line.value


# Pictures


def test_pictures_are_laid_out_as_panels():
    panel = pictures.Panel("title", np.full((50, 80, 3), 7, np.uint8), (255, 0, 0))
    sheet = pictures.table([panel] * 4, columns=3)
    assert sheet.shape == (2 * (50 + pictures.TITLE) + pictures.GAP, 3 * 80 + 2 * pictures.GAP, 3)
    assert (sheet[pictures.TITLE : pictures.TITLE + 50, 80 + pictures.GAP : 160 + pictures.GAP] == 7).all()
    assert (sheet[8, 4] == (255, 0, 0)).all()
    decoded = np.asarray(Image.open(io.BytesIO(pictures.png(sheet))))
    assert np.array_equal(decoded, sheet)


def test_maps_lie_over_grey():
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    grey = picture.mean(2).astype(np.uint8)
    clear = pictures.overlay(picture, torch.rand(4, 6), opacity=0)
    assert np.abs(clear.astype(int) - grey[..., None]).max() <= 1
    dark, bright = (pictures.overlay(picture, np.full((4, 6), value), opacity=1) for value in (0, 1))
    assert dark.mean() < 5 and bright.mean() > 200
    labels = pictures.painted(np.array([[0, 1], [255, 2]]), (4, 4, 3))
    assert labels[0, 0].tolist() == [0, 0, 0] and labels[3, 0].tolist() == [224] * 3
    assert tuple(labels[0, 3].tolist()) == pictures.colour_of(0)


def test_a_loaded_clip_is_enough(tiny_clip, models):
    studio = Studio(load_settings(**models), clip=load_clip(tiny_clip))
    assert studio.small and CamExplorer(studio).view(CamChoice()).pixels.ndim == 3
