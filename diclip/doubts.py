"""Say what a small model cannot know, and which preset's model can."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diclip.clip import DenseCLIP

CURE = 'load_settings("voc") has a CLIP that was trained on photographs'


def is_small(clip: DenseCLIP) -> bool:
    """Tell whether only MiniVOC's words and drawings mean something to a CLIP."""
    return clip.model.vocab_size <= 4096


def doubt_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence about those of the words that the mini CLIP never read, none if there is none."""
    unknown = [word for word in words if not set(re.findall(r"\w+", word.lower())) <= known_words()]
    if not unknown:
        return ()
    listed = ", ".join(unknown[:4]) + (" …" if len(unknown) > 4 else "")
    return (f"The mini CLIP has never heard of {listed}: it knows MiniVOC's words alone. {CURE}.",)


def known_words() -> frozenset[str]:
    """Return every word of MiniVOC's captions: what its mini CLIP can have learnt."""
    from diclip.data.minivoc.captions import vocabulary_sentences

    return frozenset(re.findall(r"\w+", " ".join(vocabulary_sentences()).lower()))
