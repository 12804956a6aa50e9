"""Keep what a training has become: weights as equal files if they are equal, and the state beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from diclip.runs import replacing
from diclip.settings import Settings, load_settings, shipped_heads, shown

WEIGHTS = "model.safetensors"
KEY = "diclip"  # the only metadata key: files with several list them in any order


LEARNED = (
    "supervision",
    "parity_crops_see_masks",
    "attention",
    "surgery_blocks",
    "bias_strength",
    "decoder_tokens",
    "decoder_width",
    "decoder_heads",
    "decoder_layers",
    "pair_mean",
    "affinity_from",
    "dynamic_from",
    "adapter_slots",
    "adapter_strength",
    "label_scale",
    "label_power",
)
"""Settings that weights remember: without them they would be read wrongly."""


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write weights as safetensors, with `about` as JSON in their metadata: no paths, no times."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(about, sort_keys=True)})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: tensors on the CPU, and what they are about.

    Raises FileNotFoundError where there is no file, ValueError for one that is damaged or no weights of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: there is no such file: train first, or name another run")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()[KEY])  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{shown(path)}: holds no weights of a training ({error}): copy the file again") from None


def with_learned(settings: Settings, system: Any) -> Settings:
    """Return settings with what a trained system's weights remember in their place."""
    return settings.model_copy(update={name: getattr(system.settings, name) for name in LEARNED})


def find_weights(path: Path) -> Path:
    """Return the weights' file that a path names: itself, or those that a run's folder was scored with.

    Raises FileNotFoundError, in one line, for a path where nothing is.
    """
    if path.is_file():
        return path
    settings = path / "settings.json"
    if not settings.is_file():
        raise FileNotFoundError(f"{shown(path)}: no file of weights and no run's folder: name another, or train first")
    which = json.loads(settings.read_text(encoding="utf-8")).get("scored_checkpoint", "last")
    scored = path / "checkpoints" / which / WEIGHTS
    return scored if scored.is_file() else path / "checkpoints" / "last" / WEIGHTS  # without validations none is best


def ship(run: Path, path: Path | None = None) -> dict[str, Any]:
    """Write a run's trained parts in half precision where its preset's and method's ship from, or to `path`.

    Returns what they are about and where they are now. Raises as `find_weights` and `load_weights`.
    """
    weights, about = load_weights(find_weights(run))
    path = path or shipped_heads(load_settings(about["preset"], method=about["method"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {name: value.half() for name, value in weights.items()}, about)
    return {"file": shown(path), **about}


def save_checkpoint(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any], state: Any) -> None:
    """Write weights and the state that belongs to them, of step `about["step"]`.

    The state's file is named by its step and comes first; the renaming of the weights makes both count. A kill
    before leaves the old pair whole, a kill after leaves only an old state too many.
    """
    mine = folder / f"state-{about['step']}.pt"
    with replacing(mine) as temporary:
        torch.save(state, temporary)
    save_weights(folder / WEIGHTS, weights, about)
    sweep_up(folder, keep=mine)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Any] | None:
    """Read weights and state, if there are any; raise ValueError, in one line, for what is damaged."""
    if not (folder / WEIGHTS).is_file():
        return None
    weights, about = load_weights(folder / WEIGHTS)
    path = folder / f"state-{about['step']}.pt"
    try:
        return weights, torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{shown(path)} is missing or damaged: choose another run_dir") from error


def sweep_up(folder: Path, *, keep: Path) -> None:
    """Remove states of other steps, and what kills have left half written."""
    for path in [*folder.glob("state-*.pt"), *folder.glob(f".{WEIGHTS}.*"), *folder.glob(".state-*")]:
        if path != keep:
            path.unlink(missing_ok=True)


def forget(metrics: Path, *, after: int) -> None:
    """Drop from metrics.jsonl what a killed run had logged beyond its last checkpoint: those steps are done again."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last line short
    kept = [line for line in whole if json.loads(line)["step"] <= after]
    with replacing(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
