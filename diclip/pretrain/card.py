"""The model card of the mini models: what they were trained on, how long, how good they are, and what they are not."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

from diclip.runs import write_json
from diclip.settings import ROOT

LIMITS = (
    "Supervised by captions and tags of a toy world: it knows MiniVOC and nothing else. "
    "The order of methods measured with it does not predict their order on PASCAL VOC."
)


def clip_quality(results: Path) -> dict[str, Any]:
    """Gather what `diclip evaluate` stored of the mini CLIP in `clip-val.json` and its like."""
    found = {name: _read(results / f"clip-{name}.json") for name in ("val", "shift", "val-seed7")}
    return {
        name: {**r["recognition"], **{f"{rung}_miou": value for rung, value in r["ladder"].items()}}
        for name, r in found.items()
    }


def diffusion_quality(results: Path) -> dict[str, Any]:
    """Gather what `diclip judge` and `diclip effects` stored of the mini diffusion model."""
    judged, knows = _read(results / "judge.json"), _read(results / "effects.json")["diffusion correlation"]
    return {
        "recognised": judged["recognised"],
        "same_object_auc": {"value": knows["with"], knows["null_is"]: knows["null"], "interval": knows["interval"]},
    }


def card(run: Path, results: Path) -> dict[str, Any]:
    """Gather the card of a mini model, by its name, from its run folder and from the stored results of it.

    `run` holds `settings.json`, `environment.json`, `metrics.jsonl` and `model/`.
    """
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings, environment = (_read(run / f"{name}.json") for name in ("settings", "environment"))
    latent = (run / "model/unet").is_dir()
    pictures = settings["pretrain_pictures"]
    data = f"{pictures} rendered MiniVOC pictures (split pretrain)"
    data += f" and {pictures // 2} of one thing on calm ground (split studio), with captions" if latent else ""
    quality = diffusion_quality(results) if latent else clip_quality(results)
    spent = (max(0.0, b["seconds"] - a["seconds"]) for a, b in zip(records, records[1:], strict=False))
    found = {
        "data": data if latent else f"{data}, with captions and tags",
        "steps": records[-1]["step"],
        "parameters": parameters(run / "model"),
        "minutes": round(sum(spent) / 60, 1),
        "hardware": f"{environment['device']}, {environment['threads']} CPU thread(s)",
        "seed": settings["seed"],
        "quality": quality,
        "limits": LIMITS,
        "curve": [{k: v for k, v in r.items() if k != "seconds"} for r in records if r["step"] % 200 == 0],
    }
    return {"diffusion" if latent else "clip": found}


def parameters(model: Path) -> int:
    """Count the parameters in all safetensors under a folder."""
    from safetensors import safe_open

    total = 0
    for file in model.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def write_card(run: Path, results: Path, target: Path) -> None:
    """Write `target`, a JSON file with one entry a mini model; entries of other models are kept."""
    kept = _read(target) if target.exists() else {}
    write_json(target, kept | card(run, results))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":  # python -m diclip.pretrain.card RUN_FOLDER, after `make results`
    write_card(Path(sys.argv[1]), ROOT / "data/results", ROOT / "data/mini/card.json")
