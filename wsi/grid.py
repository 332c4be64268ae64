"""Positions of tiles on a slide: pure geometry, no pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import shapely

from wsi.errors import GridError
from wsi.units import Box, Mpp

#: `TileGrid.covered` stops halving a group of tiles at this size.
_FEW_TILES = 8


@dataclass(frozen=True, slots=True, eq=False)
class TileGrid:
    """Tiles of one size at one resolution, on a regular lattice over a slide.

    Attributes
    ----------
    columns, rows : int32 (n,)
        Position of each tile on the lattice; row by row, then column by column.
    tile : (float, float)
        Width and height of a tile in level-0 pixels; fractional.
    stride : (float, float)
        Distance between tiles in level-0 pixels; fractional.
    tile_px : int
        Side of a tile's patch in pixels at `mpp`.
    mpp : float
        Microns per pixel of the patches.
    """

    columns: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    tile: tuple[float, float]
    stride: tuple[float, float]
    tile_px: int
    mpp: float

    @classmethod
    def cover(
        cls, size: tuple[int, int], *, slide_mpp: Mpp, mpp: float, tile_px: int, stride_px: int | None = None
    ) -> Self:
        """Lay tiles over a whole slide; those at the right and bottom edge may reach outside.

        Parameters
        ----------
        size : (int, int)
            Slide width and height in level-0 pixels.
        slide_mpp : Mpp
            Microns per level-0 pixel.
        mpp : float
            Microns per pixel of the patches.
        tile_px : int
            Side of a patch in pixels.
        stride_px : int, optional
            Distance between patches in pixels at `mpp`; default `tile_px`. Smaller: tiles overlap; larger: gaps.

        Raises
        ------
        GridError
            A size, stride or resolution is not positive, or the tile is larger than the slide.

        Examples
        --------
        >>> grid = TileGrid.cover((1000, 600), slide_mpp=Mpp(0.5, 0.5), mpp=1.0, tile_px=100)
        >>> len(grid), grid.box(1)
        (15, Box(x=200.0, y=0.0, w=200.0, h=200.0))
        """
        if not (math.isfinite(mpp) and mpp > 0):
            raise GridError(f"mpp={mpp:g}", "the resolution must be positive microns per pixel")
        return cls._lay(size, (mpp / slide_mpp.x, mpp / slide_mpp.y), mpp, tile_px, stride_px)

    @classmethod
    def of_level(
        cls, size: tuple[int, int], level_size: tuple[int, int], *, slide_mpp: Mpp, tile_px: int,
        stride_px: int | None = None,
    ) -> Self:  # fmt: skip
        """Lay tiles over a slide at exactly the resolution of a pyramid level, so that no pixel is resampled.

        Parameters
        ----------
        level_size : (int, int)
            The level's width and height in its own pixels; `tile_px` and `stride_px` are in these.
        size, slide_mpp, tile_px, stride_px
            As in ``cover``.

        Raises
        ------
        GridError
            As in ``cover``.

        Examples
        --------
        >>> grid = TileGrid.of_level((1001, 600), (500, 300), slide_mpp=Mpp(0.5, 0.5), tile_px=100)
        >>> len(grid), round(grid.mpp, 4), grid.box(1).x
        (15, 1.0005, 200.2)
        """
        scale = size[0] / level_size[0], size[1] / level_size[1]
        mpp = math.sqrt(scale[0] * slide_mpp.x * scale[1] * slide_mpp.y)
        return cls._lay(size, scale, mpp, tile_px, stride_px)

    @classmethod
    def _lay(
        cls, size: tuple[int, int], scale: tuple[float, float], mpp: float, tile_px: int, stride_px: int | None
    ) -> Self:
        """Lay tiles whose pixels are `scale` level-0 pixels wide and high."""
        stride_px = tile_px if stride_px is None else stride_px
        if tile_px < 1:
            raise GridError(f"tile={tile_px}", "a tile must be at least 1 px wide")
        if stride_px < 1:
            remedy = "Leave it out for tiles side by side"
            raise GridError(f"stride={stride_px}", "the stride must be at least 1 px", remedy)
        tile = tile_px * scale[0], tile_px * scale[1]
        stride = stride_px * scale[0], stride_px * scale[1]
        # Rounded before comparing: float error must neither refuse a slide of one tile nor add a column.
        if round(tile[0] - size[0], 6) > 0 or round(tile[1] - size[1], 6) > 0:
            raise GridError(
                f"slide of {size[0]} x {size[1]} px",
                f"is smaller than one tile of {tile_px} px at {mpp:g} mpp ({tile[0]:.1f} x {tile[1]:.1f} level-0 px)",
                "Use a smaller tile, or check the slide's microns per pixel",
            )
        # The last tile is the first that reaches the edge; with gaps, the last that starts inside.
        n_columns, n_rows = (
            min(1 + math.ceil(round((size[i] - tile[i]) / stride[i], 6)), math.ceil(round(size[i] / stride[i], 6)))
            for i in (0, 1)
        )
        rows, columns = np.divmod(np.arange(n_rows * n_columns, dtype=np.int64), n_columns)
        return cls(columns.astype(np.int32), rows.astype(np.int32), tile, stride, tile_px, mpp)

    def __len__(self) -> int:
        return len(self.columns)

    def box(self, i: int) -> Box:
        """Return tile `i` in level-0 pixels."""
        return Box(float(self.columns[i]) * self.stride[0], float(self.rows[i]) * self.stride[1], *self.tile)

    def boxes(self) -> npt.NDArray[np.float64]:
        """Return all tiles, float64 (n, 4): x, y, w, h in level-0 pixels."""
        out = np.empty((len(self), 4), np.float64)
        out[:, 0], out[:, 1] = self.columns * self.stride[0], self.rows * self.stride[1]
        out[:, 2:] = self.tile
        return out

    def polygons(self) -> npt.NDArray[np.object_]:
        """Return all tiles as shapely boxes in level-0 pixels."""
        x, y, w, h = self.boxes().T
        return np.asarray(shapely.box(x, y, x + w, y + h))

    def inside(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return which tiles lie entirely inside a slide of `size`, bool (n,)."""
        boxes = self.boxes()
        return np.asarray((np.round(boxes[:, :2] + boxes[:, 2:] - size, 6) <= 0).all(axis=1))

    def covered(self, area: shapely.Geometry) -> npt.NDArray[np.float64]:
        """Return the fraction of each tile that an area covers, float64 (n,).

        Tiles are halved recursively and the area is clipped to each half: intersecting every tile with the whole area
        takes hours for outlines of 200,000 points.

        Parameters
        ----------
        area : shapely.Geometry
            Valid, in level-0 pixels. Points and lines cover nothing.

        Examples
        --------
        >>> grid = TileGrid.cover((40, 10), slide_mpp=Mpp(1, 1), mpp=1, tile_px=10)
        >>> grid.covered(shapely.box(5, 0, 22.5, 10)).tolist()
        [0.5, 1.0, 0.25, 0.0]
        """
        boxes, share = self.boxes(), np.zeros(len(self))
        boxes[:, 2:] += boxes[:, :2]
        waiting = [(np.arange(len(self)), area)] if len(self) else []
        while waiting:
            rows, around = waiting.pop()
            reach = np.concatenate([boxes[rows, :2].min(axis=0), boxes[rows, 2:].max(axis=0)])
            parts = shapely.get_parts(shapely.intersection(around, shapely.box(*reach)))
            near = shapely.multipolygons(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])
            if near.is_empty:
                continue
            if len(rows) <= _FEW_TILES:
                share[rows] = shapely.area(shapely.intersection(shapely.box(*boxes[rows].T), near))
                continue
            along = int(np.argmax(reach[2:] - reach[:2]))
            rows = rows[np.argsort(boxes[rows, along], kind="stable")]
            waiting += [(half, near) for half in np.array_split(rows, 2)]
        return np.asarray(share / (self.tile[0] * self.tile[1]))

    def keep(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.integer]) -> Self:
        """Return the grid of the chosen tiles (a mask or indices) only."""
        return type(self)(self.columns[chosen], self.rows[chosen], self.tile, self.stride, self.tile_px, self.mpp)
