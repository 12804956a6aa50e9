"""Test segmentation with trained parts: averages of views by hand, labels by the evaluator, weights that do not fit."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diclip import network
from diclip.checkpoints import LEARNED, load_weights, save_weights, ship
from diclip.clip import load_clip
from diclip.data import Batch, open_dataset
from diclip.evaluate import evaluate, loader, measure
from diclip.export import export_voc
from diclip.methods import build_method
from diclip.methods.trained import build_system, load_system
from diclip.outside import measure_masks
from diclip.score import image_counts, miou
from diclip.settings import load_settings, shipped_heads
from diclip.validate import at_size
from diclip.vocabulary import VOC_CLASSES


class Leaning:
    """Say of patches of 8 pixels how red, green and blue they are, and redder to the right."""

    patch_size = (8, 8)

    def segment(self, images):
        cells = F.avg_pool2d(images, 8)
        cells[:, 0] += torch.linspace(0, 1, cells.shape[3])
        return 5 * cells


def picture(seed: int = 0):
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def test_one_view_is_the_network_itself():
    assert network.predict(Leaning(), picture(), load_settings()).equal(Leaning().segment(picture()))


def test_views_are_averaged_at_the_largest_size():
    small = F.interpolate(picture(), size=(16, 24), mode="bilinear", align_corners=False)
    expected = torch.zeros(2, 3, 4, 6)
    for image in (picture(), small):
        plain, mirrored = Leaning().segment(image), Leaning().segment(image.flip(-1)).flip(-1)
        for view in (plain, mirrored):
            expected += F.interpolate(view, size=(4, 6), mode="bilinear", align_corners=False) / 4
    found = network.predict(Leaning(), picture(), load_settings(scales=(0.5, 1.0), flip=True))
    torch.testing.assert_close(found, expected)


def test_masks_are_at_each_images_own_size():
    batch = Batch(["a", "b"], picture(), [torch.tensor([], dtype=torch.long)] * 2, [None] * 2, [(40, 30), (9, 70)])
    scores = network.probabilities(Leaning(), batch, load_settings())
    logits = Leaning().segment(picture())
    for own, plain, size in zip(scores, logits, batch.sizes, strict=True):
        torch.testing.assert_close(own.sum(0), torch.ones(size))
        assert network.masks([own])[0].equal(at_size(plain, size))
    (sure,) = network.masks(scores[:1], confidence=0.6)
    assert sure.eq(255).equal(scores[0].amax(0) < 0.6) and 0 < sure.eq(255).sum() < sure.numel()
    seen = []
    network.probabilities(Leaning(), batch, load_settings(), refine=lambda found: seen.extend(found) or found)
    assert [x.shape for x in seen] == [x.shape for x in scores]


@pytest.fixture(scope="module")
def settings(tiny_world, tiny_clip, tmp_path_factory):
    """Return settings of a system with trained parts, which are as they began, of a width of their own."""
    folder = tmp_path_factory.mktemp("heads")
    sentences = folder / "one.yaml"
    sentences.write_text("".join(f"{name}: [it is number {i}.]\n" for i, name in enumerate(VOC_CLASSES)))
    plain = load_settings(
        method="excel",
        data_root=str(tiny_world),
        clip_model=str(tiny_clip),
        attributes=str(sentences),
        attribute_clusters=5,
        device="cpu",
        baselines=False,
        batch_size=4,
    )
    made = plain.model_copy(update={"decoder_width": 16, "decoder_heads": 2, "seed": 3})
    about = {name: getattr(made, name) for name in LEARNED}
    weights = build_system(made, labels=False).state_dict()
    save_weights(folder / "excel.safetensors", weights, {"method": "excel", "preset": "mini", "step": 7, **about})
    return plain.model_copy(update={"trained": folder / "excel.safetensors"})


def test_trained_parts_bring_their_shape(settings):
    system = build_method(settings)
    assert system.settings.decoder_width == 16 and not system.training
    weights, _ = load_weights(settings.trained)
    assert all(value.equal(weights[name]) for name, value in system.state_dict().items())


def test_the_ladder_ends_with_the_network(settings, tiny_clip):
    clip = load_clip(tiny_clip)
    system = load_system(settings, clip)
    changed = settings.model_copy(update={"refine": "par", "confidence": 0.06})
    found = measure(changed, method=system)
    assert found.ladder == ("dynamic", "caa", "network", "par")
    dataset = open_dataset(settings)
    hits = 0
    for batch in loader(dataset, settings):
        for image, size, truth in zip(batch.images, batch.sizes, batch.masks, strict=True):
            hits += int((at_size(system.segment(image[None])[0], size) == truth).sum())
    assert hits == found.rung("network")[..., 0].sum()
    assert not np.array_equal(found.rung("par"), found.rung("network"))
    assert found.sure is not None and 0 < found.sure[..., 2].sum() <= found.rung("network")[..., 2].sum()
    report = evaluate(settings)
    assert report["protocol"]["tags"] == "given to maps, not to the network"
    assert list(report["ladder"]) == ["dynamic", "caa", "network"] and report["recognition"] == {}
    assert report["protocol"]["trained"].endswith("excel.safetensors")


def test_exported_masks_score_as_the_network_does(settings, tmp_path):
    found = export_voc(settings, tmp_path)
    assert found["rung"] == "network" and found["protocol"]["masks used for choosing"] == "none"
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert len(archive.getnames()) == 6
    inside = tmp_path / "results/VOC2012/Segmentation/comp6_val_cls"
    with Image.open(inside / "val_00000.png") as image:
        assert image.mode == "P"
    again = measure_masks(settings.model_copy(update={"trained": None}), inside)
    np.testing.assert_array_equal(again.rung(again.ladder[0]), measure(settings).rung("network"))


def test_an_export_goes_on_with_the_weights_that_it_began_with(settings, tmp_path):
    again = shutil.copy(settings.trained, tmp_path / "excel.safetensors")
    settings = settings.model_copy(update={"trained": again})
    export_voc(settings, tmp_path / "sent")
    for name in ("results.tar.gz", "finished.json"):
        (tmp_path / "sent" / name).unlink()
    weights, about = load_weights(again)
    save_weights(again, {name: value + 1 for name, value in weights.items()}, about)
    with pytest.raises(ValueError, match="holds a run of other settings .weights was '.*', now '.*'"):
        export_voc(settings, tmp_path / "sent")


def test_what_ships_is_half_as_large_and_almost_the_same(settings, tmp_path):
    about = ship(settings.trained, tmp_path / "half.safetensors")
    assert about["step"] == 7
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * settings.trained.stat().st_size
    images = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    full, half = (
        load_system(settings.model_copy(update={"trained": path}), labels=False).segment(images)
        for path in (settings.trained, tmp_path / "half.safetensors")
    )
    torch.testing.assert_close(half, full, atol=0.01, rtol=0.01)


def test_faults_are_one_line(settings, tmp_path):
    weights, about = load_weights(settings.trained)

    def load(changes, *, weights=weights, path=tmp_path / "other.safetensors"):
        save_weights(path, weights, about | changes)
        load_system(settings.model_copy(update={"trained": path}), labels=False)

    with pytest.raises(ValueError, match="other weights than those of excel on mini"):
        load({"method": "diclip"})
    with pytest.raises(ValueError, match="another CLIP, memory or number of classes"):
        load({"decoder_width": 32})
    with pytest.raises(FileNotFoundError, match="no file of weights and no run's folder"):
        load_system(settings.model_copy(update={"trained": tmp_path / "nothing"}))


@pytest.mark.parametrize("method", ["excel", "diclip"])
def test_what_ships_segments_real_scenes(method, tiny_world):
    """Segment the first scenes of MiniVOC's val without tags: far above saying background everywhere."""
    plain = load_settings(method=method, data_root=str(tiny_world), device="cpu", batch_size=8)
    settings = plain.model_copy(update={"trained": shipped_heads(plain)})
    system = load_system(settings, labels=False)
    (batch,) = loader(open_dataset(settings), settings)
    found = network.masks(network.probabilities(system, batch, settings))
    counts = np.stack([image_counts(x, y, num_classes=20) for x, y in zip(found, batch.masks, strict=True)])
    assert miou(counts.sum(0)) > 25
