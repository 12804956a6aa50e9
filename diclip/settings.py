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

from diclip.presets import METHODS, PRESETS
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


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"setting 'crop_scales' is {pair[0]:g} to {pair[1]:g}, expected the smaller number first")
    return pair


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
Share = Annotated[float, Field(ge=0, le=1)]


Interval = Annotated[
    tuple[Annotated[float, Field(gt=0, le=8)], Annotated[float, Field(gt=0, le=8)]],
    BeforeValidator(_words),
    AfterValidator(_ascending),
]


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

    max_iters: int = Field(600, ge=1, description="steps of a training")
    supervision: Literal["tags", "masks"] = Field("tags", description="what a network learns from; masks: its ceiling")
    decoder_tokens: Literal["clean", "aliased"] = Field(
        "clean", description="blocks' outputs, or the release's mixture"
    )
    decoder_width: int = Field(64, ge=1, description="channels of the decoder")
    decoder_heads: int = Field(4, ge=1, description="heads of its attention; they divide the width")
    decoder_layers: int = Field(3, ge=1, description="its transformer blocks")
    decoder_dropout: float = Field(0.1, ge=0, lt=1, description="share of its features' channels dropped in training")
    pair_mean: Literal["image", "batch"] = Field("image", description="whose mean a pair of patches is compared with")
    pair_radius: int = Field(6, ge=0, description="rows and columns that the pairs of the diversity loss span")
    pair_weight: float = Field(0.1, ge=0, description="weight of the diversity loss")
    own_labels_from: Share = Field(1.0, description="share of the steps after which pairs follow the decoder's labels")
    affinity_from: Share = Field(0.2, description="share of the steps after which its pairs join CAA; 1: never")
    dynamic_from: Share = Field(0.0, description="share after which the trained maps replace the static ones; 1: never")
    adapter_slots: int = Field(87, ge=0, description="free slots of the adapter, beside the memory's keys")
    adapter_spread: float = Field(0.02, ge=0, description="deviation that their weights begin with")
    adapter_dropout: float = Field(0.1, ge=0, lt=1, description="share of the adapter's values dropped in training")
    adapter_weight: float = Field(0.1, ge=0, description="weight of the adapter's loss")
    adapter_strength: float = Field(0.1, ge=0, description="weight of the adapter in the trained maps")
    label_scale: float = Field(1.0, gt=0, description="scale of a training's crops that their labels are made at")
    label_power: float = Field(1.0, gt=0, description="power of the background score in these labels; < 1: less object")
    train_caa: bool = Field(True, description="spread the labels of a training by CAA")
    train_rar_rounds: int = Field(5, ge=0, description="RAR's steps, for the labels of a training")
    par_rounds: int = Field(20, ge=0, description="rounds of pixel-adaptive refinement, for ExCEL's labels")
    par_image: Literal["exact", "truncated"] = Field("exact", description="its pixels; truncated: up to a 255th darker")

    trained: Folder | None = Field(None, description="trained parts: a run's folder, or a file; none: without training")

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

    train_split: str = Field("train", pattern=r"^[\w-]+$", description="images that a network is trained on")
    train_images: int = Field(0, ge=0, description="take only the first images of train_split; 0 takes all")
    val_split: str = Field("val", pattern=r"^[\w-]+$", description="images that a trained network is reported on")
    warmup_iters: int = Field(20, ge=0, description="steps in which the learning rate grows; then it falls to zero")
    learning_rate: float = Field(5e-3, gt=0, description="the largest learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    train_batch: int = Field(4, ge=1, description="crops of a step, of all processes and accumulated parts together")
    accumulate: int = Field(1, ge=1, description="parts that a step's crops are taken in, for less memory")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="numbers that a network computes in")
    crop_scales: Interval = Field((0.5, 2.0), description="smallest and largest scale of an image that is cropped")
    parity_crops_see_masks: bool = Field(
        False, description="PIXEL SUPERVISION, as the released code has it: choose crops by the true masks"
    )
    validate_every: int = Field(100, ge=0, description="steps between validations on tune_split; 0: none")
    validate_images: int = Field(0, ge=0, description="first images of tune_split that they score; 0: all")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    scored_checkpoint: Literal["last", "best"] = Field("last", description="which is reported; best: on tune_split")
    score_pseudo_labels: bool = Field(True, description="also score what a network learned from, on val_split")
    reference_run: Folder | None = Field(None, description="run of supervision masks, to report beside this one")

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


def shipped_heads(settings: Settings) -> Path:
    """Return where the trained parts lie that ship with a preset's method."""
    return ROOT / "data" / settings.preset / "heads" / f"{settings.method}.safetensors"


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
