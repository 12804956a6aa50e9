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


def line(variant, *, miou, spread, pseudo=None, **others):
    own = {
        "variant": variant,
        "method": "diclip",
        "supervision": "tags",
        "train_images": 400,
        "runs": 3,
        "seconds": 99.6,
    }
    pseudo = {"pseudo_miou": pseudo, "± pseudo_miou": None, "training_free_miou": pseudo, "± training_free_miou": 0.5}
    return {**own, **pseudo, "val_miou": miou, "± val_miou": spread, **others}


def test_networks_stand_beside_their_ceiling(tmp_path):
    masks = {"supervision": "masks", "spread": 0.25}
    found = [
        line("diclip", miou=45.0, spread=1.04, pseudo=50.0),
        line("masks", miou=50.0, **masks),
        line("masks_33", miou=20.0, train_images=33, **masks),
    ]
    (tmp_path / "training.json").write_text(json.dumps({"means": found}))
    assert tables.training_table(tmp_path).splitlines()[2:] == [
        "| `diclip` | tags of 400 images, 3 seeds | 50.0 ± 0.5 | 50.0 | 45.0 ± 1.0 | 90 % | 100 |",
        "| the same decoder | masks of 400 images, 3 seeds | – | – | 50.0 ± 0.2 | 100 % | 100 |",
        "| the same decoder | masks of 33 images, 3 seeds | – | – | 20.0 ± 0.2 | 40 % | 100 |",
    ]


def test_ablations_are_differences_from_the_whole(tmp_path):
    found = [line("whole", miou=45.0, spread=1.0, pseudo=50.0), line("without_vce", miou=40.0, spread=2.0, pseudo=44.0)]
    lost = [{"A is": "whole", "B is": "without_vce", "runs": 3, "B - A": -5.04, "low": -6.0, "high": -4.0}]
    (tmp_path / "ablations.json").write_text(json.dumps({"means": found, "B - A in mIoU": lost}))
    assert tables.ablations_table(tmp_path).splitlines()[2:] == [
        "| DiCLIP | 50.0 | 45.0 ± 1.0 | – |",
        "| without the diffusion's correlation (VCE) | 44.0 | 40.0 ± 2.0 | -5.0 (-6.0 to -4.0) |",
    ]
