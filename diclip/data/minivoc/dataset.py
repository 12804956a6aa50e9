"""MiniVOC on disk: the splits in PASCAL VOC's layout, and the pictures that the mini models are trained on."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from diclip.data.minivoc.captions import PLACES, describe
from diclip.data.minivoc.render import Rendered, render
from diclip.data.minivoc.scene import CLASSES, Scene, in_studio, sample_scene

SPLITS: dict[str, int] = {"train": 400, "tune": 100, "val": 1000, "shift": 200}
_STREAMS = {"pretrain": 1, "studio": 6, "train": 2, "tune": 3, "val": 4, "shift": 5}  # a split: disjoint scenes
_SEEDED = ("val", "shift")
ICONIC_RATE = 0.4
PRETRAIN_SIDE = 128


def scene_of(split: str, index: int, *, seed: int = 0) -> Scene:
    """Draw scene `index` of a split; `seed` (`minivoc_seed`) moves `val` and `shift` and nothing else.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in _STREAMS:
        raise ValueError(f"MiniVOC has no split '{split}'; choose one of {', '.join(_STREAMS)}")
    rng = np.random.default_rng([seed if split in _SEEDED else 0, _STREAMS[split], index])
    if split == "studio":
        return in_studio(sample_scene(rng, iconic=True))
    iconic = split == "pretrain" and bool(rng.random() < ICONIC_RATE)
    return sample_scene(rng, iconic=iconic, shifted=split == "shift")


def palette() -> np.ndarray:
    """Make VOC's colour map `(256, 3)` uint8: the bits of a label spread over the three channels."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Save label ids `(H, W)` uint8 as a palette PNG, as VOC does."""
    from PIL import Image

    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    image.save(path, "PNG")


def _write_scene(folder: Path, seed: int, split: str, index: int) -> tuple[str, list[str], str]:
    from PIL import Image

    scene = scene_of(split, index, seed=seed)
    drawn: Rendered = render(scene)
    name = f"{split}_{index:05d}"
    Image.fromarray(drawn.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
    for kind, mask in (("Class", drawn.classes), ("Object", drawn.instances), ("Part", drawn.parts)):
        save_mask(folder / f"Segmentation{kind}" / f"{name}.png", mask)
    caption = describe(scene.tags, scene.place, np.random.default_rng([scene.seed, 2]))
    return name, list(scene.tags), caption.text


def minivoc_folder(root: Path, *, seed: int = 0) -> Path:
    """Name the folder of one MiniVOC under `root`."""
    return Path(root) / f"minivoc-{seed}"


def write_minivoc(
    root: Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Path:
    """Write all splits in VOC's layout under `root` once, and return the folder.

    The folder appears by a rename when it is complete; one that exists is left alone. Beside VOC's own folders it
    holds `SegmentationPart` (1 discriminative part, 2 body), `tags.json` and `captions.json`.
    """
    folder = minivoc_folder(root, seed=seed)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        _write_splits(scratch, seed, workers, progress)
        scratch.rename(folder)
    except OSError:  # another process was faster: its folder holds the same pictures
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_splits(folder: Path, seed: int, workers: int | None, progress: Callable) -> None:
    for sub in ("JPEGImages", "SegmentationClass", "SegmentationObject", "SegmentationPart", "ImageSets/Segmentation"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    jobs = [(split, index) for split, count in SPLITS.items() for index in range(count)]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(partial(_write_scene, folder, seed), *zip(*jobs, strict=True), chunksize=25)
        done = list(progress(results, len(jobs)))
    for split in SPLITS:
        names = [name for name, _, _ in done if name.startswith(split)]
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "tags.json").write_text(json.dumps({name: tags for name, tags, _ in done}, indent=0))
    (folder / "captions.json").write_text(json.dumps({name: text for name, _, text in done}, indent=0))


def _pretrain_chunk(split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = np.empty((stop - start, PRETRAIN_SIDE, PRETRAIN_SIDE, 3), np.uint8)
    tags = np.zeros((stop - start, len(CLASSES)), bool)
    places = np.zeros(stop - start, np.uint8)
    for row, index in enumerate(range(start, stop)):
        scene = scene_of(split, index)
        side = (PRETRAIN_SIDE, PRETRAIN_SIDE)
        images[row] = cv2.resize(render(scene).image, side, interpolation=cv2.INTER_LINEAR)
        tags[row, [CLASSES.index(name) for name in scene.tags]] = True
        places[row] = PLACES.index(scene.place)
    return images, tags, places


def write_pretrain(
    root: Path,
    count: int,
    *,
    split: Literal["pretrain", "studio"] = "pretrain",
    workers: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Path:
    """Render the first `count` pictures of a split under `root`, in resumable chunks of 2,000; return the folder.

    Each chunk is `images-K.npy (n, 128, 128, 3)` uint8, `tags-K.npy (n, 20)` bool and `places-K.npy (n,)`.
    """
    folder = Path(root) / f"minivoc-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [(start, min(start + 2000, count)) for start in range(0, count, 2000)]
    todo = [c for c in chunks if not (folder / f"places-{c[0]:06d}-{c[1]:06d}.npy").exists()]
    draw = partial(_pretrain_chunk, split)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        results = zip(todo, pool.map(draw, *zip(*todo, strict=True)), strict=True) if todo else ()
        for (start, stop), arrays in progress(results, len(todo)):
            for kind, array in zip(("images", "tags", "places"), arrays, strict=True):
                target = folder / f"{kind}-{start:06d}-{stop:06d}.npy"
                with open(target.with_suffix(".tmp"), "wb") as file:
                    np.save(file, array)
                target.with_suffix(".tmp").rename(target)
    return folder
