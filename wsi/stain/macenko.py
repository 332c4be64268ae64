"""Macenko: the two stains are the extreme directions of tissue in the plane of its two largest principal components.

M. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009, 1107-1110.
"""

from __future__ import annotations

import numpy as np

from wsi.slide.base import U8
from wsi.stain.config import FitConfig
from wsi.stain.pixels import density_of, tissue_density
from wsi.stain.statistics import F64, MIN_VARIANCE_RATIO, Stains, Unmeasurable

#: Percentile of a stain's amounts that defines its full strength.
FULL_STRENGTH = 99.0


def measure(rgb: U8, config: FitConfig) -> Stains:
    """Measure two stains, haematoxylin (with more red absorption) first, as unit vectors.

    Angles are measured in the plane of the first and second eigenvector, from the second one, which is turned towards
    tissue. So they do not wrap around, whatever the signs of the eigenvectors. Raises Unmeasurable, see
    ``wsi.stain.FALLBACKS``.

    Parameters
    ----------
    rgb : uint8 (..., 3)
        Any number of images; all pixels are pooled.
    config : FitConfig

    Examples
    --------
    >>> amounts = np.random.default_rng(0).gamma(2.0, 0.3, (64, 64, 2))
    >>> tile = (255 * np.exp(-amounts @ [[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])).astype(np.uint8)
    >>> stains = measure(tile, FitConfig())
    >>> stains.vectors[0][0] > stains.vectors[1][0]
    True
    """
    density = tissue_density(rgb, config)
    vectors, variances = directions(density, config.alpha)
    return Stains.of(vectors, full_strength(vectors, density, rgb, config), density.shape[1], variances)


def directions(density: F64, alpha: float) -> tuple[F64, F64]:
    """Return the extreme directions of optical densities (3, n) as unit vectors (2, 3), and the variances (3,)."""
    variances, axes = np.linalg.eigh(np.cov(density))
    if not variances[1] > MIN_VARIANCE_RATIO * variances[2]:
        raise Unmeasurable("one-colour")
    plane = axes[:, 1:]
    second, first = plane.T @ density
    if second.mean() < 0:  # towards tissue, which lies within a quarter turn of its mean: angles do not wrap
        plane, second = plane * [-1, 1], -second
    angles = np.percentile(np.arctan2(first, second), (alpha, 100 - alpha))
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    return haematoxylin_first(vectors), variances


def haematoxylin_first(vectors: F64) -> F64:
    """Order two stains: haematoxylin absorbs more red."""
    return vectors if vectors[0, 0] > vectors[1, 0] else vectors[::-1]


def full_strength(vectors: F64, density: F64, rgb: U8, config: FitConfig) -> F64:
    """99th percentile of each stain's amount, float64 (2,), over tissue; over all pixels if ``config.published``."""
    if config.published:
        density = density_of(rgb, config)
    return np.percentile(np.linalg.pinv(vectors.T) @ density, FULL_STRENGTH, axis=1)
