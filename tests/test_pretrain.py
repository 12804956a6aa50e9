"""Test what the mini models are trained with: tokenizer, facts, augmentation, loss, loop, export."""

import json
import math
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPTokenizer

from diclip.data.minivoc import CLASSES, write_pretrain
from diclip.data.minivoc.captions import PLACES, Caption, describe, vocabulary_sentences
from diclip.pretrain.clip import build_model, caption_loss, encode_dropped, model_config
from diclip.pretrain.data import Pictures, augment, candidate_prompts, truths, write_captions
from diclip.pretrain.tokenizer import CONTEXT_LENGTH, END, build_tokenizer
from diclip.vocabulary import BACKGROUND_WORDS, VOC


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_clip):
    return CLIPTokenizer.from_pretrained(tiny_clip)


def captions(facts) -> list[str]:
    rng = np.random.default_rng(1)
    return [c.text for c in (*write_captions(*facts, rng), *candidate_prompts(rng))]


def test_each_word_of_captions_is_one_token(tokenizer, facts):
    words = {word.strip(".,") for text in captions(facts) for word in text.replace(",", " ").split()}
    words |= {word.strip(".,") for text in vocabulary_sentences() for word in text.replace(",", " ").split()}
    assert len(words) > 80
    assert {word for word in words | set(BACKGROUND_WORDS) if len(tokenizer.tokenize(word)) != 1} == set()


def test_vocabulary_is_small_and_ends_with_the_end(tokenizer, facts):
    assert len(tokenizer) <= 4096
    assert tokenizer.eos_token == END and tokenizer.eos_token_id == len(tokenizer) - 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    lengths = [len(tokenizer(text).input_ids) for text in [*captions(facts), *VOC.prompts()]]
    assert max(lengths) <= CONTEXT_LENGTH


def test_text_towers_find_the_end_of_the_sentence(tokenizer):
    ids = tokenizer(["cat", "a cat and a dog and grass."], padding="max_length", max_length=CONTEXT_LENGTH)
    assert np.argmax(ids.input_ids, 1).tolist() == [2, 9]  # after start and words; padding has no higher id


def test_open_clip_and_transformers_read_the_same(tiny_clip, tokenizer, facts):
    other = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    texts = [*captions(facts)[:60], *VOC.prompts(), "Ünïcode, CAPITALS & 42 emoji 🦊", "", "cat " * 40]
    own = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH).input_ids
    assert other(texts).tolist() == own
    assert len({tuple(ids) for ids in own}) > 60


def test_any_text_survives(tokenizer):
    for text in ("zebra in pyjamas", "ünïcode", "漢字 🦊"):
        ids = tokenizer(text).input_ids[1:-1]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).strip() == text


def test_tokenizer_is_the_same_each_time(tiny_clip, tmp_path):
    expected = json.loads((tiny_clip / "tokenizer.json").read_text())["model"]
    for index in range(5):
        folder = build_tokenizer(tmp_path / str(index))
        assert json.loads((folder / "tokenizer.json").read_text())["model"] == expected


# Facts


def slow_truths(captions, tags, places, told):
    """Say it as one would: for each picture and each caption."""
    true, known = (np.zeros((len(tags), len(captions)), bool) for _ in range(2))
    for row in range(len(tags)):
        present = {CLASSES[index] for index in range(20) if tags[row, index]}
        for column, caption in enumerate(captions):
            if not caption.classes <= present:
                known[row, column] = True  # and false
            elif caption.place is None:
                true[row, column] = known[row, column] = True
            elif told[row]:
                known[row, column], true[row, column] = True, caption.place == PLACES[places[row]]
    return true, known


def test_truths_against_a_slow_version(facts):
    tags, places = (array[:60] for array in facts)
    rng = np.random.default_rng(3)
    texts = write_captions(tags, places, rng) + candidate_prompts(rng)
    true, known = truths(texts, tags, places, np.random.default_rng(4))
    told = np.random.default_rng(4).random(60) < 0.3
    expected = slow_truths(texts, tags, places, told)
    np.testing.assert_array_equal(true.numpy(), expected[0])
    np.testing.assert_array_equal(known.numpy(), expected[1])
    assert not (true & ~known).any()
    silent = (~known).any(1).numpy()
    assert silent.tolist() == (~told).tolist() and 0.5 < silent.mean() < 0.9
    own = [caption.place is None or told[row] for row, caption in enumerate(texts[:60])]
    assert true[range(60), range(60)].tolist() == own  # a picture's own caption holds for it


