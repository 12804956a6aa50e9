"""Test ExCEL on a tiny random CLIP: which rungs, made of what, and which texts its nulls put in their place."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diclip import effects
from diclip.__main__ import main
from diclip.affinity import caa
from diclip.attributes import attribute_bank, enrich, hunt, read_attributes
from diclip.cam import normalise, pack, surgery_cam, surgery_scores
from diclip.clip import load_clip
from diclip.data import batches, open_dataset
from diclip.evaluate import measure, report
from diclip.methods import build_method
from diclip.methods.clip import PlainCLIP
from diclip.methods.excel import ExCEL
from diclip.nulls import enrichments, misnamed
from diclip.settings import for_method, load_settings
from diclip.vocabulary import VOC_CLASSES, Vocabulary

LADDER = ["clip", "intra", "tse", "caa"]


@pytest.fixture(scope="module")
def settings(tiny_world, tiny_clip):
    models = {"clip_model": str(tiny_clip), "data_root": str(tiny_world)}
    return load_settings(method="excel", batch_size=4, device="cpu", tau_box=0.6, ablate=True, **models)


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return load_clip(tiny_clip)


@pytest.fixture(scope="module")
def method(settings, clip):
    found = build_method(settings, clip)
    assert isinstance(found, ExCEL) and found.clip is clip
    return found


@pytest.fixture(scope="module")
def batch(settings):
    return next(iter(batches(open_dataset(settings), image_size=128, batch_size=4)))


def test_published_settings_are_the_methods_own():
    for preset in ("voc", "coco"):
        settings = load_settings(preset, method="excel")
        assert (settings.attention, settings.surgery_blocks, settings.attribute_share) == ("qkv", 5, 0.9)
        assert load_settings(preset).attention == "qq+2kk"
    assert load_settings("voc", method="excel").attribute_clusters == 112
    assert load_settings("coco", method="excel").attribute_clusters == 224
    assert load_settings("voc", method="excel", surgery_blocks=2).surgery_blocks == 2


def test_rungs(method, settings, clip, batch):
    found = dict(method.rungs(batch))
    without = ["without_svc", "without_tse", "without_caa"]
    assert list(found) == [*LADDER, *without] == [*method.raw, *method.refined, *method.ablations]
    plain = dict(PlainCLIP(settings, clip).rungs(batch))
    for name, same in (("clip", "clip"), ("intra", "intra"), ("without_tse", "caa")):
        torch.testing.assert_close(found[name].scores, plain[same].scores)
    assert found["without_caa"].scores.equal(found["tse"].scores)
    encoded = clip.encode(batch.images, attention="qkv", surgery_blocks=3)
    bank = attribute_bank(settings, clip, method.vocabulary, read_attributes(settings.attributes, VOC_CLASSES))
    texts = torch.cat([enrich(method.texts[:20], bank), method.texts[20:]])
    how = {"num_classes": 20, "pooled_is_token": clip.pooled_is_token}
    tse = pack(surgery_cam(encoded.patches, encoded.pooled, texts, **how).unflatten(-1, (16, 16)), batch.tags)
    torch.testing.assert_close(found["tse"].scores, tse.scores)
    assert (tse.scores - found["intra"].scores).abs().max() > 1e-3
    spread = caa(tse, encoded.attention, threshold=0.6, layers=4)
    torch.testing.assert_close(found["caa"].scores, spread.scores, atol=1e-5, rtol=1e-4)
    assert found["without_svc"].scores.shape == spread.scores.shape
    assert not torch.allclose(found["without_svc"].scores, spread.scores)


def test_a_bank_may_be_given_and_other_classes_need_no_file(settings, clip):
    bank = F.normalize(torch.randn(12, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
    words = Vocabulary(("zebra", "dog"), ("grass",))
    method = ExCEL(settings, clip, vocabulary=words, bank=bank)
    assert method.texts.shape == method.enriched.shape == (3, 128)
    assert method.enriched[2].equal(method.texts[2])
    torch.testing.assert_close(method.enriched[:2], enrich(method.texts[:2], bank))
    with pytest.raises(ValueError, match="no list of sentences for class 'zebra'"):
        ExCEL(settings, clip, vocabulary=words)


def test_evaluation(settings, method):
    found = json.loads(json.dumps(report(measure(settings, method=method)), allow_nan=False))
    assert list(found["ladder"]) == LADDER and list(found["lost"]) == list(method.ablations)
    assert found["settings"]["method"] == "excel"


def test_texts_of_nulls(method, settings, clip):
    texts = enrichments(method, seed=3)
    owner = misnamed(20, seed=3)
    assert (owner != np.arange(20)).all() and sorted(owner) == list(range(20))
    plain, bank = method.texts, method.bank
    for name, found in texts.items():
        assert found[20:].equal(plain[20:]), name
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(found)), msg=name)
    assert texts["enriched"].equal(method.enriched) and texts["plain names"].equal(plain)
    mixed = hunt(plain[:20], bank)
    for label, other in enumerate(owner):
        expected = F.normalize(plain[label] + mixed[other], dim=-1)
        torch.testing.assert_close(texts["shuffled attributes"][label], expected)
        expected = F.normalize(plain[label] + bank.mean(0), dim=-1)
        torch.testing.assert_close(texts["mean attribute"][label], expected)
    own = read_attributes(settings.attributes, VOC_CLASSES)
    others = {name: own[VOC_CLASSES[other]] for name, other in zip(VOC_CLASSES, owner, strict=True)}
    wrong = enrich(plain[:20], attribute_bank(settings, clip, method.vocabulary, others))
    torch.testing.assert_close(texts["shuffled sentences"][:20], wrong)
    assert not torch.allclose(wrong, method.enriched[:20], atol=1e-4)


def test_the_effect_of_enrichment_counts_patches_inside_objects(settings, method):
    found = effects.measure_effects(settings)
    assert list(found) == ["text enrichment"]
    effect = json.loads(json.dumps(found["text enrichment"], allow_nan=False))
    nulls = {"shuffled sentences", "shuffled attributes", "mean attribute"}
    assert set(effect["nulls"]) == nulls and effect["null_is"] in nulls and effect["without_is"] == "plain names"
    assert (effect["split"], effect["images"], effect["metric"]) == ("val", 6, "patch-text accuracy")
    assert effect["attributes"] == "20 for 20 classes"
    assert effect["interval"][0] <= effect["with"] - effect["null"] <= effect["interval"][1]
    right = total = 0
    for sample in open_dataset(settings):
        image = torch.nn.functional.interpolate(sample.image[None], (128, 128), mode="bilinear")
        encoded = method.clip.encode(image, attention="qkv", surgery_blocks=3)
        patches, pooled = normalise(encoded.patches, encoded.pooled, pooled_is_token=method.clip.pooled_is_token)
        scores = surgery_scores(patches, pooled, method.texts)[0][0]
        mask = torch.nn.functional.interpolate(sample.mask[None, None].float(), (128, 128), mode="nearest-exact")
        for index, patch in enumerate(mask[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).flatten(0, 1).long()):
            votes = patch[patch != 255].bincount(minlength=21)
            if votes.sum() and votes.argmax():
                total += 1
                right += int(scores[index, :20].argmax() + 1 == votes.argmax())
    assert effect["without"] == pytest.approx(100 * right / total, abs=0.0051) and 0 < right < total


def test_settings_for_another_method_keep_what_was_changed():
    settings = load_settings("voc", method="diclip", tau_box=0.5)
    other = for_method(settings, "excel")
    assert (other.method, other.attention, other.surgery_blocks, other.tau_box) == ("excel", "qkv", 5, 0.5)
    assert for_method(other, "diclip") == settings
    assert for_method(load_settings(attention="vv"), "excel").attention == "vv"


@pytest.mark.parametrize(
    ("method", "name", "message"), [("excel", "attributes", "no attributes at"), ("diclip", "memory", "no memory at")]
)
def test_small_files_are_read_before_models(monkeypatch, tmp_path, method, name, message):
    monkeypatch.setattr("diclip.methods.load_clip", lambda *given, **how: pytest.fail("CLIP was loaded"))
    with pytest.raises(ValueError, match=message):
        build_method(load_settings(method=method, **{name: str(tmp_path / "none.yaml")}))


def test_faults_are_one_line(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DICLIP_HEADLESS", "1")
    given = {"clip_model": settings.clip_model, "data_root": settings.data_root, "device": "cpu"}
    common = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    for name, message in (("none.yaml", "there are no attributes at"), ("short.yaml", "for class 'bird'")):
        (tmp_path / "short.yaml").write_text("aeroplane: [wings]\nbicycle: [wheels]\n")
        arguments = ["evaluate", "--method", "excel", *common, "--set", f"attributes={tmp_path / name}"]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("diclip: ") and err.count("\n") == 1 and message in err
