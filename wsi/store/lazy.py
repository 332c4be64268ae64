"""A store's patches as a dask array, and the slide that they were cut from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi.errors import StoreError
from wsi.grid import TileGrid
from wsi.slide import Slide, open_slide
from wsi.store.pixels import U8
from wsi.units import Box

if TYPE_CHECKING:
    import dask.array

    from wsi.store.patches import PatchStore


def lazy_patches(store: PatchStore, slide: Slide | None = None) -> dask.array.Array:
    """See ``PatchStore.dask``."""
    import dask.array

    side = store.grid.tile_px
    if store.pixels != "none":
        load: Callable[[range], U8] = store.read
    elif slide is not None:
        load = _cutter(slide, store.grid)
    else:
        with slide_of(store) as found:
            load = _cutter(found, store.grid)

    def chunk(block_info: Any = None) -> U8:
        return load(range(*block_info[None]["array-location"][0]))

    chunks = (tuple(len(store.tiles(shard)) for shard in store.shards) or (0,), (side,), (side,), (3,))
    meta = np.empty((0, 0, 0, 0), np.uint8)
    lazy: dask.array.Array = dask.array.map_blocks(chunk, chunks=chunks, dtype=np.uint8, meta=meta)
    return lazy


def _cutter(slide: Slide, grid: TileGrid) -> Callable[[range], U8]:
    """Return a function that cuts tiles from a slide; it opens the slide itself, in whatever process it is called."""
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


def slide_of(store: PatchStore, path: str | None = None) -> Slide:
    """Open the slide that a store's patches were cut from, with the same reader and resolution.

    `path` is where the slide is now, if it has moved. Raises StoreError if the store names no slide or the slide there
    has another size, and SlideError.
    """
    path, facts = path or store.attributes.get("slide_path"), store.attributes.get("slide")
    if path is None or facts is None:
        raise StoreError(store.path, "keeps no pixels and names no slide", "Make it with wsi tile")
    slide = open_slide(path, facts["reader"], mpp=facts["mpp"][0], decode=facts["decode"])
    if list(slide.size) != facts["size"]:
        slide.close()
        raise StoreError(store.path, f"is of a slide of {facts['size']}, and {path} has {list(slide.size)}")
    return slide
