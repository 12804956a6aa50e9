"""Test what annotation costs, and how trainings are joined to rows."""

import json

import pytest

from diclip.annotation import affordable, minutes, summarise
from diclip.settings import load_settings


def test_minutes_by_hand():
    assert minutes("tags", 400) == pytest.approx(133.33, abs=0.01)
    assert minutes("masks", 1464) / 60 == pytest.approx(97.5, abs=0.1)  # hours for VOC's train
    with pytest.raises(ValueError, match="kind of annotation is 'boxes', expected one of tags, points"):
        minutes("boxes", 1)


@pytest.mark.parametrize("kind", ["tags", "points", "scribbles", "masks"])
def test_what_time_pays_for_is_as_much_as_fits(kind):
    for images in (0, 1, 33, 400):
        assert affordable(kind, minutes(kind, images)) == images
    number = affordable(kind, 100)
    assert minutes(kind, number) <= 100 < minutes(kind, number + 1)


def test_equal_minutes():
    assert affordable("masks", minutes("tags", 400)) == 33


@pytest.fixture
def finished(tmp_path):
    """Return a function that writes the metrics of a finished training and returns its folder."""

    def write(name, *, val, pseudo=None, images=400, **changed):
        folder = tmp_path / name
        folder.mkdir()
        settings = load_settings(**{"method": "diclip", "run_dir": str(folder), **changed}).model_dump(mode="json")
        found = {"val_miou": val, "pseudo_miou": pseudo, "train_images": images, "steps": 600}
        protocol = {"split": "val of minivoc (seed 0), 1000 images"}
        (folder / "metrics.json").write_text(json.dumps({**found, "protocol": protocol, "settings": settings}))
        return folder

    return write


def test_seeds_are_joined_and_supervisions_are_not(finished):
    folders = [
        finished("a", val=44.0, pseudo=41.0, seed=0),
        finished("b", val=48.0, pseudo=43.0, seed=1, batch_size=2),
        finished("c", val=60.0, seed=0, supervision="masks"),
        finished("d", val=40.0, seed=0, supervision="masks", train_images=33, images=33),
    ]
    tags, masks, few = summarise(folders)
    assert tags["seeds"] == [0, 1] and tags["val_miou"] == 46.0 and tags["pseudo_miou"] == 42.0
    assert tags["val_miou_sd"] == 2.83 and tags["minutes"] == 133.3 and tags["split"].startswith("val of minivoc")
    assert (masks["supervision"], masks["images"], masks["minutes"]) == ("masks", 400, 1598.0)
    assert masks["val_miou_sd"] is masks["pseudo_miou"] is masks["pseudo_miou_sd"] is None
    assert (few["images"], few["minutes"], few["val_miou"]) == (33, 131.8, 40.0)


def test_runs_that_differ_in_more_than_the_seed(finished):
    folders = [finished("a", val=44.0, seed=0), finished("b", val=48.0, seed=1, learning_rate=1e-3)]
    with pytest.raises(ValueError, match="runs of diclip, tags, 400 images differ in learning_rate: join others"):
        summarise(folders)


def test_a_training_that_is_not_finished(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.json: there is no such file: finish that training first"):
        summarise([tmp_path])
