"""Read image files and masks, and refuse what cannot be meant."""

from __future__ import annotations

import io
from pathlib import Path
from struct import error as StructError

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diclip.settings import shown

MIN_SIDE, MAX_SIDE = 8, 10_000
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")  # what strangers may send: no format that runs a program
VOID = 255
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def read_image(path: Path) -> Tensor:
    """Read an image as (3, H, W) float32 in [0, 1].

    Grey, palette, CMYK and 16-bit images are converted, transparency is laid on white, and of an animation
    the first frame counts. Raises FileNotFoundError if there is no file, ValueError if it is none or an
    absurd size.
    """
    return _pixels(_load(path), shown(path))


def decode_image(data: bytes, *, name: str, most: int = 512) -> Tensor:
    """Read an image from a file's bytes, whoever sent it, as `read_image` does; `name` is for messages.

    It is turned upright, as EXIF says if it can be read, and scaled down to sides of at most `most`. Raises ValueError.
    """
    if not data:
        raise ValueError(f"{name}: found 0 bytes, expected an image: choose the file again")
    image = _open(io.BytesIO(data), name, formats=FORMATS)
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, StructError):
        pass  # damaged EXIF says nothing about what is up: the picture stays as it is stored
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if max(image.size) > most and not image.mode.startswith(("I", "F")):
        image.thumbnail((most, most))
    pixels = _pixels(image, name)
    step = -(-max(pixels.shape[1:]) // most)  # 16 bits, which Pillow does not scale
    return pixels[:, ::step, ::step].contiguous()


def pictures_in(folder: str | Path) -> list[Path]:
    """List a folder's pictures by name; raise FileNotFoundError or ValueError, in one line, where there are none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(folder)}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{shown(folder)} holds no picture ({', '.join(SUFFIXES)})")
    return found


def _pixels(image: Image.Image, name: str) -> Tensor:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8
        grey = np.asarray(image).astype(np.float32) / 65535
        return torch.from_numpy(np.clip(grey, 0, 1)).expand(3, -1, -1).contiguous()
    if image.mode == "F":
        raise ValueError(f"{name}: found floating-point pixels, expected 8 or 16 bits: save it as PNG")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def read_mask(path: Path, *, num_classes: int, size: tuple[int, int] | None = None) -> Tensor:
    """Read a mask as (H, W) int64 with 0 for background, 1 to `num_classes`, and 255 for void.

    `size` is the image's (H, W), which the mask must have. Raises FileNotFoundError if there is no file,
    ValueError if its pixels are no class ids, such as the colours of VOC's palette.
    """
    image = _load(path)
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"{shown(path)}: found colours (mode {image.mode}), expected class ids: "
            "save the ids as an 8-bit palette or grey PNG"
        )
    ids = np.array(image)
    strange = [value for value in np.unique(ids).tolist() if value > num_classes and value != VOID]
    if strange:
        raise ValueError(
            f"{shown(path)}: found {_some(strange)}, expected class ids 0 to {num_classes} and {VOID}: "
            "these may be palette colours turned to grey; save the ids themselves"
        )
    if size is not None and ids.shape != size:
        found, expected = ("{1}x{0}".format(*shape) for shape in (ids.shape, size))
        raise ValueError(f"{shown(path)}: found {found} pixels, expected {expected} as its image has")
    return torch.from_numpy(ids.astype(np.int64))


def _load(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: there is no such file")
    if not path.stat().st_size:
        raise ValueError(f"{shown(path)}: found 0 bytes, expected an image: copy the file again")
    return _open(path, shown(path))


def _open(source: Path | io.BytesIO, name: str, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    try:
        image = Image.open(source, formats=formats)
        if min(image.size) < MIN_SIDE or max(image.size) > MAX_SIDE:
            raise _absurd(name, "{}x{}".format(*image.size))
        image.load()
    except Image.DecompressionBombError:
        raise _absurd(name, "too many") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: is no readable image (cannot identify image file): copy the file again") from None
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        reason = str(error).replace(str(source), Path(name).name)
        raise ValueError(f"{name}: is no readable image ({reason}): copy the file again") from None
    return image


def _absurd(name: str, found: str) -> ValueError:
    sides = f"expected sides of {MIN_SIDE} to {MAX_SIDE}"
    return ValueError(f"{name}: found {found} pixels, {sides}: resize it or take it off the list")


def _some(values: list[int], *, most: int = 5) -> str:
    return ", ".join(map(str, values[:most])) + (" …" if len(values) > most else "")
