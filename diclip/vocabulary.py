"""Name things: classes, the words that prompt for them, and the background."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

TEMPLATE = "a clean origami {}."

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# MS COCO's, in the order of its category ids.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# Where a class name alone prompts badly, the words used instead (CLIP-ES, CVPR 2023).
VOC_SYNONYMS = {
    "bird": "bird avian",
    "chair": "chair seat",
    "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
}
# The same for COCO; the released list says "sknowboard" for snowboard, a slip that is not repeated here.
COCO_SYNONYMS = {
    **VOC_SYNONYMS,
    "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse",
    "tie": "necktie",
    "baseball glove": "glove",
    "spoon": "dessertspoon",
    "remote": "remote control",
    "hair drier": "hairdrier,blowdrier",
    "tv": "tvmonitor screen",
}
VOC_PROMPT_NAMES = tuple(VOC_SYNONYMS.get(name, name) for name in VOC_CLASSES)

BACKGROUND_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
    "railway", "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock",
    "street", "valley", "bridge", "sign",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Hold the classes of a task and what is said about them.

    `synonyms` maps a class to the words that prompt for it; a class that is absent is prompted by its name.
    Class i is label i + 1 in a mask; label 0 is the background. Raises ValueError for no classes, a name
    given twice, a synonym of an unknown class, or a template without exactly one `{}`.

        Vocabulary(("cat", "dog"), synonyms={"cat": "cat kitten"}).prompts()
    """

    classes: tuple[str, ...]
    background: tuple[str, ...] = BACKGROUND_WORDS
    template: str = TEMPLATE
    synonyms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("the vocabulary has no classes: give at least one name")
        for kind, names in (("class", self.classes), ("background", self.background)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} names must differ, found twice: {', '.join(twice)}")
        unknown = sorted(set(self.synonyms) - set(self.classes))
        if unknown:
            raise ValueError(f"synonyms are given for {', '.join(unknown)}, which are not among the classes")
        if self.template.count("{}") != 1:
            raise ValueError(f"the template {self.template!r} must contain {{}} exactly once")

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """Return the words that stand for each class in a prompt."""
        return tuple(self.synonyms.get(name, name) for name in self.classes)

    def prompts(self) -> list[str]:
        """Return one sentence a class, then one a background word."""
        return [self.template.format(name) for name in (*self.prompt_names, *self.background)]

    def indices(self, tags: Iterable[str]) -> list[int]:
        """Return the ascending class indices of tags; raise ValueError for a tag that is no class."""
        found = set()
        for tag in tags:
            if tag not in self.classes:
                near = get_close_matches(tag, self.classes, n=1) or self.classes[:1]
                known = f"the {len(self.classes)} classes; did you mean {near[0]!r}?"
                raise ValueError(f"tag {tag!r} is not one of {known}")
            found.add(self.classes.index(tag))
        return sorted(found)


VOC = Vocabulary(VOC_CLASSES, synonyms=VOC_SYNONYMS)
