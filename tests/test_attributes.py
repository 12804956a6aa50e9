"""Test ExCEL's text enrichment: its sentences, its bank, and the soft hunting against one class at a time."""

import json
import math
import re
import tomllib

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diclip.attributes import attribute_bank, enrich, hunt, read_attributes
from diclip.clip import load_clip
from diclip.presets import PRESETS
from diclip.settings import ROOT, load_settings
from diclip.vocabulary import VOC, VOC_CLASSES, Vocabulary

SENTENCES = {"cat": ["soft fur", "long whiskers"], "dog": ["a wet nose"], "bus": ["rows of windows", "big wheels"]}
WORDS = Vocabulary(("dog", "cat"), ("grass",), synonyms={"cat": "cat kitten"})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return load_clip(tiny_clip)


def enriched_one_by_one(texts, bank, *, dropped, weight):
    rows = []
    for text in texts.tolist():
        scores = [sum(a * b for a, b in zip(text, attribute, strict=True)) for attribute in bank.tolist()]
        kept = sorted(range(len(bank)), key=lambda index: scores[index])[dropped:]
        total = sum(math.exp(scores[index]) for index in kept)
        row = [
            value + weight * sum(math.exp(scores[index]) / total * bank[index, e].item() for index in kept)
            for e, value in enumerate(text)
        ]
        length = math.sqrt(sum(value**2 for value in row))
        rows.append([value / length for value in row])
    return torch.tensor(rows)


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (9, 0), (10, 0), (20, 1), (100, 9), (112, 11), (224, 22)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_enrichment_one_class_at_a_time(count, dropped, weight):
    """The numbers left out are those of the released code, which counts them in floating point."""
    texts, bank = F.normalize(random(3, 6), dim=-1), random(count, 6, seed=1)
    expected = enriched_one_by_one(texts, bank, dropped=dropped, weight=weight)
    torch.testing.assert_close(enrich(texts, bank, weight=weight), expected, atol=1e-6, rtol=0)


