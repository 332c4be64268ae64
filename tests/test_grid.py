"""The grid: every pixel in a tile, at exactly the resolution asked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import shapely
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wsi.errors import GridError
from wsi.grid import TileGrid
from wsi.units import Box, Mpp

SQUARE = Mpp(0.5, 0.5)


@given(
    st.integers(300, 5000),
    st.integers(300, 5000),
    st.floats(0.2, 1.0),
    st.floats(0.95, 1.05),
    st.integers(16, 64),
    st.floats(0.25, 1.0),
)
def test_covers_the_slide_without_a_tile_too_many(
    w: int, h: int, mpp: float, skew: float, tile_px: int, overlap: float
) -> None:
    slide_mpp = Mpp(mpp, mpp * skew)
    assume(tile_px / slide_mpp.x < w and tile_px / slide_mpp.y < h)
    stride_px = max(1, int(tile_px * overlap))
    grid = TileGrid.cover((w, h), slide_mpp=slide_mpp, mpp=1.0, tile_px=tile_px, stride_px=stride_px)
    boxes = grid.boxes()
    right, bottom = (boxes[:, 0] + boxes[:, 2]).max(), (boxes[:, 1] + boxes[:, 3]).max()
    assert boxes[:, :2].min() == 0
    assert right >= w - 1e-5 * w and bottom >= h - 1e-5 * h
    assert right - grid.stride[0] < w and bottom - grid.stride[1] < h
    # exact resolution: a tile is tile_px pixels of 1.0 um, whatever the slide's own resolution
    assert np.allclose(boxes[:, 2] * slide_mpp.x, tile_px) and np.allclose(boxes[:, 3] * slide_mpp.y, tile_px)
    # no drift: the last column stands where arithmetic puts it
    assert np.isclose(boxes[:, 0].max() * slide_mpp.x, grid.columns.max() * stride_px, rtol=1e-12)
    assert len(grid) == (grid.columns.max() + 1) * (grid.rows.max() + 1)


def test_one_tile_where_the_slide_is_one_tile() -> None:
    grid = TileGrid.cover((2800, 2350), slide_mpp=Mpp(4.0, 4.0), mpp=4.0, tile_px=50)
    assert len(grid) == 56 * 47
    assert grid.box(57) == Box(50, 50, 50, 50)
    assert len(TileGrid.cover((512, 512), slide_mpp=SQUARE, mpp=1.0, tile_px=256)) == 1
    # 350 * (0.88 / 0.7) is a hair above 440: a slide of exactly one tile is not smaller than it
    assert len(TileGrid.cover((440, 440), slide_mpp=Mpp(0.7, 0.7), mpp=0.88, tile_px=350)) == 1
    # 0.1 + 0.2 must not make a column of nothing
    assert len(TileGrid.cover((300, 100), slide_mpp=Mpp(0.1, 0.1), mpp=0.1, tile_px=100)) == 3


def test_gaps_start_no_tile_outside() -> None:
    for stride_px, n in ((100, 25), (150, 16), (1000, 1), (2000, 1)):
        grid = TileGrid.cover((1000, 1000), slide_mpp=SQUARE, mpp=1.0, tile_px=100, stride_px=stride_px)
        assert len(grid) == n and grid.boxes()[:, :2].max() < 1000


def test_keep_and_pickle() -> None:
    grid = TileGrid.cover((1000, 1000), slide_mpp=SQUARE, mpp=1.0, tile_px=100)
    kept = grid.keep(np.array([3, 7]))
    assert [kept.box(0), kept.box(1)] == [grid.box(3), grid.box(7)]
    assert len(grid.keep(np.zeros(len(grid), bool))) == 0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept)).boxes(), kept.boxes())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"tile_px": 0}, "tile=0"),
        ({"stride_px": 0}, "stride=0"),
        ({"stride_px": -5}, "stride=-5"),
        ({"mpp": 0.0}, "mpp=0"),
        ({"mpp": float("nan")}, "mpp=nan"),
        ({"tile_px": 501}, "smaller than one tile"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, float], names: str) -> None:
    whole = {"slide_mpp": SQUARE, "mpp": 1.0, "tile_px": 100, **arguments}
    with pytest.raises(GridError, match=names):
        TileGrid.cover((1000, 1000), **whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError):  # also the builtin a stranger would catch
        TileGrid.cover((1000, 1000), **whole)  # type: ignore[arg-type]


class TestLevels:
    @given(
        size=st.tuples(st.integers(200, 2000), st.integers(200, 2000)),
        factor=st.sampled_from([1, 2, 4, 4.0003, 16]),
        tile_px=st.integers(6, 12),
        gap=st.integers(0, 5),
    )
    def test_patches_are_whole_pixels_of_the_level(
        self, size: tuple[int, int], factor: float, tile_px: int, gap: int
    ) -> None:
        level = int(size[0] // factor), int(size[1] // factor)
        grid = TileGrid.of_level(size, level, slide_mpp=Mpp(0.25, 0.26), tile_px=tile_px, stride_px=tile_px + gap)
        boxes = grid.boxes() / ([size[0] / level[0], size[1] / level[1]] * 2)  # in pixels of the level
        np.testing.assert_allclose(boxes, np.round(boxes), atol=1e-6)
        assert (np.round(boxes[:, 2:]) == tile_px).all()
        assert grid.mpp == pytest.approx(np.sqrt(0.25 * 0.26 * size[0] / level[0] * size[1] / level[1]))
        inside = (np.round(boxes[:, :2]) + tile_px <= level).all(axis=1)
        np.testing.assert_array_equal(grid.inside(size), inside)
        across, down = ((side - tile_px) // (tile_px + gap) + 1 for side in level)
        assert inside.sum() == across * down

    def test_the_finest_level_is_the_slide_itself(self) -> None:
        own = TileGrid.of_level((1000, 600), (1000, 600), slide_mpp=Mpp(0.5, 0.5), tile_px=64, stride_px=48)
        cover = TileGrid.cover((1000, 600), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=64, stride_px=48)
        np.testing.assert_array_equal(own.boxes(), cover.boxes())
        assert own.mpp == cover.mpp

    def test_refuses_what_makes_no_grid(self) -> None:
        for arguments, says in (({"tile_px": 0}, "tile=0"), ({"tile_px": 301}, "smaller than one tile")):
            with pytest.raises(GridError, match=says):
                TileGrid.of_level((1000, 600), (500, 300), slide_mpp=Mpp(0.5, 0.5), **arguments)


@given(st.integers(0, 2**32), st.integers(5, 90))
@settings(max_examples=50, deadline=None)
def test_what_an_area_covers_of_each_tile(seed: int, stride: int):
    """Against each tile cut by itself; shapes that touch edges of tiles among them."""
    rng = np.random.default_rng(seed)
    grid = TileGrid.cover((300, 200), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=30, stride_px=stride)
    grid = grid.keep(rng.random(len(grid)) < 0.8)
    shapes = [shapely.Point(*rng.random(2) * 300).buffer(float(r)) for r in rng.random(6) * 60 + 1]
    shapes += [
        shapely.box(*at, *(at + size)) for at, size in zip(rng.integers(0, 9, (3, 2)) * 30, (30, 60, 15), strict=True)
    ]
    area = shapely.difference(shapely.union_all(shapes), shapely.Point(150, 100).buffer(20))
    found = grid.covered(area)
    expected = [shapely.box(x, y, x + w, y + h).intersection(area).area / (w * h) for x, y, w, h in grid.boxes()]
    assert np.allclose(found, expected, rtol=0, atol=1e-9)
    assert (
        not grid.covered(shapely.MultiPolygon()).any() and not grid.covered(shapely.LineString([(0, 0), (99, 9)])).any()
    )
