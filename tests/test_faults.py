"""Test that what goes wrong is told in one line on stderr, with exit code 2, by the command line itself."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diclip.__main__ import main
from diclip.data.minivoc import palette


@pytest.fixture
def world(tiny_world, tmp_path):
    shutil.copytree(tiny_world, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def weights(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def complaint(world, weights, capsys, monkeypatch):
    """Return a function that evaluates with settings, must fail, and returns the line on stderr."""
    monkeypatch.setenv("DICLIP_HEADLESS", "1")  # no progress bars

    def call(*settings: str, command: tuple[str, ...] = ("evaluate",)) -> str:
        base = [f"data_root={world}", f"clip_model={weights}", "device=cpu", "background=fixed", "baselines=false"]
        arguments = [word for pair in (*base, *settings) for word in ("--set", pair)]
        assert main([*command, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("diclip: ") and err.count("\n") == 1 and len(err) < 700, err
        assert "Traceback" not in err
        return err

    return call


def picture(world, name: str = "val_00002"):
    return world / f"minivoc-0/JPEGImages/{name}.jpg"


def test_all_is_well_without_faults(world, weights, capsys, monkeypatch):
    monkeypatch.setenv("DICLIP_HEADLESS", "1")
    settings = [f"data_root={world}", f"clip_model={weights}", "device=cpu", "background=fixed", "baselines=false"]
    assert main(["evaluate", "--json", *(word for pair in settings for word in ("--set", pair))]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


# Weights


def test_no_weights(complaint, tmp_path):
    found = complaint(f"clip_model={tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere is neither a folder nor" in found and "git checkout" in found
    assert "diclip pretrain" in found


@pytest.mark.parametrize("file", ["open_clip_config.json", "open_clip_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbled"])
def test_damaged_weights(complaint, weights, file, damage):
    path = weights / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbled": b"\x80" * 4096}[damage])
    found = complaint()
    assert str(weights) in found and "git checkout" in found


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_tokenizer(complaint, weights, damage):
    path = weights / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:1000])
    assert str(weights) in complaint()


def test_weights_of_another_architecture(complaint, weights):
    path = weights / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 96
    path.write_text(json.dumps(config))
    assert str(weights) in complaint()


def test_more_surgery_than_blocks(complaint):
    assert "surgery_blocks is 9, expected 0 to 4" in complaint("surgery_blocks=9")


# Data


@pytest.mark.parametrize(("setting", "name"), [("split=vla", "vla"), ("tune_split=nut", "nut")])
def test_no_such_split(complaint, setting, name):
    found = complaint(setting, "background=sweep")
    assert f"no split '{name}'" in found and "shift, train, tune, val" in found


def test_an_unknown_tag(complaint, world):
    path = world / "minivoc-0/tags.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_00001": ["dgo"]}))
    found = complaint()
    assert "tags.json: image val_00001: tag 'dgo'" in found and "did you mean 'dog'" in found


def test_a_damaged_tag_file(complaint, world):
    path = world / "minivoc-0/tags.json"
    path.write_text(path.read_text()[:50])
    assert "tags.json: cannot be read" in complaint()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), (b"", "found 0 bytes"), (b"\xff\xd8\xff\xe0 no picture", "no readable image")],
)
def test_an_unreadable_image(complaint, world, content, message):
    picture(world).unlink()
    if content is not None:
        picture(world).write_bytes(content)
    found = complaint()
    assert "val_00002.jpg" in found and message in found


def test_a_truncated_image(complaint, world):
    content = picture(world).read_bytes()
    picture(world).write_bytes(content[: len(content) // 2])
    assert "val_00002.jpg: is no readable image" in complaint()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 4)])
def test_an_absurd_image(complaint, world, size):
    Image.new("RGB", size).save(picture(world))
    assert f"found {size[0]}x{size[1]} pixels" in complaint()


def test_a_mask_of_colours(complaint, world):
    path = world / "minivoc-0/SegmentationClass/val_00003.png"
    with Image.open(path) as image:
        colours = palette()[np.array(image)]
    Image.fromarray(colours).save(path)
    found = complaint()
    assert "val_00003.png: found colours (mode RGB), expected class ids" in found


def test_a_mask_of_another_size(complaint, world):
    path = world / "minivoc-0/SegmentationClass/val_00003.png"
    Image.fromarray(np.zeros((9, 11), np.uint8)).save(path)
    assert "val_00003.png: found 11x9 pixels" in complaint()


def test_another_dataset_that_is_not_there(complaint):
    assert "VOCdevkit/VOC2012" in complaint("dataset=voc")


def test_data_root_is_a_file(complaint, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in complaint(f"data_root={tmp_path}/file")


# Settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("image_size=100", "multiple of 8"),
        ("image_size=16", "greater than or equal to 32"),
        ("image_size=80000", "less than or equal to 2048"),
        ("batch_size=0", "greater than or equal to 1"),
        ("batch_size=many", "valid integer"),
        ("limit=-1", "greater than or equal to 0"),
        ("tau_box=1.5", "less than or equal to 1"),
        ("tau_box=nan", "finite"),
        ("background_score=-0.1", "greater than or equal to 0"),
        ("surgery_blocks=0", "greater than or equal to 1"),
        ("shard_index=3", "expected 0 to 0"),
        ("method=magic", "'clip'"),
        ("attention=qqq", "'qq+2kk'"),
        ("device=gpu", "match pattern"),
        ("device=cuda:77", "is not on this machine"),
        ("split=../../etc", "match pattern"),
        ("template=no braces", "match pattern"),
        ("seed=-1", "greater than or equal to 0"),
        ("nosuch=1", "unknown setting 'nosuch'"),
    ],
)
def test_settings_out_of_range(complaint, setting, message):
    found = complaint(setting)
    assert message in found and setting.split("=")[0] in found


@pytest.mark.parametrize("command", [("data", "minivoc"), ("pretrain", "clip"), ("demo",)])
def test_every_command_checks_its_settings(complaint, command):
    assert "setting 'batch_size' is '0'" in complaint("batch_size=0", command=command)
