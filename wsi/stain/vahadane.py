"""Vahadane: the stains are two non-negative factors of optical density, with sparse amounts.

A. Vahadane et al., "Structure-preserving color normalization and sparse stain separation for histological images",
IEEE Trans Med Imaging 35 (2016) 1962-1971. Theirs learns a dictionary online from random batches. Ours descends on
all sampled pixels from Macenko's stains, so that the same pixels give the same stains.
"""

from __future__ import annotations

import numpy as np

from wsi.slide.base import U8
from wsi.stain import macenko
from wsi.stain.config import FitConfig
from wsi.stain.pixels import density_of, thinned, tissue_density
from wsi.stain.statistics import F64, Stains, Unmeasurable

#: Maximum number of pixels factored.
MAX_PIXELS = 50_000
_MAX_STEPS, _ENOUGH = 200, 1e-6


def measure(rgb: U8, config: FitConfig) -> Stains:
    """Measure two stains by sparse non-negative factorisation; parameters as in ``wsi.stain.macenko.measure``.

    Minimises ``1/2 |V - W H|^2 + sparsity * sum(H)`` over W >= 0 with unit columns and H >= 0 (their equation 4), by
    block descent with exact steps: the amounts of two stains have four cases, and each stain has a closed form. The
    objective never rises.

    Examples
    --------
    >>> amounts = np.random.default_rng(0).gamma(0.6, 0.6, (64, 64, 2))
    >>> tile = (255 * np.exp(-amounts @ [[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])).astype(np.uint8)
    >>> haematoxylin = np.array(measure(tile, FitConfig()).vectors[0])
    >>> bool(haematoxylin @ [0.65, 0.70, 0.29] > 0.995)  # the cosine of the angle between them
    True
    """
    density = tissue_density(rgb, config)
    seed, variances = macenko.directions(density, config.alpha)
    sample = np.ascontiguousarray(thinned(density.T, MAX_PIXELS).T)
    vectors = macenko.haematoxylin_first(factor(sample, seed, config.sparsity))
    if config.published:  # its own amounts, over all pixels
        amounts = sparse_amounts(density_of(rgb, config), vectors, config.sparsity)
        strength = np.percentile(amounts, macenko.FULL_STRENGTH, axis=1)
    else:
        strength = macenko.full_strength(vectors, density, rgb, config)
    return Stains.of(vectors, strength, density.shape[1], variances)


def factor(density: F64, seed: F64, sparsity: float) -> F64:
    """Descend from `seed` (2, 3) to the factors of `density` (3, n): non-negative unit vectors (2, 3).

    Raises Unmeasurable where there is only one stain.
    """
    stains = np.maximum(seed, 1e-6)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    total, before = float((density**2).sum()), np.inf
    for _ in range(_MAX_STEPS):
        amounts = sparse_amounts(density, stains, sparsity)
        seen, among = amounts @ density.T, amounts @ amounts.T  # (2, 3), (2, 2): the stains depend only on these
        if min(among[0, 0], among[1, 1]) <= 0:
            raise Unmeasurable("one-colour")
        for _ in range(10):
            for k in range(2):
                stain = np.maximum(seen[k] - among[k, 1 - k] * stains[1 - k], 0.0)
                length = np.linalg.norm(stain)
                if length > 0:  # else any direction is as good: keep it
                    stains[k] = stain / length
        fit = total - 2 * float((stains * seen).sum()) + float(((stains @ stains.T) * among).sum())
        objective = fit / 2 + sparsity * float(amounts.sum())
        if not objective < before * (1 - _ENOUGH):
            break
        before = objective
    return stains


def sparse_amounts(density: F64, stains: F64, sparsity: float) -> F64:
    """Amounts (2, n) >= 0 that minimise ``1/2 |v - W h|^2 + sparsity * sum(h)`` for each pixel of (3, n), exactly.

    Examples
    --------
    >>> sparse_amounts(np.array([[1.0], [0.0], [0.0]]), np.eye(3)[:2], 0.1).tolist()
    [[0.9], [0.0]]
    """
    h, e = stains @ density - sparsity  # the stains have unit length
    overlap = float(stains[0] @ stains[1])
    both_h, both_e = (h - overlap * e) / (1 - overlap**2), (e - overlap * h) / (1 - overlap**2)
    both = (both_h > 0) & (both_e > 0)
    # Where not both are positive, the larger one alone: it lowers the objective by half the square of its amount.
    alone_h, alone_e = np.where(h > e, np.maximum(h, 0.0), 0.0), np.where(h > e, 0.0, np.maximum(e, 0.0))
    return np.stack([np.where(both, both_h, alone_h), np.where(both, both_e, alone_e)])