@given(st.integers(1, 40), st.floats(1e-6, 1), st.floats(0, 5), st.integers(0, 99))
def test_enriched_texts_are_unit_rows_and_mixtures_lie_within_the_bank(count, share, weight, seed):
    texts, bank = F.normalize(random(4, 5, seed=seed), dim=-1), random(count, 5, seed=seed + 1)
    mixture = hunt(texts, bank, share=share)
    assert (mixture <= bank.amax(0) + 1e-5).all() and (mixture >= bank.amin(0) - 1e-5).all()
    enriched = enrich(texts, bank, share=share, weight=weight)
    torch.testing.assert_close(enriched.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(enriched, enrich(texts, bank.flip(0), share=share, weight=weight))


def test_the_smallest_share_takes_the_nearest_attribute():
    texts, bank = F.normalize(random(4, 5), dim=-1), random(30, 5, seed=1)
    torch.testing.assert_close(hunt(texts, bank, share=1e-6), bank[(texts @ bank.T).argmax(1)])
    torch.testing.assert_close(enrich(texts, bank, weight=0), texts)


@pytest.mark.parametrize(
    ("texts", "bank", "share", "message"),
    [
        ((2, 4), (3, 5), 0.9, r"texts and bank are \(2, 4\) and \(3, 5\)"),
        ((2, 4), (0, 4), 0.9, r"\(0, 4\)"),
        ((2, 4), (3, 4), 0.0, "share is 0.0"),
        ((2, 4), (3, 4), 1.5, "share is 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(texts, bank, share, message):
    with pytest.raises(ValueError, match=message) as error:
        enrich(random(*texts), random(*bank), share=share)
    assert "\n" not in str(error.value)


def test_reading_takes_yaml_and_json_and_the_asked_classes(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(SENTENCES))
    (tmp_path / "a.json").write_text(json.dumps(SENTENCES))
    expected = {"dog": ("a wet nose",), "cat": ("soft fur", "long whiskers")}
    for name in ("a.yaml", "a.json"):
        found = read_attributes(tmp_path / name, ("dog", "cat"))
        assert found == expected and list(found) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there are no attributes at"),
        ("cat: [a, b", "is no YAML"),
        (b"\xff\xfe\x00", "is no YAML"),
        ("- a\n- b", "holds list"),
        ("", "holds NoneType"),
        ("cat: [soft fur]", "no list of sentences for class 'dog'"),
        ("cat: [soft fur]\ndog: a wet nose", "for class 'dog'"),
        ("cat: [soft fur]\ndog: []", "for class 'dog'"),
        ("cat: [soft fur, 3]\ndog: [nose]", "for class 'cat'"),
        ("cat: [' ']\ndog: [nose]", "for class 'cat'"),
    ],
)
def test_faults_of_the_file_are_one_line(tmp_path, content, message):
    path = tmp_path / "attributes.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_attributes(path, ("cat", "dog"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_bank_holds_each_sentence_after_its_class(clip):
    settings = load_settings(attribute_clusters=9)
    bank = attribute_bank(settings, clip, WORDS, SENTENCES)
    said = [
        "a clean origami dog. a wet nose",
        "a clean origami cat kitten. soft fur",
        "a clean origami cat kitten. long whiskers",
    ]
    torch.testing.assert_close(bank, clip.encode_text(said))
    alone = attribute_bank(load_settings(attribute_prompts=False), clip, WORDS, SENTENCES)
    torch.testing.assert_close(alone, clip.encode_text(["a wet nose", "soft fur", "long whiskers"]))


def test_a_bank_sums_up_and_repeats_with_its_seed(clip):
    attributes = read_attributes(load_settings().attributes, VOC_CLASSES)
    banks = [attribute_bank(load_settings(seed=seed), clip, VOC, attributes) for seed in (0, 0, 1)]
    assert banks[0].shape == (20, 128) and banks[0].equal(banks[1]) and not banks[0].equal(banks[2])
    assert (banks[0].norm(dim=1) < 1).all()  # means of unit rows


@pytest.mark.parametrize("preset", PRESETS)
def test_shipped_sentences_are_of_every_class_and_fit_the_models_context(preset):
    import open_clip

    settings = load_settings(preset)
    vocabulary = settings.vocabulary()
    attributes = read_attributes(settings.attributes, vocabulary.classes)
    said = [text for own in attributes.values() for text in own]
    assert len(set(said)) == len(said) >= settings.attribute_clusters
    assert len({len(own) for own in attributes.values()}) == 1
    prompts = dict(zip(vocabulary.classes, vocabulary.prompts(), strict=False))
    full = [f"{prompts[name]} {text}" for name, own in attributes.items() for text in own]
    model = f"local-dir:{settings.clip_model}" if preset == "mini" else settings.clip_model
    tokens = open_clip.get_tokenizer(model)(full)
    assert (tokens.argmax(1) < tokens.shape[1] - 1).all()  # the end, which has the highest id, is not at the last place
    assert len(tokens.unique(dim=0)) == len(full)


SAID = {  # other names of classes, and plurals that no s makes
    "diningtable": ["dining table"],
    "pottedplant": ["potted plant"],
    "tvmonitor": ["television", "monitor"],
    "person": ["person", "people", "man", "men", "woman", "women", "child", "children"],
    "motorbike": ["motorbike", "motorcycle"],
    "motorcycle": ["motorcycle", "motorbike"],
    "airplane": ["airplane", "aeroplane"],
    "bicycle": ["bicycle", "bike"],
    "sports ball": ["ball"],
    "couch": ["couch", "sofa"],
    "tv": ["tv", "television", "monitor"],
    "knife": ["knife", "knives"],
    "mouse": ["mouse", "mice"],
    "cell phone": ["phone"],
    "refrigerator": ["refrigerator", "fridge"],
    "donut": ["donut", "doughnut"],
}


@pytest.mark.parametrize("preset", ["voc", "coco"])
def test_no_sentence_names_another_class_or_a_background_word(preset):
    """They are to tell a class from the others, and background words take from it what they explain better."""
    settings = load_settings(preset)
    classes = settings.vocabulary().classes
    for name, own in read_attributes(settings.attributes, classes).items():
        foreign = {word for other in classes if other != name for word in SAID.get(other, [other])}
        foreign |= set(settings.background_words)
        pattern = re.compile(rf"\b({'|'.join(foreign)})(e?s)?\b", re.IGNORECASE)
        assert not [text for text in own if pattern.search(text)], name


def test_mini_sentences_are_of_words_that_the_mini_clip_has_read():
    from transformers import CLIPTokenizer

    settings = load_settings()
    tokenizer = CLIPTokenizer.from_pretrained(settings.clip_model)
    for own in read_attributes(settings.attributes, VOC_CLASSES).values():
        for text in own:
            assert all(token.endswith("</w>") for token in tokenizer.tokenize(text)), text


def test_presets_name_files_for_their_classes():
    assert {load_settings(preset).attributes.name for preset in PRESETS} == {"minivoc.yaml", "voc.yaml", "coco.yaml"}


def test_sentences_are_shipped_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["diclip"]
    shipped = {path for pattern in patterns for path in (ROOT / "diclip").glob(pattern)}
    assert shipped == set((ROOT / "diclip/sentences").iterdir()) and len(shipped) == 3
