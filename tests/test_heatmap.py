"""Heatmap: raster and regions against literal sums and shapely's union of the tiles; the picture pixel by pixel."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.array_slide import ArraySlide
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap, major_axis_um, save_overlay
from wsi.units import Box, Mpp

MARGIN = 24  # of the picture in the figure


def box_of(box: Box) -> shapely.Polygon:
    return shapely.box(box.x, box.y, box.x + box.w, box.y + box.h)


def heatmap_of(values: list[list[float]], tile_px: int = 100) -> Heatmap:
    """Tiles side by side; NaN where there is none."""
    array = np.array(values, np.float32)
    size = array.shape[1] * tile_px, array.shape[0] * tile_px
    grid = TileGrid.cover(size, slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=tile_px)
    there = ~np.isnan(array.ravel())
    return Heatmap(grid.keep(there), array.ravel()[there])


@st.composite
def heatmaps(draw):
    tile_px, stride_px = draw(st.integers(5, 20)), draw(st.integers(3, 25))
    size = draw(st.integers(40, 90)), draw(st.integers(40, 90))
    mpp = draw(st.sampled_from([0.5, 0.61]))
    grid = TileGrid.cover(size, slide_mpp=Mpp(0.5, 0.49), mpp=mpp, tile_px=tile_px, stride_px=stride_px)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    grid = grid.keep(rng.random(len(grid)) < draw(st.sampled_from([0.2, 0.7, 1.0])))
    return Heatmap(grid, rng.random(len(grid)).astype(np.float32))


@given(heatmaps())
@settings(max_examples=40, deadline=None)
def test_a_cell_is_the_mean_of_its_tiles_by_area(heatmap):
    raster, (w, h) = heatmap.raster(), heatmap.grid.stride
    boxes = heatmap.grid.boxes()
    assert raster.dtype == np.float32
    for row, column in np.ndindex(raster.shape):
        sides = np.minimum(boxes[:, :2] + boxes[:, 2:], ((column + 1) * w, (row + 1) * h))
        common = (sides - np.maximum(boxes[:, :2], (column * w, row * h))).clip(0).prod(axis=1)
        common[common < 1e-6] = 0
        if common.sum() == 0:
            assert np.isnan(raster[row, column])
        else:
            assert raster[row, column] == pytest.approx((common * heatmap.values).sum() / common.sum(), rel=1e-5)
    if len(boxes):  # and no tile reaches beyond the raster
        assert (boxes[:, 0] + boxes[:, 2]).max() <= raster.shape[1] * w + 1e-6
        assert (boxes[:, 1] + boxes[:, 3]).max() <= raster.shape[0] * h + 1e-6


@given(heatmaps(), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_regions_are_the_union_of_the_cells(heatmap, threshold):
    within = Box(7.5, 3.25, 50, 60)
    regions = heatmap.regions(threshold, within)
    (w, h), raster = heatmap.grid.stride, heatmap.raster()
    if heatmap.grid.tile[0] < w:  # gaps between the tiles are in no region
        w, h = heatmap.grid.tile
    step = heatmap.grid.stride
    cells = [
        box_of(Box(c * step[0], r * step[1], w, h)) for r, c in np.ndindex(raster.shape) if raster[r, c] >= threshold
    ]
    expected = shapely.union_all(cells).intersection(box_of(within))
    assert shapely.union_all(regions).symmetric_difference(expected).area < 1e-6
    assert sum(r.area for r in regions) == pytest.approx(expected.area), "regions do not overlap"
    assert all(r.geom_type == "Polygon" and r.is_valid and r.area > 0 for r in regions)
    assert all(a.intersection(b).length == 0 for a, b in itertools.combinations(regions, 2)), "none share an edge"
    keys = [(-r.area, *r.bounds[:2]) for r in regions]
    assert keys == sorted(keys)


@pytest.mark.parametrize("mpp", [0.5, 0.25, 1.1])
def test_a_tile_is_drawn_where_it_was_cut(mpp):
    """The planted defect is the commonest one: a heatmap half a tile away."""
    grid = TileGrid.cover((1000, 800), slide_mpp=Mpp(0.5, 0.5), mpp=mpp, tile_px=64)
    for i in (0, 7, len(grid) // 2):
        (region,) = Heatmap(grid, np.eye(len(grid), dtype=np.float32)[i]).regions(0.5, Box(0, 0, 1000, 800))
        expected = box_of(grid.box(i).intersect(Box(0, 0, 1000, 800)))
        assert region.symmetric_difference(expected).area < 1e-6
        moved = shapely.transform(expected, lambda xy: xy + np.array(grid.tile) / 2)
        assert region.symmetric_difference(moved).area > 0.5 * expected.area


def test_holes_stay_and_corners_do_not_join():
    ring = heatmap_of([[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    (region,) = ring.regions(0.5, Box(0, 0, 300, 300))
    assert region.area == 80_000 and [box.bounds for box in region.interiors] == [(100, 100, 200, 200)]
    corners = heatmap_of([[1, 0], [0, 1]])
    assert [r.bounds for r in corners.regions(1.0, Box(0, 0, 200, 200))] == [(0, 0, 100, 100), (100, 100, 200, 200)]
    cut = heatmap_of([[1, 1, 1], [1, np.nan, 1]]).regions(0.5, Box(0, 100, 300, 100))
    assert [r.bounds for r in cut] == [(0, 100, 100, 200), (200, 100, 300, 200)]
    assert heatmap_of([[0.2]]).regions(0.5, Box(0, 0, 100, 100)) == []


def test_no_tiles_make_an_empty_heatmap():
    grid = TileGrid.cover((100, 100), slide_mpp=Mpp(1, 1), mpp=1, tile_px=20).keep(np.zeros(25, bool))
    heatmap = Heatmap(grid, np.zeros(0, np.float32))
    assert heatmap.raster().size == 0 and heatmap.regions(0.0, Box(0, 0, 100, 100)) == []


@pytest.mark.parametrize("values", [[0.1], [0.1, np.nan], [0.1, np.inf], [[0.1, 0.2]]])
def test_values_that_are_not_one_finite_number_a_tile_are_refused(values):
    grid = TileGrid.cover((20, 10), slide_mpp=Mpp(1, 1), mpp=1, tile_px=10)
    with pytest.raises(ValueError, match="heatmap"):
        Heatmap(grid, np.array(values, np.float32))


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_major_axis_is_the_largest_distance(points):
    shape = shapely.MultiPoint(points).convex_hull.union(shapely.box(0, 0, 1, 1))
    outline = shapely.get_coordinates(shape) * (0.5, 0.25)
    expected = max(np.hypot(*(a - b)) for a in outline for b in outline)
    assert major_axis_um(shape, Mpp(0.5, 0.25)) == pytest.approx(expected)


def test_the_major_axis_of_nothing_is_zero():
    assert major_axis_um(shapely.Polygon(), Mpp(1, 1)) == 0.0


# --- the picture ---------------------------------------------------------------------------------------------------


def overlay(tmp_path: Path, slide: ArraySlide, heatmap: Heatmap | None, **options: object) -> np.ndarray:
    path = tmp_path / "overlay.png"
    save_overlay(path, slide, heatmap, **options)
    with Image.open(path) as image:
        assert "Software" not in image.info
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def slide() -> ArraySlide:
    rgb = np.random.default_rng(0).integers(150, 250, (1000, 1200, 3), np.uint8)
    return ArraySlide(rgb, 0.5, Box(200, 100, 1000, 800))


def test_only_the_pixels_of_the_tiles_are_coloured(tmp_path: Path, slide: ArraySlide):
    values = np.full((10, 12), np.nan)
    values[2, 5], values[4:6, 8], values[0, 0], values[5, 1] = 0.9, 0.2, 1.0, 0.5  # [0, 0] lies outside the bounds
    plain, coloured = overlay(tmp_path, slide, None), overlay(tmp_path, slide, heatmap_of(values.tolist()))
    x, y = np.arange(1000) + 200, np.arange(800) + 100  # a thumbnail pixel is a level-0 pixel here
    expected = ~np.isnan(values)[np.ix_(y // 100, x // 100)]
    window = np.s_[MARGIN : MARGIN + 800, MARGIN : MARGIN + 1000]
    changed = (plain[window] != coloured[window]).any(axis=2)
    inner = np.s_[2:-2, 2:-2]  # the frame lies on the outermost pixels
    assert (changed[inner] == expected[inner]).all()
    assert (changed[inner] != np.roll(expected, 50, axis=1)[inner]).any()


def test_outlines_and_scale_bar_lie_where_they_should(tmp_path: Path, slide: ArraySlide):
    slide.rgb[...] = 255
    image = overlay(
        tmp_path, slide, None, regions=[shapely.box(500, 300, 700, 450).difference(shapely.box(560, 340, 600, 400))]
    )
    picture = image[MARGIN : MARGIN + 800, MARGIN : MARGIN + 1000]
    crimson = (picture[..., 0] > 150) & (picture[..., 1] < 60)
    rows, columns = np.nonzero(crimson)
    assert (columns.min() + 200, columns.max() + 200) == pytest.approx((500, 700), abs=2)
    assert (rows.min() + 100, rows.max() + 100) == pytest.approx((300, 450), abs=2)
    assert crimson[242:298, 358:363].any(axis=1).all(), "the hole has an outline"
    black = (picture.max(axis=2) < 40)[700:].sum(axis=1)
    assert black.max() == pytest.approx(100 / 0.5, abs=2), "a fifth of 500 um is 100 um"


@pytest.mark.parametrize("threshold", [0.25, 0.8])
def test_the_threshold_is_marked_on_the_colour_bar(tmp_path: Path, slide: ArraySlide, threshold: float):
    heatmap = heatmap_of(np.linspace(0, 1, 120).reshape(10, 12).tolist())
    marked = overlay(tmp_path, slide, heatmap, threshold=threshold)
    left = MARGIN + 1000 + 22  # the bar is 18 px wide and 360 high
    black = marked[MARGIN : MARGIN + 360, left + 2 : left + 16].max(axis=(1, 2)) < 90
    assert np.flatnonzero(black).mean() == pytest.approx((1 - threshold) * 360, abs=1.5)
    plain = overlay(tmp_path, slide, heatmap)
    assert not (plain[MARGIN + 3 : MARGIN + 357, left + 2 : left + 16].max(axis=(1, 2)) < 90).any()


def test_the_same_input_is_the_same_file(tmp_path: Path, slide: ArraySlide):
    heatmap = heatmap_of(np.linspace(-1, 2, 120).reshape(10, 12).tolist())
    names = [tmp_path / "a.png", tmp_path / "b.png"]
    for name in names:
        save_overlay(
            name, slide, heatmap, regions=heatmap.regions(0.5, slide.bounds), label="probability", long_side_px=300
        )
    assert names[0].read_bytes() == names[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (40, 30)])
def test_any_shape_of_slide_makes_a_picture(tmp_path: Path, size: tuple[int, int]):
    slide = ArraySlide(np.full((size[1], size[0], 3), 200, np.uint8), 0.25)
    grid = TileGrid.cover(size, slide_mpp=slide.mpp, mpp=0.25, tile_px=1)
    image = overlay(tmp_path, slide, Heatmap(grid, np.ones(len(grid), np.float32)))
    assert min(image.shape[:2]) >= 320


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path, slide: ArraySlide):
    with pytest.raises(FileNotFoundError):
        save_overlay(tmp_path / "none" / "a.png", slide, None)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(IsADirectoryError):
        save_overlay(tmp_path / "a.png", slide, None)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]
