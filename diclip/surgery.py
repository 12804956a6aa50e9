"""The two paths through a ViT block: CLIP's own attention, and CLIP Surgery's, shared by all heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a surgery block sums over its heads: weight · softmax(left rightᵀ / √d) for a pair of letters, weight ·
# unit matrix for "1". "3identity" is the null of "qq+2kk", with rows of the same sum; "bias" leaves only the bias.
ATTENTIONS: dict[str, tuple[tuple[float, str], ...]] = {
    "qk": ((1.0, "qk"),),
    "qq": ((1.0, "qq"),),
    "kk": ((1.0, "kk"),),
    "vv": ((1.0, "vv"),),
    "qkv": ((1 / 3, "qq"), (1 / 3, "kk"), (1 / 3, "vv")),  # ExCEL
    "qq+2kk": ((1.0, "qq"), (2.0, "kk")),  # DiCLIP
    "identity": ((1.0, "1"),),
    "3identity": ((3.0, "1"),),
    "bias": (),
}


def project(block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project normalised tokens (B, T, D) to queries, keys and values, each (B, heads, T, d)."""
    qkv = F.linear(hidden, block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(left: Tensor, right: Tensor) -> Tensor:
    """Return softmax(left rightᵀ / √d) of two (B, heads, T, d): (B, heads, T, T)."""
    scores = left @ right.transpose(-2, -1)
    return scores.mul_(left.shape[-1] ** -0.5).softmax(-1)  # in place: memory is what it costs


def merge(heads: Tensor) -> Tensor:
    """Put heads side by side: (B, heads, T, d) to (B, T, D)."""
    return heads.transpose(1, 2).flatten(2)


def head_sum(q: Tensor, k: Tensor, v: Tensor, *, attention: str, bias: Tensor | None = None) -> Tensor:
    """Return the one matrix (B, T, T) that all heads of a surgery block share.

    It is the sum over heads, not normalised: with 12 heads its rows sum to 12 ("qkv") or 36 ("qq+2kk"), and
    a row-stochastic `bias` (B, N, N), added to each head's patch-patch part, adds 12. The masses are part of
    the methods: they weigh the surgery path against the plain blocks before it (ExCEL, CVPR 2025; DiCLIP).
    """
    part, heads, size = {"q": q, "k": k, "v": v}, q.shape[1], q.shape[2]
    total = q.new_zeros(len(q), size, size)
    for weight, pair in ATTENTIONS[attention]:
        if pair == "1":
            total = total + weight * heads * torch.eye(size, device=q.device)
        else:
            total = total + weight * attend(part[pair[0]], part[pair[1]]).sum(1)
    return total if bias is None else total + heads * F.pad(bias, (1, 0, 1, 0))


def resize_positions(positions: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resize position embeddings (1 + N, D) to another grid, bilinearly, without antialiasing.

    The class token's stays as it is. open_clip's own resizing (bicubic, antialiased) would move CAMs by 0.2.
    """
    if tuple(native) == tuple(grid):
        return positions
    patches = positions[1:].T.unflatten(1, native)[None]  # (1, D, h, w)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], patches[0].flatten(1).T])


def alias_tokens(outputs: list[Tensor], middles: list[Tensor], surgery: Tensor, blocks: int) -> list[Tensor]:
    """Return the features by block that the released decoders of ExCEL and DiCLIP were trained on.

    Their code adds in place to tensors that are already stored. With `blocks` surgery blocks, the last plain
    block's slot holds the final surgery path, and each slot after it, but for the last, the next block's
    tokens before its MLP (`middles`). Published decoder weights need this; new training does not.
    """
    first, last = len(outputs) - blocks, len(outputs) - 1
    slots = list(outputs)
    slots[first:last] = middles[first + 1 :]
    if 0 < first <= last:
        slots[first - 1] = surgery
    return slots
