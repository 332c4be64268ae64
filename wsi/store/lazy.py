"""A store's patches as a dask array."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from wsi.grid import TileGrid
from wsi.store.origin import slide_of
from wsi.store.pixels import U8
from wsi.units import Box

if TYPE_CHECKING:
    from wsi.slide import Slide
    from wsi.store.patches import PatchStore


def lazy_patches(store: PatchStore, slide: Slide | None = None) -> da.Array:
    """See ``PatchStore.dask``."""
    side = store.grid.tile_px
    load = store.read if store.pixels != "none" else _cutter(slide or _closed(slide_of(store)), store.grid)

    def chunk(block_info: Any = None) -> U8:
        return load(range(*block_info[None]["array-location"][0]))

    chunks = (tuple(len(store.tiles(shard)) for shard in store.shards) or (0,), (side,), (side,), (3,))
    lazy: da.Array = da.map_blocks(chunk, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0, 0), np.uint8))
    return lazy


def _cutter(slide: Slide, grid: TileGrid) -> Callable[[range], U8]:
    """Return what cuts tiles from a slide, which it opens by its path, in whatever process that happens."""
    (reopen, arguments), boxes, side = slide.__reduce__(), grid.boxes(), grid.tile_px

    def cut(tiles: range) -> U8:
        out = np.empty((len(tiles), side, side, 3), np.uint8)
        with reopen(*arguments) as opened:
            for box, patch in zip(boxes[tiles.start : tiles.stop].tolist(), out, strict=True):
                damage: list[Box] = []
                opened.read(Box(*box), (side, side), patch, damage=damage)
                if damage:
                    patch[...] = 255
        return out

    return cut


def _closed(slide: Slide) -> Slide:
    """Close a slide: what opens it again is all that is wanted of it."""
    with slide:
        return slide
