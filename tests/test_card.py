import json

import pytest
from safetensors.torch import load_file

from diclip.pretrain import card
from diclip.settings import ROOT


@pytest.mark.parametrize("model", ["clip", "diffusion"])
def test_the_card_that_ships_is_about_the_weights_that_ship(model):
    shipped = json.loads((ROOT / "data/mini/card.json").read_text())[model]
    files = list((ROOT / "data/mini" / model).rglob("*.safetensors"))
    assert shipped["parameters"] == sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert shipped["limits"] == card.LIMITS
    assert shipped["curve"][-1]["step"] == shipped["steps"]


@pytest.mark.parametrize("name", ["val", "shift", "val-seed7"])
def test_its_quality_is_what_the_results_say(name):
    shipped = json.loads((ROOT / "data/mini/card.json").read_text())["clip"]["quality"][name]
    found = json.loads((ROOT / f"data/results/clip-{name}.json").read_text())
    assert shipped["intra_miou"] == found["ladder"]["intra"]
    assert shipped["single_tag_top1"] == found["recognition"]["single_tag_top1"]


def test_what_generates_is_judged():
    shipped = json.loads((ROOT / "data/mini/card.json").read_text())["diffusion"]["quality"]
    assert shipped["recognised"] == json.loads((ROOT / "data/results/judge.json").read_text())["recognised"]
    found = json.loads((ROOT / "data/results/effects.json").read_text())["diffusion correlation"]
    assert shipped["same_object_auc"]["value"] == found["with"]


def test_a_card_keeps_the_entries_of_other_models(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "card", lambda run, results: {"clip": {"steps": 3}})
    (tmp_path / "card.json").write_text('{"diffusion": {"steps": 9}}')
    card.write_card(tmp_path, tmp_path, tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text()) == {"diffusion": {"steps": 9}, "clip": {"steps": 3}}
