"""The diffusion explorer, on tiny models: one step of the U-Net for each timestep and draw, and what comes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diclip.correlation import acr, cluster
from diclip.explorers import DiffusionChoice, DiffusionExplorer, Pick, Studio, explore_diffusion
from diclip.explorers.diffusion import in_colours
from diclip.methods.diclip import DiCLIP
from diclip.settings import load_settings


@pytest.fixture(scope="module")
def explorer(tiny_clip, tiny_world, tiny_diffusion):
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion)}
    return DiffusionExplorer(Studio(load_settings(**models, data_root=str(tiny_world), device="cpu")))


def test_it_shows_the_systems_correlation(explorer):
    choice, studio = DiffusionChoice(Pick(index=1), timestep=51, seed=4, threshold=0.4), explorer.studio
    batch = studio.batch(studio.photo(choice.pick), (), studio.classes)
    before, after, owner, grid = explorer.correlations(choice, batch)
    changed = {"method": "diclip", "diffusion_timesteps": (51,), "seed": 4, "correlation_threshold": 0.4}
    settings = studio.settings.model_copy(update=changed)
    expected = DiCLIP(settings, studio.frozen, studio.diffusion._diffusion, None).walked(batch)[0]
    torch.testing.assert_close(before, expected[0], atol=1e-5, rtol=0)
    ids = cluster(expected, grid=grid)
    assert owner.equal(ids[0])
    torch.testing.assert_close(after, acr(expected, ids)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "steps"),
    [({"row": 2}, 0), ({"opacity": 0.1}, 0), ({"threshold": 0.6}, 0), ({"timestep": 701}, 1), ({"seed": 9}, 1)],
    ids=str,
)
def test_the_unet_runs_only_for_another_timestep_or_draw(explorer, change, steps):
    first, made = explorer.view(DiffusionChoice()), explorer.studio.memo.made
    before = made["diffusion"]
    assert not np.array_equal(explorer.view(replace(DiffusionChoice(), **change)).pixels, first.pixels)
    assert made["diffusion"] - before == steps


def test_colours_are_one_projection_of_both():
    rows = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    before, after = in_colours(rows, rows.roll(1, 0))
    assert before.shape == (64, 3) and min(before.min(), after.min()) == 0 and max(before.max(), after.max()) == 1
    torch.testing.assert_close(before.roll(1, 0), after)


@pytest.mark.parametrize(("name", "value"), [("timestep", 301), ("seed", 2), ("row", 1), ("column", 3), ("index", 2)])
def test_every_widget_changes_the_picture(explorer, name, value):
    board = explore_diffusion(explorer.studio)
    before = board.picture.value
    board[name].value = value
    assert board.picture.value != before and "b00020" not in board.line.value


def test_without_a_model_it_says_so_in_one_line(explorer, tmp_path):
    settings = explorer.studio.settings.model_copy(update={"diffusion_model": (str(tmp_path / "none"),)})
    studio = Studio(settings, clip=explorer.studio.frozen)
    with pytest.raises(ValueError, match="there is no diffusion model in .*diclip pretrain diffusion"):
        DiffusionExplorer(studio).view(DiffusionChoice())
    board = explore_diffusion(studio)
    assert "there is no diffusion model" in board.line.value and board["timestep"].disabled and board["seed"].disabled
    with pytest.raises(ValueError, match="there is no patch"):
        explorer.view(DiffusionChoice(row=99))
