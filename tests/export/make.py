"""Results folders of slides with a red mark: what the tiles say of it is measured on the slide's own pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from tests.array_slide import ArraySlide
from wsi.export.qupath import PathClass, Region, write_regions
from wsi.grid import TileGrid
from wsi.store import PatchStore
from wsi.units import Box

CLASSES = ("stroma", "tumour")


@dataclass(frozen=True)
class Marked:
    """A slide, where its mark is (level-0 pixels), and the grid it was scored on."""

    mark: Box
    grid: TileGrid
    bounds: Box
    size: tuple[int, int]
    mpp: float


def marked_results(
    results: Path,
    slide_id: str = "a",
    *,
    size: tuple[int, int] = (3000, 2000),
    mpp: float = 0.25,
    tile_mpp: float = 0.5,
    tile_px: int = 64,
    stride_px: int | None = None,
    bounds: Box | None = None,
    features: int = 0,
    unreadable: tuple[int, ...] = (),
) -> Marked:
    """Write the results of a white slide with a red mark, which is a tile near its lower right corner.

    A tile's probability of tumour is the share of red among its pixels as the slide reads them.
    """
    bounds = bounds or Box(0, 0, *size)
    rgb = np.full((size[1], size[0], 3), 255, np.uint8)
    grid = TileGrid.cover(
        size, slide_mpp=ArraySlide(rgb[:1, :1], mpp).mpp, mpp=tile_mpp, tile_px=tile_px, stride_px=stride_px
    )
    inside = shapely.box(bounds.x, bounds.y, bounds.x + bounds.w, bounds.y + bounds.h).buffer(1e-6)
    x, y, w, h = grid.boxes().T
    last = int(np.flatnonzero(shapely.contains(inside, shapely.box(x, y, x + w, y + h)))[-1])
    x0, y0 = round(grid.box(last).x), round(grid.box(last).y)
    mark = Box(x0, y0, round(grid.box(last).x + w[0]) - x0, round(grid.box(last).y + h[0]) - y0)
    rgb[y0 : y0 + int(mark.h), x0 : x0 + int(mark.w)] = (255, 0, 0)
    slide = ArraySlide(rgb, mpp, bounds)

    # Only the tiles around the mark need reading; elsewhere the slide is white.
    red = np.zeros(len(grid), np.float32)
    for i in np.flatnonzero(np.abs(x - mark.x) + np.abs(y - mark.y) < 4 * w[0]).tolist():
        patch = slide.read(grid.box(i), (tile_px, tile_px))
        red[i] = 1 - patch[..., 1].mean() / 255
    folder = results / slide_id
    folder.mkdir(parents=True)
    arrays: dict = {"probabilities": ((2,), "float32"), "attention": ((), "float32")}
    if features:
        arrays["features"] = ((features,), "float16")
    attributes = {"slide": {"size": list(size), "mpp": [mpp, mpp]}, "model_sha256": "f" * 64}
    store = PatchStore.create(folder / "store.zarr", grid, arrays, attributes=attributes)
    lost = np.isin(np.arange(len(grid)), unreadable)
    store.put("unreadable", lost)
    store.put("probabilities", np.where(lost[:, None], np.nan, np.stack([1 - red, red], axis=1)).astype(np.float32))
    attention = np.random.default_rng(0).dirichlet(np.ones(len(grid))).astype(np.float32)
    store.put("attention", np.where(lost, np.nan, attention).astype(np.float32))
    if features:
        values = np.random.default_rng(1).normal(size=(len(grid), features)).astype(np.float16)
        store.put("features", np.where(lost[:, None], np.nan, values).astype(np.float16))
    tissue = Region(
        shapely.box(*bounds[:2], bounds.x + bounds.w / 2, bounds.y + bounds.h), PathClass("Tissue", (1, 2, 3))
    )
    write_regions(folder / "regions.geojson", [tissue], bounds=bounds, slide_id=slide_id)
    numbers = {
        "slide_id": slide_id,
        "slide": f"/slides/{slide_id}.tif",
        "grade": "tumour",
        "probabilities": {"no tumour": 0.25, "tumour": 0.75},
        "size_px": list(size),
        "bounds_px": list(bounds),
        "mpp": mpp,
        "class_names": list(CLASSES),
        "positive_classes": ["tumour"],
        "threshold": 0.5,
        "tissue_mm2": 1.0,
        "vendor": "generic-tiff",
        "provenance": {"wsi": "0", "model": "red", "model_sha256": "f" * 64},
    }
    (folder / "result.json").write_text(json.dumps(numbers))
    (folder / "seconds.json").write_text("{}")
    (results / "run.json").write_text("{}")
    return Marked(mark, grid, bounds, size, mpp)
