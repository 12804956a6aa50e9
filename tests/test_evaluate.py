"""Test evaluation on a tiny random CLIP and a dozen pictures: what is chosen where, and what is reported."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diclip.clip import load_clip
from diclip.data import batches, open_dataset
from diclip.evaluate import choose_background, evaluate, measure, recognition, report
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.report import protocol
from diclip.score import miou
from diclip.settings import Settings, load_settings
from diclip.vocabulary import VOC_CLASSES


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return load_clip(tiny_clip)


@pytest.fixture
def settings(tiny_world, tiny_clip) -> Settings:
    return load_settings(
        data_root=str(tiny_world), clip_model=str(tiny_clip), device="cpu", baselines=False, batch_size=1
    )


@pytest.fixture
def world(tiny_world, tmp_path):
    """Copy the pictures, so that a test may change them."""
    shutil.copytree(tiny_world, tmp_path / "world")
    return tmp_path / "world"


def paint_masks(world, split: str, value) -> None:
    """Replace the masks of a split by what `value(mask)` makes of them."""
    for path in (world / "minivoc-0/SegmentationClass").glob(f"{split}_*.png"):
        with Image.open(path) as image:
            mask = np.array(image)
        Image.fromarray(value(mask).astype(np.uint8)).save(path)


def test_the_report(settings):
    settings = settings.model_copy(update={"baselines": True, "batch_size": 4})
    found = json.loads(json.dumps(evaluate(settings), allow_nan=False))
    assert list(found["ladder"]) == list(found["intervals"]) == ["clip", "intra", "caa"]
    assert list(found["gains"]) == ["clip to intra", "intra to caa"]
    assert list(found["baselines"]) == list(found["baseline_intervals"]) == ["grabcut"] and found["lost"] == {}
    for values, spread in (("ladder", "intervals"), ("baselines", "baseline_intervals")):
        for name, value in found[values].items():
            low, high = found[spread][name]
            assert 0 <= low <= high <= 100 and 0 <= value <= 100 and low < high, name
    change = found["ladder"]["intra"] - found["ladder"]["clip"]
    assert found["gains"]["clip to intra"][0] == pytest.approx(change, abs=0.011)
    raw, refined = found["miou_tuned_background"], found["miou_one_minus_max"]
    assert found["ladder"] == {"clip": raw["clip"], "intra": raw["intra"], "caa": refined["caa"]}
    assert list(found["background_on_tune"]) == ["clip", "intra", "caa"]
    assert set(found["classes"]["caa"]) == {"background", *VOC_CLASSES}
    assert found["images"] == 6 and found["settings"]["split"] == "val"
    assert load_settings(**found["settings"]) == settings
    assert {"torch", "open_clip_torch"} <= set(found["versions"]["packages"])
    assert 0 <= found["recognition"]["tag_map"] <= 100
    assert (
        found["protocol"].items()
        >= {
            "split": "val of minivoc (seed 0), 6 images",
            "tags": "given",
            "scales": "1 of 128 px",
            "flip": "no",
            "CRF": "no",
            "seeds": "0 (one run)",
            "masks used for choosing": "tune, for background scores",
        }.items()
    )


def test_the_report_says_what_went_wrong(settings, clip):
    """Count all pixels of each rung again, under its own rule."""
    method = build_method(settings, clip)
    measured = measure(settings, method=method)
    found = json.loads(json.dumps(report(measured), allow_nan=False))
    wrong = {rung: np.zeros(3) for rung in ("clip", "intra", "caa")}
    dataset, pixels = open_dataset(settings), 0
    for batch in batches(dataset, image_size=128, batch_size=1):
        (truth,) = batch.masks
        pixels += int((truth != 255).sum())
        for rung, maps in method.rungs(batch):
            rule = "one_minus_max" if rung == "caa" else "fixed"
            (mask,) = pseudo_labels(maps, batch.sizes, rule=rule, score=measured.background[rung])
            off, known = mask != truth, truth != 255
            kinds = (off & (truth == 0), off & (truth > 0) & (mask > 0) & known, off & known & (mask == 0))
            wrong[rung] += [int(kind.sum()) for kind in kinds]
    for rung, counts in wrong.items():
        assert list(found["errors"][rung].values()) == pytest.approx(100 * counts / pixels, abs=0.006)
        assert set(found["sizes"][rung]) == {"small", "medium", "large"}
        assert sum(size["regions"] for size in found["sizes"][rung].values()) == measured.tags.sum()
        precision = [x["precision"] for x in found["classes"][rung].values() if x["precision"] is not None]
        assert found["rates"][rung]["precision"] == pytest.approx(np.mean(precision), abs=0.01)
        assert {"boundary IoU", "part recall", "body recall"} < set(found["rates"][rung])
    assert found["confusion"]["rung"] == found["worst"]["rung"] == found["best"]["rung"] == "caa"
    hits = np.trace(found["confusion"]["truth by prediction"])
    assert hits == measured.rung("caa")[..., 0].sum() == pixels - wrong["caa"].sum()
    worst, best = ([row["mIoU"] for row in found[name]["images"]] for name in ("worst", "best"))
    assert worst == sorted(worst) and best == sorted(best, reverse=True) and best[0] >= worst[-1]


def test_a_dataset_without_parts_has_no_recall_on_them(settings, clip, world):
    shutil.rmtree(world / "minivoc-0/SegmentationPart")
    settings = settings.model_copy(update={"data_root": world, "background": "fixed"})
    found = report(measure(settings, method=build_method(settings, clip)))
    assert list(found["rates"]["caa"]) == ["precision", "recall", "boundary IoU"]
    assert found["protocol"]["masks used for choosing"] == "none"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scales": (0.5, 1.0, 1.5), "flip": True}, {"scales": "0.5, 1, 1.5 of 128 px", "flip": "mean"}),
        ({"flip": True, "flip_join": "max", "seed": 3}, {"flip": "max", "seeds": "3 (one run)"}),
        ({"split": "tune"}, {"masks used for choosing": "tune (the images that are scored), for background scores"}),
        ({"dataset": "voc", "num_shards": 4}, {"split": "val of voc, 9 images, shard 0 of 4"}),
    ],
)
def test_the_protocol_names_what_was_done(changed, said):
    versions = {"diclip": "1.2", "commit": "0123456789", "changed": "", "packages": {"torch": "2.11"}}
    found = protocol(load_settings(**changed), versions, images=9)
    assert found.items() >= said.items()
    assert found["versions"] == "diclip 1.2 (0123456), torch 2.11"


def test_counts_are_those_of_the_pseudo_labels(settings, clip):
    """Count again, a pixel at a time, what the report says of one rung."""
    settings = settings.model_copy(update={"background": "fixed", "background_score": 0.3})
    method = build_method(settings, clip)
    found = measure(settings, method=method)
    dataset = open_dataset(settings)
    sums = np.zeros((21, 3))
    for batch in batches(dataset, image_size=settings.image_size, batch_size=1):
        (mask,) = pseudo_labels(dict(method.rungs(batch))["intra"], batch.sizes, rule="fixed", score=0.3)
        known = batch.masks[0] != 255
        for label in range(21):
            guess, truth = (mask == label) & known, (batch.masks[0] == label) & known
            sums[label] += [(guess & truth).sum(), guess.sum(), truth.sum()]
    np.testing.assert_array_equal(found.tuned["intra"].sum(0), sums)
    assert report(found)["ladder"]["intra"] == pytest.approx(float(miou(sums)), abs=0.005)
    assert found.names == dataset.names and found.tags.sum(1).tolist() == [len(s.tags) for s in dataset]


def test_background_is_chosen_on_tune_alone(settings, clip, world):
    settings = settings.model_copy(update={"data_root": world})
    method = build_method(settings, clip)
    before = measure(settings, method=method)
    paint_masks(world, "val", lambda mask: np.zeros_like(mask))
    after = measure(settings, method=method)
    assert after.background == before.background
    assert not np.array_equal(after.tuned["intra"], before.tuned["intra"])
    paint_masks(world, "tune", lambda mask: np.zeros_like(mask))
    empty = choose_background(settings, method)
    assert set(empty) == {"clip", "intra", "caa"} and min(empty.values()) > max(before.background.values())


def test_background_is_low_where_objects_fill_tune(settings, clip, world):
    settings = settings.model_copy(update={"data_root": world})
    tags = json.loads((world / "minivoc-0/tags.json").read_text())
    single = [name for name in tags if name.startswith("tune") and len(tags[name]) == 1]
    (world / "minivoc-0/ImageSets/Segmentation/tune.txt").write_text("\n".join(single))
    label = VOC_CLASSES.index(tags[single[0]][0]) + 1
    (world / "minivoc-0/ImageSets/Segmentation/tune.txt").write_text(single[0])
    paint_masks(world, "tune", lambda mask: np.full_like(mask, label))
    assert max(choose_background(settings, build_method(settings, clip)).values()) < 0.05


def test_a_fixed_background_reads_nothing(settings, clip, world):
    (world / "minivoc-0/ImageSets/Segmentation/tune.txt").unlink()
    settings = settings.model_copy(update={"data_root": world, "background": "fixed", "background_score": 0.25})
    method = build_method(settings, clip)
    assert choose_background(settings, method) == {"clip": 0.25, "intra": 0.25, "caa": 0.25}
    assert measure(settings, method=method).background["intra"] == 0.25
    with pytest.raises(FileNotFoundError, match="no split 'tune'"):
        measure(settings.model_copy(update={"background": "sweep"}), method=method)


def test_shards_add_up(settings, clip):
    settings = settings.model_copy(update={"baselines": True})
    method = build_method(settings, clip)
    whole = measure(settings, method=method)
    shards = [measure(settings.model_copy(update={"shard_index": i, "num_shards": 2}), method=method) for i in (0, 1)]
    assert [len(shard.names) for shard in shards] == [3, 3]
    order = [name for shard in shards for name in shard.names]
    assert sorted(order) == sorted(whole.names)
    rows = [whole.names.index(name) for name in order]
    assert shards[0].background == shards[1].background == whole.background
    for kind in ("tuned", "one_minus_max", "baselines"):
        for rung, counts in getattr(whole, kind).items():
            parts = np.concatenate([getattr(shard, kind)[rung] for shard in shards])
            np.testing.assert_array_equal(parts, counts[rows], err_msg=f"{kind} {rung}")
    np.testing.assert_allclose(np.concatenate([shard.similarity for shard in shards]), whole.similarity[rows])


def test_an_empty_shard_says_so(settings, clip):
    settings = settings.model_copy(update={"shard_index": 9, "num_shards": 10, "background": "fixed"})
    with pytest.raises(ValueError, match="shard 9 of split 'val' has no images: use fewer shards"):
        measure(settings, method=build_method(settings, clip))


def test_batches_do_not_matter(settings, clip):
    settings = settings.model_copy(update={"background": "fixed"})
    method = build_method(settings, clip)
    one = measure(settings, method=method)
    four = measure(settings.model_copy(update={"batch_size": 4}), method=method)
    for rung in ("clip", "intra", "caa"):
        pixels = np.abs(one.tuned[rung] - four.tuned[rung]).sum()
        assert pixels < 0.002 * one.tuned[rung][..., 2].sum()  # rounding may move a pixel on the edge
    np.testing.assert_allclose(one.similarity, four.similarity, atol=1e-5)


def test_other_splits_and_limits(settings, clip):
    settings = settings.model_copy(update={"background": "fixed", "split": "shift", "limit": 1})
    found = measure(settings, method=build_method(settings, clip))
    assert found.names == ["shift_00000"] and report(found)["images"] == 1


def test_recognition_by_hand():
    similarity = np.array([[0.9, 0.1, 0.0], [0.2, 0.15, 0.3], [0.5, 0.6, 0.1], [0.3, 0.2, 0.8]])
    tags = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=bool)
    found = recognition(similarity, tags)
    assert found["single_tag_top1"] == pytest.approx(100 / 3)  # the first of three with one tag
    first, second = 1, (1 + 2 / 3) / 2  # class 1 is right at ranks 1 and 3; class 2 is nobody's tag
    assert found["tag_map"] == pytest.approx(100 * (first + second) / 2)
    assert recognition(similarity[2:3], tags[2:3])["single_tag_top1"] is None


def test_single_tag_top1_may_be_missing_from_the_report(settings, clip, world):
    """JSON has no NaN: without a picture of one tag the accuracy is null."""
    tags = json.loads((world / "minivoc-0/tags.json").read_text())
    several = [name for name in tags if name.startswith("val") and len(tags[name]) > 1]
    (world / "minivoc-0/ImageSets/Segmentation/val.txt").write_text("\n".join(several))
    settings = settings.model_copy(update={"data_root": world, "background": "fixed"})
    found = report(measure(settings, method=build_method(settings, clip)))
    assert found["recognition"]["single_tag_top1"] is None and found["images"] == len(several) > 0
    assert found["baselines"] == found["baseline_intervals"] == {}
    json.dumps(found, allow_nan=False)
