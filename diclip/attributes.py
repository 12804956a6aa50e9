"""Enrich the texts of classes with visual attributes found in sentences (ExCEL's text semantic enrichment)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from diclip.clip import DenseCLIP
from diclip.memory import centres
from diclip.settings import Settings, shown
from diclip.vocabulary import Vocabulary


def read_attributes(path: str | Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read each class's sentences from a YAML or JSON file, `{class: [sentence, ...]}`; it may know other classes too.

    Raises ValueError, in one line, for a file that is absent or of another form and for a class without sentences.
    """
    form = "write each class's name and below it a list of sentences, as in diclip/sentences/voc.yaml"
    if not Path(path).is_file():
        raise ValueError(f"there are no attributes at {shown(path)}: {form}, and name it in the setting attributes")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown(path)} is no YAML ({str(error).splitlines()[0]}): {form}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)} holds {type(found).__name__}, expected sentences by class: {form}")
    for name in classes:
        own = found.get(name)
        if not isinstance(own, list) or not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise ValueError(f"{shown(path)} has no list of sentences for class {name!r}: {form}")
    return {name: tuple(found[name]) for name in classes}


def attribute_bank(
    settings: Settings, clip: DenseCLIP, vocabulary: Vocabulary, attributes: Mapping[str, Sequence[str]]
) -> Tensor:
    """Sum the sentences of all classes up to attributes (B, E) by k-means of their text features.

    Each sentence follows its class's prompt if the settings say so, as ExCEL's do. With fewer distinct sentences than
    `attribute_clusters` each is an attribute. Centres are no unit rows.
    """
    prompts = dict(zip(vocabulary.classes, vocabulary.prompts(), strict=False))
    opening = {name: f"{prompt} " if settings.attribute_prompts else "" for name, prompt in prompts.items()}
    sentences = [f"{opening[name]}{text}".lower() for name in prompts for text in attributes[name]]
    features = clip.encode_text(sentences)
    return centres(features, settings.attribute_clusters, seed=settings.seed).to(features)


def hunt(texts: Tensor, bank: Tensor, *, share: float = 0.9) -> Tensor:
    """Mix for each text (C, E) those of a bank's attributes (B, E) that are most like it: (C, E).

    The weights are the softmax, at temperature 1, of the products with the best `share` of the attributes (ExCEL,
    CVPR 2025, text semantic enrichment, as released). How many are left out is counted in floating point, as there:
    0.9 of 112 leaves out 11, of 100 only 9. Of a bank too small to leave any out all are taken, where the released code
    gives NaN. Raises ValueError for an empty bank, another width, and a share outside of (0, 1].
    """
    if texts.ndim != 2 or bank.ndim != 2 or texts.shape[1] != bank.shape[1] or not len(bank):
        raise ValueError(f"texts and bank are {tuple(texts.shape)} and {tuple(bank.shape)}, expected (C, E), (B, E)")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0 and at most 1")
    likeness = texts @ bank.T  # (C, B)
    dropped = min(int((1 - share) * len(bank)), len(bank) - 1)
    lowest = likeness.topk(dropped, largest=False).indices
    return likeness.scatter(1, lowest, -torch.inf).softmax(-1) @ bank


def enrich(texts: Tensor, bank: Tensor, *, share: float = 0.9, weight: float = 1.0) -> Tensor:
    """Add to texts (C, E), unit rows, `weight` times what they `hunt` in a bank (B, E); return unit rows."""
    return mix(texts, hunt(texts, bank, share=share), weight=weight)


def mix(texts: Tensor, attributes: Tensor, *, weight: float = 1.0) -> Tensor:
    """Add attributes (C, E) or (E,) to texts (C, E), and return unit rows."""
    return F.normalize(texts + weight * attributes, dim=-1)
