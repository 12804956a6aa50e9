"""Explain class scores by their gradients: softmax Grad-CAM, from one pass through a frozen CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diclip.cam import Maps, minmax, packed
from diclip.clip import DenseCLIP
from diclip.surgery import merge, project

Pool = Literal["patches", "model"]


class GradCAM(NamedTuple):
    """Hold the maps of P pairs of image and tag, in [0, 1], and what they are made of."""

    maps: Maps  # (P, h, w)
    weights: Tensor  # (P, D), the mean gradient of the tag's probability over the patches
    probabilities: Tensor  # (P, n), of all texts; those of classes that are no tag of the image are 0


def softmax_gradcam(
    clip: DenseCLIP,
    tokens: Tensor,
    texts: Tensor,
    tags: Sequence[Tensor],
    *,
    num_classes: int,
    grid: tuple[int, int],
    pool: Pool = "patches",
    chunk: int = 16,
) -> GradCAM:
    """Return the Grad-CAM of each tag's probability among the image's tags and the background words.

    `tokens` (B, 1 + N, D) enter the last block, `texts` (n, E) are unit rows: `num_classes` classes, then
    background words, which take from the tags what they explain better; `tags` are 0-based class indices. The
    layer is the last block's first LayerNorm. Images are pooled by the mean of their patches, or as the model
    does. Only the last block is run again and differentiated, `chunk` maps at a time; the weights of the model
    stay frozen, and no graph is left. Source: CLIP-ES, CVPR 2023, softmax Grad-CAM and class-related background
    suppression. Raises ValueError for shapes and tags that do not fit.
    """
    if tokens.ndim != 3 or len(tags) != len(tokens) or tokens.shape[1] != 1 + grid[0] * grid[1]:
        found = f"tokens are {tuple(tokens.shape)} for {len(tags)} images of {grid[0]}x{grid[1]} patches"
        raise ValueError(f"{found}, expected (B, 1 + h·w, D)")
    if not 0 < num_classes <= len(texts) or pool not in ("patches", "model"):
        choices = f"1 to the number of texts, {len(texts)}, and patches or model"
        raise ValueError(f"num_classes is {num_classes} and pool {pool!r}, expected {choices}")
    image, label = (index.to(tokens.device) for index in packed(tags, num_classes))
    heard = torch.zeros(len(tokens), len(texts), dtype=torch.bool, device=tokens.device)
    heard[:, num_classes:] = True
    heard[image, label] = True

    # A pass a map through one block. Passes shared by the maps of an image would need as many backward passes of
    # the whole batch as its most crowded image has tags.
    chunks = []
    for i, c in zip(image.split(chunk), label.split(chunk), strict=True):
        chunks.append(_explain(clip, tokens[i].detach(), texts.detach(), heard[i], c, pool))
    scores, weights, probabilities = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    scores = scores.unflatten(1, grid)
    # Twice, as released: probabilities make raw maxima of 1e-6 to 1e-3, so small that the first
    # stretch's 1e-7 counts: it leaves maxima of 0.9 to 0.9999.
    # The second leaves a maximum of 1 - 1e-7, which CAA cuts to the byte 254.
    for _ in range(2):
        scores = minmax(scores, (-2, -1), eps=1e-7)
    return GradCAM(Maps(scores, image, label), weights, probabilities)


@torch.enable_grad()
def _explain(
    clip: DenseCLIP, tokens: Tensor, texts: Tensor, heard: Tensor, label: Tensor, pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw maps (P, N), channel weights (P, D) and probabilities (P, n) of tokens (P, 1 + N, D)."""
    block = clip.blocks[-1]
    hidden = block.ln_1(tokens).requires_grad_()  # the gradient comes through q, k and v, not past the LayerNorm
    q, k, v = project(block, hidden)
    x = tokens + block.ls_1(block.attn.out_proj(merge(F.scaled_dot_product_attention(q, k, v))))
    patches, pooled = clip.head(x + block.ls_2(block.mlp(block.ln_2(x))))
    feature = F.normalize(patches.mean(1) if pool == "patches" else pooled, dim=-1)
    logits = clip.model.logit_scale.exp() * feature @ texts.T  # OpenAI's scale is 100
    probabilities = logits.masked_fill(~heard, -torch.inf).softmax(-1)
    target = probabilities.gather(1, label[:, None]).sum()  # each map's own: maps do not share anything
    (gradient,) = torch.autograd.grad(target, hidden)
    weights = gradient[:, 1:].mean(1)
    scores = (hidden.detach()[:, 1:] @ weights[:, :, None])[..., 0].relu()
    return scores, weights, probabilities.detach()
