"""Where output pixels lie on a level, and how they are made of the level's pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from wsi import native

U8 = npt.NDArray[np.uint8]

#: Edges of cells are counted in this part of a pixel.
ONE_PX = 1 << native.FIXED_POINT_BITS


@dataclass(frozen=True, slots=True)
class Cells:
    """Where the pixels of one side of a read lie on a level, as the decoder gives it.

    Attributes
    ----------
    edges : int64 (n + 1,)
        Edges of the output pixels in 1/4096 px, from `first` on.
    first, last : int
        The level's pixels from and up to which they reach.
    shrink : int
        By how much the decoder reduces the level while decoding it: 1, 2, 4 or 8. Pixels are of the reduced level.
    are_pixels : bool
        Every output pixel is one pixel of the level.
    """

    edges: npt.NDArray[np.int64]
    first: int
    last: int
    shrink: int
    are_pixels: bool

    @classmethod
    def of(cls, edges: npt.NDArray[np.int64], shrink: int = 1) -> Self:
        """Take edges counted from the level's border."""
        first, last = int(edges[0]) // ONE_PX, -(int(edges[-1]) // -ONE_PX)
        are_pixels = len(edges) == last - first + 1 and bool((np.diff(edges) == ONE_PX).all())
        return cls(edges - first * ONE_PX, first, last, shrink, are_pixels)


def cell_edges(start: float | npt.NDArray[np.floating], length: float, n: int, scale: float) -> npt.NDArray[np.int64]:
    """Edges of `n` equal cells over [start, start + length) level-0 px, in 1/4096 px of a level."""
    position = (start + np.arange(n + 1) * (length / n)) * (scale * ONE_PX)
    edges: npt.NDArray[np.int64] = np.rint(position).astype(np.int64)
    if (np.diff(edges) < 1).any():
        raise ValueError(f"cannot enlarge {length:g} level-0 px to {n} px")
    if (np.diff(edges) > native.MAX_CELL_PX * ONE_PX).any():
        raise ValueError(
            f"cannot reduce {length:g} level-0 px to {n} px: more than {native.MAX_CELL_PX}-fold for a level"
        )
    return edges


def shrunk(edges: npt.NDArray[np.int64], shrink: int) -> Cells:
    """Find the same edges on the reduced level."""
    return Cells.of((edges + shrink // 2) // shrink, shrink)


def part_of(cells: Cells, run: slice) -> Cells:
    """Take the cells of a run."""
    if run.stop - run.start == len(cells.edges) - 1:
        return cells
    return Cells.of(cells.edges[run.start : run.stop + 1] + cells.first * ONE_PX, cells.shrink)


def blocks_of(cells: Cells, max_px: int) -> list[slice]:
    """Cut cells into runs that span at most about `max_px` source pixels (one cell at least)."""
    n = len(cells.edges) - 1
    per_run = max(1, n * max_px // max(1, cells.last - cells.first))
    return [slice(start, min(start + per_run, n)) for start in range(0, n, per_run)]


def resample(source: U8, x: Cells, y: Cells, out: U8) -> None:
    """Make output pixels of the level's pixels from ``(x.first, y.first)`` on."""
    if x.are_pixels and y.are_pixels:
        out[...] = source
    else:
        native.area_average(source, y.edges, x.edges, out)


def put(tile: U8, tile_x: int, tile_y: int, region: U8, x: int, y: int) -> None:
    """Copy what a tile that lies at (tile_x, tile_y) has of a region that lies at (x, y)."""
    left, top = max(x, tile_x), max(y, tile_y)
    right, bottom = min(x + region.shape[1], tile_x + tile.shape[1]), min(y + region.shape[0], tile_y + tile.shape[0])
    region[top - y : bottom - y, left - x : right - x] = tile[
        top - tile_y : bottom - tile_y, left - tile_x : right - tile_x
    ]
