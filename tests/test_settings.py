from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diclip.presets import PRESETS, QUIRKS
from diclip.settings import ROOT, Attention, Settings, load_settings
from diclip.vocabulary import BACKGROUND_WORDS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
    settings = load_settings(preset)
    assert settings.preset == preset
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_mini_is_the_default_and_presets_differ():
    assert load_settings() == Settings() == load_settings("mini")
    assert (load_settings().image_size, load_settings("voc").image_size) == (128, 320)
    assert load_settings("voc").clip_pretrained == "openai"
    assert len(load_settings("voc").background_words) == 25
    assert len(load_settings("coco").background_words) == 23


def test_overrides_win_over_the_preset():
    assert load_settings("voc", image_size=224).image_size == 224


@pytest.mark.parametrize(
    ("preset", "tau", "pool"), [("mini", 0.4, "model"), ("voc", 0.4, "patches"), ("coco", 0.7, "patches")]
)
def test_a_method_changes_a_preset_and_overrides_win(preset, tau, pool):
    settings = load_settings(preset, method="clip-es")
    assert (settings.tau_box, settings.caa_layers, settings.pixel_norm, settings.gradcam_pool) == (tau, 8, "clip", pool)
    assert (load_settings(preset).tau_box, load_settings(preset).caa_layers) != (tau, 8)
    assert load_settings(preset, method="clip-es", tau_box=0.5).tau_box == 0.5
    assert load_settings(**settings.model_dump(mode="json")) == settings


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_numbers_may_come_as_strings(batch_size, tau):
    settings = load_settings(batch_size=str(batch_size), tau_box=str(tau), baselines="false")
    assert (settings.batch_size, settings.tau_box, settings.baselines) == (batch_size, tau, False)


@pytest.mark.parametrize("text", ["sky, dark grass", "[sky, dark grass]", "['sky', 'dark grass']"])
def test_words_may_come_as_one_string(text):
    assert load_settings(background_words=text).background_words == ("sky", "dark grass")


@pytest.mark.parametrize("text", ["51,101", "[51, 101]", " 51, 101 "])
def test_lists_of_numbers_may_come_as_one_string(text):
    settings = load_settings(diffusion_timesteps=text, coarse_heads="3", fine_heads=[1])
    assert (settings.diffusion_timesteps, settings.coarse_heads, settings.fine_heads) == ((51, 101), (3,), (1,))


def test_systems_and_distances_may_come_as_one_string():
    settings = load_settings(systems="clip, diclip", par_dilations="[1, 3]")
    assert (settings.systems, settings.par_dilations) == (("clip", "diclip"), (1, 3))
    with pytest.raises(ValueError, match="systems"):
        load_settings(systems="clip, clop")


def test_models_may_come_as_one_string():
    settings = load_settings(diffusion_model="data/own, hf-hub:owner/name, /tmp/model")
    assert settings.diffusion_model == (str(ROOT / "data/own"), "hf-hub:owner/name", "/tmp/model")
    assert settings.model_dump(mode="json")["diffusion_model"] == ["data/own", "hf-hub:owner/name", "/tmp/model"]


def test_no_background_words():
    assert load_settings(background_words="").background_words == ()
    assert load_settings().background_words == BACKGROUND_WORDS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bach_size": 4}, "unknown setting 'bach_size': did you mean 'batch_size'?"),
        ({"zzz": 4}, "unknown setting 'zzz': `diclip --help` lists them all"),
        ({"batch_size": "many"}, "setting 'batch_size' is 'many', but it should be a valid integer"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"image_size": 100}, "multiple of 8"),
        ({"tau_box": "nan"}, "finite number"),
        ({"attention": "qq2"}, "'qq+2kk'"),
        ({"background_words": ["sky", False]}, "is False, but it should be a valid string"),
        ({"template": "no place for a name"}, "pattern"),
        ({"diffusion_model": ""}, "setting 'diffusion_model' is '', but it should have at least 1 item"),
        ({"diffusion_timesteps": "101, -1"}, "setting 'diffusion_timesteps' is -1, but it should be greater"),
        ({"fine_heads": "first"}, "setting 'fine_heads' is 'first', but it should be a valid integer"),
        ({"device": "gpu"}, "pattern"),
        ({"shard_index": 2, "num_shards": 2}, "setting 'shard_index' is 2, expected 0 to 1"),
        ({"method": "clipes"}, "setting 'method' is 'clipes', but it should be 'clip', 'clip-es'"),
        ({"preset": "imagenet"}, "preset is 'imagenet', expected one of mini, voc, coco"),
    ],
)
def test_errors_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=".") as error:
        load_settings(**overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_named():
    with pytest.raises(ValueError, match="'seed' is -1.*'bach_size'"):
        load_settings(bach_size=1, seed=-1)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().seed = 1


def test_paths_are_relative_to_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(data_root="elsewhere", run_dir=tmp_path)
    assert settings.data_root == ROOT / "elsewhere"
    assert settings.clip_model == str(ROOT / "data/mini/clip")
    assert load_settings(data_root="~/data").data_root == Path.home() / "data"
    written = settings.model_dump(mode="json")
    assert (written["data_root"], written["run_dir"]) == ("elsewhere", str(tmp_path))
    assert written["clip_model"] == "data/mini/clip"


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "hf-hub:someone/model"])
def test_names_of_models_are_no_paths(name):
    assert load_settings(clip_model=name).clip_model == name


def test_the_vocabulary_follows_the_settings():
    prompts = load_settings(template="a {}.", background_words="sky").vocabulary().prompts()
    assert len(prompts) == 21 and prompts[2] == "a bird avian." and prompts[-1] == "a sky."
    assert load_settings().vocabulary(("zebra", "bird")).prompt_names == ("zebra", "bird avian")
    assert load_settings("coco").vocabulary(("tie", "bird")).prompt_names == ("necktie", "bird avian")


def test_layers_are_those_of_the_mini_model():
    """Both lie on the finest level; test_real_size_diffusion has the presets'."""
    import torch

    from diclip.pretrain.diffusion import build_unet
    from diclip.taps import attentions

    with torch.device("meta"):
        layers = attentions(build_unet())
    settings = load_settings()
    assert (layers[settings.coarse_layer].stride, layers[settings.fine_layer].stride) == (1, 1)
    assert max(settings.coarse_heads) < layers[settings.coarse_layer].heads
    assert max(settings.fine_heads) < layers[settings.fine_layer].heads


@pytest.mark.parametrize("preset", PRESETS)
def test_quirks_are_no_default(preset):
    clean, parity = load_settings(preset).model_dump(), load_settings(preset, **QUIRKS).model_dump()
    assert {name for name in clean if clean[name] != parity[name]} == set(QUIRKS)


def test_every_setting_is_described():
    assert all(field.description for field in Settings.model_fields.values())


def test_attentions_are_those_of_the_surgery_path():
    surgery = pytest.importorskip("diclip.surgery")
    assert set(get_args(Attention)) == set(surgery.ATTENTIONS)


def test_scales_of_crops_are_in_order():
    assert load_settings(crop_scales="0.5, 2").crop_scales == (0.5, 2)
    with pytest.raises(ValueError, match="setting 'crop_scales' is 2 to 0.5, expected the smaller number first"):
        load_settings(crop_scales="2, 0.5")
