"""Find the attention layers of a diffusers U-Net, and record their queries and keys while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class Layer(NamedTuple):
    """Describe an attention layer of a U-Net: its heads, and how many latents one of its tokens spans."""

    heads: int
    stride: int

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Return the layer's (h, w) on latents (B, C, H, W); the U-Net rounds up where it halves."""
        return -(-latents.shape[2] // self.stride), -(-latents.shape[3] // self.stride)


def attentions(unet: UNet2DConditionModel) -> dict[str, Layer]:
    """Return a U-Net's attention layers by module name, in the order down, middle, up.

    Names end in `attn1` (self-attention) or `attn2` (attention to the prompt), which alternate.
    """
    last, found = len(unet.config.block_out_channels) - 1, {}
    levels = {f"down_blocks.{i}": i for i in range(last + 1)} | {"mid_block": last}
    levels |= {f"up_blocks.{i}": last - i for i in range(last + 1)}
    for part, level in levels.items():
        for name, module in unet.get_submodule(part).named_modules(prefix=part):
            if name.endswith((".attn1", ".attn2")):
                found[name] = Layer(module.heads, 2**level)
    return found


def diclip_layers(unet: UNet2DConditionModel) -> tuple[str, str]:
    """Return the names of DiCLIP's two self-attentions: numbers -14 (coarse) and -4 (fine) of `attentions`.

    In Stable Diffusion 1 and 2 these are the last of the first up block that attends, and the second of the
    last up block. Raises ValueError for a U-Net with fewer than 14 attentions.
    """
    names = list(attentions(unet))
    if len(names) < 14:
        raise ValueError(f"U-Net has {len(names)} attentions, expected 14 or more: name the two layers")
    return names[-14], names[-4]


class _Enough(Exception):
    """Leave a U-Net in the middle."""


@contextmanager
def tap(
    unet: UNet2DConditionModel, names: Sequence[str], *, stop: bool = False
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record queries and keys (B, heads, n, d), float32, of the attentions `names` at each call of a U-Net.

    The dictionary holds those of the last call that the thread made which taps: others may use the U-Net meanwhile.
    Forward hooks do the work: processors stay as they are, and at the end, or at an exception, nothing is left in the
    model. To `stop` is to leave the U-Net's call, and with it
    the `with` block, when all are recorded: what comes after the last of them is not computed. Raises ValueError for
    an unknown name.

        with tap(diffusion.unet, names) as taps:
            diffusion.predict(latents, timestep=101, generator=generator)
        q, k = taps[names[0]]
    """
    known = attentions(unet)
    queries: dict[str, Tensor] = {}
    taps: dict[str, tuple[Tensor, Tensor]] = {}
    owner = get_ident()

    def split(output: Tensor, name: str) -> Tensor:
        return output.unflatten(-1, (known[name].heads, -1)).transpose(1, 2).float()

    def keep_query(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if get_ident() == owner:
            queries[name] = split(output, name)

    def keep_key(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if get_ident() != owner:
            return
        taps[name] = queries.pop(name), split(output, name)
        if stop and len(taps) == len(set(names)):
            raise _Enough

    with ExitStack() as hooks, suppress(_Enough):
        for name in dict.fromkeys(names):
            if name not in known:
                raise ValueError(f"{name!r} is no attention of the U-Net, {hint(name, known)}")
            attention = unet.get_submodule(name)
            hooks.enter_context(attention.to_q.register_forward_hook(partial(keep_query, name)))
            hooks.enter_context(attention.to_k.register_forward_hook(partial(keep_key, name)))
        yield taps


def hint(name: str, known: dict[str, Layer]) -> str:
    """Say which name was expected in place of an unknown one."""
    near = get_close_matches(name, known, n=1, cutoff=0) or ["a U-Net with attentions"]
    return f"expected one such as {near[0]}: see self_attentions()"
