"""The command line: `diclip` or `python -m diclip`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diclip import __version__
from diclip.presets import PRESETS
from diclip.runs import write_json
from diclip.screen import Result, brief, defaults, text
from diclip.settings import ROOT, Settings, load_settings, shipped_heads, shown

# Before torch is loaded: threads that spin while they wait slow a machine that has other work several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


SHIPPED = object()  # what `--trained` without a run means


def demo(args: argparse.Namespace) -> Result:
    from diclip.demo import run_demo

    return run_demo(_settings(args))


def run(args: argparse.Namespace) -> Result:
    from diclip.runs import run_notebook

    parameters = {**_yaml(args.file), **_preset(args), **dict(args.parameter), **_overrides(args)}
    return {"notebook": shown(run_notebook(find_notebook(args.notebook), parameters, echo=True))}


def evaluate(args: argparse.Namespace) -> Result:
    from diclip.runs import progress

    named = {name: getattr(args, name) for name in ("method", "split", "ablate") if getattr(args, name)}
    settings = _settings(args, **named)
    settings = _with_trained(args, settings)
    if args.export:
        from diclip.export import export_voc

        kind, folder = args.export
        if kind != "voc":
            raise ValueError(f"export format is {kind!r}, expected voc: --export voc FOLDER")
        return export_voc(settings, folder, progress, rung=args.rung)
    counts = None if args.json in (None, "-") else Path(args.json).with_suffix(".npz")
    if args.masks:
        from diclip.evaluate import finish
        from diclip.outside import measure_masks

        return finish(measure_masks(settings, args.masks, progress), counts)
    from diclip.evaluate import evaluate

    return evaluate(settings, progress, counts=counts)


def segment(args: argparse.Namespace) -> Result:
    from diclip.runs import progress
    from diclip.segment import segment_folder

    settings = _with_trained(args, _settings(args, **({"method": args.method} if args.method else {})))
    if not args.classes and settings.trained is None:
        raise ValueError("found no classes to look for: name them, --classes dog,sofa, or take a network's, --trained")
    classes = list(dict.fromkeys(word.strip() for word in args.classes.split(",") if word.strip()))
    out = args.out or ROOT / "runs" / f"segment-{args.folder.resolve().name}"
    done = segment_folder(settings, args.folder, classes, out, tags=args.tags, rung=args.rung, progress=progress)
    said = {"folder": shown(Path(out).resolve()), "masks": len(done["images"]), "doubts": list(done["doubts"])}
    return {**said, **({"skipped": done["skipped"]} if done["skipped"] else {})}


def compare(args: argparse.Namespace) -> Result:
    from diclip.compare import compare_results

    return compare_results(args.before, args.after, rung=args.rung)


def bench(args: argparse.Namespace) -> Result:
    from diclip.bench import bench
    from diclip.runs import progress

    if args.explorer:
        from diclip.bench.explorer import bench_explorer

        return bench_explorer(_settings(args), progress)
    named = {"bench_stages": args.stages} if args.stages else {}
    return bench(_settings(args, **named, **({"random_weights": True} if args.random_weights else {})), progress)


def pretrain(args: argparse.Namespace) -> Result:
    from diclip.pretrain import pretrain
    from diclip.runs import progress

    return pretrain(args.model, _settings(args), progress)


def train(args: argparse.Namespace) -> Result:
    from diclip.runs import fresh_folder, progress
    from diclip.train import train

    named = {"method": args.method, "run_dir": args.run_dir and str(args.run_dir.absolute())}
    chosen = {**_yaml(args.params), **_preset(args), **{name: x for name, x in named.items() if x}, **_overrides(args)}
    if "run_dir" not in chosen and args.resume == "auto":
        raise ValueError("found --resume auto without a run to resume: name it by --run-dir")
    if "run_dir" not in chosen and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("found several processes without a common folder: name it by --run-dir")
    settings = load_settings(**{"run_dir": str(fresh_folder("train")), **chosen})
    return train(settings, progress, resume=args.resume == "auto")


def sweep(args: argparse.Namespace) -> Result:
    from diclip.runs import progress
    from diclip.sweep import run_sweep

    return run_sweep(args.file, progress, cluster=args.cluster)


def ship(args: argparse.Namespace) -> Result:
    from diclip.checkpoints import ship

    return ship(args.run.absolute())


def memory(args: argparse.Namespace) -> Result:
    from diclip.remember import write_memory
    from diclip.runs import progress

    return write_memory(_settings(args), progress)


def judge(args: argparse.Namespace) -> Result:
    from diclip.judge import judge_generated
    from diclip.runs import progress

    return judge_generated(_settings(args), progress)


def effects(args: argparse.Namespace) -> Result:
    from diclip.effects import measure_effects
    from diclip.runs import progress

    return measure_effects(_settings(args), progress)


def data_minivoc(args: argparse.Namespace) -> Result:
    from diclip.data import prepare

    return {"folder": shown(prepare(_settings(args, dataset="minivoc")))}


def data_check(args: argparse.Namespace) -> Result:
    from diclip.data import dataset_folder, dataset_vocabulary
    from diclip.data.check import check_folder

    settings = _settings(args)
    folder = (Path(args.folder) if args.folder else dataset_folder(settings)).resolve()
    classes = None if args.folder else dataset_vocabulary(settings).classes
    return {"folder": shown(folder), "problems": check_folder(folder, class_names=classes)}


def data_difficulty(args: argparse.Namespace) -> Result:
    from diclip.difficulty import measure_difficulty
    from diclip.runs import progress

    return measure_difficulty(_settings(args, dataset="minivoc"), progress)


def find_notebook(name: str) -> Path:
    """Return the notebook with that path, or that title or number in notebooks/ ("training", "06")."""
    if name.endswith(".ipynb"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no notebook {name}")
        return Path(name).resolve()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        if name in (notebook.stem, *notebook.stem.split("_", 1)):
            return notebook
    have = ", ".join(notebook.stem for notebook in notebooks) or "none"
    raise FileNotFoundError(f"there is no notebook {name!r} in notebooks/, which has {have}")


def parser() -> argparse.ArgumentParser:
    """Return the parser; each command's `call` takes the arguments and returns what to show."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--preset", choices=PRESETS, help="where the settings start from (default: mini)")
    repeated = {"action": "append", "default": []}
    common.add_argument("--set", metavar="NAME=VALUE", type=_pair, help="change a setting", **repeated)
    common.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON; without FILE print it"
    )
    width = max(map(len, Settings.model_fields))
    said = defaults()
    names = "\n".join(
        f"  {name:<{width}} {field.description} [{said[name]}]" for name, field in Settings.model_fields.items()
    )
    top = argparse.ArgumentParser(
        prog="diclip",
        description=sys.modules["diclip"].__doc__,
        epilog=f"settings [default; what presets and methods have instead]:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"diclip {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Any, text: str, *, within: Any = commands) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(call=call)
        return made

    command("demo", demo, "run the notebooks 00 to 05 and the ladder on the embedded default")
    notebook = command("run", run, "run a notebook with papermill in a run folder of its own")
    notebook.add_argument("notebook", help="a path, or a notebook's number or title")
    notebook.add_argument("-f", "--file", type=Path, help="YAML file of parameters")
    notebook.add_argument("-p", "--parameter", nargs=2, metavar=("NAME", "VALUE"), help="set one", **repeated)
    scored = command("evaluate", evaluate, "score a method, rung by rung")
    scored.add_argument("--method", help="the system, as --set method=…")
    scored.add_argument("--split", help="the images, as --set split=…")
    where = "also with its trained parts: those of a run, or those that ship, as --set trained=…"
    scored.add_argument("--trained", type=Path, nargs="?", const=SHIPPED, metavar="RUN", help=where)
    scored.add_argument("--ablate", action="store_true", help="also without each part, as --set ablate=true")
    scored.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="score these PNG or npy masks, of whomever, instead"
    )
    scored.add_argument(
        "--export", nargs=2, metavar=("voc", "FOLDER"), help="pack predictions for VOC's server instead"
    )
    scored.add_argument("--rung", help="what --export predicts with (default: the last)")
    compared = command("compare", compare, "tell how much better one stored result is than another, image by image")
    compared.add_argument("before", type=Path, help="what `diclip evaluate --json FILE` wrote")
    compared.add_argument("after", type=Path, help="the same of another method, other settings or other masks")
    compared.add_argument("--rung", help="compare this rung of both (default: the last, and all of the same name)")
    own = command("segment", segment, "segment a folder of pictures into classes of one's own")
    own.add_argument("folder", type=Path, help="folder of pictures")
    own.add_argument("--classes", default="", metavar="A,B…", help="what to look for, any words, apart by commas")
    where = "segment by trained parts, without tags: those of a run, or those that ship"
    own.add_argument("--trained", type=Path, nargs="?", const=SHIPPED, metavar="RUN", help=where)
    own.add_argument(
        "--tags", type=Path, metavar="FILE.csv", help="head image,tags; without it CLIP says what is there"
    )
    own.add_argument("--out", type=Path, metavar="FOLDER", help="where masks go (default: runs/segment-NAME)")
    own.add_argument("--method", help="the system, as --set method=…")
    own.add_argument("--rung", help="where the system stops (default: its last)")
    timed = command("bench", bench, "time each stage, and compare it with a plain reference")
    timed.add_argument("--stages", metavar="cam,rar…", help="only these, in that order, as --set bench_stages=…")
    timed.add_argument("--explorer", action="store_true", help="time the explorers' answers instead")
    timed.add_argument("--random-weights", action="store_true", help="as --set random_weights=true")
    model = command("pretrain", pretrain, "train one of the two embedded models")
    model.add_argument("model", choices=("clip", "diffusion"))
    trained = command("train", train, "train a network from tags, resumable")
    trained.add_argument("--method", help="the system, as --set method=…")
    trained.add_argument("--params", type=Path, metavar="FILE", help="YAML file of settings")
    trained.add_argument("--run-dir", type=Path, metavar="FOLDER", help="the run's folder, as --set run_dir=…")
    how = "auto: go on with what is in the folder; never: refuse it (default)"
    trained.add_argument("--resume", choices=("auto", "never"), default="never", help=how)
    swept = command("sweep", sweep, "run many trainings or notebooks: finished ones are skipped, failed ones listed")
    swept.add_argument("file", help="YAML file, here or in notebooks/")
    at_once = "as Ray tasks, a GPU share each: here or, named by RAY_ADDRESS, on a cluster"
    swept.add_argument("--cluster", action="store_true", help=at_once)
    shipped = command("ship", ship, "keep a run's trained parts, in half precision, where `evaluate --trained` looks")
    shipped.add_argument("run", type=Path, help="a training's folder, or its model.safetensors")
    command("memory", memory, "generate pictures of every class and build DiCLIP's memory from them")
    command("judge", judge, "tell how many generated pictures a classifier of its own recognises")
    command("effects", effects, "measure each idea of DiCLIP against the simplest thing that could explain it")
    data = commands.add_parser("data", help="draw or check a dataset")
    data = data.add_subparsers(required=True, metavar="WHAT")
    command("minivoc", data_minivoc, "draw MiniVOC", within=data)
    check = command("check", data_check, "open every file of a dataset and list what is wrong", within=data)
    check.add_argument("folder", nargs="?", help="folder in VOC's layout (default: the settings' dataset)")
    command("difficulty", data_difficulty, "measure what comes for free on MiniVOC, without learning", within=data)
    return top


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
    return name, value


