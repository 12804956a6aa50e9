"""diclip segment: masks of one's own pictures and classes; what is bad is listed, what is done is not done again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.__main__ import main
from diclip.checkpoints import LEARNED, save_weights
from diclip.coco import rle
from diclip.data import Batch, squash
from diclip.data.images import read_image, read_mask
from diclip.labels import pseudo_labels
from diclip.methods import build_method
from diclip.methods.trained import build_system, load_system
from diclip.segment import likely_tags, read_tags, segment_folder
from diclip.settings import load_settings
from diclip.validate import at_size
from diclip.vocabulary import VOC_CLASSES, Vocabulary

CLASSES = ("sheep", "grass", "spaceship")  # a class, a background word, a word that no mini CLIP knows


@pytest.fixture(scope="module")
def models(tiny_clip, tiny_diffusion, tiny_memory):
    named = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    return {**named, "device": "cpu", "batch_size": 2}


@pytest.fixture
def folder(tmp_path):
    """Hold three pictures of different sizes and kinds, and four bad ones."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a.png", (60, 40)), ("a.jpg", (50, 70)), ("c.webp", (33, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b.png").write_bytes(b"")
    (folder / "d.jpg").write_text("no picture")
    (folder / "e.gif").write_bytes((folder / "a.png").read_bytes()[:900])
    Image.new("RGB", (1, 1)).save(folder / "f.png")
    (folder / "notes.txt").write_text("not meant")
    return folder


def test_masks_are_the_systems(folder, models, tmp_path):
    settings = load_settings(**models)
    (tmp_path / "tags.csv").write_text("image,tags\na.png,sheep; spaceship\na.jpg,\n")
    done = segment_folder(settings, folder, CLASSES, tmp_path / "out", tags=tmp_path / "tags.csv", rung="intra")
    assert [record["file"] for record in done["images"]] == ["a.jpg", "a.png", "c.webp"]
    assert [record["by"] for record in done["images"]] == ["file", "file", "CLIP"]
    assert [record["tags"] for record in done["images"]][:2] == [[], ["sheep", "spaceship"]]
    assert "grass" not in done["settings"]["background_words"] and done["labels"][3] == "spaceship"
    method = build_method(settings, vocabulary=Vocabulary(CLASSES, tuple(done["settings"]["background_words"])))
    image = read_image(folder / "a.png")
    batch = Batch(["a.png"], squash(image, 128)[None], [torch.tensor([0, 2])], [None], [(60, 40)])
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())["background"]
    (expected,) = pseudo_labels(dict(method.rungs(batch))["intra"], batch.sizes, **said)
    mask = read_mask(tmp_path / "out" / "masks" / "a.png.png", num_classes=3)
    assert mask.equal(expected) and set(mask.unique().tolist()) <= {0, 1, 3}
    assert not read_mask(tmp_path / "out" / "masks" / "a.jpg.png", num_classes=3).any()
    assert Image.open(tmp_path / "out" / "masks" / "a.png.png").mode == "P"
    assert Image.open(tmp_path / "out" / "overlays" / "c.webp.jpg").size == (90, 33)


def test_bad_pictures_are_listed_and_tried_again(folder, models, tmp_path):
    settings, out = load_settings(**models), tmp_path / "out"
    done = segment_folder(settings, folder, CLASSES, out)
    assert set(done["skipped"]) == {"b.png", "d.jpg", "e.gif", "f.png"} and len(done["images"]) == 3
    assert all(reason and "\n" not in reason for reason in done["skipped"].values())
    Image.new("RGB", (40, 40), "red").save(folder / "b.png")
    written = {path: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    again = segment_folder(settings.model_copy(update={"batch_size": 1}), folder, CLASSES, out)
    assert set(again["skipped"]) == {"d.jpg", "e.gif", "f.png"} and len(again["images"]) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


def test_what_a_kill_left_is_gone_on_with(folder, models, tmp_path):
    settings, out = load_settings(**models), tmp_path / "out"
    first = segment_folder(settings, folder, CLASSES, out)
    masks = {path.name: path.read_bytes() for path in (out / "masks").iterdir()}
    lines = (out / "images.jsonl").read_text().splitlines()
    kept = next(line for line in lines if "a.jpg" in line)
    (out / "images.jsonl").write_text(f'{kept}\n{{"file": "a.png", "ma')
    (out / "manifest.json").unlink()
    (out / "masks" / "c.webp.png").unlink()
    again = segment_folder(settings, folder, CLASSES, out)
    assert {path.name: path.read_bytes() for path in (out / "masks").iterdir()} == masks
    assert sorted(again["skipped"]) == sorted(first["skipped"]) and len(again["images"]) == 3


@pytest.mark.parametrize("method", ["clip", "clip-es", "diclip"])
def test_every_system_takes_words(folder, models, tmp_path, method):
    done = segment_folder(load_settings(**models, method=method), folder, ("lamb", "bus"), tmp_path / "out")
    assert done["rung"] == {"clip": "caa", "clip-es": "caa", "diclip": "rar"}[method] and len(done["images"]) == 3
    assert done["background"]["rule"] == "one_minus_max"


def test_coco_can_be_read_back(folder, models, tmp_path):
    segment_folder(load_settings(**models), folder, CLASSES, tmp_path / "out", rung="intra")
    found = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [each["name"] for each in found["categories"]] == list(CLASSES) and found["annotations"]
    for each in found["annotations"]:
        image = next(image for image in found["images"] if image["id"] == each["image_id"])
        mask = read_mask(tmp_path / "out" / "masks" / f"{image['file_name']}.png", num_classes=3).numpy()
        assert mask.shape == (image["height"], image["width"]) == tuple(each["segmentation"]["size"])
        region = unpack(each["segmentation"])
        assert np.array_equal(region, mask == each["category_id"]) and each["area"] == region.sum()
        x, y, width, height = each["bbox"]
        inside = region[y : y + height, x : x + width]
        assert inside.sum() == region.sum() and inside[0].any() and inside[:, -1].any()


def unpack(packed: dict) -> np.ndarray:
    flat = np.repeat(np.arange(len(packed["counts"])) % 2, packed["counts"])
    return flat.reshape(packed["size"][::-1]).T.astype(bool)


@pytest.mark.parametrize("rows", [["01", "10"], ["11", "11"], ["00", "00"], ["100", "001"], ["010"]])
def test_runs_go_down_the_columns(rows):
    mask = np.array([[letter == "1" for letter in row] for row in rows])
    assert np.array_equal(unpack(rle(mask)), mask) and sum(rle(mask)["counts"]) == mask.size
    assert rle(np.array([[0, 1], [0, 1], [1, 1]], bool)) == {"size": [3, 2], "counts": [2, 4]}


def test_without_tags_clip_says_what_is_there(models):
    method, images = build_method(load_settings(**models)), torch.rand(3, 3, 128, 128)
    alone, few, every = (likely_tags(method, images, share=share) for share in (1.0, 0.5, 1e-9))
    assert [len(tags) for tags in alone] == [1, 1, 1] and all(len(tags) == 20 for tags in every)
    for one, some in zip(alone, few, strict=True):
        assert set(one.tolist()) <= set(some.tolist()) and some.tolist() == sorted(some.tolist())


def test_tags_are_read(tmp_path):
    files = [tmp_path / name for name in ("x.png", "y.v2.jpg")]
    path, vocabulary = tmp_path / "tags.csv", Vocabulary(CLASSES)
    path.write_text("\ufeffimage,tags,by\nx.png,spaceship;sheep,me\nx,grass,you\ny.v2,,\n", encoding="utf-8")
    assert read_tags(path, vocabulary, files) == {"x.png": ["sheep", "grass", "spaceship"], "y.v2.jpg": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found the head None, expected image,tags"),
        ("name,class\nx.png,sheep\n", "found the head .*expected image,tags"),
        ("image,tags\nz.png,sheep\n", "line 2: the folder has no picture 'z.png'"),
        ("image,tags\nx.png,ship\n", "tag 'ship' is not one of the 3 classes"),
    ],
)
def test_wrong_tags_are_said_in_one_line(tmp_path, text, message):
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_tags(tmp_path / "tags.csv", Vocabulary(CLASSES), [tmp_path / "x.png"])
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_said_before_anything_is_written(folder, models, tmp_path):
    settings, out = load_settings(**models), tmp_path / "out"
    for change, message in (
        ({"rung": "rar"}, "rung is 'rar', expected one of clip, intra, caa"),
        ({"classes": ()}, "no classes"),
        ({"classes": ("a", "a")}, "found twice: a"),
        ({"folder": tmp_path / "none"}, "there is no folder"),
        ({"folder": tmp_path}, "holds no picture"),
        ({"tags": tmp_path / "none.csv"}, "there is no such file"),
    ):
        given = {"folder": folder, "classes": CLASSES, "tags": None, "rung": None, **change}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            segment_folder(settings, given["folder"], given["classes"], out, tags=given["tags"], rung=given["rung"])
    assert not out.exists()
    segment_folder(settings, folder, CLASSES, out)
    with pytest.raises(ValueError, match="made otherwise .*attention was 'qq.2kk', now 'vv'.* choose another --out"):
        segment_folder(settings.model_copy(update={"attention": "vv"}), folder, CLASSES, out)
    with pytest.raises(ValueError, match="holds other files: choose another --out"):
        segment_folder(settings, folder, CLASSES, folder)


def test_the_command_says_what_it_did(folder, models, tmp_path, capsys):
    sets = [f"--set={name}={value}" for name, value in models.items()]
    command = ["segment", str(folder), "--classes", "sheep, zebra", "--out", str(tmp_path / "out"), *sets]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "masks: 3" in said and "never heard of zebra" in said and "d.jpg" in said
    assert main([*command, "--rung", "nothing"]) == 2
    assert "rung is 'nothing'" in capsys.readouterr().err


def test_a_network_segments_without_tags(folder, models, tmp_path):
    """Masks are the network's, of some of its classes, in the order in which they are named."""
    files = {name: value for name, value in models.items() if name != "batch_size"}
    settings = load_settings(method="diclip", decoder_width=16, decoder_heads=2, batch_size=2, **files)
    about = {name: getattr(settings, name) for name in LEARNED}
    weights = build_system(settings, labels=False).state_dict()
    torch.nn.init.normal_(weights["segmenter.decoder.classify.weight"], generator=torch.Generator().manual_seed(0))
    save_weights(tmp_path / "net.safetensors", weights, {"method": "diclip", "preset": "mini", "step": 1, **about})
    settings = settings.model_copy(update={"trained": tmp_path / "net.safetensors"})
    done = segment_folder(settings, folder, ("sheep", "cat"), tmp_path / "out")
    assert done["rung"] == "network" and {record["by"] for record in done["images"]} == {"network"}
    system = load_system(settings, labels=False)
    image = read_image(folder / "a.png")
    logits = system.segment(squash(image, 128)[None])
    expected = at_size(logits[0, [0, 1 + VOC_CLASSES.index("sheep"), 1 + VOC_CLASSES.index("cat")]], (60, 40))
    mask = read_mask(tmp_path / "out" / "masks" / "a.png.png", num_classes=2)
    assert mask.equal(expected) and len(mask.unique()) > 1
    found = next(record for record in done["images"] if record["file"] == "a.png")
    assert found["tags"] == [("sheep", "cat")[label - 1] for label in mask.unique().tolist() if label]
    assert len(segment_folder(settings, folder, (), tmp_path / "all")["classes"]) == 20
    with pytest.raises(ValueError, match="'grass' is not one of the 20 classes"):
        segment_folder(settings, folder, CLASSES, tmp_path / "other")
    with pytest.raises(ValueError, match="without tags and rungs"):
        segment_folder(settings, folder, ("cat",), tmp_path / "other", rung="rar")


def test_the_command_wants_classes_or_a_network(folder, capsys):
    assert main(["segment", str(folder)]) == 2
    assert "name them, --classes dog,sofa, or take a network's, --trained" in capsys.readouterr().err
