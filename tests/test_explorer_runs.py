"""The run browser: it finds what runs left, draws it, and makes masks of stored results again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.compare import load_result
from diclip.evaluate import evaluate
from diclip.explorers import Pick, RunChoice, RunExplorer, Studio, explore_runs, find_runs
from diclip.explorers.cam import class_iou
from diclip.explorers.runs import ORDERS, image_ious, predict_again
from diclip.runs import write_json
from diclip.score import image_counts
from diclip.settings import load_settings
from diclip.train import train


@pytest.fixture(scope="module")
def studio(tiny_clip, tiny_world, tmp_path_factory):
    nowhere = str(tmp_path_factory.mktemp("nowhere") / "model")
    models = {"clip_model": str(tiny_clip), "data_root": str(tiny_world), "device": "cpu"}
    return Studio(load_settings(**models, diffusion_model=nowhere, memory=nowhere))


@pytest.fixture(scope="module")
def root(studio, tmp_path_factory):
    """Lay out two shipped results, a training that was killed, and pictures that an explorer kept."""
    root = tmp_path_factory.mktemp("root")
    models = {name: str(getattr(studio.settings, name)) for name in ("clip_model", "data_root", "device")}
    for name, seed in (("clip-val", {}), ("kk-val", {"attention": "kk"})):
        path = root / "data" / "results" / f"{name}.json"
        settings = load_settings(**models, limit=4, baselines=False, **seed)
        write_json(path, evaluate(settings, counts=path.with_suffix(".npz")))
    (root / "data" / "results" / "speed.json").write_text("{}")
    run = root / "runs" / "training"
    write_json(run / "settings.json", {**load_settings().model_dump(mode="json"), "learning_rate": 0.1})
    lines = ({"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05, "tune_miou": 40.0})
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 30, "lo']))
    kept = root / "runs" / "explorer" / "val_00000-1"
    write_json(kept / "manifest.json", {})
    Image.new("RGB", (60, 40), "red").save(kept / "figure.png")
    return root


def test_runs_and_results_are_found(root, tmp_path):
    runs = find_runs(root)
    assert set(runs) == {"clip-val", "kk-val", "runs/training", "runs/explorer/val_00000-1"}
    assert runs["clip-val"].systems == ("clip", "intra", "caa") and runs["runs/training"].systems == ()
    assert runs["runs/training"].settings["learning_rate"] == 0.1
    assert find_runs(tmp_path) == {}


def test_a_log_that_was_cut_off_is_read_up_to_there(root):
    run = find_runs(root)["runs/training"]
    assert run.series("loss") == ([10, 20], [0.1, 0.05]) and run.series("tune_miou") == ([20], [40.0])
    assert run.quantities() == ("loss", "tune_miou")


def test_image_ious_are_means_over_the_labels_of_an_image():
    truth, mask = np.array([[0, 0, 3, 3]]), np.array([[0, 3, 3, 3]])
    counts = image_counts(torch.tensor(mask), torch.tensor(truth), num_classes=5)
    assert image_ious(counts[None]).tolist() == pytest.approx([100 * (1 / 2 + 2 / 3) / 2])


def test_masks_that_are_made_again_are_those_that_were_counted(studio, root):
    for name in ("clip-val", "kk-val"):
        run, stored = find_runs(root)[name], load_result(root / "data" / "results" / f"{name}.json")
        for system in run.systems:
            expected = image_ious(stored.counts(system))
            for index in range(4):
                photo = studio.photo(Pick("val", index))
                labels = predict_again(studio, run, system, photo)
                found = 100 * np.mean(list(class_iou(labels, photo.mask, 20).values()))
                assert found == pytest.approx(expected[index], abs=0.05), (name, system, index)


def test_a_trained_network_can_be_asked_too(studio, root):
    asked = []

    def predict(studio, run, system, photo):
        asked.append((run.name, system))
        return photo.mask.masked_fill(photo.mask == 255, 0)

    explorer = RunExplorer(studio, root=root, predict=predict)
    view = explorer.view(RunChoice("clip-val", "kk-val", look="images"))
    assert asked == [("clip-val", "caa"), ("kk-val", "caa")] and view.pixels.ndim == 3
    assert predict_again(studio, explorer.runs["clip-val"], "network", studio.photo(Pick())) is None


def test_images_are_ordered_by_what_is_gained(studio, root):
    explorer = RunExplorer(studio, root=root)
    lines = {order: explorer.view(RunChoice("clip-val", "kk-val", look="images", order=order)).line for order in ORDERS}
    stored = [load_result(root / "data" / "results" / f"{name}.json") for name in ("clip-val", "kk-val")]
    gains, names = np.diff([image_ious(each.counts("caa")) for each in stored], axis=0)[0], stored[0].names
    for order, index in zip(ORDERS, (gains.argmax(), gains.argmin(), 0), strict=True):
        assert names[index] in lines[order]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (RunChoice("none"), "there is no run 'none', only "),
        (RunChoice("clip-val", look="all"), "found 'all'.* expected one of numbers"),
        (RunChoice("clip-val", look="curves"), "results have no curves"),
        (RunChoice("runs/training", look="curves", quantity="acc"), "no 'acc' was logged, only loss, tune_miou"),
        (RunChoice("runs/training", look="images"), "runs/training stored no scores"),
        (RunChoice("runs/training", look="pictures"), "hold no pictures"),
        (RunChoice("clip-val", look="images", first_system="rar"), "has no 'rar', only clip, intra, caa"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(studio, root, choice, message):
    with pytest.raises(ValueError, match=message) as error:
        RunExplorer(studio, root=root).view(choice)
    assert "\n" not in str(error.value)


def test_a_result_that_was_cut_off_is_said_to_be(studio, tmp_path):
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text('{"ladder": ')
    np.savez(folder / "cut.npz")
    with pytest.raises(ValueError, match="cut.json is no JSON"):
        RunExplorer(studio, root=tmp_path).view(RunChoice("cut"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first", "kk-val"),
        ("second", "kk-val"),
        ("look", "images"),
        ("rank", 2),
        ("order", ORDERS[1]),
        ("first_system", "clip"),
        ("second_system", "clip"),
    ],
)
def test_every_widget_changes_the_picture(studio, root, name, value):
    look = "numbers" if name in ("first", "second", "look") else "images"
    second = None if name == "second" else "kk-val"
    board = explore_runs(studio, RunChoice("clip-val", second, look=look), root=root)
    before = board.picture.value
    assert "b00020" not in board.line.value
    board[name].value = value
    assert board.picture.value != before and "b00020" not in board.line.value


def test_the_board_follows_the_runs(studio, root, tmp_path):
    board = explore_runs(studio, RunChoice("clip-val", look="curves"), root=root)
    assert "results have no curves" in board.line.value
    board["first"].value = "runs/training"
    assert "0.05 at step 20" in board.line.value and board["quantity"].options == ("loss", "tune_miou")
    board["quantity"].value = "tune_miou"
    assert "40 at step 20" in board.line.value
    board["first"].value, board["look"].value = "runs/explorer/val_00000-1", "pictures"
    assert "pictures: 1" in board.line.value
    assert "there is no run" in explore_runs(studio, root=tmp_path).line.value


def test_a_networks_masks_are_made_again(studio, tmp_path):
    (tmp_path / "sentences.yaml").write_text("".join(f"{name}: [it is a thing.]\n" for name in studio.classes))
    own = {name: str(getattr(studio.settings, name)) for name in ("clip_model", "data_root", "device")}
    small = {"decoder_width": 16, "decoder_heads": 2, "attribute_clusters": 1, "par_rounds": 1}
    short = {"max_iters": 3, "limit": 3, "validate_every": 0, "score_pseudo_labels": False, "learning_rate": 0.05}
    files = {"attributes": str(tmp_path / "sentences.yaml"), "run_dir": str(tmp_path / "runs" / "net")}
    train(load_settings(method="excel", **own, **small, **short, **files))
    run = find_runs(tmp_path)["runs/net"]
    counts = load_result(run.result).counts("network")
    for index, expected in enumerate(counts):
        photo = studio.photo(Pick("val", index))
        labels = predict_again(studio, run, "network", photo)
        np.testing.assert_array_equal(image_counts(labels, photo.mask, num_classes=20), expected)
    browser = RunExplorer(studio, root=tmp_path)
    assert "runs/net" in browser.view(RunChoice("runs/net", look="images")).line
    assert "at step 3" in browser.view(RunChoice("runs/net", look="curves")).line
