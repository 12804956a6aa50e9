"""Make a memory learnable: a small network that starts as the memory's keys and values (TSA with training)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diclip.memory import Memory


def dropout(x: Tensor, rate: float, generator: torch.Generator | None, *, whole_channels: bool = False) -> Tensor:
    """Set a share `rate` of x (B, C, ...) to 0, or of its channels, and scale the rest up by 1 / (1 - rate).

    torch's own layers draw from the global generator; here a run is the same whatever else draws. Without a generator
    nothing is dropped. Raises ValueError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate is {rate}, expected 0 to 1, without 1: it would drop all")
    if generator is None or rate == 0:
        return x
    shape = (*x.shape[:2], *([1] * (x.ndim - 2))) if whole_channels else x.shape
    kept = torch.rand(shape, generator=generator, device=generator.device) >= rate
    return x * kept.to(x.device, x.dtype) / (1 - rate)


class KVAdapter(nn.Module):
    """Map patches to background and classes: W2 · relu(W1 · x), which starts as a `Memory` of keys and values.

    W1's first rows are the keys, W2's first columns the values, and `slots` further ones are free: normal with
    deviation `spread`, cut at two (DiCLIP, text semantic augmentation: 87 slots, spread 1, at which the free slots
    outweigh the keys at first). Biases are torch's own. In training, dropout of `rate` follows both layers.
    """

    def __init__(self, memory: Memory, *, slots: int = 87, spread: float = 1.0, rate: float = 0.1) -> None:
        super().__init__()
        (count, width), channels = memory.keys.shape, memory.values.shape[1]
        self.keys = nn.Linear(width, count + slots)
        self.values = nn.Linear(count + slots, channels)
        self.rate = rate
        with torch.no_grad():
            for weight in (self.keys.weight, self.values.weight):
                if slots and spread:
                    nn.init.trunc_normal_(weight, std=spread, a=-2 * spread, b=2 * spread)
                else:
                    weight.zero_()
            self.keys.weight[:count] = memory.keys
            self.values.weight[:, :count] = memory.values.T

    def forward(self, patches: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return logits (B, 1 + C, N), background first, of patches (B, N, E) from `normalise`; see `dropout`."""
        generator = generator if self.training else None
        hidden = dropout(self.keys(patches).relu(), self.rate, generator)
        return dropout(self.values(hidden), self.rate, generator).transpose(1, 2)
