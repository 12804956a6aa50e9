"""Test class names, prompts and tags."""

import pytest

from diclip.settings import load_settings
from diclip.vocabulary import BACKGROUND_WORDS, COCO_CLASSES, COCO_SYNONYMS, VOC, VOC_CLASSES, Vocabulary


def test_voc():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES) and len(BACKGROUND_WORDS) == 25
    prompts = VOC.prompts()
    assert len(prompts) == 45
    assert prompts[2] == "a clean origami bird avian." and prompts[20] == "a clean origami ground."


def test_own_classes_synonyms_and_tags():
    words = Vocabulary(("cat", "dog"), background=("sky",), template="a {}", synonyms={"dog": "dog hound"})
    assert words.prompts() == ["a cat", "a dog hound", "a sky"]
    assert words.indices(["dog", "cat", "dog"]) == [0, 1] and words.indices([]) == []
    with pytest.raises(ValueError, match="'dgo' is not one of the 2 classes; did you mean 'dog'"):
        words.indices(["dgo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ()}, "no classes"),
        ({"classes": ("cat", "dog", "cat")}, "found twice: cat"),
        ({"classes": ("cat",), "synonyms": {"cow": "moo"}}, "cow"),
        ({"classes": ("cat",), "template": "a cat"}, "exactly once"),
    ],
)
def test_bad_vocabularies(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**arguments)


def test_coco_prompts_its_own_classes():
    vocabulary = load_settings("coco").vocabulary()
    assert vocabulary.classes == COCO_CLASSES and len(set(COCO_CLASSES)) == 80 and COCO_CLASSES[79] == "toothbrush"
    assert set(vocabulary.synonyms) == set(COCO_SYNONYMS) - {"tvmonitor"}
    prompts = vocabulary.prompts()
    assert len(prompts) == 80 + 23 and prompts[27] == "a clean origami necktie."
    assert load_settings("voc").vocabulary().classes == load_settings().vocabulary().classes == VOC_CLASSES
