"""Show results in a terminal: of each what fits a screen, laid out as lines and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from diclip.presets import METHODS, PRESETS
from diclip.settings import load_settings

Result = dict[str, Any]


def brief(result: Result) -> Result:
    """Keep of an evaluation what fits a screen; --json shows all of it."""
    if "difficulty" in result:
        rows = [{"measure": name, **row} for name, row in result["difficulty"].items()]
        said = {name: result[name] for name in ("protocol", "images") if name in result}
        return {**said, "95 % bootstrap over images, and the bar to stay below": rows}
    if "answers" in result:
        from diclip.bench import digits

        rows = [{k: digits(v) if isinstance(v, float) else v for k, v in row.items()} for row in result["answers"]]
        return {"seconds from a choice to a picture": rows}
    if "rows" in result and "skipped" in result:
        from diclip.bench import conditions, digits

        rows = [{k: digits(v) if isinstance(v, float) else v for k, v in row.items()} for row in result["rows"]]
        return {conditions(result): rows, **({"skipped": result["skipped"]} if result["skipped"] else {})}
    if result and all(isinstance(value, dict) and "null_is" in value for value in result.values()):
        columns = ("metric", "with", "without", "null", "null_is")
        rows = []
        for idea, effect in result.items():
            low, high = effect["interval"]
            rows.append({"idea": idea, **{name: effect[name] for name in columns}, "low": low, "high": high})
        title = "with minus null (without one: minus without), 95 % bootstrap over images"
        return {"protocol": effect["protocol"], title: rows}
    if "val_miou" in result:
        spans = {k: "–".join(map(_cell, v)) for k, v in result.items() if k.endswith("interval") and v}
        return {name: value for name, value in {**result, **spans}.items() if name != "settings"}
    if "recognised" in result:
        own = result["judge"]
        real = {"value": own["accuracy"], "low": own["low"], "high": own["high"]}
        rows = [{"pictures": "generated", **result["recognised"]}, {"pictures": "real", **real}]
        return {"recognised in per cent, 95 % bootstrap over pictures": rows, "generated, by class": result["classes"]}
    if "miou_one_minus_max" not in result:
        return {name: brief(value) if isinstance(value, dict) else value for name, value in result.items()}
    from diclip.report import on_screen

    return on_screen(result)


def text(result: Result) -> str:
    """Lay a result out for reading: plain values a line each, lists of mappings as tables."""
    lines = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {line}" for line in text(dict(value)).splitlines())]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{name}:", *(f"  {line}" for line in table(value))]
        elif isinstance(value, list):
            lines += [f"{name}: {len(value) or 'none'}", *(f"  {_cell(item)}" for item in value)]
        else:
            lines.append(f"{name}: {_cell(value)}")
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Align rows with the same keys as columns, numbers to the right; what is nested is left to --json."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, (Mapping, list))]
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    sides = [">" if isinstance(rows[0][column], (int, float)) else "<" for column in columns]
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [layout.format(*line).rstrip() for line in cells]


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–" if value is None else str(value)


def defaults() -> dict[str, str]:
    """Say each setting's default, and where a preset or a method's paper has another."""
    plain = {preset: load_settings(preset).model_dump(mode="json") for preset in PRESETS}

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            value = shorten(", ".join(map(str, value)), 56, placeholder=" …")
        return "none" if value in ("", None) else str(value)

    said = {}
    for name, default in plain["mini"].items():
        others: dict[str, list[str]] = {}
        for preset, values in plain.items():
            if name != "preset" and values[name] != default:
                others.setdefault(text(values[name]), []).append(preset)
        for method, changes in METHODS.items():
            found = {preset: own.get(name, plain[preset][name]) for preset, own in changes.items()}
            found = {preset: value for preset, value in found.items() if value != plain[preset][name]}
            alike = len(found) == len(PRESETS) and len(set(found.values())) == 1
            for preset, value in found.items():
                others.setdefault(text(value), []).append(method if alike else f"{method} on {preset}")
        said[name] = "; ".join(
            [text(default), *(f"{', '.join(dict.fromkeys(who))}: {value}" for value, who in others.items())]
        )
    return said
