"""What can be said of a scene. A caption is a sentence and the facts that it states, so that a program knows
for which pictures it is true.
"""

from dataclasses import dataclass

import numpy as np

from diclip.data.minivoc.scene import CLASSES
from diclip.data.minivoc.textures import CLASS_MATERIALS

PLACE_RATE = 0.3
ATTRIBUTE_RATE = 0.3

TEMPLATES = (
    "a clean origami {}.", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "there is a {}.", "one {}.",
    "{}.", "{}",
)  # fmt: skip
SYNONYMS: dict[str, tuple[str, ...]] = {
    "aeroplane": ("aeroplane", "airplane", "plane"),
    "bicycle": ("bicycle", "bike", "cycle"),
    "bird": ("bird", "bird avian", "little bird"),
    "boat": ("boat", "ship"),
    "bottle": ("bottle", "flask"),
    "bus": ("bus", "coach"),
    "car": ("car", "automobile"),
    "cat": ("cat", "kitten"),
    "chair": ("chair", "chair seat", "seat"),
    "cow": ("cow", "bull"),
    "diningtable": ("diningtable", "dining table", "table"),
    "dog": ("dog", "puppy"),
    "horse": ("horse", "pony"),
    "motorbike": ("motorbike", "motorcycle", "moped"),
    "person": ("person", "person with clothes,people,human", "human", "people"),
    "pottedplant": ("pottedplant", "potted plant", "plant"),
    "sheep": ("sheep", "lamb"),
    "sofa": ("sofa", "couch"),
    "train": ("train", "tram"),
    "tvmonitor": ("tvmonitor screen", "tvmonitor", "television", "monitor"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "sky": ("sky", "cloud"),
    "grass": ("grass", "land", "valley"),
    "road": ("road", "street"),
    "water": ("water", "lake", "river", "sea", "ocean"),
    "room": ("wall", "house", "building", "room"),
    "rails": ("railway", "railroad"),
    "wood": ("ground", "wood"),
    "snow": ("snow", "mountain"),
}
PLACES = tuple(PLACE_WORDS)


@dataclass(frozen=True)
class Caption:
    """A sentence with the classes and the place that it names."""

    text: str
    classes: frozenset[str]
    place: str | None = None


def name_of(label: str, rng: np.random.Generator) -> str:
    """Name a class by a synonym or, in three of ten cases, by its material alone."""
    if rng.random() < ATTRIBUTE_RATE:
        return f"thing with {CLASS_MATERIALS[label][1]}"
    return str(rng.choice(SYNONYMS[label]))


def describe(tags: tuple[str, ...], place: str, rng: np.random.Generator) -> Caption:
    """Write a caption for a picture of `tags` at `place`: one to all of the classes, seldom the place."""
    count = int(rng.integers(1, len(tags) + 1))
    chosen = [str(name) for name in rng.permutation(np.array(tags, dtype=object))[:count]]
    words = " and a ".join(name_of(name, rng) for name in chosen)
    if rng.random() < PLACE_RATE:
        word = str(rng.choice(PLACE_WORDS[place]))
        return Caption(f"a {words} and {word}.", frozenset(chosen), place)
    return Caption(str(rng.choice(TEMPLATES)).format(words), frozenset(chosen))


def class_prompts(rng: np.random.Generator) -> list[Caption]:
    """Write one prompt for each class, in class order."""
    return [Caption(str(rng.choice(TEMPLATES)).format(name_of(name, rng)), frozenset([name])) for name in CLASSES]


def vocabulary_sentences() -> list[str]:
    """List sentences that hold every word that captions use: what the tokenizer is built from."""
    words = [word for names in (*SYNONYMS.values(), *PLACE_WORDS.values()) for word in names]
    words += [f"thing with {material}" for _, material in CLASS_MATERIALS.values()]
    return [template.format(word) for template in TEMPLATES for word in words] + ["a cat and a dog and grass."]
