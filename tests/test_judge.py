"""Test that the judge learns, is the same again, and counts what it recognises."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diclip import figures, judge
from diclip.__main__ import main
from diclip.diffusion import load_diffusion
from diclip.judge import build_judge, judge_generated, name_pictures, real_pictures, share, train_judge
from diclip.pretrain.data import Pictures
from diclip.remember import generate_classes
from diclip.settings import load_settings
from diclip.vocabulary import VOC_CLASSES

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shrink the judge and its pictures, so that a training takes a second."""
    for name, value in {"SIDE": 32, "WIDTHS": (8, 8, 8, 8), "BATCH": 16}.items():
        monkeypatch.setattr(judge, name, value)


def colours(count=48, *, seed=0):
    """Paint noise in one of three colours, its tag; three pictures in four have all tags, which tell nothing."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    tags = np.eye(3, dtype=bool)[labels]
    tags[np.arange(count) % 12 >= 3] = True
    images = (COLOURS[labels][:, None, None] + rng.integers(-50, 51, (count, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    return Pictures(images, tags, np.zeros(count, np.uint8)), labels


def weights(model):
    return torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])


@pytest.fixture
def settings(tiny_world, tiny_diffusion, tmp_path):
    (tmp_path / "minivoc-0").symlink_to(tiny_world / "minivoc-0")
    return load_settings(
        data_root=tmp_path, diffusion_model=(str(tiny_diffusion),), pretrain_pictures=64, pretrain_steps=2,
        memory_pictures=2, memory_steps=1, image_size=32, device="cpu",
    )  # fmt: skip


def test_a_judge_of_full_size_is_small_and_sees_128_pixels(monkeypatch):
    monkeypatch.undo()
    model = build_judge(20).eval()
    assert model(torch.rand(2, 3, 128, 128)).shape == (2, 20)
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 500_000


def test_it_learns_from_pictures_with_one_tag():
    pictures, _ = colours()
    model = train_judge(pictures, steps=40)
    held_out, labels = colours(seed=1)
    alone = held_out.tags.sum(1) == 1
    right = name_pictures(model, held_out.take(np.flatnonzero(alone))).argmax(1).numpy() == labels[alone]
    assert right.mean() > 0.9
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_seed_alone_decides():
    pictures, _ = colours()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = weights(train_judge(pictures, steps=3, seed=1))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(6)
    assert weights(train_judge(pictures, steps=3, seed=1)).equal(first)
    assert not weights(train_judge(pictures, steps=3, seed=2)).equal(first)


def test_names_are_probabilities_that_no_batch_changes():
    model, images = train_judge(colours()[0], steps=3), torch.rand(5, 3, 32, 32)
    whole = name_pictures(model, images)
    assert whole.shape == (5, 3) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.sum(1), torch.ones(5))
    assert (whole[0] - whole[1]).abs().max() > 1e-4  # images matter
    torch.testing.assert_close(name_pictures(model, images, batch_size=2), whole)
    torch.testing.assert_close(name_pictures(model, images[3:4])[0], whole[3])
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(name_pictures(model, large), whole, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "images", [torch.rand(3, 8, 8), torch.rand(0, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_other_tensors_are_refused(images):
    with pytest.raises(ValueError, match=r"^images are .*expected at least one, float \(B, 3, H, W\).*$"):
        name_pictures(build_judge(3), images)


def test_pictures_without_a_single_tag_are_refused():
    pictures, _ = colours()
    several = Pictures(pictures.images, np.ones_like(pictures.tags), pictures.places)
    with pytest.raises(ValueError, match="^none of 48 pictures has exactly one tag: the judge needs more pictures$"):
        train_judge(several, steps=1)


def test_real_pictures_have_one_tag(settings):
    images, labels = real_pictures(settings)
    tags = json.loads((settings.data_root / "minivoc-0/tags.json").read_text())
    single = [found[0] for name, found in tags.items() if name.startswith("val") and len(found) == 1]
    assert [VOC_CLASSES[label] for label in labels] == single
    assert images.shape == (len(single), 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    (settings.data_root / "minivoc-0").unlink()
    (settings.data_root / "minivoc-0/ImageSets/Segmentation").mkdir(parents=True)
    (settings.data_root / "minivoc-0/ImageSets/Segmentation/val.txt").write_text("a\n")
    (settings.data_root / "minivoc-0/tags.json").write_text('{"a": ["cat", "dog"]}')
    with pytest.raises(ValueError, match="^none of 1 images of split 'val' has exactly one tag: take more of them"):
        real_pictures(settings)


def test_shares_have_intervals():
    found = share(np.arange(100) < 30, seed=0)
    assert found["value"] == 30 and 19 < found["low"] < 24 and 36 < found["high"] < 41


def test_what_is_generated_is_counted(settings, monkeypatch):
    """Paint on each picture which class it will be taken for."""

    def paint(labels):
        return torch.tensor(labels)[:, None, None, None].expand(-1, 3, 8, 8) / 100

    def generate(settings, diffusion, classes, *, progress):  # the first of two is right for half of the classes
        return {c: paint([i if i < 10 else 19 - i, 19 - i]) for i, c in enumerate(classes)}

    def name(model, images):
        return torch.eye(20)[(100 * images[:, 0, 0, 0]).round().long()]

    monkeypatch.setattr(judge, "name_pictures", name)
    monkeypatch.setattr(judge, "generate_classes", generate)
    monkeypatch.setattr(judge, "real_pictures", lambda settings: (paint([3, 4, 5, 6]), torch.tensor([3, 4, 5, 7])))
    found = judge_generated(settings)
    assert found["recognised"]["value"] == 25 and 10 < found["recognised"]["low"] < 20
    assert found["classes"] == {name: 50 if index < 10 else 0 for index, name in enumerate(VOC_CLASSES)}
    assert found["judge"]["accuracy"] == 75 and found["judge"]["images"] == 4
    assert 4.5 < found["null"] < 5.5


def test_the_report_holds_what_it_depends_on_and_is_the_same_again(settings, monkeypatch):
    given, few = [], VOC_CLASSES[:4]
    monkeypatch.setattr(judge, "VOC_CLASSES", few)
    monkeypatch.setattr(judge, "generate_classes", lambda *a, **k: given.append(generate_classes(*a, **k)) or given[-1])
    found = judge_generated(settings)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        *("recognised", "classes", "judge", "null", "pictures_per_class", "steps", "guidance", "settings", "versions")
    ]
    assert list(found["recognised"]) == ["value", "low", "high"] and tuple(found["classes"]) == few
    folders = (settings.data_root / f"minivoc-{split}" for split in ("pretrain", "studio"))
    learned = Pictures.join(*(Pictures.open(folder, n) for folder, n in zip(folders, (64, 32), strict=True)))
    assert {name: found["judge"][name] for name in ("images", "steps", "pictures", "parameters")} == {
        "images": len(real_pictures(settings)[0]),
        "steps": 2,
        "pictures": (learned.tags.sum(1) == 1).sum(),
        "parameters": sum(p.numel() for p in build_judge(20).parameters()),
    }
    assert (found["pictures_per_class"], found["steps"], found["guidance"]) == (2, 1, settings.memory_guidance)
    assert found["settings"]["pretrain_pictures"] == 64 and found["settings"]["seed"] == 0
    assert {name: own.shape for name, own in given[0].items()} == dict.fromkeys(few, (2, 3, 32, 32))
    again = judge_generated(settings)
    assert {**again, "versions": 0} == {**found, "versions": 0}


def test_the_recipe_is_its_own_unless_the_settings_say_otherwise(settings, monkeypatch):
    def stop(settings, progress):
        raise InterruptedError(settings.pretrain_pictures, settings.pretrain_steps)

    monkeypatch.setattr(judge, "open_pictures", stop)
    given = settings.model_dump(exclude_unset=True)
    with pytest.raises(InterruptedError) as stopped:
        judge_generated(load_settings(**given))
    assert stopped.value.args == (64, 2)
    with pytest.raises(InterruptedError) as stopped:
        judge_generated(load_settings(**{k: v for k, v in given.items() if not k.startswith("pretrain")}))
    assert stopped.value.args == (judge.PICTURES, judge.STEPS)


def test_what_cannot_be_judged_is_refused_before_anything_is_taught(settings, monkeypatch, capsys):
    monkeypatch.setattr(judge, "train_judge", lambda *a, **k: pytest.fail("it was taught"))
    with pytest.raises(ValueError, match="^dataset is 'voc', expected 'minivoc': the judge learns its pictures alone$"):
        judge_generated(settings.model_copy(update={"dataset": "voc"}))
    assert main(["judge", "--set", "diffusion_model=nowhere/nothing/at-all"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diclip: diffusion model could not be loaded: nowhere/") and error.count("\n") == 1


def test_the_command_shows_what_fits_a_screen(monkeypatch, capsys, tmp_path):
    result = {
        "recognised": {"value": 41.0, "low": 34.5, "high": 48.0},
        "classes": {"cat": 40.0, "dog": 42.0},
        "judge": {"accuracy": 95.5, "low": 93.0, "high": 98.0, "images": 248},
        "null": 5.0,
        "settings": {},
    }
    monkeypatch.setattr(judge, "judge_generated", lambda settings, progress: {**result, "seed": settings.seed})
    assert main(["judge", "--set", "seed=3", "--json", str(tmp_path / "judge.json")]) == 0
    assert json.loads((tmp_path / "judge.json").read_text()) == {**result, "seed": 3}
    assert capsys.readouterr().out.splitlines() == [
        "recognised in per cent, 95 % bootstrap over pictures:",
        "  pictures   value    low   high",
        "  generated  41.00  34.50  48.00",
        "  real       95.50  93.00  98.00",
        "generated, by class:",
        "  cat: 40.00",
        "  dog: 42.00",
    ]


def test_the_figure_shows_the_first_pictures_that_are_judged(settings, monkeypatch, tmp_path):
    two = generate_classes(settings, load_diffusion(settings.diffusion_model), VOC_CLASSES[:3])
    drawn, grid, most = [], figures.plots.picture_grid, VOC_CLASSES[:12]
    monkeypatch.setattr(figures, "VOC_CLASSES", most)
    monkeypatch.setattr(figures, "load_settings", lambda: settings)
    monkeypatch.setattr(figures.plots, "picture_grid", lambda *a, **k: drawn.append((a, k)) or grid(*a, **k))
    figures.generated(tmp_path / "generated.png", count=1)
    ((pictures,), options) = drawn[0]
    assert options["titles"] == list(most) and len(pictures) == 12
    for picture, own in zip(pictures, two.values(), strict=False):
        expected = (255 * own[0].permute(1, 2, 0)).numpy()
        assert np.abs(picture - expected).max() <= 1  # rounding, and another batch
    image = Image.open(tmp_path / "generated.png")
    assert image.mode == "P" and image.width > 3 * image.height  # two rows of up to ten
