import json

import pytest

from diclip.pretrain import card
from diclip.settings import ROOT


def test_the_card_that_ships_is_about_the_weights_that_ship():
    from safetensors.torch import load_file

    shipped = json.loads((ROOT / "data/mini/card.json").read_text())["clip"]
    weights = load_file(ROOT / "data/mini/clip/open_clip_model.safetensors")
    assert shipped["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert shipped["limits"] == card.LIMITS
    assert shipped["curve"][-1]["step"] == shipped["steps"]


@pytest.mark.parametrize("name", ["val", "shift", "val-seed7"])
def test_its_quality_is_what_the_results_say(name):
    shipped = json.loads((ROOT / "data/mini/card.json").read_text())["clip"]["quality"][name]
    found = json.loads((ROOT / f"data/results/clip-{name}.json").read_text())
    assert shipped["intra_miou"] == found["ladder"]["intra"]
    assert shipped["single_tag_top1"] == found["recognition"]["single_tag_top1"]


def test_a_card_keeps_the_entries_of_other_models(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "clip_card", lambda run, results: {"steps": 3})
    (tmp_path / "card.json").write_text('{"diffusion": {"steps": 9}}')
    card.write_card(tmp_path, tmp_path, tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text()) == {"diffusion": {"steps": 9}, "clip": {"steps": 3}}
