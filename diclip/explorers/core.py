"""What the explorers share: frozen models that remember what they said, pictures to look at, and systems to try."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from diclip.clip import DenseCLIP, Encoded, load_clip
from diclip.data import Batch, dataset_vocabulary, open_dataset, squash
from diclip.data.images import decode_image, pictures_in
from diclip.data.voc import VOCFolder
from diclip.doubts import CURE, doubt_words, is_small
from diclip.explorers.pictures import Pixels, png
from diclip.methods import Method
from diclip.runs import pick_device
from diclip.settings import Settings, shown
from diclip.vocabulary import Vocabulary

T = TypeVar("T")


class Memo:
    """Remember the last `keep` results of each stage; `made` counts what had to be computed, by stage.

    Threads may ask at once: who asks for what another is making waits for it, and nobody else does.
    """

    def __init__(self, *, keep: int = 24) -> None:
        self.keep, self.made = keep, Counter()
        self._stages: dict[str, OrderedDict[Hashable, Any]] = {}
        self._making: dict[tuple[str, Hashable], Lock] = {}
        self._lock = Lock()

    def __call__(self, stage: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned for that key, at the first time by calling it."""
        known = self._stages.setdefault(stage, OrderedDict())
        with self._lock:
            making = self._making.setdefault((stage, key), Lock())
        try:
            with making:
                with self._lock:
                    if key in known:
                        known.move_to_end(key)
                        return known[key]
                made = make()
                with self._lock:
                    known[key] = made
                    self.made[stage] += 1
                    while len(known) > self.keep:
                        known.popitem(last=False)
                return made
        finally:
            self._making.pop((stage, key), None)


def digest(*tensors: Tensor | None) -> tuple[bytes | None, ...]:
    """Return a short name of each tensor's content."""
    return tuple(
        None if x is None else blake2b(x.detach().cpu().contiguous().numpy(), digest_size=16).digest() for x in tensors
    )


class RememberingCLIP:
    """Stand for a DenseCLIP, and encode each image and each prompt only once: whatever is built on it does too."""

    def __init__(self, clip: DenseCLIP, memo: Memo) -> None:
        self._clip, self._memo = clip, memo
        self._texts: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clip, name)

    def encode(
        self,
        images: Tensor,
        *,
        attention: str = "qq+2kk",
        surgery_blocks: int = 3,
        bias: Tensor | None = None,
        tokens: str | None = "clean",
        need_attention: bool = True,
        need_pull: bool = False,
    ) -> Encoded:
        """Do as DenseCLIP.encode does."""
        how = {
            "attention": attention,
            "surgery_blocks": surgery_blocks,
            "tokens": tokens,
            "need_attention": need_attention,
            "need_pull": need_pull,
        }
        key = (digest(images, bias), *how.values())
        return self._memo("clip", key, lambda: self._clip.encode(images, bias=bias, **how))

    def encode_text(self, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Do as DenseCLIP.encode_text does."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new or not prompts:
            self._texts.update(zip(new, self._clip.encode_text(new, batch_size=batch_size), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])


class RememberingDiffusion:
    """Stand for a Diffusion, and look at each image only once at a timestep and draw of noise."""

    def __init__(self, diffusion: Any, memo: Memo) -> None:
        self._diffusion, self._memo = diffusion, memo

    def __getattr__(self, name: str) -> Any:
        return getattr(self._diffusion, name)

    def encode(self, images: Tensor) -> Tensor:
        """Do as Diffusion.encode does."""
        return self._memo("latents", digest(images), lambda: self._diffusion.encode(images))

    def capture(self, images: Tensor, *, generator: Any, latents: Tensor | None = None, **how: Any) -> Any:
        """Do as Diffusion.capture does: a step of noise is told from others by the state of its generators."""
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        states = digest(*(each.get_state() for each in generators))
        key = (digest(images), states, *sorted((name, str(value)) for name, value in how.items()))

        def look() -> tuple[Any, list[Tensor]]:
            taps = self._diffusion.capture(images, generator=generator, latents=latents, **how)
            return taps, [each.get_state() for each in generators]

        taps, after = self._memo("diffusion", key, look)
        for each, state in zip(generators, after, strict=True):
            each.set_state(state)  # the next draw is another one, as it would be
        return taps


@dataclass(frozen=True)
class Pick:
    """Say which picture is meant: one of a split, or else of a folder, or else an uploaded file's name and bytes."""

    split: str = "val"
    index: int = 0
    folder: str = ""
    upload: tuple[str, bytes] | None = None


@dataclass(frozen=True, eq=False)
class Photo:
    """Hold a picture with what is known about it."""

    name: str
    image: Tensor  # (3, H, W) float32 in [0, 1]
    tags: tuple[str, ...]
    mask: Tensor | None  # (H, W) int64, 0 background, 255 void
    foreign: bool  # none of the dataset's

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W)."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Hold what a choice looks like: pixels (H, W, 3), one line about them, and what to doubt."""

    pixels: Pixels
    line: str
    doubts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return " ".join((self.line, *self.doubts))

    def _repr_png_(self) -> bytes:
        return png(self.pixels, small=True)


