"""Test the effects table on tiny random models: what is compared with what, and by which counts."""

import json

import numpy as np
import pytest
import torch

from diclip import effects
from diclip.data import batches, open_dataset
from diclip.diffusion import load_diffusion
from diclip.memory import Memory
from diclip.methods import build_method
from diclip.nulls import NULLS, RAW, REFINED, STRENGTHS, Beside, shuffled, untrained
from diclip.remember import key_features, remember_crops
from diclip.score import mean, paired_interval
from diclip.settings import load_settings


@pytest.fixture(scope="module")
def settings(tiny_world, tiny_clip, tiny_diffusion, tiny_memory):
    models = {"clip_model": str(tiny_clip), "diffusion_model": str(tiny_diffusion), "memory": str(tiny_memory)}
    choices = {"batch_size": 4, "rar_rounds": 2, "bias_strength": 3.0, "method": "diclip", "device": "cpu"}
    return load_settings(data_root=str(tiny_world), **models, **choices)


@pytest.fixture(scope="module")
def beside(settings):
    method = build_method(settings)
    memories = {"shuffled": shuffled(method.memory, seed=0), "true crops": remember_crops(method)}
    return Beside(method, untrained(method.diffusion, seed=0), memories)


@pytest.fixture(scope="module")
def batch(settings):
    return next(iter(batches(open_dataset(settings), image_size=128, batch_size=4)))


def test_the_maps_of_diclip_are_its_own(beside, batch):
    found, own = dict(beside.rungs(batch)), dict(beside.method.rungs(batch))
    for name in ("clip", "intra", "vce", "tsa", "caa", "rar"):
        torch.testing.assert_close(found[name].scores, own[name].scores)
    torch.testing.assert_close(found["clip rar"].scores, own["clip_rar"].scores)
    assert set(RAW) | set(REFINED) <= {*found, *(f"vce {null}" for null in NULLS)}
    strong = {null: found[f"vce {null} x {STRENGTHS[-1]}"].scores for null in NULLS}
    for null, scores in strong.items():
        assert not torch.allclose(scores, found[f"vce {null} x {STRENGTHS[0]}"].scores), null
    assert len({round(float(scores.double().sum()), 6) for scores in strong.values()}) == len(NULLS)


def test_a_strength_multiplies_the_bias(settings, beside, batch):
    one = Beside(beside.method, beside.untrained, beside.memories)
    one.strengths = {**one.strengths, "no clusters": (3.0,)}
    found = dict(one.rungs(batch))
    method = beside.method
    coarse = 3.0 * method.walked(batch)[0]
    torch.testing.assert_close(
        found["vce no clusters"].scores, one.map(method.encode(batch, bias=coarse), batch).scores
    )


def test_an_untrained_model_differs_in_its_u_net_alone(beside, tiny_diffusion):
    trained, other = load_diffusion(tiny_diffusion), beside.untrained
    assert not torch.equal(trained.unet.conv_in.weight, other.unet.conv_in.weight)
    assert torch.equal(trained.vae.encoder.conv_in.weight, other.vae.encoder.conv_in.weight)
    again = untrained(trained, seed=0)
    assert torch.equal(again.unet.conv_in.weight, other.unet.conv_in.weight)
    assert not torch.equal(untrained(trained, seed=1).unet.conv_in.weight, other.unet.conv_in.weight)


@pytest.mark.parametrize("seed", range(4))
def test_a_shuffled_memory_misnames_every_class_and_no_background(tiny_memory, seed):
    memory = Memory.load(tiny_memory)
    wrong = shuffled(memory, seed=seed)
    assert torch.equal(wrong.keys, memory.keys) and torch.equal(wrong.values[:, 0], memory.values[:, 0])
    assert not (wrong.values[:, 1:] * memory.values[:, 1:]).any()
    assert torch.equal(wrong.values.sum(0), memory.values.sum(0))  # two keys a class in both


