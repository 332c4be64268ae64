"""Detections against the loop they are defined by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wsi.errors import EvaluationError
from wsi.evaluate.detect import DetectConfig, detect, write_detections
from wsi.evaluate.inputs import read_detections
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap
from wsi.units import Mpp


def heatmap_of(values: np.ndarray, tile: int = 64, mpp: float = 0.5) -> Heatmap:
    rows, columns = values.shape
    grid = TileGrid.cover((columns * tile, rows * tile), slide_mpp=Mpp(mpp, mpp), mpp=mpp, tile_px=tile)
    there = ~np.isnan(values.ravel())
    return Heatmap(grid.keep(there), values.ravel()[there].astype(np.float32))


@st.composite
def rasters(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.integers(0, 17, rng.integers(1, 15, 2)) / 16
    values[rng.random(values.shape) < 0.2] = np.nan
    return values


@given(rasters(), st.integers(0, 4), st.sampled_from([0.0, 0.5, 0.9]))
@settings(max_examples=80, deadline=None)
def test_suppression_is_the_loop_of_the_specification(values, radius, threshold):
    """While the maximum is above the threshold: emit it, strike out the square around it."""
    if np.isnan(values).all():
        return
    left, expected = np.nan_to_num(values, nan=-1), []
    while left.max() > threshold:
        row, column = divmod(int(left.argmax()), left.shape[1])
        expected.append([left[row, column], int((column + 0.5) * 64), int((row + 0.5) * 64)])
        left[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1] = -1
    found = detect(heatmap_of(values), 0.5, DetectConfig("nms", threshold, radius * 32.0))
    assert found.tolist() == expected


@given(rasters(), st.sampled_from([0.3, 0.9]))
@settings(max_examples=50, deadline=None)
def test_components_are_one_detection_each(values, threshold):
    if np.isnan(values).all():
        return
    labels, n = ndimage.label(np.nan_to_num(values, nan=-1) >= threshold, np.ones((3, 3)))
    found = detect(heatmap_of(values), 0.5, DetectConfig("components", threshold))
    cells = (found[:, ::-1][:, :2] // 64).astype(int)
    assert sorted(labels[tuple(cell)] for cell in cells) == list(range(1, n + 1))
    assert all(values[tuple(cell)] == p for cell, p in zip(cells, found[:, 0], strict=True))


def test_a_detection_lies_in_the_tile_it_comes_from():
    values = np.zeros((5, 9))
    values[3, 7] = 1
    for mpp in (0.243, 0.5):
        (found,) = detect(heatmap_of(values, 100, mpp), mpp)
        assert found.tolist() == [1, 750, 350], "column to x, row to y, centre of the tile"


def test_the_radius_is_a_length():
    values = np.ones((1, 40))
    assert len(detect(heatmap_of(values, 64, 0.243), 0.243)) == 4  # 12 cells of 64 px at 0.243 um
    assert len(detect(heatmap_of(values, 128, 0.243), 0.243)) == 6  # 6 cells of 128 px
    assert len(detect(heatmap_of(values, 64, 0.486), 0.486)) == 6


def test_files_are_written_exactly(tmp_path: Path):
    p = np.array([[np.float32(0.1), 7, 9], [np.float32(1 / 3), 1e5, 3]], np.float64)
    write_detections(tmp_path / "a.csv", p)
    assert (read_detections(tmp_path / "a.csv") == p).all()
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "0.10000000149011612,7,9"
    write_detections(tmp_path / "b.csv", np.zeros((0, 3)))
    assert (tmp_path / "b.csv").read_bytes() == b"" and read_detections(tmp_path / "b.csv").shape == (0, 3)


@pytest.mark.parametrize("row", ["0.5,1", "0.5,1,2,3", "nan,1,2", "0.5,x,2", "1.5,1,2", "-0.1,1,2", "0.5,inf,2"])
def test_rows_that_are_no_detections_are_refused(tmp_path: Path, row: str):
    (tmp_path / "a.csv").write_text(f"0.25,1,2\n{row}\n")
    with pytest.raises(EvaluationError, match="line 2"):
        read_detections(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("probability,x,y\n0.25,1,2\n")
    assert read_detections(tmp_path / "a.csv").tolist() == [[0.25, 1, 2]]


def test_a_configuration_that_makes_no_sense_is_refused():
    for wrong in ({"method": "x"}, {"threshold": 1.5}, {"radius_um": -1.0}, {"radius_um": float("nan")}):
        with pytest.raises(EvaluationError):
            DetectConfig(**wrong)


def test_with_gaps_between_tiles_a_detection_lies_on_its_tile():
    grid = TileGrid.cover((1000, 600), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=50, stride_px=200)
    values = np.zeros(len(grid), np.float32)
    values[7] = 1
    for method in ("nms", "components"):
        (found,) = detect(Heatmap(grid, values), 0.5, DetectConfig(method))
        box = grid.box(7)
        assert found.tolist() == [1, box.x + 25, box.y + 25]


@given(st.integers(0, 2**32), st.sampled_from([16, 40, 64, 100]))
@settings(max_examples=60, deadline=None)
def test_every_detection_lies_on_the_slide_and_on_a_tile_with_its_score(seed: int, stride: int):
    """The last tiles of a grid that overlaps reach outside, with cells that nobody could click on."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(64, 400)), int(rng.integers(64, 400))
    grid = TileGrid.cover(size, slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=64, stride_px=stride)
    heatmap = Heatmap(grid, (rng.integers(0, 17, len(grid)) / 16).astype(np.float32))
    raster, boxes = heatmap.raster(), grid.boxes()
    for method in ("nms", "components"):
        for p, x, y in detect(heatmap, 0.5, DetectConfig(method, 0.25, 30), size=size):
            assert 0 <= x < size[0] and 0 <= y < size[1]
            assert raster[int(y / stride), int(x / stride)] == p
            assert ((boxes[:, :2] <= (x, y)) & ((x, y) < boxes[:, :2] + boxes[:, 2:])).all(axis=1).any()


def test_a_first_line_with_a_number_in_it_is_no_header(tmp_path: Path):
    for line in ('"0,9",100,200', "O.9,100,200", "x,y,0.9"):
        (tmp_path / "a.csv").write_text(line + "\n")
        with pytest.raises(EvaluationError, match="line 1"):
            read_detections(tmp_path / "a.csv")