class Studio:
    """Hold the models of some settings, loaded once, for all explorers; a frozen CLIP may be given.

    Raises ValueError, in one line, for weights that are absent. What a diffusion model is needed for is not loaded
    before it is asked for; `lacks` says what cannot be.
    """

    def __init__(self, settings: Settings, *, clip: DenseCLIP | None = None) -> None:
        self.memo = Memo()
        self.settings = settings.model_copy(update={"device": str(pick_device(settings.device))})
        clip = clip or load_clip(
            settings.clip_model,
            pretrained=settings.clip_pretrained,
            device=self.settings.device,
            pixel_norm=settings.pixel_norm,
        )
        self.frozen, self.clip = clip, RememberingCLIP(clip, self.memo)
        self.small = is_small(clip)  # a mini model: only MiniVOC's words and drawings mean something
        self.classes = dataset_vocabulary(self.settings).classes

    @property
    def lacks_diffusion(self) -> str | None:
        """Say in one line that there is no diffusion model, where that is known without loading one."""
        models = self.settings.diffusion_model
        if not any(Path(name).is_dir() or not name.startswith("/") for name in models):
            return f"there is no diffusion model in {shown(models[-1])}: train one with `diclip pretrain diffusion`"
        return None

    @property
    def lacks(self) -> str | None:
        """Say in one line what DiCLIP lacks, the diffusion model or the memory."""
        if self.lacks_diffusion:
            return self.lacks_diffusion
        if not self.settings.memory.is_file():
            where = shown(self.settings.memory)
            return f"there is no memory at {where}: build one with `diclip memory` and the same --preset"
        return None

    @property
    def diffusion(self) -> RememberingDiffusion:
        """Load the diffusion model; raise ValueError, in one line, where it is missing."""
        from diclip.diffusion import load_diffusion

        names, device = self.settings.diffusion_model, self.settings.device
        make = lambda: RememberingDiffusion(load_diffusion(names, device=device), self.memo)  # noqa: E731
        return self.memo("model", names, make)

    def dataset(self, split: str) -> VOCFolder:
        """Open all of a split; raise FileNotFoundError, in one line, where it is missing."""
        whole = {"limit": 0, "shard_index": 0, "num_shards": 1}
        chosen = self.settings.model_copy(update={"split": split, **whole})
        return self.memo("dataset", split, lambda: open_dataset(chosen))

    def photo(self, pick: Pick) -> Photo:
        """Read a picture; raise ValueError or FileNotFoundError, in one line, for one that is none."""
        return self.memo("photo", pick, lambda: self._read(pick))

    def _read(self, pick: Pick) -> Photo:
        if pick.upload is not None:
            name, data = pick.upload
            return Photo(name, decode_image(data, name=name), (), None, True)
        if pick.folder:
            files = pictures_in(pick.folder)
            path = files[min(pick.index, len(files) - 1)]
            return Photo(path.name, decode_image(path.read_bytes(), name=path.name), (), None, True)
        dataset = self.dataset(pick.split)
        if not 0 <= pick.index < len(dataset):
            raise ValueError(f"index is {pick.index}, expected 0 to {len(dataset) - 1} in {pick.split}")
        sample = dataset[pick.index]
        tags = tuple(dataset.class_names[tag] for tag in sample.tags.tolist())
        return Photo(sample.name, sample.image, tags, sample.mask, False)

    def batch(self, photo: Photo, classes: Sequence[str], names: Sequence[str]) -> Batch:
        """Return a photo as a batch of one, squashed, tagged with some of the class `names`."""
        tags = torch.tensor(sorted(names.index(name) for name in classes), dtype=torch.long)
        image = squash(photo.image, self.settings.image_size)
        return Batch([photo.name], image[None], [tags], [photo.mask], [photo.size])

    def system(self, settings: Settings, words: tuple[str, ...] = ()) -> Method:
        """Build the system that settings name, with `words` for classes of one's own beside the dataset's.

        Raises ValueError, in one line, for words twice and for what is missing. DiCLIP has no memory of words.
        """
        return self.memo("system", (settings.model_dump_json(), words), lambda: self._build(settings, words))

    def _build(self, settings: Settings, words: tuple[str, ...]) -> Method:
        from diclip.attributes import attribute_bank, read_attributes
        from diclip.memory import Memory
        from diclip.methods.clip import PlainCLIP
        from diclip.methods.clip_es import CLIPES
        from diclip.methods.diclip import DiCLIP
        from diclip.methods.excel import ExCEL

        own = settings.vocabulary(self.classes)
        twice = sorted(set(words) & set(own.background))
        if twice:
            raise ValueError(f"{', '.join(twice)} cannot be class and background: take it out of one of the boxes")
        wider = Vocabulary((*own.classes, *words), own.background, own.template, own.synonyms)
        if settings.method == "excel":
            bank = attribute_bank(settings, self.clip, own, read_attributes(settings.attributes, own.classes))
            return ExCEL(settings, self.clip, vocabulary=wider, bank=bank)
        if settings.method == "diclip":
            if self.lacks:
                raise ValueError(self.lacks)
            memory = None if words else Memory.load(settings.memory)  # it knows the dataset's classes alone
            return DiCLIP(settings, self.clip, self.diffusion, memory, vocabulary=wider)
        return {"clip": PlainCLIP, "clip-es": CLIPES}[settings.method](settings, self.clip, vocabulary=wider)

    def doubts(self, photo: Photo, words: Sequence[str] = ()) -> tuple[str, ...]:
        """Say what the models cannot know about a photo and some words, and which preset's can."""
        if not self.small:
            return ()
        said = list(doubt_words(words))
        if photo.foreign:
            said.append(f"The mini CLIP has only ever seen MiniVOC's drawings: this map means little. {CURE}.")
        return tuple(said)
