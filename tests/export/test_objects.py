"""Results as objects of QuPath: outlines that were simplified, and regions against one by one."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from wsi.export.objects import path_classes, percentile_rank, positive_regions, simplify
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap, major_axis_um
from wsi.tissue import mask_polygons
from wsi.units import Box, Mpp


@pytest.mark.parametrize("tolerance", [0.5, 8.0, 40.0])
def test_simplified_outlines_stay_within_the_tolerance_and_apart(tolerance: float):
    rng = np.random.default_rng(0)
    mpp = Mpp(0.5, 0.25)
    for _ in range(20):
        cells = mask_polygons(rng.random((12, 15)) < 0.6)
        outlines = [shapely.transform(cell, lambda xy: xy * 20) for cell in cells]
        found = simplify(outlines, tolerance, mpp)
        assert len(found) == len(outlines)
        together = shapely.MultiPolygon(found)
        assert together.is_valid
        for before, after in zip(outlines, found, strict=True):
            um = [shapely.transform(shape.boundary, lambda xy: xy * np.array(mpp)) for shape in (before, after)]
            assert shapely.hausdorff_distance(*um) <= tolerance * 1.0001
            assert len(before.interiors) == len(after.interiors)


def test_regions_say_what_their_tiles_do():
    """Against each outline asked about each tile."""
    mpp = Mpp(0.5, 0.25)
    grid = TileGrid.cover((3000, 2000), slide_mpp=mpp, mpp=1.0, tile_px=30)
    score = np.random.default_rng(0).random(len(grid)).astype(np.float32)
    heatmap = Heatmap(grid, score)
    outlines = heatmap.regions(0.5, Box(0, 0, 3000, 2000))
    (colour,) = path_classes(["tumour"], ["tumour"])
    found = positive_regions(outlines, heatmap, positive=["tumour", "dcis"], path_class=colour, mpp=mpp)
    assert [each.name for each in found] == [f"tumour or dcis {i}" for i in range(1, len(outlines) + 1)]
    x, y, w, h = grid.boxes().T
    for region, outline in zip(found, outlines, strict=True):
        inside = score[shapely.contains_xy(outline, x + w / 2, y + h / 2)]
        assert dict(region.measurements) == {
            "area_mm2": outline.area * 0.125 / 1e6,
            "major_axis_um": major_axis_um(outline, mpp),
            "mean_probability": float(inside.mean()),
            "max_probability": float(inside.max()),
        }
    assert len(found) > 20
    assert positive_regions([], heatmap, positive=["t"], path_class=colour, mpp=mpp) == []


def test_colours_tell_positive_classes_apart():
    names = [f"class {i}" for i in range(12)]
    found = {each.name: each.color for each in path_classes(names, names[3:5])}
    assert list(found) == names and found["class 3"] == (200, 0, 0)
    assert not {found[name] for name in names[3:5]} & {found[name] for name in names[:3] + names[5:]}
    assert percentile_rank(np.array([])).shape == (0,)
