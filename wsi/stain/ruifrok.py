"""Ruifrok and Johnston: two stains of fixed colour; only their amounts are measured.

A. C. Ruifrok and D. A. Johnston, "Quantification of histochemical staining by color deconvolution", Anal Quant Cytol
Histol 23 (2001) 291-299.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wsi.slide.base import U8
from wsi.stain.config import FitConfig
from wsi.stain.macenko import full_strength
from wsi.stain.pixels import tissue_density
from wsi.stain.statistics import Stains, Vector

#: Optical density of red, green and blue; not of unit length, as is customary.
HAEMATOXYLIN: Vector = (0.65, 0.70, 0.29)
EOSIN: Vector = (0.07, 0.99, 0.11)


def measure(rgb: U8, config: FitConfig) -> Stains:
    """Measure the amounts of haematoxylin and eosin; parameters as in ``wsi.stain.macenko.measure``.

    Examples
    --------
    >>> amounts = np.random.default_rng(0).gamma(2.0, 0.3, (64, 64, 2))
    >>> tile = (255 * np.exp(-amounts @ [HAEMATOXYLIN, EOSIN])).astype(np.uint8)
    >>> measured = np.array(measure(tile, FitConfig()).max_amounts)
    >>> bool(np.allclose(measured, np.percentile(amounts, 99, axis=(0, 1)), rtol=0.1))
    True
    """
    density = tissue_density(rgb, config)
    vectors = np.array([HAEMATOXYLIN, EOSIN])
    return Stains.of(vectors, full_strength(vectors, density, rgb, config), density.shape[1])


def in_fixed_stains(target: Stains) -> Stains:
    """Express a target in the fixed stains: each of its stains' full strength, projected on the fixed one.

    Examples
    --------
    >>> in_fixed_stains(Stains((HAEMATOXYLIN, EOSIN), (1.5, 0.8))).max_amounts
    (1.5, 0.8)
    """
    if target.vectors == (HAEMATOXYLIN, EOSIN):
        return target
    amounts = np.diag(np.array(target.vectors) @ np.linalg.pinv([HAEMATOXYLIN, EOSIN])) * target.max_amounts
    return dataclasses.replace(target, vectors=(HAEMATOXYLIN, EOSIN), max_amounts=tuple(amounts.tolist()))