def test_an_effect_is_measured_against_its_strongest_null():
    rng = np.random.default_rng(0)
    counts = {
        name: np.stack([rng.random(30) + base, np.ones(30)], -1)
        for name, base in zip("abcd", (2, 1, 3, 0), strict=True)
    }
    found = effects.compare("something", counts, value=mean, seed=1)
    means = {name: round(float(x[:, 0].mean()), 2) for name, x in counts.items()}
    assert (found["with"], found["without"], found["without_is"]) == (means["a"], means["b"], "b")
    assert (found["null"], found["null_is"]) == (means["c"], "c")
    expected = paired_interval(counts["c"], counts["a"], generator=np.random.default_rng(1), metric=mean)
    assert found["interval"] == [round(expected.low, 2), round(expected.high, 2)] and found["interval"][1] < 0
    assert found["over_without"][0] > 0 and found["nulls"]["d"]["interval"][0] > 0
    alone = effects.compare("something", dict(list(counts.items())[:2]), value=mean, seed=1)
    assert alone["null"] is alone["null_is"] is None and alone["interval"] == found["over_without"]


def test_the_table(settings, monkeypatch):
    monkeypatch.setattr("diclip.nulls.STRENGTHS", (0.5, 8.0))
    found = json.loads(json.dumps(effects.measure_effects(settings), allow_nan=False))
    for name, effect in found.items():
        assert {"metric", "with", "without", "null", "interval", "split", "images"} <= set(effect), name
        assert effect["interval"][0] <= effect["interval"][1] and effect["split"] == "val"
        assert effect["protocol"]["scales"] == "1 of 128 px" and "versions" in effect["protocol"], name
    assert found["visual correlation enhancement"]["images"] == 6
    assert found["the same in scenes of several tags"]["images"] < 6
    assert found["visual correlation enhancement"]["strengths"]["vce"] == 3.0
    assert set(found["visual correlation enhancement"]["nulls"]) == {f"vce {null}" for null in NULLS[:4]}
    assert found["key-value memory"]["without"] == found["visual correlation enhancement"]["with"]
    assert {"value", "over_without"} == set(found["key-value memory"]["ceiling"])
    for name in ("co-occurrence", "co-occurrence, no background words"):
        assert 0 <= found[name]["with"] <= 100 and found[name]["without_is"] == "another place"
    knows = found["diffusion correlation"]
    assert 0 < knows["with"] < 100 and len(knows["nulls"]) in (8, 10) and "diffusion" in knows["is"]
    assert len(knows["all"]) == len(knows["nulls"]) + 4 and knows["all"][knows["is"]] == knows["with"]
    assert knows["is"].removesuffix(", clustered") == knows["without_is"].removesuffix(", clustered")


def test_other_datasets_are_refused(settings):
    with pytest.raises(ValueError, match="expected minivoc"):
        effects.measure_effects(settings.model_copy(update={"dataset": "voc"}))
    with pytest.raises(ValueError, match="effects are of maps at a single scale"):
        effects.measure_effects(settings.model_copy(update={"flip": True}))


def test_smoothness_is_one_for_equal_patches(settings, beside):
    found = effects.smoothness(settings, beside.method)
    assert found.shape == (6, 4, 2) and (found[..., 1] == 1).all() and (np.abs(found[..., 0]) <= 1).all()
    batch = next(iter(batches(open_dataset(settings), image_size=128, batch_size=4)))
    tokens = beside.method.clip.encode(batch.images).tokens[2, 1, 1:]
    cosine = torch.nn.functional.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    off = cosine[~torch.eye(len(tokens), dtype=torch.bool)]
    assert found[1, 2, 0] == pytest.approx(off.mean().item(), abs=1e-4)


def test_a_memory_of_true_objects_holds_what_lies_inside_masks(settings, beside):
    memory, method = beside.memories["true crops"], beside.method
    train = settings.model_copy(update={"split": "train"})
    (batch,) = batches(open_dataset(train), image_size=128, batch_size=4)
    present = {1 + label for tags in batch.tags for label in tags.tolist()}
    assert set(memory.values[:, 1:].any(0).nonzero()[:, 0].add(1).tolist()) == present
    features = key_features(method, method.look(batch).biased)[0].unflatten(0, (16, 16))
    mask = torch.nn.functional.interpolate(batch.masks[0][None, None].float(), (128, 128), mode="nearest")
    mask = torch.nn.functional.interpolate(mask, (16, 16), mode="nearest")[0, 0]
    for label in (0, *present):
        key = memory.keys[memory.values[:, label] == 1]
        torch.testing.assert_close(key[0], features[mask == label].mean(0), atol=1e-5, rtol=1e-4)
