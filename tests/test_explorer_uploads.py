"""Uploads: bad ones are a line each and leave the explorer working, odd ones are shown."""

import io
import struct
import zlib
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from diclip.explorers.board import Board
from diclip.explorers.cam import CamChoice
from diclip.explorers.cam_board import explore_cams
from diclip.explorers.core import Pick

widgets = pytest.importorskip("ipywidgets")


# Uploads


def file(kind: str, image: Image.Image | None = None, **how) -> bytes:
    image = image or Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Declare a size and hold next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file("JPEG", exif=exif.tobytes())


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


BAD = {
    "empty.jpg": b"",
    "space.png": b" ",
    "nul.jpg": bytes(4096),
    "noise.png": np.random.default_rng(1).bytes(5000),
    "text.jpg": b"this is no picture\n" * 50,
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>',
    "svg.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "paper.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage\n",
    "archive.jpg": b"PK\x03\x04" + bytes(60),
    "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(60),
    "phone.heic": b"\0\0\0\x18ftypheic" + bytes(60),
    "notebook.ipynb": b'{"cells": []}',
    "pickle.png": b"\x80\x04K\x01.",
    "start.jpg": b"\xff\xd8\xff\xe0",
    "signature.png": b"\x89PNG\r\n\x1a\n",
    "one.png": file("PNG", Image.new("RGB", (1, 1))),
    "one.jpg": file("JPEG", Image.new("RGB", (1, 1))),
    "one.gif": file("GIF", Image.new("P", (1, 1))),
    "narrow.png": file("PNG", Image.new("RGB", (7, 300))),
    "long.png": file("PNG", Image.new("L", (20_000, 9))),
    "vast.png": png_of(20_000, 20_000),
    "bomb.png": png_of(2**31 - 1, 2**31 - 1),
    "hollow.png": png_of(3_000, 2_000),
    "nothing.png": png_of(0, 50),
    "half.jpg": file("JPEG")[:700],
    "half.png": file("PNG")[:3000],
    "half.gif": file("GIF")[:900],
    "half.webp": file("WEBP")[:300],
    "half.tiff": file("TIFF")[:2000],
    "half.bmp": file("BMP")[:2000],
    "header.png": flipped(file("PNG"), 20),
    "float.tiff": file("TIFF", Image.new("F", (30, 30))),
    "icon.ico": file("ICO"),
    "targa.tga": file("TGA"),
    "<b>bold.jpg": b"no",
    "a" * 300 + ".jpg": b"no",
}
ODD = {
    "cmyk.jpg": file("JPEG", Image.new("CMYK", (40, 30), (0, 200, 100, 10))),
    "deep.png": file("PNG", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
    "grey.png": file("PNG", Image.new("LA", (40, 30), (99, 128))),
    "bits.png": file("PNG", Image.new("1", (40, 30))),
    "palette.gif": file("GIF", Image.new("P", (40, 30), 3)),
    "film.gif": file("GIF", Image.new("P", (40, 30)), save_all=True, append_images=[Image.new("P", (40, 30), 9)] * 3),
    "glass.webp": file("WEBP", Image.new("RGBA", (40, 30), (9, 9, 9, 0))),
    "panorama.jpg": file("JPEG", Image.new("RGB", (3000, 40))),
    "turned.jpg": turned(6),
    "absurd.jpg": turned(60_000),
    "exif.jpg": file("JPEG", exif=b"Exif\0\0" + bytes(60_000)),
    "called.txt": file("PNG"),
}


@pytest.fixture(scope="module")
def upload_board(studio):
    return explore_cams(studio, CamChoice(Pick(index=1)))


def send(board: Board, name: str, data: bytes) -> None:
    about = {"name": name, "type": "image/png", "size": len(data), "last_modified": datetime.now(UTC)}
    board["upload"].value = ({**about, "content": memoryview(data)},)


@pytest.mark.parametrize("name", BAD, ids=lambda name: name[:20])
def test_a_bad_upload_is_a_line_and_the_explorer_goes_on(upload_board, name, caplog):
    before = upload_board.picture.value
    send(upload_board, name, BAD[name])
    assert upload_board.picture.value == before and "b00020" in upload_board.line.value
    assert "\n" not in upload_board.line.value and "<b>bold" not in upload_board.line.value
    assert not caplog.records  # expected: a ValueError with a remedy, not an accident
    upload_board["index"].value = 3 - upload_board["index"].value  # 1 or 2
    assert upload_board.picture.value != before and "b00020" not in upload_board.line.value


@pytest.mark.parametrize("name", ODD)
def test_an_odd_upload_is_shown(upload_board, name):
    before = upload_board.picture.value
    send(upload_board, name, ODD[name])
    assert upload_board.picture.value != before and name in upload_board.line.value
    assert "only ever seen MiniVOC" in upload_board.doubts.value


def test_bad_and_odd_are_many():
    assert len(BAD) + len(ODD) >= 40


def test_uploads_are_turned_upright(studio):
    photo = studio.photo(Pick(upload=("turned.jpg", turned(6))))
    assert photo.size == (60, 40) and studio.photo(Pick(upload=("a.jpg", turned(1)))).size == (40, 60)
