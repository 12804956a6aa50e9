"""Test that figures about scores show what went wrong, and where."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb

from diclip import plots_evaluation as pictures
from diclip.score import image_confusion
from diclip.tally import ERRORS, errors_of

MASK = torch.tensor([[0, 0, 1], [2, 1, 0], [1, 2, 0]])
TRUTH = torch.tensor([[0, 1, 1], [1, 0, 255], [255, 2, 0]])
IMAGE = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))


def shown(figure) -> str:
    texts = [t.get_text() for a in figure.axes for t in (a.title, a.xaxis.label, *a.texts, *a.get_yticklabels())]
    return " ".join(texts + [t.get_text() for legend in figure.legends for t in legend.get_texts()])


def test_outcomes_by_hand():
    assert pictures.outcomes(MASK, TRUTH).tolist() == [[0, 4, 1], [3, 2, 255], [255, 1, 0]]


def test_outcomes_are_what_the_tally_counts():
    rng = np.random.default_rng(0)
    mask, truth = (torch.from_numpy(rng.choice(ids, (40, 30))) for ids in ([0, 1, 2, 3], [0, 1, 2, 3, 255]))
    kinds = pictures.outcomes(mask, truth)
    found = tuple(int((kinds == 2 + index).sum()) for index in range(3))
    assert found == errors_of(image_confusion(mask, truth, num_classes=3)) and min(found) > 0
    assert list(pictures.OUTCOMES)[2:] == list(ERRORS) and ((kinds == 255) == (truth == 255).numpy()).all()


def test_errors_wear_their_colours():
    before = plt.get_fignums()
    figure = pictures.error_table([IMAGE, IMAGE], [MASK, TRUTH], [TRUTH, TRUTH], names=["cat: 12", "dog: 99"])
    assert len(figure.axes) == 8 and plt.get_fignums() == before
    drawn = figure.axes[6].images[0].get_array()  # the last row's first column
    colours = list(pictures.OUTCOMES.values())
    assert [to_hex(drawn[y, x]) for y, x in ((0, 0), (0, 2), (1, 1), (1, 0), (0, 1))] == [
        to_hex(to_rgb(colours[kind])) for kind in (0, 1, 2, 3, 4)
    ]
    assert to_hex(drawn[1, 2]) == pictures.UNKNOWN
    assert all(word in shown(figure) for word in ("cat: 12", "dog: 99", "labels", "truth", "errors", *ERRORS))


def test_a_confusion_is_shown_by_its_classes_shares():
    figure = pictures.confusion([[90, 10], [0, 0]], ["background", "cat"], title="val")
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn[0], [90**0.5, 10**0.5])
    assert np.isnan(np.ma.filled(drawn[1], np.nan)).all()  # no true pixel, no share
    assert all(word in shown(figure) for word in ("background", "cat", "val", "prediction"))


def test_dots_stand_at_their_values():
    before = plt.get_fignums()
    values = {"cat": {"clip": 40.0, "excel": 50.0}, "dog": {"clip": 20.0, "excel": None}}
    figure = pictures.dots(values, xlabel="IoU (%)", intervals={"dog": {"clip": (15.0, 30.0)}})
    (axis,) = figure.axes
    dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "o"]
    whiskers = [list(line.get_xdata()) for line in axis.lines if line.get_marker() != "o"]
    assert sorted(float(x[0]) for x in dots) == [20, 40, 50] and whiskers == [[15, 30]]
    rows = {float(line.get_xdata()[0]): round(float(line.get_ydata()[0])) for line in axis.lines}
    assert rows[40.0] == rows[50.0] == 0 and rows[20.0] == 1
    assert all(word in shown(figure) for word in ("cat", "dog", "clip", "excel", "IoU (%)"))
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first group is on top
    assert plt.get_fignums() == before
