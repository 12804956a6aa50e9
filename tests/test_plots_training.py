"""Test that figures about trainings show what was logged, and nothing else."""

import matplotlib.pyplot as plt

from diclip import plots_training as pictures

RECORDS = [
    {"step": 5, "loss": 3.0, "seg": 2.5, "div": 0.5},
    {"step": 10, "loss": 2.0, "seg": 1.5, "div": 0.4, "tune_miou": 20.0},
    {"step": 20, "loss": 1.0, "seg": 0.9, "div": 0.3, "tune_miou": 30.0},
]
POINTS = [
    {"name": "tags of 400", "kind": "tags", "minutes": 133.3, "miou": 46.0, "low": 45.0, "high": 47.5},
    {"name": "masks of 33", "kind": "masks", "minutes": 131.8, "miou": 40.0, "low": None, "high": None},
    {"name": "masks of 400", "kind": "masks", "minutes": 1598.0, "miou": 60.0, "low": 59.0, "high": 61.0},
]


def shown(figure) -> str:
    texts = [t.get_text() for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label, *a.texts)]
    legends = [a.get_legend() for a in figure.axes if a.get_legend()]
    return " ".join([*texts, figure.get_suptitle(), *(t.get_text() for x in legends for t in x.get_texts())])


def test_a_curve_for_each_part_that_was_logged():
    before = plt.get_fignums()
    figure = pictures.learning(RECORDS, steps=40, title="step 20")
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2.5, 1.5, 0.9], [0.5, 0.4, 0.3]]
    (judged,) = right.lines
    assert list(judged.get_xdata()) == [10, 20] and list(judged.get_ydata()) == [20.0, 30.0]
    assert left.get_xlim() == right.get_xlim() and left.get_xlim()[1] > 40
    words = shown(figure)
    assert all(word in words for word in ("step 20", "decoder", "pairs of patches", "loss", "mIoU on tune (%)"))
    assert "adapter" not in words and plt.get_fignums() == before


def test_a_training_that_has_not_begun():
    figure = pictures.learning([], steps=40)
    assert not any(axis.lines for axis in figure.axes) and figure.axes[0].get_legend() is None


def test_costs_stand_at_their_minutes():
    before = plt.get_fignums()
    figure = pictures.costs(POINTS, title="val")
    (axis,) = figure.axes
    dots = {float(line.get_xdata()[0]): line for line in axis.lines if line.get_marker() == "o"}
    spreads = [list(line.get_ydata()) for line in axis.lines if line.get_marker() != "o"]
    assert {x: float(line.get_ydata()[0]) for x, line in dots.items()} == {133.3: 46.0, 131.8: 40.0, 1598.0: 60.0}
    assert spreads == [[45.0, 47.5], [59.0, 61.0]]
    assert dots[131.8].get_color() == dots[1598.0].get_color() != dots[133.3].get_color()
    assert axis.get_xscale() == "log" and axis.get_xlim()[0] < 131.8 < 1598 < axis.get_xlim()[1]
    assert all(word in shown(figure) for word in ("tags of 400", "masks of 33", "minutes of annotation", "val"))
    assert plt.get_fignums() == before


def test_names_of_equal_minutes_do_not_cover_one_another():
    near = {**POINTS[0], "name": "more tags", "miou": 46.2}
    (axis,) = pictures.costs([*POINTS, near]).axes
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert heights["tags of 400"] == 46.0 and heights["more tags"] >= 48.5 and heights["masks of 400"] == 60.0
