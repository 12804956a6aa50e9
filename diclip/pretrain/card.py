"""The model card of the mini models: what they were trained on, how long, how good they are, and what they are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from diclip.runs import write_json
from diclip.settings import ROOT

LIMITS = (
    "Supervised by captions and tags of a toy world: it knows MiniVOC and nothing else. "
    "The order of methods measured with it does not predict their order on PASCAL VOC."
)


def clip_card(run: Path, results: Path) -> dict[str, Any]:
    """Gather the card of a mini CLIP from its run folder and from the stored evaluations of it.

    `run` holds `settings.json`, `environment.json`, `metrics.jsonl` and `model/`; `results` the files
    `clip-val.json`, `clip-shift.json` and `clip-val-seed7.json` of `diclip evaluate`.
    """
    from safetensors import safe_open

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings, environment = (json.loads((run / f"{name}.json").read_text()) for name in ("settings", "environment"))
    with safe_open(run / "model" / "open_clip_model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    parameters = sum(_product(shape) for shape in shapes)
    minutes = sum(max(0.0, b["seconds"] - a["seconds"]) for a, b in zip(records, records[1:], strict=False)) / 60
    quality = {name: _quality(results / f"clip-{name}.json") for name in ("val", "shift", "val-seed7")}
    return {
        "data": f"{settings['pretrain_pictures']} rendered MiniVOC pictures (split pretrain), with captions and tags",
        "steps": records[-1]["step"],
        "parameters": parameters,
        "minutes": round(minutes, 1),
        "hardware": f"{environment['device']}, {environment['threads']} CPU thread(s)",
        "seed": settings["seed"],
        "quality": quality,
        "limits": LIMITS,
        "curve": [{k: v for k, v in r.items() if k != "seconds"} for r in records if r["step"] % 200 == 0],
    }


def write_card(run: Path, results: Path, target: Path) -> None:
    """Write `target`, a JSON file with one entry a mini model; entries of other models are kept."""
    kept = json.loads(target.read_text()) if target.exists() else {}
    write_json(target, {**kept, "clip": clip_card(run, results)})


def _quality(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text())
    return {**found["recognition"], **{f"{rung}_miou": value for rung, value in found["ladder"].items()}}


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


if __name__ == "__main__":  # python -m diclip.pretrain.card RUN_FOLDER, after `make results`
    write_card(Path(sys.argv[1]), ROOT / "data/results", ROOT / "data/mini/card.json")
