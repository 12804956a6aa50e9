"""Turn a frozen CLIP's tokens into a segmentation: fusion of all blocks, a transformer decoder, and both together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diclip.adapter import KVAdapter, dropout


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · σ(1.702 x), OpenAI CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class FusionHead(nn.Module):
    """Fuse the tokens of `blocks` blocks of `width` to a feature map of `dim` channels.

    Each block has a two-layer perceptron of its own; what they give is put side by side and mixed to `dim` channels,
    of which whole ones are dropped in training (WeCLIP, CVPR 2024; ExCEL; DiCLIP).
    """

    def __init__(self, blocks: int, width: int, dim: int, *, rate: float = 0.1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(blocks)
        )
        self.mix = nn.Linear(blocks * dim, dim)
        self.rate = rate

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, generator: torch.Generator | None = None) -> Tensor:
        """Return features (B, dim, h, w) of tokens (L, B, 1 + h·w, D), class token first; see `dropout`.

        Raises ValueError for another number of blocks, width or grid.
        """
        expected = (len(self.levels), tokens.shape[1], 1 + grid[0] * grid[1], self.levels[0][0].in_features)
        if tokens.shape != expected:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, expected {expected} for {grid[0]}x{grid[1]} patches")
        levels = [level(own[:, 1:]) for level, own in zip(self.levels, tokens, strict=True)]
        features = self.mix(torch.cat(levels, -1)).transpose(1, 2).unflatten(2, grid)
        return dropout(features, self.rate, generator, whole_channels=True) if self.training else features


class Decoder(nn.Module):
    """Read class logits from a feature map by a transformer without position embedding (WeCLIP; ExCEL; DiCLIP)."""

    def __init__(self, dim: int, channels: int, *, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        shape = {"dropout": 0.0, "activation": quick_gelu, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, dim_feedforward=4 * dim, **shape) for _ in range(layers)
        )
        self.classify = nn.Linear(dim, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, channels, h, w) of features (B, dim, h, w)."""
        x = features.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.classify(x).transpose(1, 2).unflatten(2, features.shape[2:])


class Segmenter(nn.Module):
    """Hold all that is trained on top of frozen models: fusion head, decoder and, in DiCLIP, the adapter.

    `blocks` and `width` are CLIP's, `num_classes` counts no background; the other defaults are the published ones.
    """

    def __init__(
        self,
        blocks: int,
        width: int,
        num_classes: int,
        *,
        dim: int = 256,
        layers: int = 3,
        heads: int = 8,
        rate: float = 0.1,
        adapter: KVAdapter | None = None,
    ) -> None:
        super().__init__()
        self.fusion = FusionHead(blocks, width, dim, rate=rate)
        self.decoder = Decoder(dim, 1 + num_classes, layers=layers, heads=heads)
        self.adapter = adapter

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features (B, dim, h, w) and logits (B, 1 + C, h, w), background first, of tokens (L, B, 1 + N, D).

        The features' `pair_affinity` says which patches belong together. See `FusionHead`.
        """
        features = self.fusion(tokens, grid, generator=generator)
        return features, self.decoder(features)


# Parts of names in the checkpoints that ExCEL and DiCLIP released, and ours.
_RELEASED = (
    ("decoder_fts_fuse.linears_modulelist.", "fusion.levels."),
    ("decoder_fts_fuse.linear_fuse.", "fusion.mix."),
    (".proj.", ".0."),
    (".proj_2.", ".2."),
    ("decoder.transformer.resblocks.", "decoder.blocks."),
    ("decoder.linear_pred.", "decoder.classify."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".linear1."),
    (".mlp.c_proj.", ".linear2."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
)


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the head's and decoder's weights of a released checkpoint for `Segmenter.load_state_dict`.

    Other entries, such as the frozen CLIP's, are left out. These weights expect `decoder_tokens="aliased"`.
    Raises ValueError if there are none.
    """
    found = {}
    for name, value in state.items():
        if name.startswith(("decoder_fts_fuse.", "decoder.")):
            for theirs, ours in _RELEASED:
                name = name.replace(theirs, ours)
            # Their convolutions of one pixel are our linear layers.
            found[name] = value.flatten(1) if value.ndim == 4 else value
    if not found:
        raise ValueError(f"found {len(state)} weights, none of a decoder: expected names that begin with decoder.")
    return found
