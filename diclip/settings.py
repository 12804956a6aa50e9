"""Say what a run does: one flat, typed, validated object, and three presets."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from diclip.vocabulary import BACKGROUND_WORDS, TEMPLATE, VOC_CLASSES, VOC_SYNONYMS, Vocabulary

ROOT = Path(__file__).resolve().parents[1]


def shown(path: str | Path) -> str:
    """Return a path as people and files should see it: relative to the repository where it lies inside."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _absolute(path: str | Path) -> Path:
    return ROOT / Path(path).expanduser()


def _model(name: str) -> str:
    """Make the path of a model's folder absolute; leave names of architectures and hubs alone."""
    return str(_absolute(name)) if "/" in name and ":" not in name else name


def _model_shown(name: str) -> str:
    return shown(name) if name.startswith("/") else name


def _words(value: Any) -> Any:
    """Read "sky, grass" and "[sky, grass]", as they come from a command line, as lists."""
    return yaml.safe_load(f"[{value.strip().strip('[]')}]") if isinstance(value, str) else value


Folder = Annotated[Path, AfterValidator(_absolute), PlainSerializer(shown, when_used="json")]
Model = Annotated[str, AfterValidator(_model), PlainSerializer(_model_shown, when_used="json")]
Attention = Literal["qk", "qq", "kk", "vv", "identity", "bias", "qkv", "qq+2kk"]
Background = Literal["fixed", "sweep"]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class Settings(BaseModel):
    """Hold everything a run depends on; the defaults are the embedded default, the preset `mini`,
    whose choices were made on MiniVOC's `tune`; `voc` and `coco` take the published ones.

    Relative paths are relative to the repository, never to the working directory, and are written so to JSON.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    preset: Literal["mini", "voc", "coco"] = Field("mini", description="where the other defaults come from")
    method: Literal["clip"] = Field("clip", description="the system")

    dataset: Literal["minivoc", "voc", "coco"] = Field("minivoc", description="the images")
    data_root: Folder = Field(Path("data"), description="folder that holds the datasets")
    minivoc_seed: int = Field(0, ge=0, description="which val and shift scenes MiniVOC draws")
    tune_split: str = Field("tune", pattern=r"^[\w-]+$", description="images that settings are chosen on")
    split: str = Field("val", pattern=r"^[\w-]+$", description="list of images: train, tune, val, shift …")
    image_size: int = Field(128, ge=32, le=2048, multiple_of=8, description="side images are squashed to")
    limit: int = Field(0, ge=0, description="read only the first images; 0 reads all")
    shard_index: int = Field(0, ge=0, description="which part of the images this process takes")
    num_shards: int = Field(1, ge=1, description="how many parts there are")

    clip_model: Model = Field("data/mini/clip", description="folder, or open_clip model name")
    clip_pretrained: str | None = Field(None, description="open_clip weights: tag or file; none for a folder")
    pixel_norm: Literal["clip", "imagenet"] = Field("clip", description="whose mean and deviation pixels get")
    attention: Attention = Field("qkv", description="what mixes patches in the surgery path")
    surgery_blocks: int = Field(2, ge=1, description="last blocks that feed the surgery path")
    norm_dim: Literal["token", "channel"] = Field("token", description="axis that features are normalised over")
    template: str = Field(TEMPLATE, pattern=r"^[^{}]*\{\}[^{}]*$", description="prompt, with {} for the name")
    background_words: Words = Field(BACKGROUND_WORDS, description="what is prompted for besides the classes")

    tau_box: float = Field(0.79, ge=0, le=1, description="share of a map's maximum that earns a box (CAA)")
    caa_layers: int = Field(6, ge=1, description="last blocks whose attention CAA averages")
    background: Background = Field("sweep", description="background score of raw maps; sweep: the best on tune")
    background_score: float = Field(0.5, ge=0, le=1, description="the fixed background score")

    baselines: bool = Field(True, description="also score what needs no learning")

    pretrain_pictures: int = Field(60_000, ge=64, description="rendered pictures that a mini model learns from")
    pretrain_steps: int = Field(5_000, ge=1, description="steps of 128 pictures")
    max_minutes: float = Field(0, ge=0, description="stop a training after that time, to be resumed; 0: never")

    batch_size: int = Field(16, ge=1, description="images at a time")
    workers: int = Field(0, ge=0, description="processes that read images")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="a GPU if there is one")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything random")
    run_dir: Folder = Field(Path("runs/scratch"), description="folder that the run writes to")

    def vocabulary(self, classes: tuple[str, ...] = VOC_CLASSES) -> Vocabulary:
        """Return the classes of a dataset, with what the settings say about them and their background."""
        synonyms = {name: words for name, words in VOC_SYNONYMS.items() if name in classes}
        return Vocabulary(classes, self.background_words, self.template, synonyms)

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        if self.shard_index >= self.num_shards:
            last = self.num_shards - 1
            raise ValueError(f"setting 'shard_index' is {self.shard_index}, expected 0 to {last} (num_shards - 1)")
        return self


# What a preset changes of the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {},
    "voc": {
        "dataset": "voc",
        "split": "train",
        "tune_split": "train",
        "baselines": False,
        "image_size": 320,
        "clip_model": "ViT-B-16-quickgelu",
        "clip_pretrained": "openai",
        "pixel_norm": "imagenet",
        "attention": "qq+2kk",
        "surgery_blocks": 3,
        "workers": 4,
    },
    "coco": {
        "dataset": "coco",
        "tune_split": "train",
        "baselines": False,
        "image_size": 320,
        "clip_model": "ViT-B-16-quickgelu",
        "clip_pretrained": "openai",
        "pixel_norm": "imagenet",
        "attention": "qq+2kk",
        "surgery_blocks": 3,
        "background_words": tuple(word for word in BACKGROUND_WORDS if word not in ("keyboard", "sign")),
        "tau_box": 0.88,
        "workers": 4,
    },
}


def load_settings(preset: str = "mini", **overrides: Any) -> Settings:
    """Return the settings of a preset with some of them changed; numbers may come as strings.

    Raises ValueError, in one line, for an unknown preset or name and for values that do not fit.

        load_settings("voc", split="train", limit=10)
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    try:
        return Settings(preset=preset, **{**PRESETS[preset], **overrides})
    except ValidationError as error:
        raise ValueError("; ".join(map(_explain, error.errors()))) from None


def _explain(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name, found = error["loc"][0], error["input"]
    if error["type"] != "extra_forbidden":
        expected = error["msg"].replace("Input should", "it should").replace("String should", "it should")
        return f"setting {name!r} is {found!r}, but {expected} ({Settings.model_fields[name].description})"
    near = get_close_matches(str(name), Settings.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(Settings.model_fields)}"
    return f"unknown setting {name!r}: {hint}"
