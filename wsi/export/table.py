"""A slide's tiles with what the layouts of other programs need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.scored import ScoredSlide, ScoredTiles
from wsi.units import Mpp


@dataclass(frozen=True, eq=False)
class TileTable:
    """A slide's tiles; attributes that are unknown are None.

    Attributes
    ----------
    name : str
        Slide id or pseudonym.
    features : (n, d)
    corners : float64 (n, 2)
        Level-0 pixels, not rounded.
    positions : int64 or float64 (n, 2)
        Column and row on the lattice; fractional if there is no common lattice.
    tile, stride : (float, float)
        Level-0 pixels.
    tile_px : int
        Side of a tile in pixels at the resolution it was cut at.
    tile_mpp : float
        Microns per pixel at that resolution.
    mpp : Mpp
        Microns per level-0 pixel.
    size : (int, int)
        The slide's, in level-0 pixels.
    encoder : str
        As a folder name, see ``folder_name``.
    scored : (ScoredSlide, ScoredTiles)
        The scores.
    """

    name: str
    features: npt.NDArray[Any] | None
    corners: npt.NDArray[np.float64]
    positions: npt.NDArray[Any]
    tile: tuple[float, float]
    stride: tuple[float, float] | None = None
    tile_px: int | None = None
    tile_mpp: float | None = None
    mpp: Mpp | None = None
    size: tuple[int, int] | None = None
    encoder: str | None = None
    scored: tuple[ScoredSlide, ScoredTiles] | None = None

    @property
    def corners_px(self) -> npt.NDArray[np.int64]:
        return np.rint(self.corners).astype(np.int64)

    @property
    def side(self) -> int:
        """A tile's side in whole level-0 pixels."""
        return round(self.tile[0])

    @property
    def overlap_px(self) -> int:
        """Pixels that neighbouring tiles share, as TRIDENT counts: negative if there is a gap."""
        assert self.stride is not None and self.tile_px is not None
        return round(self.tile_px * (1 - self.stride[0] / self.tile[0]))
