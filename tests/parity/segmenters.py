"""The decoders of the golden cases, with the rule's weights under the released checkpoints' names."""

from __future__ import annotations

from diclip.adapter import KVAdapter
from diclip.heads import Segmenter, from_released

from .rule import state

WIDTH, DIM = 768, 256


def shapes(blocks: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Return the released names and shapes of a fusion head over `blocks` blocks and a decoder."""
    found: dict[str, tuple[int, ...]] = {"decoder_fts_fuse.linear_fuse.weight": (DIM, blocks * DIM, 1, 1)}
    for level in (f"decoder_fts_fuse.linears_modulelist.{index}." for index in range(blocks)):
        found |= {level + "proj.weight": (DIM, WIDTH), level + "proj_2.weight": (DIM, DIM)}
    for block in (f"decoder.transformer.resblocks.{index}." for index in range(3)):
        found |= {
            block + "attn.in_proj_weight": (3 * DIM, DIM),
            block + "attn.out_proj.weight": (DIM, DIM),
            block + "ln_1.weight": (DIM,),
            block + "mlp.c_fc.weight": (4 * DIM, DIM),
            block + "mlp.c_proj.weight": (DIM, 4 * DIM),
            block + "ln_2.weight": (DIM,),
        }
    found["decoder.linear_pred.weight"] = (channels, DIM, 1, 1)
    return found | {name.removesuffix("weight") + "bias": shape[:1] for name, shape in found.items()}


def released(seed: int, num_classes: int, *, blocks: int = 12, adapter: KVAdapter | None = None) -> Segmenter:
    """Return a segmenter of the published sizes with the rule's weights in the head and the decoder."""
    segmenter = Segmenter(blocks, WIDTH, num_classes, dim=DIM)
    segmenter.load_state_dict(from_released(state(shapes(blocks, 1 + num_classes), seed=seed)))
    segmenter.adapter = adapter
    return segmenter.eval()
