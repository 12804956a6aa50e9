"""Test the evaluation of a whole system on tiny random models: what is compared, with what, and by which labels."""

import json

import numpy as np
import pytest

from diclip.data import batches, open_dataset
from diclip.evaluate import measure, report
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.methods.diclip import DiCLIP
from diclip.score import image_counts
from diclip.settings import load_settings

LADDER = ["clip", "intra", "vce", "tsa", "caa", "rar"]
LOST = ["without_vce", "without_tsa", "without_caa", "without_rar"]


@pytest.fixture(scope="module")
def system(tiny_world, tiny_clip, tiny_diffusion, tiny_memory):
    """Measure DiCLIP, and itself without each part; return it and what was counted."""
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    settings = load_settings(method="diclip", ablate=True, data_root=str(tiny_world), device="cpu", **models)
    settings = settings.model_copy(update={"batch_size": 4, "rar_rounds": 2})
    method = build_method(settings)
    return method, measure(settings, method=method)


def mean_iou(counts: np.ndarray) -> float:
    """Average, over the classes that have true pixels, hits / (guessed + true - hits), in per cent."""
    rates = [100 * hits / (guessed + true - hits) for hits, guessed, true in counts.sum(0).tolist() if true]
    return sum(rates) / len(rates)


def test_the_report_of_a_system(system):
    _, measured = system
    found = json.loads(json.dumps(report(measured), allow_nan=False))
    assert list(found["ladder"]) == list(found["intervals"]) == LADDER == list(found["classes"])
    assert list(found["gains"]) == [f"{a} to {b}" for a, b in zip(LADDER, LADDER[1:], strict=False)]
    assert list(found["baselines"]) == list(found["baseline_intervals"]) == ["grabcut", "clip_rar"]
    assert list(found["lost"]) == LOST
    tuned, plain = found["miou_tuned_background"], found["miou_one_minus_max"]
    for kind, values in (("tuned", tuned), ("one_minus_max", plain)):
        assert list(values) == list(found["background_on_tune"]) == [*LADDER, "clip_rar", *LOST]
        assert values == {k: pytest.approx(mean_iou(c), abs=0.0051) for k, c in getattr(measured, kind).items()}
    assert found["ladder"] == {**{rung: tuned[rung] for rung in LADDER[:4]}, "caa": plain["caa"], "rar": plain["rar"]}
    grabcut = pytest.approx(mean_iou(measured.baselines["grabcut"]), abs=0.0051)
    assert found["baselines"] == {"grabcut": grabcut, "clip_rar": plain["clip_rar"]}
    assert len(set(plain.values())) > 8  # what is compared differs
    for name, (value, low, high) in found["lost"].items():
        assert value == pytest.approx(plain["rar"] - plain[name], abs=0.0151) and low <= value <= high, name
    assert found["lost"]["without_rar"] == found["gains"]["caa to rar"]


def test_its_labels_are_stretched_at_the_images_size(system):
    method, measured = system
    settings = measured.settings
    counts = {again: np.zeros((21, 3)) for again in (True, False)}
    for batch in batches(open_dataset(settings), image_size=128, batch_size=4):
        maps = dict(method.rungs(batch))["rar"]
        for again, sums in counts.items():
            masks = pseudo_labels(maps, batch.sizes, restretch=again)
            for mask, truth in zip(masks, batch.masks, strict=True):
                sums += image_counts(mask, truth, num_classes=20)
    np.testing.assert_array_equal(measured.one_minus_max["rar"].sum(0), counts[True])
    assert not np.array_equal(counts[True], counts[False])


def test_the_best_background_of_stretched_labels_is_chosen(system):
    method, measured = system
    tune = measured.settings.model_copy(update={"split": "tune"})
    scores, counts = np.arange(101) / 100, np.zeros((101, 21, 3))
    for batch in batches(open_dataset(tune), image_size=128, batch_size=4):
        maps = dict(method.rungs(batch))["vce"]
        for sums, score in zip(counts, scores, strict=True):
            masks = pseudo_labels(maps, batch.sizes, rule="fixed", score=float(score), restretch=True)
            for mask, truth in zip(masks, batch.masks, strict=True):
                sums += image_counts(mask, truth, num_classes=20)
    reached = [mean_iou(sums[None]) for sums in counts]
    assert reached[round(100 * measured.background["vce"])] == max(reached) > min(reached)


def test_only_what_was_measured_is_lost(system):
    """The method's own settings decide what it yields."""
    whole, _ = system
    settings = whole.settings.model_copy(update={"background": "fixed", "baselines": False, "limit": 1})
    silent = settings.model_copy(update={"ablate": False})
    bare = DiCLIP(silent, whole.clip, whole.diffusion, whole.memory)
    found = report(measure(settings, method=bare))
    assert found["lost"] == {} and list(found["background_on_tune"]) == [*LADDER, "clip_rar"]
    found = report(measure(silent, method=whole))
    assert list(found["lost"]) == LOST and list(found["baselines"]) == ["clip_rar"]
