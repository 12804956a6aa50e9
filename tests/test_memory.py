"""Test the memory of TSA: how it is built, kept on disk and read, patch by patch."""

from math import exp

import pytest
import torch
import torch.nn.functional as F

from diclip.cam import minmax, normalise, surgery_scores
from diclip.memory import Memory, build_memory, fuse, pooled_keys, retrieve

E, CLASSES = 8, ("cat", "dog", "bus")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def memory() -> Memory:
    """Two keys of background, three cats, one dog, two buses; not in blocks."""
    owner = torch.tensor([0, 1, 3, 1, 0, 2, 3, 1])
    return Memory(random(8, E, seed=3), torch.eye(4)[owner], CLASSES)


@pytest.fixture
def batch():
    """Return patches (2, 12, E), pooled features and texts of the classes and two background words."""
    return random(2, 12, E), random(2, E, seed=1), F.normalize(random(5, E, seed=2), dim=-1)


def test_pooled_keys_one_image_at_a_time():
    patches = random(4, 12, E)
    masks = torch.rand(4, 9, 16, generator=torch.Generator().manual_seed(0)) > 0.5  # three pixels by four a cell
    masks[1], masks[2] = False, True
    foreground, background, valid = pooled_keys(patches, masks, grid=(3, 4))
    assert valid.tolist() == [[True, False, True, True], [True, False, False, True]]
    for image in (0, 3):
        inside = masks[image, ::3, ::4].flatten()
        torch.testing.assert_close(foreground[image], patches[image, inside].mean(0))
        torch.testing.assert_close(background[image], patches[image, ~inside].mean(0))
    torch.testing.assert_close(foreground[2], patches[2].mean(0))
    assert not foreground[1].any() and not background[1:3].any()


def blobs(centres, count, seed):
    return (centres[:, None] + 0.01 * random(len(centres), count, E, seed=seed)).flatten(0, 1)


def test_build_finds_the_centres_background_first():
    places = 5 * torch.eye(E)
    foreground = {
        "cat": blobs(places[:2], 9, 0),
        "dog": places[2:3] + random(1, E),  # fewer keys than centres
        "bus": places[3:4].repeat(6, 1),  # six keys, all the same
        "van": torch.zeros(0, E),
    }
    built = build_memory(foreground, blobs(places[5:8], 9, 1), per_class=2, background_centres=3, seed=7)
    assert built.classes == ("cat", "dog", "bus", "van")
    assert built.values.argmax(1).tolist() == [0, 0, 0, 1, 1, 2, 3] and built.values.shape == (7, 5)
    nearest = torch.cdist(built.keys, places).argmin(1)
    assert sorted(nearest[:3].tolist()) == [5, 6, 7] and sorted(nearest[3:5].tolist()) == [0, 1]
    torch.testing.assert_close(built.keys[5:6], foreground["dog"])
    torch.testing.assert_close(built.keys[6], places[3])
    blob = foreground["cat"][:9]
    assert torch.isclose(built.keys[3:5], blob.mean(0), atol=1e-4).all(1).sum() == 1


def test_build_repeats_with_its_seed():
    keys, other = random(60, E), random(60, E, seed=1)
    one, same, another = (
        build_memory({"cat": keys}, other, per_class=9, background_centres=9, seed=seed) for seed in (0, 0, 1)
    )
    assert one.keys.equal(same.keys) and not one.keys.equal(another.keys)


def test_a_file_holds_all_of_it(memory, tmp_path):
    path = tmp_path / "new" / "memory.safetensors"
    Memory(memory.keys + 1, memory.values, CLASSES).save(path)
    memory.save(path)  # in place of the other
    read = Memory.load(path)
    assert read.keys.equal(memory.keys) and read.values.equal(memory.values) and read.classes == CLASSES
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def slow_retrieval(patches, pooled, memory, texts, value_mode, affinity, beta):
    """Retrieve for one image; features are normalised."""
    if affinity == "exp":
        likeness = [[exp(-beta * (1 - float(F.cosine_similarity(x, k, dim=0)))) for k in memory.keys] for x in patches]
    else:
        likeness = surgery_scores(patches[None], pooled[None], memory.keys)[0][0].clamp_min(0).tolist()
    owner = memory.values.argmax(1).tolist()
    words = [texts[3:].mean(0), *texts[:3]]
    maps = []
    for column, word in enumerate(words):
        own = [u for u, o in enumerate(owner) if o == column]
        weight = [exp(float(memory.keys[u] @ word)) if value_mode == "masked_text_softmax" else 1.0 for u in own]
        maps.append([sum(w * row[u] for w, u in zip(weight, own, strict=True)) / sum(weight) for row in likeness])
    found = minmax(torch.tensor(maps), 1)
    return minmax(found[1:] * (1 - found[0]), 1)


