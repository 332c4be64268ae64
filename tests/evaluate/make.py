"""Results folders as `wsi score` leaves them, without a slide and without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from wsi.grid import TileGrid
from wsi.heatmap import Heatmap, major_axis_um
from wsi.store import PatchStore
from wsi.units import Box, Mpp


def scored(
    results: Path,
    slide_id: str,
    values: np.ndarray,
    *,
    tile: int = 256,
    mpp: float = 0.243,
    mil: float | None = None,
    threshold: float = 0.5,
    origin: tuple[int, int] = (0, 0),
) -> Heatmap:
    """Write a slide's results: `values` (rows, columns) are probabilities, NaN where no tile is."""
    rows, columns = values.shape
    size = columns * tile, rows * tile
    grid = TileGrid.cover(size, slide_mpp=Mpp(mpp, mpp), mpp=mpp, tile_px=tile)
    there = ~np.isnan(values.ravel())
    grid, p = grid.keep(there), values.ravel()[there].astype(np.float32)
    folder = results / slide_id
    folder.mkdir(parents=True)
    (results / "run.json").write_text("{}")
    store = PatchStore.create(folder / "store.zarr", grid, {"probabilities": ((2,), "float32")})
    if len(grid):
        store.put("probabilities", np.stack([1 - p, p], axis=1))
    heatmap = Heatmap(grid, p)
    bounds = Box(*origin, size[0] - origin[0], size[1] - origin[1])
    regions = heatmap.regions(threshold, bounds) if len(grid) else []
    numbers = {
        "slide_id": slide_id,
        "size_px": size,
        "bounds_px": list(bounds),
        "mpp": mpp,
        "class_names": ["benign", "tumour"],
        "positive_classes": ["tumour"],
        "positive_probability": mil,
        "threshold": threshold,
        "n_tiles": len(grid),
        "tissue_mm2": len(grid) * (tile * mpp / 1000) ** 2,
        "positive_mm2": sum(region.area for region in regions) * (mpp / 1000) ** 2,
        "largest_region_um": max((major_axis_um(r, Mpp(mpp, mpp)) for r in regions), default=None),
        "reasons": {},
    }
    (folder / "result.json").write_text(json.dumps(numbers))
    return heatmap
