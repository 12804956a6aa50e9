"""Browse what runs left: curves, numbers, pictures, and two of them image by image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diclip import network
from diclip.compare import Stored, load_result
from diclip.data.images import decode_image
from diclip.evaluate import own_rule
from diclip.explorers import pictures
from diclip.explorers.cam import LADDERS, CamChoice, CamExplorer, class_iou
from diclip.explorers.core import Photo, Pick, Studio, View
from diclip.explorers.pictures import Panel, Pixels
from diclip.methods.trained import load_system
from diclip.plots import lines, scatter
from diclip.score import Counts
from diclip.settings import ROOT, load_settings, shown

LOOKS = ("numbers", "curves", "images", "pictures")
ORDERS = ("what B gains most", "what B loses most", "as stored")
WIDE = 3 * pictures.SIDE + 2 * pictures.GAP


@dataclass(frozen=True)
class Run:
    """Name what lies in a run's folder, or a result that is shipped."""

    name: str
    path: Path
    result: Path | None = None  # JSON with a ladder, counts beside it
    log: Path | None = None  # metrics.jsonl
    pictures: tuple[Path, ...] = ()

    @property
    def systems(self) -> tuple[str, ...]:
        """Return what was measured, in order."""
        return tuple(_read(self.result)["ladder"]) if self.result else ()

    @property
    def settings(self) -> dict[str, Any]:
        """Return the run's settings; of an old result that has none, nothing."""
        path = self.path / "settings.json"
        return _read(path) if path.is_file() else _read(self.result).get("settings", {}) if self.result else {}

    def series(self, quantity: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a logged quantity; a last line that was cut off by a kill counts for nothing."""
        records = [record for record in self.records() if isinstance(record.get(quantity), int | float)]
        return [record["step"] for record in records], [record[quantity] for record in records]

    def quantities(self) -> tuple[str, ...]:
        """Return what was logged, in the order in which it first was."""
        return tuple(dict.fromkeys(name for record in self.records() for name in record if name != "step"))

    def records(self) -> list[dict[str, Any]]:
        """Return the log's lines."""
        text = self.log.read_text(encoding="utf-8") if self.log else ""
        whole = [line for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        return [record for record in map(json.loads, whole) if "step" in record]


@dataclass(frozen=True)
class RunChoice:
    """Say which run (or two, A and B) to look at and how; systems are what was measured in them, None the last."""

    first: str
    second: str | None = None
    look: str = "numbers"
    first_system: str | None = None
    second_system: str | None = None
    quantity: str = "loss"
    order: str = ORDERS[0]
    rank: int = 0


def find_runs(root: Path = ROOT) -> dict[str, Run]:
    """Return by name the shipped results and the runs under runs/, the newest of these first; files are not opened."""
    found = {}
    folders = {path.parent for name in ("settings.json", "manifest.json") for path in (root / "runs").rglob(name)}
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        log, result = folder / "metrics.jsonl", folder / "val.json"
        drawn = tuple(sorted(folder.glob("*.png")))
        name = folder.relative_to(root).as_posix()
        found[name] = Run(name, folder, result if _scored(result) else None, log if log.is_file() else None, drawn)
    for path in sorted((root / "data" / "results").glob("*.json")):
        if _scored(path):
            found[path.stem] = Run(path.stem, path, path)
    return found


class RunExplorer:
    """Turn choices into views. `predict` makes a run's labels (H, W) of a photo again, or returns None if it cannot."""

    def __init__(
        self,
        studio: Studio,
        *,
        root: Path = ROOT,
        predict: Callable[[Studio, Run, str, Photo], Tensor | None] | None = None,
    ) -> None:
        self.studio, self.runs, self.predict = studio, find_runs(root), predict or predict_again

    def view(self, choice: RunChoice, *, side: int = pictures.SIDE) -> View:
        """Draw a choice; raise ValueError or FileNotFoundError, in one line, for what is not there."""
        pair = [self._run(name) for name in (choice.first, choice.second) if name]
        if choice.look not in LOOKS or choice.order not in ORDERS:
            known = f"{', '.join(LOOKS)}; {', '.join(ORDERS)}"
            raise ValueError(f"found {choice.look!r}, {choice.order!r}, expected one of {known}")
        draw = {"numbers": self.numbers, "curves": self.curves, "images": self.images, "pictures": self.kept}
        panels, line, columns = draw[choice.look](choice, pair, side)
        return View(pictures.table(panels, columns=columns), f"{' and '.join(run.name for run in pair)} · {line}")

    def _run(self, name: str) -> Run:
        if name not in self.runs:
            raise ValueError(f"there is no run {name!r}, only {', '.join(list(self.runs)[:5]) or 'none'}")
        return self.runs[name]

    def numbers(self, choice: RunChoice, pair: list[Run], side: int) -> tuple[list[Panel], str, int]:
        """Show what each run reached, and in what the settings of two differ."""
        reached = [_read(run.result)["ladder"] if run.result else {} for run in pair]
        high = max((value for ladder in reached for value in ladder.values()), default=1)
        panels = []
        for run, ladder in zip(pair, reached, strict=True):
            shape = (max(40, 26 * len(ladder)), WIDE // 2, 3)
            lacking = "It stored no scores: it is unfinished, or no evaluation."
            drawn = pictures.bars(ladder, shape, most=high) if ladder else pictures.note(lacking, shape)
            panels.append(Panel(f"{run.name} · mIoU in per cent", drawn))
        both = [run.settings for run in pair]
        names = sorted({*both[0], *both[-1]})
        differing = [name for name in names if both[0].get(name) != both[-1].get(name)] if len(pair) > 1 else []
        if differing:
            rows = [
                ["setting", "A", "B"],
                *([name, *(str(each.get(name, "–")) for each in both)] for name in differing),
            ]
            panels.append(Panel("settings that differ", pictures.sheet(rows, width=WIDE // 2)))
        said = f"{len(differing)} settings differ" if len(pair) > 1 else "choose a second run to compare"
        return panels, said, 2

    def curves(self, choice: RunChoice, pair: list[Run], side: int) -> tuple[list[Panel], str, int]:
        """Show a logged quantity against the step."""
        series = {run.name: run.series(choice.quantity) for run in pair}
        series = {name: found for name, found in series.items() if found[0]}
        if not series:
            logged = ", ".join(dict.fromkeys(name for run in pair for name in run.quantities()))
            raise ValueError(f"no {choice.quantity!r} was logged, only {logged or 'nothing: results have no curves'}")
        drawn = pictures.raster(lines(series, xlabel="step", ylabel=choice.quantity))
        last = ", ".join(f"{values[-1]:.4g} at step {steps[-1]}" for steps, values in series.values())
        return [Panel(choice.quantity, drawn)], last, 1

    def kept(self, choice: RunChoice, pair: list[Run], side: int) -> tuple[list[Panel], str, int]:
        """Show the pictures that lie in the folders."""
        files = [path for run in pair for path in run.pictures]
        if not files:
            raise ValueError(f"{' and '.join(run.name for run in pair)} hold no pictures")
        found = [(path.name, decode_image(path.read_bytes(), name=path.name)) for path in files[:12]]
        return [Panel(name, pictures.fit(image, side=side)) for name, image in found], f"pictures: {len(files)}", 3

    def images(self, choice: RunChoice, pair: list[Run], side: int) -> tuple[list[Panel], str, int]:
        """Show how two runs (or two systems of one) do on each image, and one image closely."""
        ends = [pair[0], pair[-1]]
        stored = [load_result(run.result) if run.result else _unscored(run) for run in ends]
        wanted = zip(ends, (choice.first_system, choice.second_system), strict=True)
        systems = [system or run.systems[-1] for run, system in wanted]
        names, ious = self._paired(stored, systems)
        gain = ious[1] - ious[0]
        order = {ORDERS[0]: np.argsort(-gain), ORDERS[1]: np.argsort(gain)}.get(choice.order, np.arange(len(gain)))
        index = int(order[min(choice.rank, len(order) - 1)])
        title = "mIoU of each image, in per cent"
        axes = [f"{letter}: {system}" for letter, system in zip("AB", systems, strict=True)]
        drawn = pictures.raster(scatter(*ious, xlabel=axes[0], ylabel=axes[1], marked=index), side=side)
        panels = [*self._closely(names[index], ends, systems, side), Panel(title, drawn)]
        line = f"{names[index]}: {ious[0][index]:.0f} % and {ious[1][index]:.0f} %"
        return panels, f"{line} · B is better on {int((gain > 0).sum())} of {len(gain)} images", 3

    def _paired(self, stored: Sequence[Stored], systems: Sequence[str]) -> tuple[list[str], list[NDArray[np.float64]]]:
        place = {name: index for index, name in enumerate(stored[1].names)}
        names = [name for name in stored[0].names if name in place]
        if not names:
            raise ValueError(f"{shown(stored[0].path)} and {shown(stored[1].path)} share no image: choose one split")
        own = {name: index for index, name in enumerate(stored[0].names)}
        rows = [own[name] for name in names], [place[name] for name in names]
        counts = (each.counts(system)[row] for each, system, row in zip(stored, systems, rows, strict=True))
        return names, [image_ious(each) for each in counts]

    def _closely(self, name: str, runs: Sequence[Run], systems: Sequence[str], side: int) -> Iterator[Panel]:
        photo = self._photo(name, runs[0])
        if photo is None:
            note = "Its picture is of another dataset, or of scenes of another seed, than this explorer opened."
            yield Panel(name, pictures.note(note, (side, side, 3)))
            return
        base = pictures.fit(photo.image, side=side)
        yield Panel(name, base)
        yield Panel("truth", pictures.painted(photo.mask, base.shape))
        for letter, run, system in zip("AB", runs, systems, strict=True):
            yield Panel(*self._labels(f"{letter}: {system}", run, system, photo, base))

    def _labels(self, title: str, run: Run, system: str, photo: Photo, base: Pixels) -> tuple[str, Pixels]:
        key = (run.name, system, photo.name)
        labels = self.studio.memo("again", key, partial(self.predict, self.studio, run, system, photo))
        if labels is None:
            return title, pictures.note(f"The masks of {system} were counted, not kept.", base.shape)
        iou = class_iou(labels, photo.mask, len(self.studio.classes))
        mean = f" · {100 * np.mean(list(iou.values())):.0f} %" if iou else ""
        return f"{title}{mean}", pictures.painted(labels, base.shape)

    def _photo(self, name: str, run: Run) -> Photo | None:
        settings, own = {**run.settings, **_read(run.result).get("settings", {})}, self.studio.settings
        if any(settings.get(key) != getattr(own, key) for key in ("dataset", "minivoc_seed")):
            return None
        split = name.rpartition("_")[0] if own.dataset == "minivoc" else settings["split"]
        names = self.studio.dataset(split).names
        return self.studio.photo(Pick(split, names.index(name))) if name in names else None


def predict_again(studio: Studio, run: Run, system: str, photo: Photo) -> Tensor | None:
    """Make the labels (H, W) of a rung of a stored result, or of a run's network, again; None for what cannot be."""
    found = _read(run.result)
    said = run.settings
    if said.get("trained") or said.get("scales", [1.0]) != [1.0] or said.get("flip"):
        return None
    same = all(said.get(name) == studio.settings.model_dump(mode="json")[name] for name in ("clip_model", "image_size"))
    if system == network.RUNG and same and (run.path / "checkpoints").is_dir():
        settings = load_settings(**said).model_copy(update={"device": studio.settings.device, "trained": run.path})
        trained = studio.memo("network", run.name, lambda: load_system(settings, studio.clip, labels=False))
        batch = studio.batch(photo, (), studio.classes)
        return network.masks(network.probabilities(trained, batch, settings))[0]
    if system not in LADDERS.get(said.get("method", ""), ()):
        return None
    settings = load_settings(**said).model_copy(update={"device": studio.settings.device, "ablate": False})
    method, cams = studio.system(settings), CamExplorer(studio)
    choice = CamChoice(method=settings.method, rung=system)
    maps = cams.rungs(choice, photo, settings, method, photo.tags)[system]
    score = found.get("background_on_tune", {}).get(system, settings.background_score)
    chosen = CamChoice(method=settings.method, rung=system, rule=own_rule(method, system), score=score)
    return cams.labels(chosen, photo, method, maps)[0]


def image_ious(counts: Counts) -> NDArray[np.float64]:
    """Return each image's mIoU in per cent, over what it has or was said to have, of counts (images, labels, 3)."""
    hits, predicted, true = np.moveaxis(counts.astype(np.float64), -1, 0)
    union = predicted + true - hits
    return 100 * np.divide(hits, union, out=np.zeros_like(hits), where=union > 0).sum(1) / (union > 0).sum(1)


def _scored(path: Path) -> bool:
    return path.is_file() and path.with_suffix(".npz").is_file()


def _unscored(run: Run) -> Stored:
    raise ValueError(f"{run.name} stored no scores: finish it, or choose another")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{shown(path)} is no JSON ({error.msg}): it was cut off or edited") from None
