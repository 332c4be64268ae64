"""Smoothing of tile probabilities: each tile is informed by its neighbours, according to their distance.

Tumour forms regions, but a patch model sees one patch. Its log-odds are treated as noisy measurements of a field over
the slide whose correlation decreases exponentially with distance. A tile's new log-odds are the field's expected value
there, given all tiles of the slide. Where tiles are dense this acts as a filter over one or two tiles; where they are
sparse, farther ones count too. In geostatistics this is simple kriging (Matheron 1963), elsewhere Gaussian process
regression (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 2.25, with the kernel of
equation 4.18).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.special import expit, logit

from wsi.grid import TileGrid
from wsi.nn.checkpoint import Context

F64 = npt.NDArray[np.float64]

#: Probabilities are clipped to this distance from 0 and 1.
_LEAST = 1e-4
#: Relative error of the solution, far below float32's, and a number of steps that always suffices.
_TOLERANCE, _MAX_STEPS = 1e-8, 2_000


def in_context(probabilities: npt.NDArray[np.float32], grid: TileGrid, context: Context) -> npt.NDArray[np.float32]:
    """Smooth the probabilities of a slide's tiles.

    Parameters
    ----------
    probabilities : float32 (n, 2)
        Of each tile alone.
    grid : TileGrid
        The n tiles, in any part of the lattice.
    context : Context
        Of the model; fitted on validation slides.

    Returns
    -------
    float32 (n, 2)

    Notes ----- Exact to 1e-8, by conjugate gradients. The product with the correlation matrix is a convolution on the
    lattice (FFT). Each of some 50 to 200 steps costs n log n, in one thread, so that the same tiles give the same
    bytes.

    Examples
    --------
    A doubtful tile among positive ones:

    >>> from wsi.units import Mpp
    >>> grid = TileGrid.of_level((300, 300), (300, 300), slide_mpp=Mpp(1, 1), tile_px=100)
    >>> p = np.full(9, 0.9)
    >>> p[4] = 0.4
    >>> around = in_context(np.stack([1 - p, p], 1), grid, Context(1, range_um=800.0, nugget=1.0, mean=0.0))
    >>> around[4].round(2)
    array([0.18, 0.82], dtype=float32)
    """
    if not len(grid):
        return probabilities
    p = np.asarray(probabilities[:, context.column], np.float64).clip(_LEAST, 1 - _LEAST)
    expected = context.mean + _expected(logit(p) - context.mean, grid, context)
    found = expit(context.slope * expected + context.intercept)
    out = np.empty((len(p), 2), np.float32)
    out[:, context.column], out[:, 1 - context.column] = found, 1 - found
    return out


def _expected(values: F64, grid: TileGrid, context: Context) -> F64:
    """K (K + nugget I)^-1 values, K the correlations between tiles."""
    step_um = [grid.tile_px * grid.mpp * stride / tile for stride, tile in zip(grid.stride, grid.tile, strict=True)]
    columns, rows = grid.columns - grid.columns.min(), grid.rows - grid.rows.min()
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    padded = tuple(fft.next_fast_len(2 * side, real=True) for side in shape)
    y, x = (np.minimum(np.arange(side), side - np.arange(side)) for side in padded)
    correlation = np.exp(-np.hypot(y[:, None] * step_um[1], x[None] * step_um[0]) / context.range_um)
    spectrum = fft.rfft2(correlation, workers=1).real
    plane = np.zeros(padded)

    def correlated(weights: F64) -> F64:
        plane[rows, columns] = weights
        return np.asarray(fft.irfft2(fft.rfft2(plane, workers=1) * spectrum, padded, workers=1)[rows, columns])

    # Conjugate gradients (Hestenes and Stiefel 1952). NumPy's sums do not depend on the number of threads.
    weights, rest = np.zeros(len(values)), values.copy()
    direction, error = rest.copy(), (rest * rest).sum()
    enough = _TOLERANCE**2 * error
    for _ in range(_MAX_STEPS):
        if error <= enough:
            break
        product = correlated(direction) + context.nugget * direction
        step = error / (direction * product).sum()
        weights += step * direction
        rest -= step * product
        error, before = (rest * rest).sum(), error
        direction = rest + error / before * direction
    return values - context.nugget * weights  # K w = values - nugget w
