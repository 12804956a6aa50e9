"""Read dense features from a frozen CLIP: per-block tokens and attention, and the surgery path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diclip.settings import shown
from diclip.surgery import ATTENTIONS, alias_tokens, attend, head_sum, merge, project, resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LOADING = Lock()  # while the libraries load a model they patch PyTorch for all threads: one at a time


@dataclass(frozen=True)
class Encoded:
    """Hold what CLIP says about B images of N = h·w patches (L blocks, width D, joint space E)."""

    patches: Tensor  # (B, N, E), surgery path
    plain_patches: Tensor  # (B, N, E), CLIP's own path
    pooled: Tensor  # (B, E), CLIP's own image feature, not normalised
    grid: tuple[int, int]  # (h, w); patches go row by row
    tokens: Tensor | None  # (L, B, 1 + N, D), class token first
    attention: Tensor | None  # (L, B, 1 + N, 1 + N), CLIP's own path
    surgery: Tensor | None = None  # (B, 1 + N, D), where the surgery path ends
    pull: Tensor | None = None  # (B, N, D), what a bias adds to it, patch by patch: see `DenseCLIP.biased`


class DenseCLIP:
    """Encode images densely, and texts, with a frozen open_clip model whose image tower is a ViT.

    `pooled_is_token` tells whether the model pools by its class token (OpenAI's CLIP) or averages its
    patches. Pixels are normalised here, with `mean` and `std` of values in [0, 1]. The model is made float32,
    frozen and eval in place. Raises ValueError for an image tower of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        visual = model.visual
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if not blocks or not isinstance(blocks[0].attn, nn.MultiheadAttention):
            raise ValueError(f"image tower is {type(visual).__name__}, expected open_clip's plain ViT")
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise ValueError("image tower pools by attention, expected a class token or an average")
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks = list(blocks)
        self.device = visual.proj.device
        self.patch_size: tuple[int, int] = tuple(visual.patch_size)
        self.pooled_is_token: bool = visual.pool_type == "tok"
        self.mean, self.std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (mean, std))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        attention: str = "qq+2kk",
        surgery_blocks: int = 3,
        bias: Tensor | None = None,
        tokens: Literal["clean", "aliased"] | None = "clean",
        need_attention: bool = True,
        need_pull: bool = False,
    ) -> Encoded:
        """Encode images (B, 3, H, W), float in [0, 1], H and W multiples of the patch size.

        A second path starts before the last `surgery_blocks` blocks; in each, it takes up the values mixed by
        `attention` (a key of ATTENTIONS) plus `bias` (B, N, N), without MLP (CLIP Surgery; ExCEL: 5 blocks,
        "qkv"; DiCLIP: 3, "qq+2kk"). CLIP's own path does not see it. Attention maps are the mean over heads
        in plain blocks, the sum in surgery blocks. `tokens` keeps the blocks' outputs, or what `alias_tokens`
        makes of them, or nothing; `need_pull` what `biased` needs. Raises ValueError for arguments that do not fit.
        """
        self._check(images, attention, surgery_blocks, bias, tokens)
        x, grid = self._embed(images)
        bias = None if bias is None else bias.to(x)
        surgery, outputs, middles, maps, pull = x, [], [], [], torch.zeros_like(x[:, 1:])
        for index, block in enumerate(self.blocks):
            surgical = index >= len(self.blocks) - surgery_blocks
            q, k, v = project(block, block.ln_1(x))
            weights = attend(q, k) if need_attention else None
            mixed = F.scaled_dot_product_attention(q, k, v) if weights is None else weights @ v
            middle = x + block.ls_1(block.attn.out_proj(merge(mixed)))
            x = middle + block.ls_2(block.mlp(block.ln_2(middle)))
            if surgical:
                shared, values = head_sum(q, k, v, attention=attention, bias=bias), merge(v)
                surgery = surgery + block.ls_1(block.attn.out_proj(shared @ values))
                if need_pull:
                    pull = pull + q.shape[1] * block.ls_1(F.linear(values[:, 1:], block.attn.out_proj.weight))
            else:
                surgery = x
            if weights is not None:
                maps.append(weights.sum(1) if surgical else weights.mean(1))
            if tokens is not None:
                outputs.append(x)
            if tokens == "aliased":
                middles.append(middle)
        if tokens == "aliased":
            outputs = alias_tokens(outputs, middles, surgery, surgery_blocks)
        (patches, _), (plain_patches, pooled) = self.head(surgery), self.head(x)
        kept = (torch.stack(stored) if stored else None for stored in (outputs, maps))
        ends = (surgery, pull) if need_pull else (None, None)
        return Encoded(patches, plain_patches, pooled, grid, *kept, *ends)

    @torch.no_grad()
    def biased(self, encoded: Encoded, bias: Tensor) -> Tensor:
        """Return the patches (B, N, E) that `encode` would give with a bias (B, N, N), or with one more.

        Queries, keys and values come from CLIP's own path, which sees no bias, so the surgery path is linear in it:
        one product instead of another pass. Raises ValueError without `need_pull` and for shapes that do not fit.
        """
        if encoded.surgery is None or encoded.pull is None:
            raise ValueError("nothing to bias was kept: encode with need_pull=True")
        n = encoded.pull.shape[1]
        if bias.shape != (len(encoded.pull), n, n):
            raise ValueError(f"bias is {tuple(bias.shape)}, expected {(len(encoded.pull), n, n)}: a value a pair")
        return self.head(encoded.surgery + F.pad(bias.to(encoded.pull) @ encoded.pull, (0, 0, 1, 0)))[0]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Return L2-normalised text features (n, E); raise ValueError if there are no prompts."""
        if not prompts:
            raise ValueError("no prompts to encode: give at least one sentence")
        chunks = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        encode = self.model.encode_text
        return torch.cat([encode(self.tokenizer(chunk).to(self.device), normalize=True) for chunk in chunks])

    def head(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take the last block's tokens (B, 1 + N, D) to the joint space: patches (B, N, E), pooled (B, E)."""
        visual = self.model.visual
        normed = visual.ln_post(tokens)
        if self.pooled_is_token:
            pooled = normed[:, 0]
        elif visual.final_ln_after_pool:
            pooled = visual.ln_post(tokens[:, 1:].mean(1))
        else:
            pooled = normed[:, 1:].mean(1)
        return normed[:, 1:] @ visual.proj, pooled @ visual.proj

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        visual = self.model.visual
        x = visual.conv1((images.to(self.device) - self.mean) / self.std)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        first = visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1)
        return visual.ln_pre(x + resize_positions(visual.positional_embedding, visual.grid_size, grid)), grid

    def _check(
        self, images: Tensor, attention: str, surgery_blocks: int, bias: Tensor | None, tokens: str | None
    ) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"images are {found}, expected float (B, 3, H, W) in [0, 1]: divide by 255")
        (height, width), (ph, pw) = images.shape[2:], self.patch_size
        if not height or not width or height % ph or width % pw:
            raise ValueError(f"images are {height}x{width}, expected multiples of {ph}x{pw}: resize them")
        if attention not in ATTENTIONS or tokens not in ("clean", "aliased", None):
            choices = f"attention one of {', '.join(ATTENTIONS)}; tokens clean, aliased or None"
            raise ValueError(f"found attention {attention!r} and tokens {tokens!r}, expected {choices}")
        if not 0 <= surgery_blocks <= len(self.blocks):
            raise ValueError(f"surgery_blocks is {surgery_blocks}, expected 0 to {len(self.blocks)}")
        shape = None if bias is None else tuple(bias.shape)
        n = (height // ph) * (width // pw)
        if shape not in (None, (len(images), n, n)) or (bias is None and attention == "bias"):
            raise ValueError(f"bias is {shape}, expected {(len(images), n, n)}: one value a pair of patches")


def load_clip(
    model: str | Path,
    *,
    pretrained: str | Path | None = None,
    device: str | torch.device = "cpu",
    pixel_norm: Literal["imagenet", "clip"] = "clip",
) -> DenseCLIP:
    """Load a frozen float32 CLIP from a folder, or by open_clip's name and weights.

    `model` is a folder with open_clip_config.json, open_clip_model.safetensors and a tokenizer, read from
    disk alone, or an open_clip name; its `pretrained` is then a tag such as "openai" or a checkpoint file.
    `pixel_norm` is the images' normalisation: the model's own, or ImageNet's, which ExCEL and DiCLIP use.
    Raises ValueError, in one line with the remedy, for weights that are absent, damaged or need QuickGELU.
    """
    import open_clip

    name, weights, remedy = _source(str(model), None if pretrained is None else str(pretrained))
    try:
        with LOADING:
            clip = open_clip.create_model(name, pretrained=weights, device=device, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever open_clip, safetensors, pickle or the network raise, in one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"CLIP {shown(model)} could not be loaded ({reason}); {remedy}") from error
    if pixel_norm == "imagenet":
        return DenseCLIP(clip, tokenizer)
    return DenseCLIP(clip, tokenizer, mean=clip.visual.image_mean, std=clip.visual.image_std)


def _source(model: str, pretrained: str | None) -> tuple[str, str | None, str]:
    """Return open_clip's name, its weights, and what to do if they do not load; raise if they cannot."""
    import open_clip

    if model in open_clip.list_models():
        tag = open_clip.get_pretrained_cfg(model, pretrained or "")
        if not pretrained or not (tag or Path(pretrained).is_file()):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise ValueError(f"pretrained is {pretrained!r}, expected a tag ({tags}) or a checkpoint file")
        quick = open_clip.get_model_config(model).get("quick_gelu", False)
        if not quick and (tag.get("quick_gelu") or "openai" in pretrained):
            raise ValueError(f"{pretrained} weights need QuickGELU, {model} has GELU: use {model}-quickgelu")
        fetch = f"python -c \"import open_clip; open_clip.create_model('{model}', '{pretrained}')\""
        online = f"run `{fetch}` with a network, or pass pretrained=<file>"
        return model, pretrained, online if tag else f"replace {pretrained} by weights of {model}"
    place = shown(model)
    remedy = f"restore it with `git checkout -- {place}` or train one with `diclip pretrain clip`"
    if not Path(model).is_dir():
        raise ValueError(f"CLIP {place} is neither a folder nor one of open_clip.list_models(); {remedy}")
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (Path(model) / file).is_file():
            raise ValueError(f"CLIP folder {place} has no {file}; {remedy}")
    config = (Path(model) / "open_clip_config.json").read_text(encoding="utf-8", errors="replace")
    known = ("tokenizer.json", "vocab.json", "vocab.txt")  # without one transformers makes up an empty tokenizer
    if "hf_tokenizer_name" in config and not any((Path(model) / file).is_file() for file in known):
        raise ValueError(f"CLIP folder {place} has no {known[0]}; {remedy}")
    return f"local-dir:{model}", None, remedy