def _overrides(args: argparse.Namespace) -> dict[str, str | None]:
    return {name: None if value.lower() in ("none", "null") else value for name, value in args.set}


def _preset(args: argparse.Namespace) -> dict[str, str]:
    return {"preset": args.preset} if args.preset else {}


def _settings(args: argparse.Namespace, **fixed: Any) -> Settings:
    return load_settings(**{**_preset(args), **_overrides(args), **fixed})


def _with_trained(args: argparse.Namespace, settings: Settings) -> Settings:
    """Add the trained parts that `--trained` names, a run's or, without a name, those that ship."""
    if args.trained is None:
        return settings
    if settings.method not in ("excel", "diclip"):
        raise ValueError(f"method {settings.method!r} has no trained parts: add --method excel or --method diclip")
    run = shipped_heads(settings) if args.trained is SHIPPED else args.trained.absolute()
    return settings.model_copy(update={"trained": run})


def _yaml(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found {type(found).__name__}, expected lines `name: value`")
    return {str(name): value for name, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 for problems found in data, 2 for what cannot be done."""
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of names not in the parameters cell
    args = parser().parse_args(arguments)
    try:
        result = args.call(args)
        if not result:  # one of several processes, and not the first
            return 0
        if args.json not in (None, "-"):
            write_json(args.json, result)
    except (ValueError, OSError) as error:  # OSError: files that are missing, a disk that is full
        print("diclip:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json == "-" else text(brief(result)))
    return 1 if result.get("problems") else 0


if __name__ == "__main__":
    sys.exit(main())
