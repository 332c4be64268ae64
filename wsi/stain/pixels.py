"""Selection of the pixels that are measured, from images and from a whole slide."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import StainError
from wsi.grid import TileGrid
from wsi.slide.base import U8, Slide
from wsi.stain.config import FitConfig
from wsi.stain.statistics import F64, MIN_FRACTION, MIN_PIXELS, Unmeasurable
from wsi.tissue import TissueMask, find_tissue

#: Maximum number of pixels measured: more take time and change only the fourth digit.
MAX_PIXELS = 1_000_000
#: Threads that read a slide's sample; the result does not depend on their number.
READERS = 4


def checked(rgb: Any, where: str = "rgb") -> U8:
    """Return `rgb` if it is uint8 (..., 3) and not empty; else raise StainError. Only the dtype counts, not the values.

    Examples
    --------
    >>> checked(np.zeros((2, 2, 3), np.uint16))
    Traceback (most recent call last):
    wsi.errors.StainError: rgb: holds uint16. Give 8-bit RGB: uint8 of shape (..., 3)
    """
    remedy = "Give 8-bit RGB: uint8 of shape (..., 3)"
    if not isinstance(rgb, np.ndarray):
        raise StainError(where, f"is {type(rgb).__name__}, not an array", remedy)
    if rgb.dtype != np.uint8:
        raise StainError(where, f"holds {rgb.dtype}", remedy)
    if rgb.ndim < 2 or rgb.shape[-1] != 3:
        kind = "has four channels" if rgb.ndim > 2 and rgb.shape[-1] == 4 else "is grey or not an image"
        raise StainError(where, f"{kind}: its shape is {rgb.shape}", remedy)
    if rgb.size == 0:
        raise StainError(where, f"holds no pixel: its shape is {rgb.shape}", "Give at least one")
    return rgb


def sample_slide(slide: Slide, config: FitConfig, tissue: TissueMask | None = None) -> U8:
    """Read tiles evenly spaced over a slide's tissue, uint8 (n, tile_px, tile_px, 3).

    Deterministic: every k-th, in reading order, of all tiles that are at least half tissue (else of those with any).
    Raises Unmeasurable where there is no tissue.
    """
    tissue = tissue or find_tissue(slide)
    # Slightly less than the slide, so that rounding never makes a tile larger than it.
    sides_um = [side * mpp * (1 - 1e-9) for side, mpp in zip(slide.size, slide.mpp, strict=True)]
    mpp = min(max(config.mpp, *slide.mpp), *sides_um)
    tile_px = max(1, min(config.tile_px, *(int(side / mpp) for side in sides_um)))
    grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=mpp, tile_px=tile_px)
    fraction = tissue.fraction(grid.boxes())
    rows = np.flatnonzero(fraction >= 0.5)
    rows = rows if rows.size else np.flatnonzero(fraction > 0)
    if rows.size == 0:
        raise Unmeasurable("blank", slide.path)
    return read_tiles(slide, grid, rows[evenly(len(rows), config.n_tiles)])


def evenly(n: int, at_most: int) -> npt.NDArray[np.int64]:
    """Return the indices of at most `at_most` of n items, evenly spaced.

    Examples
    --------
    >>> evenly(10, 4).tolist(), evenly(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)


def read_tiles(slide: Slide, grid: TileGrid, rows: npt.NDArray[np.int64]) -> U8:
    """Read tiles of a grid in parallel, uint8 (m, tile_px, tile_px, 3); damaged areas are white."""
    side = grid.tile_px
    tiles = np.empty((len(rows), side, side, 3), np.uint8)

    def read(tile: U8, row: int) -> None:
        slide.read(grid.box(row), (side, side), out=tile, damage=[])

    with ThreadPoolExecutor(READERS, thread_name_prefix="wsi-stain") as pool:  # reading takes most of a fit's time
        for _ in pool.map(read, tiles, rows.tolist()):
            pass
    return tiles


def tissue_pixels(rgb: U8, brightest: int) -> U8:
    """Return the pixels without a channel above `brightest`, thinned to ``MAX_PIXELS``.

    Raises Unmeasurable for fewer than ``MIN_PIXELS``, or a smaller share than ``MIN_FRACTION``.

    Examples
    --------
    >>> rgb = np.full((1000, 3), 255, np.uint8)
    >>> rgb[:600, 1] = 100
    >>> rgb[:550] -= 50
    >>> len(tissue_pixels(rgb, 230))
    550
    """
    rgb = rgb.reshape(-1, 3)
    # Channel by channel: reductions along an axis of length 3 are ten times slower.
    rows = np.flatnonzero(np.maximum(np.maximum(rgb[:, 0], rgb[:, 1]), rgb[:, 2]) <= brightest)
    if rows.size == 0:
        raise Unmeasurable("blank")
    if rows.size < max(MIN_PIXELS, MIN_FRACTION * len(rgb)):
        raise Unmeasurable("few-pixels")
    return np.asarray(rgb[thinned(rows, MAX_PIXELS)])


def thinned(values: npt.NDArray[Any], at_most: int) -> npt.NDArray[Any]:
    """Return every k-th of `values`, with the smallest k that leaves at most `at_most`."""
    return values[:: max(1, -(-len(values) // at_most))]


def density_table(io: float, *, clamp: bool) -> F64:
    """Optical density of each byte, float64 (256,): ``-ln((I + 1) / io)``; negative values are 0 if `clamp`.

    Examples
    --------
    >>> density_table(256.0, clamp=True)[[255, 0]].round(3).tolist()
    [0.0, 5.545]
    """
    density: F64 = -np.log((np.arange(256) + 1.0) / io)
    return np.asarray(np.maximum(density, 0.0)) if clamp else density


def tissue_density(rgb: U8, config: FitConfig) -> F64:
    """Optical density of tissue pixels, float64 (3, n); each channel is contiguous, which is fast in NumPy.

    Tissue is where every channel's density is at least beta. Raises Unmeasurable for too little tissue.
    """
    brightest = int(np.count_nonzero(density_table(config.io, clamp=False) >= config.beta)) - 1
    return density_of(tissue_pixels(rgb, brightest), config)


def density_of(rgb: U8, config: FitConfig) -> F64:
    """Optical density of pixels uint8 (..., 3), float64 (3, n)."""
    table = density_table(config.io, clamp=not config.published)
    return table[np.ascontiguousarray(rgb.reshape(-1, 3).T)]
