"""NumPy twins of the native kernels: slow, literal, and the specification of every build."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Cell edges are given in 1/4096 of a source pixel, so that every sum below is an exact integer.
FIXED_POINT_BITS = 12

#: A cell spans at most so many source pixels, for sums to stay exact.
MAX_CELL_PX = 1024


def area_average(
    source: npt.NDArray[np.uint8],
    edges_y: npt.NDArray[np.int64],
    edges_x: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint8],
) -> None:
    """Average `source` over the cells of a grid, each pixel weighted by the area the cell covers.

    Parameters
    ----------
    source : uint8 (h, w, 3)
    edges_y : int64 (out_h + 1,)
        Strictly increasing cell edges in 1/4096 source pixel, within [0, 4096 * h]; a cell spans at most
        1024 pixels.
    edges_x : int64 (out_w + 1,)
        Likewise along x, within [0, 4096 * w].
    out : uint8 (out_h, out_w, 3)
        Written in place: ``floor(sum(area * value) / cell_area + 1/2)``.

    Notes
    -----
    Coverages are integers and all sums stay below 2**52, so float64 holds them exactly and neither
    the order of summation nor the instruction set can change a bit.

    Examples
    --------
    >>> source = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    >>> out = np.empty((1, 1, 3), np.uint8)
    >>> area_average(source, np.array([0, 4096]), np.array([2048, 8192]), out)
    >>> out.tolist()
    [[[170, 170, 170]]]
    """
    height, width, _ = source.shape
    cover_y = _coverage(edges_y, height)  # (out_h, h)
    cover_x = _coverage(edges_x, width)  # (out_w, w)
    sums = np.einsum("yhc,xh->yxc", np.tensordot(cover_y, source.astype(np.float64), (1, 0)), cover_x, optimize=True)
    cell = np.diff(edges_y)[:, None].astype(np.float64) * np.diff(edges_x)[None, :]
    out[...] = np.floor(sums * (1.0 / cell)[..., None] + 0.5)


def _coverage(edges: npt.NDArray[np.int64], n_px: int) -> npt.NDArray[np.float64]:
    """Length of each source pixel within each cell, float64 (cells, n_px), in 1/4096 px."""
    start = np.arange(n_px, dtype=np.int64) << FIXED_POINT_BITS
    overlap = np.minimum(edges[1:, None], start + (1 << FIXED_POINT_BITS)) - np.maximum(edges[:-1, None], start)
    return np.asarray(np.maximum(overlap, 0), np.float64)
