"""Test that each figure is made of what it is given, and that none is left in pyplot's hands."""

import io
import typing
from inspect import getmembers, isfunction

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from diclip import plots
from diclip.data.minivoc import palette

PICTURE = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
BYTES = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
MASK = torch.tensor([[0, 8], [12, 255]])
HEAT = torch.linspace(0, 1, 12).view(3, 4)

# function -> (figure, number of axes, words that it must show)
FIGURES = {
    "picture_grid": lambda: (
        plots.picture_grid([PICTURE, BYTES, PICTURE], titles=["a", "b", "c"], columns=2),
        4,
        "abc",
    ),
    "map_table": lambda: (
        plots.map_table(
            [PICTURE, BYTES], {"clip": [HEAT, HEAT], "intra": [HEAT, HEAT]}, names=["x", "y"], points=[(0, 0), (1, 1)]
        ),
        2 * 3 + 1,  # and the colour bar
        ["clip", "intra", "x", "y"],
    ),
    "mask_table": lambda: (
        plots.mask_table([PICTURE], {"truth": [MASK], "caa": [MASK]}, [f"class{i}" for i in range(20)]),
        3,
        ["image", "truth", "caa", "class7", "class11"],
    ),
    "rung_table": lambda: (
        plots.rung_table([PICTURE, BYTES], {"clip": [HEAT, HEAT]}, {"truth": [MASK, MASK]}, names=["x", "y"]),
        3 * 2,
        ["image", "clip", "truth", "x", "y"],
    ),
    "ladder": lambda: (
        plots.ladder({"clip": 20.0, "intra": 41.0}, {"clip": [18, 23], "intra": [40, 44]}, baselines={"grabcut": 26.0}),
        1,
        ["20.0", "41.0", "grabcut 26.0", "clip", "intra", "mIoU (%)"],
    ),
    "heat_matrix": lambda: (plots.heat_matrix(HEAT, xlabel="dim", ylabel="token", title="m"), 1, ["dim", "token", "m"]),
    "curves": lambda: (
        plots.curves([1, 2, 3], {"u": [1, 2, 3], "v": [3, 2, 1]}, xlabel="block", ylabel="likeness", title="over"),
        1,
        ["u", "v", "block", "likeness", "over"],
    ),
    "lines": lambda: (
        plots.lines({"u": ([1, 2, 5], [1, 2, 3]), "v": ([0, 9], [3, 2])}, xlabel="step", ylabel="loss"),
        1,
        ["u", "v", "step", "loss"],
    ),
    "scatter": lambda: (
        plots.scatter(np.array([10, 90]), np.array([20, 80]), xlabel="before", ylabel="after", marked=1),
        1,
        ["before", "after"],
    ),
    "bars": lambda: (
        plots.bars({"auc": 0.745, "acc": 0.2}, xlabel="share", limit=0.77, intervals={"auc": (0.7, 0.8)}),
        1,
        ["0.745", "0.2", "auc", "share"],
    ),
}


def words(figure: Figure) -> set[str]:
    return {item.get_text().strip() for item in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def public_figures() -> set[str]:
    functions = [(n, f) for n, f in getmembers(plots, isfunction) if f.__module__ == plots.__name__ and n[0] != "_"]
    return {name for name, function in functions if typing.get_type_hints(function).get("return") is Figure}


def test_every_figure_is_tested():
    assert public_figures() == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    before = plt.get_fignums()
    figure, axes, shown = FIGURES[name]()
    assert isinstance(figure, Figure) and len(figure.axes) == axes
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert set(shown) <= words(figure)
    assert plt.get_fignums() == before == []


def test_panels_without_ticks():
    figure, axes = plots.panels(2, 3)
    assert axes.shape == (2, 3) and len(figure.axes) == 6 and not any(axis.axison for axis in axes.flat)


def test_pictures_of_both_kinds_keep_their_pixels():
    grid = plots.picture_grid([PICTURE * 3 - 1, BYTES])
    first, second = (axis.images[0].get_array() for axis in grid.axes)
    np.testing.assert_allclose(first, np.clip(PICTURE.permute(1, 2, 0).numpy() * 3 - 1, 0, 1))
    np.testing.assert_array_equal(second, BYTES)


def test_a_map_covers_its_picture():
    _, axes = plots.panels(1, 1)
    drawn = plots.draw_map(axes[0, 0], PICTURE, HEAT, limits=(0, 2))
    assert axes[0, 0].images[0].get_extent() == drawn.get_extent() == [-0.5, 29.5, 19.5, -0.5]
    assert drawn.get_clim() == (0, 2)
    np.testing.assert_allclose(drawn.get_array(), HEAT)


def test_labels_wear_vocs_colours():
    _, axes = plots.panels(1, 1)
    plots.draw_labels(axes[0, 0], MASK)
    colours = axes[0, 0].images[0].get_array()
    assert colours[0, 1].tolist() == palette()[8].tolist() and colours[1, 0].tolist() == palette()[12].tolist()
    assert colours[0, 0].tolist() == [0, 0, 0] and colours[1, 1].tolist() == [224] * 3


def test_ladder_draws_the_intervals():
    figure = plots.ladder({"clip": 20.0, "intra": 41.0}, {"intra": [40, 44], "clip": [18, 23]})
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == [20, 41]
    segments = axis.collections[0].get_segments()
    assert [sorted(point[1] for point in segment) for segment in segments] == [[18, 23], [40, 44]]
    assert axis.get_legend() is None and axis.get_ylim()[0] == 0


def test_bars_draw_the_intervals_that_there_are():
    figure = plots.bars({"auc": 0.7, "acc": 0.2}, xlabel="share", intervals={"auc": (0.6, 0.9)})
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.7, 0.2])
    segments = axis.collections[0].get_segments()
    ends = [sorted(point[0] for point in segment) for segment in segments]
    np.testing.assert_allclose(ends, [[0.6, 0.9], [0.2, 0.2]])
    texts = {text.get_text().strip(): text.get_position()[0] for text in axis.texts}
    assert texts == pytest.approx({"0.7": 0.9, "0.2": 0.2})  # beside the whisker, not on it
    assert not plots.bars({"auc": 0.7}, xlabel="share").axes[0].collections


def test_points_are_ringed_in_the_whole_row():
    figure = plots.map_table([PICTURE, BYTES], {"clip": [HEAT, HEAT]}, points=[(0.25, 0.5), (1, 0)])
    for axis in figure.axes[:2]:  # a picture of 20 x 30 pixels, whose corner is at -0.5
        assert {tuple(line.get_xydata()[0]) for line in axis.lines} == {(14.5, 4.5)}
        assert all(line.get_fillstyle() == "none" for line in axis.lines)
    assert {tuple(line.get_xydata()[0]) for axis in figure.axes[2:4] for line in axis.lines} == {(-0.5, 15.5)}
    assert not [line for axis in plots.map_table([PICTURE], {"clip": [HEAT]}).axes[:2] for line in axis.lines]
