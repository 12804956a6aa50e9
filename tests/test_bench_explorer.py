"""The benchmark of the explorers, on tiny models: what it counts, not how long that takes."""

import pytest

from diclip.bench.explorer import LIMITS, Act, _check, _passes, acts, bench_explorer, explorer_table
from diclip.explorers import Studio
from diclip.settings import load_settings


@pytest.fixture(scope="module")
def settings(tiny_clip, tiny_diffusion, tiny_memory, tmp_path_factory):
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    return load_settings(**models, device="cpu", bench_repeats=2)


def quiet(items, **_):
    return items


def test_every_act_is_timed_and_laid_out(settings):
    result = bench_explorer(settings, quiet)
    answers = result["answers"]
    assert {row["needs"] for row in answers} == set(LIMITS) and len({row["act"] for row in answers}) == len(answers)
    assert all(0 < row["median"] <= row["worst"] and row["processor"] > 0 for row in answers)
    assert all(row["kept"] == (row["median"] < LIMITS[row["needs"]]) for row in answers)
    lines = explorer_table(result).splitlines()
    assert len(lines) == 2 + len(answers) + 2 and "2 times each" in lines[-1]


def test_each_choice_is_another_one(settings):
    for act in acts(Studio(settings)):
        choices = [act.start, *(act.change(act.start, n) for n in range(1, 5))]
        assert len(set(choices)) == len(choices), act.name


def test_without_a_diffusion_model_its_acts_are_left_out(settings, tmp_path):
    lacking = settings.model_copy(update={"diffusion_model": (str(tmp_path / "none"),)})
    assert {act.needs for act in acts(Studio(lacking))} == {"nothing new", "CLIP"}


def test_an_act_that_needs_more_than_it_says_is_an_error(settings):
    studio = Studio(settings)
    picture = next(act for act in acts(studio) if act.name == "CAM: another picture")
    cheap = Act("cheap", "nothing new", *picture[2:])
    cheap.view(cheap.start)
    before = _passes(studio)
    cheap.view(cheap.change(cheap.start, 2))
    with pytest.raises(ValueError, match="cheap needs nothing new, but passes of CLIP were made"):
        _check(cheap, before, _passes(studio))
    _check(picture, before, _passes(studio))