def test_candidates_name_each_class_and_place_once():
    prompts = candidate_prompts(np.random.default_rng(0))
    assert [caption.classes for caption in prompts[:20]] == [{name} for name in CLASSES]
    assert [caption.place for caption in prompts[20:]] == list(PLACES)
    assert not any(caption.classes for caption in prompts[20:])


# Pictures


def test_pictures_are_what_was_rendered(tmp_path):
    folder = write_pretrain(tmp_path, 2, workers=1)
    pictures = Pictures.open(folder, 2)
    batch = pictures.take(np.array([1, 0, 1]))
    stored = np.load(folder / "images-000000-000002.npy")
    assert batch.shape == (3, 3, 128, 128) and batch.dtype == torch.float32 and len(pictures) == 2
    assert torch.equal((batch[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(stored[1]))
    with pytest.raises(ValueError, match="holds 2 pictures, 3 are needed"):
        Pictures.open(folder, 3)
    with pytest.raises(ValueError, match="holds 0 pictures"):
        Pictures.open(tmp_path / "nowhere", 1)


def test_pictures_of_an_earlier_smaller_rendering_count_once(tmp_path):
    def chunk(start: int, stop: int) -> None:
        values = np.arange(start, stop)
        arrays = {"images": values[:, None], "tags": values[:, None] > 0, "places": values}
        for kind, array in arrays.items():
            np.save(tmp_path / f"{kind}-{start:06d}-{stop:06d}.npy", array)

    for start, stop in ((0, 64), (0, 2000), (2000, 3000), (2000, 4000)):
        chunk(start, stop)
    assert Pictures.open(tmp_path, 3500).places.tolist() == list(range(3500))
    with pytest.raises(ValueError, match="holds 4000 pictures"):
        Pictures.open(tmp_path, 4001)


def test_augmented_pictures():
    images = torch.rand(6, 3, 40, 40, generator=generator(1))
    crop = partial(augment, images, size=24, crop=(0.5, 1.0))
    found = crop(generator=generator())
    assert found.shape == (6, 3, 24, 24) and found.dtype == torch.float32
    assert 0 <= found.min() < found.max() <= 1
    assert found.equal(crop(generator=generator())) and not found.equal(crop(generator=generator(1)))


def test_augmentation_mirrors_but_never_turns():
    y, x = torch.meshgrid(torch.linspace(0.3, 0.7, 40), torch.linspace(0.3, 0.7, 40), indexing="ij")
    images = torch.stack([y, x, torch.full_like(x, 0.5)]).expand(32, -1, -1, -1)
    found = augment(images, size=16, crop=(0.5, 1.0), generator=generator())
    steps = found.diff(dim=2)[:, 0], found.diff(dim=3)[:, 1]
    assert (steps[0] > 0).all()  # down stays down
    rightwards = (steps[1] > 0).all((1, 2))
    leftwards = (steps[1] < 0).all((1, 2))
    assert (rightwards | leftwards).all() and 6 < rightwards.sum() < 26
    # A ramp over a crop of share s rises by s, times the contrast of 0.7 to 1.3.
    rise = (found[:, 0, -1, 0] - found[:, 0, 0, 0]) / 0.4
    assert 0.5 * 0.7 * 0.9 < rise.min() < 0.6 < 0.9 < rise.max() < 1.3
    assert found[:, 2].std((1, 2)).max() < 1e-5  # what is even stays even
    assert 0.05 < found[:, 2].mean((1, 2)).std() < 0.1  # but for the light: uniform in 0.5 ± 0.12


def test_finer_sampling_makes_fine_patterns_grey():
    stripes = (torch.arange(64) % 2).float().expand(4, 3, 64, 64)
    coarse, fine = (augment(stripes, size=16, crop=(0.9, 1.0), finer=n, generator=generator()) for n in (1, 4))
    assert fine.shape == (4, 3, 16, 16) and coarse.std((1, 2, 3)).min() > 0.1 > 0.05 > fine.std((1, 2, 3)).max()
    torch.testing.assert_close(fine.mean(), coarse.mean(), atol=0.1, rtol=0)


def test_whole_pictures_are_only_mirrored_and_lit():
    images = torch.rand(8, 3, 16, 16, generator=generator(2)) * 0.1 + 0.45
    found = augment(images, size=16, crop=(1.0, 1.0), generator=generator())
    for before, after in zip(images, found, strict=True):
        flat = [(x - x.mean()).flatten() / x.std() for x in (before, before.flip(-1), after)]
        assert min((flat[0] - flat[2]).abs().max(), (flat[1] - flat[2]).abs().max()) < 1e-3


# Loss


def test_caption_loss_by_hand():
    random = generator()
    images, texts = torch.randn(3, 4, generator=random), torch.randn(4, 4, generator=random)
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)  # nothing holds for image 2
    known = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    logits = (1.7 * images @ texts.T).tolist()

    def side(rows, holds, sure):
        losses = []
        for row, truth, certain in zip(rows, holds, sure, strict=True):
            total = sum(math.exp(x) for x, c in zip(row, certain, strict=True) if c)
            right = [-math.log(math.exp(x) / total) for x, t in zip(row, truth, strict=True) if t]
            losses += [sum(right) / len(right)] if right else []
        return sum(losses) / len(losses)

    by_image = side(logits, true.tolist(), known.tolist())
    by_text = side(list(zip(*logits, strict=True)), true.T.tolist(), known.T.tolist())
    found = caption_loss(images, texts, torch.tensor(1.7), true, known)
    assert found.item() == pytest.approx((by_image + by_text) / 2, rel=1e-5)


def test_what_is_unknown_has_no_say():
    images, texts = (torch.randn(3, 4, generator=generator(seed)) for seed in (0, 1))
    true = torch.eye(3, dtype=torch.bool)
    known = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    images.requires_grad_(True)
    gradients = []
    for other in (texts, torch.cat([texts[:1] + 5 * torch.ones(1, 4), texts[1:]])):
        caption_loss(images, other, torch.tensor(2.0), true, known).backward()
        gradients.append(images.grad[2].clone())
        images.grad = None
    torch.testing.assert_close(*gradients)


# The model


@pytest.mark.parametrize("pool", ["avg", "tok"])
def test_nothing_dropped_is_open_clips_own_path(pool):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(model_config(vocab_size=50, pool=pool, width=32, layers=2)).eval()
    images = torch.randn(2, 3, 128, 128, generator=generator())
    with torch.no_grad():
        expected = model.encode_image(images)
        torch.testing.assert_close(
            encode_dropped(model.visual, images, drop=0.0, pool=pool, generator=generator()),
            expected,
            atol=1e-5,
            rtol=1e-4,
        )
        dropped = [encode_dropped(model.visual, images, drop=0.9, pool=pool, generator=generator(s)) for s in (1, 1, 2)]
    assert dropped[0].equal(dropped[1]) and not torch.allclose(dropped[0], dropped[2])
    assert not torch.allclose(dropped[0], expected, atol=1e-3)


def test_dropped_patches_are_not_looked_at():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(model_config(vocab_size=50, width=32, layers=2)).eval()
    images = torch.randn(1, 3, 128, 128, generator=generator(), requires_grad=True)
    encode_dropped(model.visual, images, drop=0.85, pool="tok", generator=generator()).sum().backward()
    patches = images.grad.abs().sum((0, 1)).unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3))
    assert (patches > 0).sum() == round(256 * 0.15)


def test_captions_describe_the_picture():
    rng = np.random.default_rng(0)
    caption = describe(("cat", "dog"), "snow", rng)
    assert isinstance(caption, Caption) and caption.classes <= {"cat", "dog"} and caption.place in (None, "snow")
    tags = np.zeros((1, 20), bool)
    tags[0, 7] = True
    (own,) = write_captions(tags, np.array([PLACES.index("snow")]), rng)
    assert own.classes == {"cat"} and own.place in (None, "snow")
