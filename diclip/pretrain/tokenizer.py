"""One small tokenizer for both mini models: byte-level BPE in CLIP's own format, built from MiniVOC's captions."""

from __future__ import annotations

import json
from pathlib import Path

from diclip.data.minivoc.captions import vocabulary_sentences
from diclip.vocabulary import BACKGROUND_WORDS

VOCABULARY_SIZE = 1024
CONTEXT_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path) -> Path:
    """Train the tokenizer and write it to `folder` in the Hugging Face format; return the folder.

    `transformers.CLIPTokenizer` and open_clip's `local-dir:` both read it. Any text can be encoded, in bytes if
    need be; words of MiniVOC's captions are whole tokens. The end token has the highest id, which CLIP's text
    towers rely on.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    raw = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    finals = [letter + "</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=finals,  # known in advance: ties are broken by number, which would else be the hash map's
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(vocabulary_sentences() + list(BACKGROUND_WORDS), trainer)
    model = json.loads(raw.to_str())["model"]
    known = [*letters, *finals]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = dict.fromkeys([*known, *(a + b for a, b in merges), START, END])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return folder
