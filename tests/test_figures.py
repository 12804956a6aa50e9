import numpy as np
from PIL import Image

from diclip import figures, plots, tables
from diclip.data.minivoc import render, scene_of
from diclip.settings import ROOT


def test_contact_sheet_centres_pictures_of_any_shape():
    wide, tall = np.zeros((2, 6, 3), np.uint8), np.zeros((3, 6, 2))  # the second is (3, H, W) in [0, 1]
    sheet = plots.contact_sheet([wide, tall, wide], columns=2, gap=1)
    assert sheet.shape == (13, 13, 3) and sheet.dtype == np.uint8
    assert not sheet[2:4, :6].any() and (sheet[:2, :6] == 255).all()
    assert not sheet[:6, 9:11].any() and (sheet[:6, 7:9] == 255).all()
    assert not sheet[9:11, :6].any() and (sheet[7:, 7:] == 255).all()


def test_the_sheet_of_minivoc_shows_val(tmp_path):
    figures.minivoc(tmp_path / "sheet.png", rows=1, columns=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    first = render(scene_of("val", 0)).image
    top, left = ((128 - side) // 2 for side in first.shape[:2])
    assert sheet.shape[1] == 2 * 128 + 4
    np.testing.assert_array_equal(sheet[top : top + first.shape[0], left : left + first.shape[1]], first)


def test_table_is_markdown():
    table = plots.table([{"a": 1, "b": "x"}, {"b": "y", "a": 2}])
    assert table.data.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x |", "| 2 | y |"]


def test_the_readme_shows_the_numbers_that_are_stored():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, table in tables.TABLES.items():
        assert f"<!-- {name} -->\n{table()}\n<!-- /{name} -->" in readme, f"{name}: run `make results`"
