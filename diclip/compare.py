"""Keep what was counted of each image beside a result, and compare two results image by image."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diclip.runs import replacing
from diclip.score import Counts, miou, paired_interval
from diclip.settings import shown
from diclip.tally import ERRORS, Rows, dense_of, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diclip.evaluate import Evaluation


@dataclass(frozen=True)
class Stored:
    """Hold a stored result: its JSON, the images' names, and each system's counts as `tally.rows_of` makes them."""

    path: Path
    result: dict[str, Any]
    names: list[str]
    classes: list[str]
    rows: dict[str, Rows]

    def counts(self, system: str) -> Counts:
        """Return a system's counts (images, 1 + classes, 3); raise ValueError for one that was not measured."""
        if system not in self.rows:
            raise ValueError(f"{shown(self.path)} has no {system!r}, only {', '.join(self.rows)}")
        return dense_of(self.rows[system], len(self.names), len(self.classes))


def save_counts(path: Path, found: Evaluation) -> None:
    """Write an evaluation's per-image counts: rungs under their own rule, baselines, ablations, errors, confusion.

    Of an image only the classes are kept that it has or was said to have: some twenty bytes each.
    """
    systems = {name: found.rung(name) for name in (*found.ladder, *found.ablations)} | dict(found.baselines)
    arrays: dict[str, NDArray[Any]] = {"names": np.array(found.names), "classes": np.array(found.classes)}
    arrays |= {f"counts/{name}": rows_of(counts) for name, counts in systems.items()}
    arrays |= {f"errors/{name}": tally.errors for name, tally in found.tallies.items()}
    arrays |= {f"confusion/{name}": tally.confusion for name, tally in found.tallies.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, error_names=np.array(ERRORS), **arrays)


def load_result(path: Path) -> Stored:
    """Read a result and the counts beside it; raise ValueError and FileNotFoundError, in one line, if they are not."""
    counts = path.with_suffix(".npz")
    for file in (path, counts):
        if not file.is_file():
            remedy = f"write both with `diclip evaluate --json {shown(path)}`"
            raise FileNotFoundError(f"{shown(file)}: there is no such file: {remedy}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        with np.load(counts, allow_pickle=False) as arrays:
            rows = {name.removeprefix("counts/"): arrays[name] for name in arrays if name.startswith("counts/")}
            return Stored(path, result, arrays["names"].tolist(), arrays["classes"].tolist(), rows)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{shown(path)} and its .npz hold no result ({error}): evaluate again") from None


def compare_results(before: Path, after: Path, *, rung: str | None = None) -> dict[str, Any]:
    """Return how much mIoU grows from one stored result to another, with paired 95 % bootstrap intervals over images.

    It is that of the systems as a whole, then of what has the same name in both; with `rung` of that alone. Raises
    ValueError if they were not measured on the same images and masks.
    """
    first, second = load_result(before), load_result(after)
    order = _same_images(first, second)
    pairs = [(rung, rung)] if rung else [(_whole(first), _whole(second))]
    pairs += [] if rung else [(name, name) for name in first.rows if name in second.rows and (name, name) not in pairs]
    rows = []
    for one, other in pairs:
        systems = first.counts(one), second.counts(other)[order]
        if not np.array_equal(systems[0][..., 2], systems[1][..., 2]):
            what = f"{shown(before)} and {shown(after)}"
            raise ValueError(f"{what} were scored against other masks: evaluate both on the same split and seed")
        gain = paired_interval(*systems, generator=np.random.default_rng(0))
        reached = {side: round(float(miou(x.sum(0))), 2) for side, x in zip("AB", systems, strict=True)}
        spread = {"B - A": round(gain.value, 2), "low": round(gain.low, 2), "high": round(gain.high, 2)}
        rows.append({"A is": one, "B is": other, **reached, **spread})
    return {
        "A": {"file": shown(before), **first.result.get("protocol", {})},
        "B": {"file": shown(after), **second.result.get("protocol", {})},
        "mIoU in per cent, paired 95 % bootstrap over images": rows,
    }


def _whole(stored: Stored) -> str:
    return list(stored.result["ladder"])[-1]


def _same_images(first: Stored, second: Stored) -> list[int]:
    """Return where each of the first result's images stands in the second."""
    place = {name: index for index, name in enumerate(second.names)}
    if set(first.names) != set(place) or first.classes != second.classes:
        both = len(set(first.names) & set(place))
        found = f"{len(first.names)} and {len(place)} images, of which they share {both}"
        classes = "" if first.classes == second.classes else ", and have other classes"
        what = f"{shown(first.path)} and {shown(second.path)}"
        raise ValueError(f"{what} hold {found}{classes}: evaluate both on the same split")
    return [place[name] for name in first.names]
