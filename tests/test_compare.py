"""Test that results can be stored small and compared image by image, and that only what is comparable is."""

import json
from pathlib import Path

import numpy as np
import pytest

from diclip.__main__ import main
from diclip.compare import compare_results, load_result, save_counts
from diclip.evaluate import Evaluation, finish
from diclip.runs import write_json
from diclip.score import miou, paired_interval
from diclip.settings import load_settings

CLASSES = ("cat", "dog", "sofa")


def some_counts(seed: int, right: float, images: int = 30) -> np.ndarray:
    """Return counts of images of 100 pixels: background and one class, of which about a share is found."""
    truth, random = np.random.default_rng(0), np.random.default_rng(seed)
    counts = np.zeros((images, 4, 3), np.int64)
    for row in counts:
        label, size = truth.integers(1, 4), truth.integers(5, 60)
        hits = random.binomial(size, right)
        row[0] = [100 - size, 100 - hits, 100 - size]
        row[label] = [hits, hits, size]
    return counts


def write(path: Path, counts: dict[str, np.ndarray], *, order=None, classes=CLASSES) -> Path:
    """Store an evaluation with these counts; `order` is in which the images come."""
    images = len(next(iter(counts.values())))
    order = list(range(images)) if order is None else order
    counts = {name: x[order] for name, x in counts.items()}
    names, versions = [f"image{i}" for i in order], {"diclip": "1", "packages": {"torch": "2"}}
    own = {name: x for name, x in counts.items() if name != "grabcut"}
    baselines = {name: x for name, x in counts.items() if name == "grabcut"}
    how = {"settings": load_settings(), "names": names, "classes": classes, "versions": versions}
    ladder = tuple(own)
    found = Evaluation(
        **how,
        ladder=ladder,
        refined=ladder,
        ablations=(),
        background={},
        tuned={},
        one_minus_max=own,
        baselines=baselines,
    )
    write_json(path, finish(found, path.with_suffix(".npz")))
    return path


@pytest.fixture
def pair(tmp_path):
    """Store two results of the same images, the second's in another order."""
    first = {"clip": some_counts(1, 0.3), "caa": some_counts(2, 0.5), "grabcut": some_counts(3, 0.4)}
    second = {"clip": some_counts(1, 0.3), "gradcam": some_counts(4, 0.7)}
    order = np.random.default_rng(0).permutation(30)
    a = write(tmp_path / "a.json", first)
    return a, write(tmp_path / "b.json", second, order=order), first, second


def test_a_result_comes_back_as_it_was(pair):
    a, b, first, _ = pair
    stored = load_result(a)
    assert stored.names == [f"image{i}" for i in range(30)] and stored.classes == list(CLASSES)
    assert list(stored.rows) == ["clip", "caa", "grabcut"]
    for name, counts in first.items():
        np.testing.assert_array_equal(stored.counts(name), counts)
    assert a.with_suffix(".npz").stat().st_size < 3 * 30 * 2 * 20 + 4000


def test_two_results_are_paired_image_by_image(pair):
    a, b, first, second = pair
    found = compare_results(a, b)
    ((title, rows),) = ((name, value) for name, value in found.items() if name not in "AB")
    assert "paired 95 % bootstrap" in title
    assert [(row["A is"], row["B is"]) for row in rows] == [("caa", "gradcam"), ("clip", "clip")]
    expected = paired_interval(first["caa"], second["gradcam"], generator=np.random.default_rng(0))
    assert [rows[0][x] for x in ("B - A", "low", "high")] == pytest.approx(expected, abs=0.006)
    assert rows[0]["A"] == pytest.approx(float(miou(first["caa"].sum(0))), abs=0.006)
    assert [rows[1][x] for x in ("B - A", "low", "high")] == [0, 0, 0]  # the same counts in another order
    back = compare_results(b, a)["mIoU in per cent, paired 95 % bootstrap over images"][0]
    assert back["B - A"] == -rows[0]["B - A"]
    for side in "AB":
        assert found[side]["split"] == "val of minivoc (seed 0), 30 images" and found[side]["flip"] == "no"


def test_the_command_prints_both_protocols(pair, capsys):
    a, b, *_ = pair
    assert main(["compare", str(a), str(b), "--rung", "clip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith("scales: 1 of 128 px") for line in lines) == 2
    assert lines[-1].split() == ["clip", "clip", *lines[-1].split()[2:4], "0.00", "0.00", "0.00"]


def complaint(capsys, *files) -> str:
    assert main(["compare", *map(str, files)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diclip: ") and err.count("\n") == 1 and len(err) < 500
    return err


def test_what_cannot_be_compared_is_told_in_one_line(pair, tmp_path, capsys):
    a, b, first, _ = pair
    assert "there is no such file: write both with `diclip evaluate --json" in complaint(capsys, a, tmp_path / "c.json")
    fewer = write(tmp_path / "fewer.json", {"caa": first["caa"][:20]})
    assert "hold 30 and 20 images, of which they share 20: evaluate both" in complaint(capsys, a, fewer)
    others = first["caa"].copy()
    others[3, 0, 2] += 1
    assert "scored against other masks" in complaint(capsys, a, write(tmp_path / "others.json", {"caa": others}))
    named = write(tmp_path / "named.json", {"caa": first["caa"]}, classes=("cat", "dog", "boat"))
    assert "and have other classes" in complaint(capsys, a, named)
    assert "b.json has no 'caa', only clip, gradcam" in complaint(capsys, a, b, "--rung", "caa")


def test_damaged_results_are_told_in_one_line(pair, capsys):
    a, b, *_ = pair
    b.with_suffix(".npz").write_bytes(a.with_suffix(".npz").read_bytes()[:500])
    assert "hold no result" in complaint(capsys, a, b)
    b.with_suffix(".npz").unlink()
    assert "b.npz: there is no such file" in complaint(capsys, a, b)
    b.with_suffix(".npz").write_bytes(a.with_suffix(".npz").read_bytes())
    b.write_text("{")
    assert "hold no result" in complaint(capsys, a, b)


def test_a_large_split_of_many_classes_is_stored_small(tmp_path):
    """Two thousand images of 80 classes, three of them in each: less than 100 kB a system."""
    random = np.random.default_rng(0)
    counts = np.zeros((2000, 81, 3), np.int64)
    for row in counts:
        row[random.choice(81, 3, replace=False)] = random.integers(0, 200_000, (3, 3))
    path, classes = tmp_path / "large.npz", tuple(f"class {i}" for i in range(80))
    names = [f"COCO_val2014_{i:012d}" for i in range(2000)]
    how = {"settings": load_settings(), "names": names, "classes": classes, "versions": {}, "background": {}}
    empty = {"refined": ("caa",), "ablations": (), "tuned": {}, "baselines": {}}
    save_counts(path, Evaluation(**how, **empty, ladder=("caa",), one_minus_max={"caa": counts}))
    assert path.stat().st_size < 100_000
    path.with_suffix(".json").write_text(json.dumps({"ladder": {"caa": 0}}))
    np.testing.assert_array_equal(load_result(path.with_suffix(".json")).counts("caa"), counts)
