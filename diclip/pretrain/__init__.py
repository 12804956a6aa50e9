"""Train the mini models on MiniVOC's pretraining split: CLIP on captions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diclip.settings import ROOT, Settings, shown


def pretrain(model: str, settings: Settings, progress: Callable[..., Iterable[Any]]) -> dict[str, Any]:
    """Train a mini model in the settings' run folder, resuming what is there; return what it has become.

    Pictures are rendered once into the data folder. The folder receives `checkpoint.pt`, `metrics.jsonl` and
    `model/`, which every command takes as `--set clip_model=FOLDER/model`. The model that ships is left alone.
    """
    from diclip.data.minivoc import write_pretrain
    from diclip.pretrain.clip import pretrain_clip
    from diclip.pretrain.data import Pictures
    from diclip.runs import environment, locked, pick_device, write_json

    folder = settings.run_dir if "run_dir" in settings.model_fields_set else ROOT / "runs" / f"pretrain-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _refuse_another(folder / "settings.json", settings)
        write_json(folder / "settings.json", settings.model_dump(mode="json"))
        write_json(folder / "environment.json", environment())
        rendered = write_pretrain(
            settings.data_root,
            settings.pretrain_pictures,
            progress=lambda items, total: progress(items, total=total, desc="render"),
        )
        started = time.monotonic()
        exported = pretrain_clip(
            folder,
            Pictures.open(rendered, settings.pretrain_pictures),
            steps=settings.pretrain_steps,
            seed=settings.seed,
            max_minutes=settings.max_minutes,
            device=str(pick_device(settings.device)),
            evaluate=lambda target: watch(settings, target),
            progress=lambda steps: progress(steps, desc=f"pretrain {model}"),
        )
    return {"model": shown(exported), "minutes": round((time.monotonic() - started) / 60, 1)}


def _refuse_another(record: Path, settings: Settings) -> None:
    before = json.loads(record.read_text()) if record.exists() else {}
    for name in ("seed", "pretrain_pictures"):
        if name in before and before[name] != getattr(settings, name):
            found = f"{name} {before[name]}, now {getattr(settings, name)}"
            raise ValueError(f"{shown(record.parent)} holds a training with {found}: choose another run_dir")


def watch(settings: Settings, model: Path) -> dict[str, float]:
    """Score an exported CLIP on the settings' `tune_split`, in per cent: raw rungs, naming of scenes."""
    from diclip.evaluate import measure, report

    changes = {"clip_model": str(model), "split": settings.tune_split, "baselines": False, "limit": 0}
    found = report(measure(settings.model_copy(update=changes)))
    return {**{rung: found["ladder"][rung] for rung in ("clip", "intra")}, **found["recognition"]}
