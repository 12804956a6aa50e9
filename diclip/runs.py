"""Run things so that they can be trusted later: folders, records, seeds, progress, notebooks."""

from __future__ import annotations

import ast
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

from diclip import __version__
from diclip.settings import ROOT, Settings, load_settings, shown

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

T = TypeVar("T")
RECORDED = "torch torchvision open_clip_torch diffusers transformers accelerate numpy pillow".split()


def progress(iterable: Iterable[T], *, total: int | None = None, desc: str | None = None) -> Iterable[T]:
    """Show a progress bar; with DICLIP_HEADLESS in the environment, a line every 30 s, none for quick loops.

    In the executed copy of a notebook bars freeze at 0 %, so who runs notebooks unseen sets the variable.
    """
    if os.environ.get("DICLIP_HEADLESS"):
        from tqdm import tqdm

        return tqdm(iterable, total=total, desc=desc, mininterval=30, delay=30)
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, desc=desc, leave=False)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name, for "auto" a GPU where there is one; ValueError where it is missing."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    device = torch.device(name)
    if not there.get(device.type) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        have = ", ".join(kind for kind, available in there.items() if available)
        raise ValueError(f"device {name!r} is not on this machine, which has {have}: set device to auto")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, which only notebooks use."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to write, renamed onto `path` if that went well and removed if it did not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically; paths, arrays and tensors are converted; ValueError for NaN and infinity."""

    def convert(item: Any) -> Any:
        if isinstance(item, Path):
            return shown(item)
        if hasattr(item, "tolist"):
            return item.tolist()
        raise TypeError(f"{type(item).__name__} cannot be written to JSON")

    text = json.dumps(value, indent=2, default=convert, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its settings: versions, commit, device, command."""
    import torch

    def git(*arguments: str) -> str | None:
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "diclip": __version__,
        "commit": git("rev-parse", "HEAD"),
        "changed": git("status", "--porcelain"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in RECORDED},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def high_water() -> float | None:
    """Return the largest memory so far in MB; none where the system does not tell (Windows).

    Linux hands getrusage's maximum down to a process from the one that starts it, so it is not asked there.
    """
    status = Path("/proc/self/status")  # Linux
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    if not find_spec("resource"):
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def create_run(
    path: str | Path, settings: Settings, *, free: Collection[str] = (), also: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Path]:
    """Hold a run's folder: locked against other processes, with settings.json and environment.json.

    A run that was killed is resumed by creating it again with the same settings, and with what is chosen `also`;
    finished.json is written last, and a finished run is never overwritten. Settings that are `free` may differ.
    Raises ValueError if the folder is in use, finished, or another's.
    """
    path, record = Path(path), {**settings.model_dump(mode="json"), **also}
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "settings.json").exists() and any(entry.name[0] != "." for entry in path.iterdir()):
        raise ValueError(f"{shown(path)} holds files that are no run's: choose another run_dir")
    with locked(path):
        if is_finished(path, settings, free=free, also=also):
            raise ValueError(f"{shown(path)} holds a finished run and is never overwritten: choose another run_dir")
        write_json(path / "settings.json", record)
        write_json(path / "environment.json", environment())
        started = time.monotonic()
        yield path
        write_json(path / "finished.json", {"seconds": round(time.monotonic() - started, 1)})


def locked(path: Path) -> AbstractContextManager[Any]:
    """Lock a folder while this process lives; raise ValueError if another process has."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(path / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"{shown(path)} is in use: wait, or choose another run_dir") from None


def is_finished(
    path: str | Path, settings: Settings, *, free: Collection[str] = (), also: Mapping[str, Any] = MappingProxyType({})
) -> bool:
    """Tell whether a folder holds a run that is finished; raise ValueError for one of settings that are not `free`."""
    path, record = Path(path), {**settings.model_dump(mode="json"), **also}
    if (path / "settings.json").exists():
        before = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        names = sorted({*before, *record} - {*free})
        changed = [name for name in names if before.get(name) != record.get(name)]
        if changed:
            what = ", ".join(f"{name} was {before.get(name)!r}, now {record.get(name)!r}" for name in changed)
            raise ValueError(f"{shown(path)} holds a run of other settings ({what}): choose another run_dir")
    return (path / "finished.json").exists()


def fresh_folder(name: str) -> Path:
    """Return a folder for a run that names none: by what it is and the time."""
    return ROOT / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def setup(namespace: dict[str, Any]) -> Settings:
    """Turn a notebook's parameters into settings, and seed everything; the device is the one that is there.

    `namespace` is `globals()` of the cell after the one tagged `parameters`. What counts are the names that
    the parameters cell (the last one run that gives `preset`) and papermill's cell below it assign: a
    variable made later in the notebook is none. A preset other than mini decides what the parameters cell
    leaves at the mini default. Raises ValueError, in one line, for a name that is no setting and a value that
    does not fit.
    """
    own, given = _parameters(namespace)
    settings = _notebook_settings(own, given)
    seed_everything(settings.seed)
    _show_figures()
    return settings.model_copy(update={"device": str(pick_device(settings.device))})


def _show_figures() -> None:
    """Let IPython show figures that were made without pyplot, as PNG, whatever the backend."""
    from IPython.core.getipython import get_ipython
    from matplotlib.figure import Figure

    if shell := get_ipython():
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """Return a figure as PNG of at most 256 colours: a third of the bytes, and notebooks are kept with outputs."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    picture = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _parameters(namespace: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the parameters cell assigns, and what papermill does."""
    history = namespace.get("In", [""])
    if history == [""]:  # a script, or a kernel that keeps none, as nbval's: whatever is a literal
        public = {name: namespace[name] for name in namespace if name != "In" and name[0] != "_"}
        return {k: v for k, v in public.items() if isinstance(v, int | float | str | list | None)}, {}
    own, given = {}, {}
    for source in history:
        names = {name: namespace[name] for name in _assigned(source) if name in namespace}
        if source.startswith("# Parameters"):
            given.update(names)
        elif "preset" in names:
            own, given = names, {}
    if own or given:
        return own, given
    raise ValueError("no parameters cell has run: run the cell tagged parameters, which gives preset")


def _assigned(source: str) -> dict[str, Any]:
    """Return names and values of a cell that does nothing but assign literals; of another cell, nothing."""
    try:
        tree = ast.parse(source).body
        pairs = [(getattr(node, "targets", None) or [node.target], node.value) for node in tree]
        return {target.id: ast.literal_eval(value) for targets, value in pairs for target in targets}
    except (SyntaxError, ValueError, AttributeError, TypeError):
        return {}


def _notebook_settings(own: dict[str, Any], given: dict[str, Any]) -> Settings:
    preset = {**own, **given}.get("preset", "mini")
    defaults = load_settings().model_dump(mode="json")
    if preset != "mini":
        own = {name: value for name, value in own.items() if name not in defaults or value != defaults[name]}
    return load_settings(**{**own, **given, "preset": preset})


def run_notebook(notebook: Path, parameters: dict[str, Any], *, echo: bool = False) -> Path:
    """Execute a notebook with papermill in a run folder of its own; return the executed copy.

    Parameters are checked before a kernel starts. Without `run_dir` among them the folder is named by
    notebook and time. `echo` shows the cells' output on stderr. Raises ValueError for parameters that do not
    fit and, naming the cell, for a notebook that fails; what had run by then is in the folder.
    """
    import nbformat
    import papermill

    cells = nbformat.read(notebook, as_version=4).cells
    own = [_assigned(cell.source) for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    given = {"run_dir": str(fresh_folder(notebook.stem)), **parameters}
    settings = _notebook_settings(own[0] if own else {}, given)
    typed = settings.model_dump(mode="json")
    stream = sys.stderr if echo else None
    with create_run(settings.run_dir, settings) as folder, patch.dict(os.environ, DICLIP_HEADLESS="1"):
        executed = folder / notebook.name
        try:
            papermill.execute_notebook(
                notebook,
                executed,
                parameters={name: typed[name] for name in given},
                kernel_name="python3",
                cwd=notebook.parent,
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
            )
        except papermill.PapermillExecutionError as error:
            where = f"{notebook.name} failed in cell {error.exec_count}"
            raise ValueError(f"{where}, {error.ename}: {error.evalue}; see {shown(executed)}") from None
    return executed
