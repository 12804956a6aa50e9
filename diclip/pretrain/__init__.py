"""Train the mini models on MiniVOC's pretraining split: CLIP, and a latent diffusion model, on captions."""

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
    `model/`, which every command takes as `--set clip_model=FOLDER/model` or `diffusion_model=FOLDER/model`. The
    models that ship are left alone.
    """
    from diclip.pretrain import clip, diffusion
    from diclip.pretrain.data import render_pictures
    from diclip.runs import environment, locked, pick_device, write_json

    folder = settings.run_dir if "run_dir" in settings.model_fields_set else ROOT / "runs" / f"pretrain-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _refuse_another(folder / "settings.json", settings)
        write_json(folder / "settings.json", settings.model_dump(mode="json"))
        write_json(folder / "environment.json", environment())
        recipe, train, score = {
            "clip": (clip, clip.pretrain_clip, watch_clip),
            "diffusion": (diffusion, diffusion.pretrain_diffusion, watch_diffusion),
        }[model]
        counts = {split: round(settings.pretrain_pictures * share) for split, share in recipe.SPLITS.items()}
        pictures = render_pictures(settings.data_root, counts, progress=progress)
        started = time.monotonic()
        exported = train(
            folder,
            *pictures,
            steps=settings.pretrain_steps or recipe.STEPS,
            seed=settings.seed,
            max_minutes=settings.max_minutes,
            device=str(pick_device(settings.device)),
            evaluate=lambda target: score(settings, target),
            progress=lambda steps: progress(steps, desc=f"pretrain {model}"),
        )
    minutes = round((time.monotonic() - started) / 60, 1)
    if exported is None:
        return {"model": None, "minutes": minutes, "unfinished": "no model yet: run the same command again to go on"}
    return {"model": shown(exported), "minutes": minutes}


def _refuse_another(record: Path, settings: Settings) -> None:
    before = json.loads(record.read_text()) if record.exists() else {}
    for name in ("seed", "pretrain_pictures"):
        if name in before and before[name] != getattr(settings, name):
            found = f"{name} {before[name]}, now {getattr(settings, name)}"
            raise ValueError(f"{shown(record.parent)} holds a training with {found}: choose another run_dir")


def watch_clip(settings: Settings, model: Path) -> dict[str, float]:
    """Score an exported CLIP on the settings' `tune_split`, in per cent: raw rungs, naming of scenes."""
    from diclip.evaluate import measure, report

    changes = {"method": "clip", "clip_model": str(model), "split": settings.tune_split, "baselines": False, "limit": 0}
    found = report(measure(settings.model_copy(update=changes)))
    return {**{rung: found["ladder"][rung] for rung in ("clip", "intra")}, **found["recognition"]}


def watch_diffusion(settings: Settings, model: Path) -> dict[str, float]:
    """Score an exported diffusion model on the settings' `tune_split`: AUC of "same object" by its correlation."""
    import torch

    from diclip.correlation import correlate
    from diclip.data import Batch
    from diclip.difficulty import PATCH, same_object_auc
    from diclip.diffusion import load_diffusion
    from diclip.methods.diclip import image_generator
    from diclip.runs import pick_device
    from diclip.score import mean

    diffusion = load_diffusion(model, device=pick_device(settings.device))
    changed = settings.model_copy(update={"split": settings.tune_split, "limit": 0})
    grid = (settings.image_size // PATCH,) * 2  # the mini CLIP's, whatever the layer's own is

    def correlation(batch: Batch) -> torch.Tensor:
        taps = diffusion.capture(
            batch.images,
            timestep=settings.diffusion_timesteps[0],
            coarse=settings.coarse_layer,
            fine=None,
            generator=[image_generator(settings.seed, name) for name in batch.names],
            prompt=settings.diffusion_prompt,
        )
        q, k = taps.coarse_q, taps.coarse_k
        return correlate(
            q,
            k,
            source=taps.coarse_grid,
            grid=grid,
            heads=settings.coarse_heads,
            threshold=settings.correlation_threshold,
            softmax=settings.correlation_softmax,
        )

    return {"same_object_auc": round(float(mean(same_object_auc(changed, correlation).sum(0))), 4)}
