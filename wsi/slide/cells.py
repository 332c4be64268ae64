"""Cells: the areas of output pixels on a pyramid level, and resampling by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from wsi import native

U8 = npt.NDArray[np.uint8]

#: One pixel in the fixed-point units of cell edges.
ONE_PX = 1 << native.FIXED_POINT_BITS


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of n output pixels along one axis of a level, which the decoder may have reduced."""

    edges: npt.NDArray[np.int64]  # (n + 1,), in 1/4096 px from `first` on
    first: int  # the level pixels covered: [first, last)
    last: int
    shrink: int  # by how much the decoder reduces the level: 1, 2, 4 or 8; pixels are those of the reduced level
    are_pixels: bool  # every cell is exactly one pixel of the level

    @classmethod
    def of(cls, edges: npt.NDArray[np.int64], shrink: int = 1) -> Self:
        """Make cells from edges counted from the level's border."""
        first, last = int(edges[0]) // ONE_PX, -(int(edges[-1]) // -ONE_PX)
        are_pixels = len(edges) == last - first + 1 and bool((np.diff(edges) == ONE_PX).all())
        return cls(edges - first * ONE_PX, first, last, shrink, are_pixels)


def cell_edges(start: float | npt.NDArray[np.floating], length: float, n: int, scale: float) -> npt.NDArray[np.int64]:
    """Return the edges of `n` equal cells over [start, start + length) level-0 px, in 1/4096 px of a level.

    `scale` is the level's pixels per level-0 pixel. Of starts (m, 1) the edges are (m, n + 1).
    """
    position = (start + np.arange(n + 1) * (length / n)) * (scale * ONE_PX)
    edges: npt.NDArray[np.int64] = np.rint(position).astype(np.int64)
    if (np.diff(edges) < 1).any():
        raise ValueError(f"cannot enlarge {length:g} level-0 px to {n} px")
    if (np.diff(edges) > native.MAX_CELL_PX * ONE_PX).any():
        most = f"more than {native.MAX_CELL_PX}-fold for a level"
        raise ValueError(f"cannot reduce {length:g} level-0 px to {n} px: {most}")
    return edges


def shrunk(edges: npt.NDArray[np.int64], shrink: int) -> Cells:
    """Return the cells with these edges on the level reduced by `shrink`."""
    return Cells.of((edges + shrink // 2) // shrink, shrink)


def part_of(cells: Cells, run: slice) -> Cells:
    """Return the cells `run`."""
    if run.stop - run.start == len(cells.edges) - 1:
        return cells
    return Cells.of(cells.edges[run.start : run.stop + 1] + cells.first * ONE_PX, cells.shrink)


def blocks_of(cells: Cells, max_px: int) -> list[slice]:
    """Divide cells into runs that each span about `max_px` level pixels at most, but at least one cell."""
    n = len(cells.edges) - 1
    per_run = max(1, n * max_px // max(1, cells.last - cells.first))
    return [slice(start, min(start + per_run, n)) for start in range(0, n, per_run)]


def resample(source: U8, x: Cells, y: Cells, out: U8) -> None:
    """Fill output pixels from the level's pixels, which begin at ``(x.first, y.first)``."""
    if x.are_pixels and y.are_pixels:
        out[...] = source
    else:
        native.area_average(source, y.edges, x.edges, out)


def put(tile: U8, tile_x: int, tile_y: int, region: U8, x: int, y: int) -> None:
    """Copy the intersection of a tile at (tile_x, tile_y) and a region at (x, y) into the region."""
    left, top = max(x, tile_x), max(y, tile_y)
    right, bottom = min(x + region.shape[1], tile_x + tile.shape[1]), min(y + region.shape[0], tile_y + tile.shape[0])
    region[top - y : bottom - y, left - x : right - x] = tile[
        top - tile_y : bottom - tile_y, left - tile_x : right - tile_x
    ]
