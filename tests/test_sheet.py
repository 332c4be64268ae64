"""The contact sheet: which tiles it shows, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.array_slide import ArraySlide
from wsi.grid import TileGrid
from wsi.sheet import save_sheet

SIDE = 40


def a_slide() -> tuple[ArraySlide, TileGrid]:
    """Sixteen tiles, each of its own grey."""
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    rgb = np.repeat(np.repeat(grey, SIDE, 0), SIDE, 1)[..., None].repeat(3, 2)
    slide = ArraySlide(np.ascontiguousarray(rgb))
    return slide, TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=0.5, tile_px=SIDE)


def shown(path: Path, n: int, rows: int) -> list[list[int]]:
    """Tiles of each row, told by their grey."""
    with Image.open(path) as opened:
        sheet = np.asarray(opened)
    return [[int(sheet[8 + row * 168 + 22 + 56, 8 + i * 120 + 56, 0]) // 10 for i in range(n)] for row in range(rows)]


def test_the_highest_and_the_lowest_of_each_class(tmp_path: Path) -> None:
    slide, grid = a_slide()
    one, other = np.arange(16.0), np.where(np.arange(16) == 7, 1.0, 0.0)
    save_sheet(tmp_path / "a.png", slide, grid, {"one": one, "other": other}, columns=3)
    rows = shown(tmp_path / "a.png", 3, 4)
    assert rows[0] == [15, 14, 13] and rows[1] == [0, 1, 2]
    assert rows[2] == [7, 0, 1] and rows[3] == [15, 14, 13]  # ties in the order of the tiles
    save_sheet(tmp_path / "b.png", slide, grid, {"one": one, "other": other}, columns=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_slide_of_one_tile(tmp_path: Path) -> None:
    slide, grid = a_slide()
    save_sheet(tmp_path / "a.png", slide, grid.keep(np.arange(16) == 5), {"attention": np.ones(1)})
    assert shown(tmp_path / "a.png", 1, 2) == [[5], [5]]


def test_where_the_model_looked_lights_up(tmp_path: Path) -> None:
    slide, grid = a_slide()
    asked: list[np.ndarray] = []

    def look(rgb: np.ndarray) -> tuple[list[str], np.ndarray]:
        asked.append(rgb)
        cam = np.zeros(rgb.shape[:3], np.float32)
        cam[:, : SIDE // 2, : SIDE // 2] = 3.0
        return ["word"] * len(rgb), cam

    save_sheet(tmp_path / "a.png", slide, grid, {"one": np.arange(16.0)}, columns=3, look=look)
    save_sheet(tmp_path / "b.png", slide, grid, {"one": np.arange(16.0)}, columns=3)
    (rgb,) = asked
    assert rgb.shape == (3, SIDE, SIDE, 3) and rgb[:, 0, 0, 0].tolist() == [150, 140, 130]  # the highest alone
    with Image.open(tmp_path / "a.png") as opened:
        sheet = np.asarray(opened)
    tile = sheet[8 + 168 + 22 :, 8:][:112, :112]
    assert (tile[70:, 70:] == 150).all() and not (tile[:40, :40] == 150).all(axis=2).any()
    with Image.open(tmp_path / "b.png") as plain:
        assert plain.height == sheet.shape[0] - 168
        np.testing.assert_array_equal(np.asarray(plain)[8:176], sheet[8:176])
