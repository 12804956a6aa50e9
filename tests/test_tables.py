"""Test how stored results become tables, on results made up by hand."""

import json

import pytest

from diclip import tables
from diclip.methods.clip import PlainCLIP
from diclip.methods.clip_es import CLIPES
from diclip.methods.diclip import DiCLIP
from diclip.methods.excel import ExCEL


def store(folder, name, ladder, *, images=9):
    spread = {rung: [value - 1, value + 2.26] for rung, value in ladder.items()}
    result = {"ladder": ladder, "intervals": spread, "images": images, "settings": {"split": "val"}}
    (folder / f"{name}-val.json").write_text(json.dumps(result))


def test_systems_stand_side_by_side(tmp_path):
    store(tmp_path, "excel", {"clip": 10.0, "intra": 20.0, "tse": 30.0, "caa": 25.5, "par": 33.0})
    store(tmp_path, "clip-es", {"gradcam": 40.0, "caa": 41.25})
    assert tables.systems_table(tmp_path).splitlines() == [
        "| system; val, 9 images | last raw rung | last refined rung | then PAR |",
        "|---|---|---|---|",
        "| `clip-es` | `gradcam` 40.0 (39.0–42.3) | `caa` 41.2 (40.2–43.5) | – |",
        "| `excel` | `tse` 30.0 (29.0–32.3) | `caa` 25.5 (24.5–27.8) | 33.0 (32.0–35.3) |",
    ]


def test_the_last_rungs_are_those_of_the_systems():
    kinds = {"clip": PlainCLIP, "clip-es": CLIPES, "excel": ExCEL, "diclip": DiCLIP}
    assert tables.SYSTEMS == {name: (kind.raw[-1], kind.refined[-1]) for name, kind in kinds.items()}
    assert {rung for kind in kinds.values() for rung in (*kind.raw, *kind.refined)} <= set(tables.RUNGS)


def test_systems_of_other_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result of any system: write them with `make results`"):
        tables.systems_table(tmp_path)
    store(tmp_path, "clip", {"intra": 1.0, "caa": 2.0}, images=8)
    store(tmp_path, "diclip", {"tsa": 1.0, "rar": 2.0})
    with pytest.raises(ValueError, match="of val, 8 images and of val, 9 images: evaluate all on the same"):
        tables.systems_table(tmp_path)


def test_the_ladder_of_a_refined_system_has_its_last_row(tmp_path):
    store(tmp_path, "clip", {"intra": 1.0, "caa": 2.0, "crf": 3.0})
    result = {**tables.read("clip-val", tmp_path), "baselines": {}}
    assert tables.ladder([result] * 3)[-1] == "| `crf`: + dense CRF |" + " 3.0 (2.0–5.3) |" * 3
