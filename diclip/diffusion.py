"""Read a frozen latent diffusion model densely: one noised step, and what its self-attentions say on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diclip.clip import LOADING
from diclip.settings import shown
from diclip.surgery import attend
from diclip.taps import Layer, attentions, hint, tap

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline

Generators = torch.Generator | Sequence[torch.Generator]
# The schedulers that people run Stable Diffusion with, as its repositories configure them.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
}


@dataclass(frozen=True)
class Taps:
    """Hold what two self-attentions say about B images: n = h·w tokens row by row in the coarse, M in the fine."""

    coarse_q: Tensor  # (B, heads, n, d), neither scaled nor normalised
    coarse_k: Tensor  # (B, heads, n, d)
    coarse_grid: tuple[int, int]
    fine: Tensor | None  # (B, M, M), mean of the chosen heads' probabilities: rows sum to 1
    fine_grid: tuple[int, int] | None


class Diffusion:
    """Look into images, and make some, with a frozen Stable Diffusion: its pipeline in diffusers.

    The pipeline's models are frozen and made eval in place, its safety checker is not used. Public tensors are
    float32 whatever the models' type. Raises ValueError for a U-Net that takes more than the VAE's latents.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        for module in (self.unet, self.vae, self.text_encoder):
            module.eval().requires_grad_(False)
        takes, gives = self.unet.config.in_channels, self.vae.config.latent_channels
        if takes != gives:
            raise ValueError(f"U-Net takes {takes} channels, expected its VAE's {gives}: use a text-to-image model")
        self.device: torch.device = self.unet.device
        self.factor: int = pipeline.vae_scale_factor  # pixels to a latent
        self.layers = attentions(self.unet)
        self._text = lru_cache(maxsize=256)(self._encode_text)

    def self_attentions(self) -> dict[str, Layer]:
        """Return the U-Net's self-attentions by module name, in the order down, middle, up."""
        return {name: layer for name, layer in self.layers.items() if name.endswith(".attn1")}

    def timestep_at(self, index: int, *, steps: int = 50, scheduler: Literal["ddim", "pndm"] | None = None) -> int:
        """Return the timestep at an index of a schedule, by default of the model's own scheduler.

        DiCLIP takes index 45 of 50 steps, which PNDM makes 101 (it runs its second step twice), DDIM 81.
        """
        schedule = self._schedule(scheduler)
        schedule.set_timesteps(steps)
        if not -len(schedule.timesteps) <= index < len(schedule.timesteps):
            raise ValueError(f"index is {index}, expected 0 to {len(schedule.timesteps) - 1} with {steps} steps")
        return round(schedule.timesteps[index].item())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the scaled mean latents (B, C, H / factor, W / factor) of images (B, 3, H, W) in [0, 1].

        Raises ValueError for sides that are not multiples of the VAE's factor.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"images are {found}, expected float (B, 3, H, W) in [0, 1]: divide by 255")
        height, width = images.shape[2:]
        if not height or not width or height % self.factor or width % self.factor:
            found, factor = f"{height}x{width}", self.factor
            raise ValueError(f"images are {found}, expected multiples of {factor}x{factor}: resize them")
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def predict(
        self, latents: Tensor, *, timestep: int, generator: Generators, prompt: str | Sequence[str] = ""
    ) -> Tensor:
        """Noise latents (B, C, h, w) to a timestep and return the U-Net's output, (B, C, h, w), without guidance.

        The noise of each image is drawn on its own, from one generator in turn or from one an image; then it
        depends neither on the batch nor on the device. `prompt` is one text for all or one an image. Raises
        ValueError if their numbers, or the timestep, do not fit.
        """
        alphas, count, channels = self.scheduler.alphas_cumprod, len(latents), self.unet.config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected (B, {channels}, h, w): see encode")
        if not 0 <= timestep < len(alphas):
            raise ValueError(f"timestep is {timestep}, expected 0 to {len(alphas) - 1}: see timestep_at")
        generators = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if not len(generators) == len(prompts) == count:
            found = f"{len(generators)} generators and {len(prompts)} prompts"
            raise ValueError(f"found {found} for {count} images, expected one, or one an image")
        noise = draw(latents.shape[1:], generators).to(latents)
        noised = alphas[timestep].sqrt() * latents + (1 - alphas[timestep]).sqrt() * noise
        texts = torch.cat([self._text(text) for text in prompts])
        return self.unet(noised.to(self.device, self.unet.dtype), timestep, encoder_hidden_states=texts).sample.float()

    @torch.no_grad()
    def capture(
        self,
        images: Tensor,
        *,
        timestep: int,
        coarse: str,
        fine: str | None,
        generator: Generators,
        fine_heads: Sequence[int] = (1, 2),
        prompt: str | Sequence[str] = "",
        latents: Tensor | None = None,
    ) -> Taps:
        """Look at images (B, 3, H, W), float in [0, 1], through two self-attentions of one noised U-Net step.

        `coarse` and `fine` are names of `self_attentions`; without `fine` only the coarse one is kept. `latents`
        (of `encode`) take the images' place, which spares encoding them for another draw or timestep. For the
        rest see `predict`; DiCLIP: timestep 101, empty prompt, the layers of `diclip_layers`, heads 1 and 2.
        Raises ValueError for arguments that do not fit.
        """
        self._check(coarse, fine, fine_heads)
        latents = self.encode(images) if latents is None else latents
        with tap(self.unet, [coarse] if fine is None else [coarse, fine], stop=True) as taps:
            self.predict(latents, timestep=timestep, generator=generator, prompt=prompt)
        grid = self.layers[coarse].grid(latents)
        if fine is None:
            return Taps(*taps[coarse], grid, None, None)
        q, k = taps[fine]
        total = reduce(Tensor.add_, (attend(q[:, head], k[:, head]) for head in fine_heads))  # a head at a time
        return Taps(*taps[coarse], grid, total.div_(len(fine_heads)), self.layers[fine].grid(latents))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int],
        generator: torch.Generator,
        steps: int = 50,
        guidance: float = 7.5,
        scheduler: Literal["ddim", "pndm"] | None = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Return a picture a prompt, (B, 3, H, W) float32 in [0, 1] on the CPU; `size` is a side or (H, W).

        `scheduler` is by default the model's own, `guidance` 1 is none. Each picture has a seed of its own, drawn
        from the generator, so that batch size and device do not matter. Raises ValueError for no prompts and for
        sides that do not fit.
        """
        size, factor = (size, size) if isinstance(size, int) else tuple(size), max(self.factor, 8)
        if not prompts or min(size) < 1 or size[0] % factor or size[1] % factor:
            found = f"{len(prompts)} prompts, size {size}"
            raise ValueError(f"found {found}, expected at least one, and sides that are multiples of {factor}")
        shape = (self.unet.config.in_channels, size[0] // self.factor, size[1] // self.factor)
        parts = {**self.pipeline.components, "scheduler": self._schedule(scheduler), "safety_checker": None}
        pipeline = type(self.pipeline)(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        seeds = torch.randint(2**62, (len(prompts),), generator=generator, device=generator.device).tolist()
        pictures = []
        for start in range(0, len(prompts), batch_size):
            own = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            made = pipeline(
                list(prompts[start : start + batch_size]),
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=draw(shape, own).to(self.device, self.unet.dtype),
                generator=own,
                output_type="pt",
            )
            pictures.append(made.images.float().cpu())
        return torch.cat(pictures)

    def _encode_text(self, prompt: str) -> Tensor:
        return self.pipeline.encode_prompt(prompt, self.device, 1, False)[0].to(self.unet.dtype)  # (1, T, D)

    def _schedule(self, name: str | None) -> SchedulerMixin:
        """Return a scheduler of the model's noise schedule that has run no step yet."""
        import diffusers

        if name is None:
            return deepcopy(self.scheduler)  # from_config would forget what the pipeline has mended in it
        if name not in SCHEDULERS:
            raise ValueError(f"scheduler is {name!r}, expected {', '.join(SCHEDULERS)} or None, the model's own")
        kind, settings = SCHEDULERS[name]
        return getattr(diffusers, kind).from_config(self.scheduler.config, **settings)

    def _check(self, coarse: str, fine: str | None, fine_heads: Sequence[int]) -> None:
        known = self.self_attentions()
        for name in (coarse, fine):
            if name is not None and name not in known:
                raise ValueError(f"{name!r} is no self-attention of the U-Net, {hint(name, known)}")
        if fine is not None and (not fine_heads or not set(fine_heads) <= set(range(known[fine].heads))):
            last = known[fine].heads - 1
            raise ValueError(f"fine_heads are {tuple(fine_heads)}, expected some of 0 to {last}, the heads of {fine}")


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Return normal noise (len(generators), *shape), a generator each, so that batches do not change it."""
    return torch.stack([torch.randn(shape, generator=each, device=each.device).cpu() for each in generators])


def load_diffusion(
    model: str | Path | Sequence[str | Path],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Diffusion:
    """Load a frozen text-to-image model that diffusers' StableDiffusionPipeline reads.

    `model` is a folder, read from disk alone, or a hub id such as "owner/name" (with "hf-hub:" before it, or
    without), or several of these, of which the first that loads is taken: Stable Diffusion 2.1 lives on in
    mirrors. Only safetensors are read. `dtype` is by default float16 on CUDA and float32 elsewhere. Raises
    ValueError, in one line with the remedy, for weights that are absent, damaged or of another kind.
    """
    models = [str(one) for one in ([model] if isinstance(model, str | Path) else model)]
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    faults: list[str] = []
    for name in models:
        try:
            with LOADING:
                pipeline = _read(name)
        except Exception as error:  # whatever diffusers, transformers, safetensors or the network raise, in one line
            reason = shorten(str(error).strip() or type(error).__name__, 160, placeholder=" …")
            faults.append(f"{shown(name)} ({reason})")
        else:
            with _quiet():
                return Diffusion(pipeline.to(device, dtype))
    what = "; ".join(faults) or "none (no name was given)"
    raise ValueError(f"diffusion model could not be loaded: {what}; {_remedy(models)}")


def _remedy(models: list[str]) -> str:
    hub = next((name.removeprefix("hf-hub:") for name in models if _hub_id(name)), None)
    if hub is None:
        place = shown(models[-1]) if models else "a folder"
        return f"restore it with `git checkout -- {place}` or train one with `diclip pretrain diffusion`"
    download = f"from diffusers import StableDiffusionPipeline as p; p.download('{hub}', use_safetensors=True)"
    return f'run `python -c "{download}"` with a network, or name a local folder'


def _hub_id(name: str) -> bool:
    return not Path(name).is_dir() and bool(re.fullmatch(r"(hf-hub:)?[\w-][\w.-]*/[\w.-]+", name))


def _read(name: str) -> StableDiffusionPipeline:
    """Read a pipeline from a folder, or download it before; refuse what the libraries would fill at random."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    folder = Path(name)
    if _hub_id(name):
        with _quiet(bars=True):
            hub = name.removeprefix("hf-hub:")
            folder = Path(StableDiffusionPipeline.download(hub, use_safetensors=True, **unused))
    if not folder.is_dir():
        raise ValueError("neither a folder nor a hub id")
    _check_files(folder)
    kinds = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}
    parts = {}
    with _quiet():
        for part, kind in kinds.items():
            read, info = kind.from_pretrained(folder / part, use_safetensors=True, output_loading_info=True)
            if info["missing_keys"]:
                lacks = sorted(info["missing_keys"])
                raise ValueError(f"{part} lacks {len(lacks)} of its weights, {lacks[0]} first")
            parts[part] = read
        return StableDiffusionPipeline.from_pretrained(folder, **parts, **unused, requires_safety_checker=False)


def _check_files(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise ValueError("no model_index.json")
    for part in ("unet", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"no safetensors in {part}")
    if not any((folder / "tokenizer" / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError("no tokenizer.json in tokenizer")  # without one transformers makes up an empty tokenizer


@contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Silence the libraries' warnings of what is checked here, and their bars, for a while."""
    import diffusers
    import transformers

    with ExitStack() as after:
        for log in (diffusers.utils.logging, transformers.utils.logging):
            after.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
            if not bars and log.is_progress_bar_enabled():
                after.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield
