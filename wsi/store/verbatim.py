"""Copy the slide's own JPEG tiles as patches, without decoding and without loss.

Each patch of the grid must be exactly one stored tile, as in grids of ``TileGrid.of_level``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.errors import GridError, SlideUnreadable, StoreError
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.store.codec import encode_jpeg
from wsi.store.patches import PatchStore
from wsi.store.pixels import U8

I64 = npt.NDArray[np.int64]

_REMEDY = "Keep pixels as jpeg or zstd, or lay the grid on the slide's own tiles (wsi tile --pixels verbatim)"


def stored_tiles(slide: Slide, grid: TileGrid) -> tuple[int, I64, I64]:
    """Return the stored tiles that equal a grid's n patches, pixel for pixel: level, columns (n,) and rows (n,).

    Raises GridError if the reader has no JPEG tiles at that level, if they have another size or position than the
    patches, or if a patch reaches over the slide's edge (where stored tiles are padded and patches are white).
    """
    level = slide.level_for(min(grid.tile) / grid.tile_px)
    side = slide.tile_px(level)
    asked = f"patches of {grid.tile_px} px at {grid.mpp:.4g} microns per pixel"
    if side is None or not slide.holds_jpeg(level):
        what = f"level {level} holds no JPEG tiles that the {slide.reader} reader can copy"
        raise GridError(slide.path, what, "Keep pixels as jpeg or zstd, or read it with another --reader")
    if side != (grid.tile_px, grid.tile_px):
        raise GridError(slide.path, f"{asked} are not its tiles of {side[0]} x {side[1]} px at level {level}", _REMEDY)
    boxes = grid.boxes()
    tiles = np.empty((len(grid), 2), np.int64)
    for axis, per_px in zip((0, 1), slide.scale(level), strict=True):
        # In 1/4096 px of the level, rounded as by Slide.read.
        scale = per_px * (1 << native.FIXED_POINT_BITS)
        whole = grid.tile_px << native.FIXED_POINT_BITS
        starts = np.rint(boxes[:, axis] * scale).astype(np.int64)
        stops = np.rint((boxes[:, axis] + boxes[:, axis + 2]) * scale).astype(np.int64)
        if (starts % whole).any() or (stops - starts != whole).any():
            raise GridError(slide.path, f"{asked} do not lie on its own tiles at level {level}", _REMEDY)
        tiles[:, axis] = starts // whole
    outside = int(((tiles < 0) | ((tiles + 1) * grid.tile_px > slide.level_sizes[level])).any(axis=1).sum())
    if outside:
        what = f"{outside} of {len(grid)} patches reach over the slide's edge, where stored tiles are padded"
        raise GridError(slide.path, what, _REMEDY)
    return level, tiles[:, 0], tiles[:, 1]


def copy_tiles(
    slide: Slide, store: PatchStore, *, threads: int = 1, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Fill the missing pixels of a store that was created with ``pixels="verbatim"`` for a grid of this slide.

    A tile that the slide omits as glass becomes white. One that is cut short is marked in ``unreadable`` and reads as
    white. Other damage shows only when a tile is decoded. `progress` is called with the number of tiles done so far.
    Raises GridError (see ``stored_tiles``), StoreError if the store keeps its pixels in another way, and OSError.
    """
    if store.pixels != "verbatim":
        raise StoreError(store.path, f"keeps its pixels as {store.pixels}", 'Make it with pixels="verbatim"')
    level, columns, rows = stored_tiles(slide, store.grid)
    side = store.grid.tile_px
    white = encode_jpeg(np.full((side, side, 3), 255, np.uint8), quality=100)
    missing = store.missing("pixels")
    done = len(store) - sum(len(store.tiles(shard)) for shard in missing)

    def copy(shard: int) -> int:
        tiles = store.tiles(shard)
        part = slice(tiles.start, tiles.stop)
        streams = slide.jpeg_tiles(level, list(zip(columns[part].tolist(), rows[part].tolist(), strict=True)))
        holes = [i for i, stream in enumerate(streams) if stream is None]
        if holes:
            unreadable = np.zeros(len(tiles), bool)
            for i in holes:
                if _is_white(slide, store.grid, tiles[i]):
                    streams[i] = white
                else:
                    unreadable[i] = True
            if unreadable.any():
                store.write(shard, {"unreadable": unreadable})
        store.keep(shard, streams)
        return len(tiles)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsi-copy")
    try:
        progress(done)
        for copied in pool.map(copy, missing):
            done += copied
            progress(done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_white(slide: Slide, grid: TileGrid, tile: int) -> bool:
    """Whether a tile without bytes is one that the slide omits, which reads as white."""
    try:
        patch: U8 = slide.read(grid.box(tile), (grid.tile_px, grid.tile_px))
    except SlideUnreadable:
        return False
    return bool((patch == 255).all())
