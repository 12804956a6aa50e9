"""The weight rule of the golden cases: every tensor is a function of its name, its shape and a seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from math import prod, sqrt
from zlib import crc32

import numpy as np
import torch

from diclip.clip import DenseCLIP


def tensor(name: str, shape: tuple[int, ...], *, seed: int, vectors: Collection[str] = ()) -> torch.Tensor:
    """Return one weight; `vectors` names the model's 1-D weights, which tell a normalisation's bias."""
    if name == "logit_scale":
        return torch.tensor(np.log(100.0), dtype=torch.float32)
    n = np.random.RandomState(seed + crc32(name.encode()) % 2**31).standard_normal(shape)
    last, tail = name.rsplit(".", 1)[-1], ".".join(name.split(".")[-2:])
    if tail == "token_embedding.weight" or last in ("class_embedding", "positional_embedding"):
        v = 0.5 * n
    elif name == "visual.ln_pre.bias":
        v = 0.5 * n
    elif name.endswith("bias"):
        v = (0.1 if name.removesuffix("bias") + "weight" in vectors else 0.02) * n
    elif len(shape) == 1 and name.endswith("weight"):
        v = 1 + 0.1 * n
    elif len(shape) >= 2:
        fan = shape[0] if last in ("proj", "text_projection") else prod(shape[1:])
        v = _matrix(name, last, tail, n) / sqrt(fan)
    else:
        v = 0.1 * n
    return torch.from_numpy(np.asarray(v, dtype=np.float16).astype(np.float32))


def _matrix(name: str, last: str, tail: str, n: np.ndarray) -> np.ndarray:
    visual = name.startswith("visual.")
    if last == "in_proj_weight" and visual:  # queries and keys are correlated
        q, k, v = np.split(n, 3)
        return np.concatenate([1.7 * q, 1.9 * (0.5 * q + sqrt(0.75) * k), 1.4 * v])
    if last == "in_proj_weight" or tail in ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight"):
        return 3 * n
    return {"out_proj.weight": 0.4 if visual else 0.3, "c_proj.weight": 0.5}.get(tail, 1.0) * n


def state(shapes: Mapping[str, tuple[int, ...]], *, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a state dict for names and shapes; values are drawn for the names with `prefix` before them."""
    vectors = {prefix + name for name, shape in shapes.items() if len(shape) == 1 and name.endswith("weight")}
    return {name: tensor(prefix + name, tuple(s), seed=seed, vectors=vectors) for name, s in shapes.items()}


@lru_cache(maxsize=1)
def openai_clip(seed: int) -> DenseCLIP:
    """Return ViT-B/16 with QuickGELU and the rule's weights, in ImageNet's pixel normalisation."""
    import open_clip

    name = "ViT-B-16-quickgelu"
    model = open_clip.CLIP(**open_clip.get_model_config(name))
    model.load_state_dict(state({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed=seed))
    return DenseCLIP(model, open_clip.get_tokenizer(name))