@pytest.mark.parametrize("value_mode", ["masked_text_softmax", "onehot"])
@pytest.mark.parametrize("affinity", ["relu_surgery", "exp"])
@pytest.mark.parametrize(("token", "norm_dim"), [(True, "token"), (False, "token"), (False, "channel")])
def test_retrieval_key_by_key(memory, batch, value_mode, affinity, token, norm_dim):
    patches, pooled, texts = batch
    norm = {"pooled_is_token": token, "norm_dim": norm_dim}
    modes = {"value_mode": value_mode, "affinity": affinity, "beta": 2.0}
    found = retrieve(patches, pooled, memory, texts, **norm, **modes)
    assert found.shape == (2, 3, 12)
    patches, pooled = normalise(patches, pooled, **norm)
    for image in range(2):
        expected = slow_retrieval(patches[image], pooled[image], memory, texts, **modes)
        torch.testing.assert_close(found[image], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("affinity", ["relu_surgery", "exp"])
def test_each_class_is_found_where_its_keys_are(affinity):
    """Patches are unit vectors: one of each class and of the background, others of neither."""
    patches = torch.eye(E)[None]
    keys = torch.eye(E)[[7, 4, 2, 0]]
    memory = Memory(keys, torch.eye(4), CLASSES)
    pooled, texts = torch.zeros(1, E), F.normalize(random(5, E), dim=-1)
    found = retrieve(patches, pooled, memory, texts, pooled_is_token=False, norm_dim="channel", affinity=affinity)
    assert found[0].argmax(-1).tolist() == [4, 2, 0] and (found[0, :, 7] == 0).all()
    assert (found[0] == 1).sum() == 3 and (found[0] > 0.5).sum() == 3


def test_class_without_keys_and_no_background_words(batch):
    patches, pooled, texts = batch
    keys = random(3, E, seed=3)
    memory = Memory(keys, torch.eye(4)[[0, 1, 3]], CLASSES)
    for mode in ("masked_text_softmax", "onehot"):
        found = retrieve(patches, pooled, memory, texts[:3], pooled_is_token=True, value_mode=mode)
        assert found.isfinite().all() and not found[:, 1].any() and found[:, [0, 2]].any(-1).all()


def test_constant_features_retrieve_nothing(memory, batch):
    found = retrieve(torch.ones(1, 12, E), torch.ones(1, E), memory, batch[2], pooled_is_token=True)
    assert found.equal(torch.zeros(1, 3, 12))


def test_fusion():
    cam, found = torch.tensor([[[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]]]), torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(fuse(cam, found)[0], torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(fuse(cam, found, weight=2.0)[0, 0], torch.tensor([1.0, 0.0, 1 / 3]))


def test_what_does_not_fit_is_said_in_one_line(memory, batch, tmp_path):
    patches, pooled, texts = batch
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    damaged.write_bytes(b"not safetensors")
    from safetensors.torch import save_file

    save_file({"keys": memory.keys, "values": memory.values}, other)
    cat, wide = {"cat": random(3, E)}, random(3, E + 1)
    token = {"pooled_is_token": True}
    centres = {"per_class": 2, "background_centres": 2}
    for call, message in (
        (lambda: Memory(memory.keys, memory.values[:, 1:], CLASSES), "\\(U, E\\) and \\(U, 4\\)"),
        (lambda: Memory(memory.keys, memory.values / 2, CLASSES), "not one-hot"),
        (lambda: Memory.load(tmp_path / "absent"), "no memory at .*absent: build one"),
        (lambda: Memory.load(damaged), "damaged is not a memory"),
        (lambda: Memory.load(other), "other is not a memory"),
        (lambda: pooled_keys(patches, torch.ones(2, 6, 8), grid=(3, 5)), "\\(B, 15, E\\)"),
        (lambda: build_memory({}, random(3, E), **centres), "0 classes"),
        (lambda: build_memory(cat, wide, **centres), "class cat are \\(3, 8\\), expected finite \\(n, 9\\)"),
        (lambda: build_memory(cat, random(3, E) / 0, **centres), "keys of background"),
        (lambda: retrieve(patches, pooled, memory, texts[:, :3], **token), "all of one width"),
        (lambda: retrieve(patches, pooled, memory, texts[:2], **token), "2 texts, .* 3 classes"),
        (lambda: retrieve(patches, pooled, memory, texts, value_mode="hard", **token), "onehot"),
        (lambda: retrieve(patches, pooled, memory, texts, affinity="cosine", **token), "relu_surgery or exp"),
        (lambda: fuse(torch.zeros(1, 3, 4), torch.zeros(1, 3, 5)), "expected the same"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
