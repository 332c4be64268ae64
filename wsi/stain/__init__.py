"""Stain normalisation: make slides of different laboratories and scanners look alike.

``fit`` measures the stains once a slide and returns a frozen ``StainTransform``; ``apply`` maps tiles at memory speed.

========= ============================================== ===============================================
method    what is measured                               what is changed
========= ============================================== ===============================================
macenko   extreme directions of tissue in the plane of   both stains' colours and amounts
          its two largest principal components
vahadane  sparse non-negative factors, started from      both stains' colours and amounts
          macenko and without randomness
ruifrok   amounts of two fixed stains                    the amounts alone
reinhard  mean and spread of tissue in CIELAB            each channel's mean and spread
========= ============================================== ===============================================

Deliberate differences from the published programs (``FitConfig(published=True, io=240)`` undoes them, with 255 for
Vahadane):

=================== ========================================= ========================================
what                published                                 here
=================== ========================================= ========================================
glass               ``OD = -ln((I + 1) / 240)``, negative on  ``OD = max(0, -ln((I + 1) / 256))``, and
                    glass, which takes on a colour cast       ``256 exp(-OD) - 1`` back: white is white
what is no stain    dropped: all colours fall into a plane    kept as a third, unscaled component, so
                                                              ink and pigment are preserved
amounts             99th percentile over all pixels           over tissue pixels
Vahadane            amounts sparse and not negative           by least squares, which is one 3x3 map
Reinhard            statistics and change of all pixels       of tissue; the change fades out to white
conversion to bytes truncated                                 rounded to nearest, in both
few or odd pixels   an exception, or plausible wrong colours  `fallback`, see ``FALLBACKS``
=================== ========================================= ========================================

Examples
--------
>>> import numpy as np
>>> amounts = np.random.default_rng(0).gamma(2.0, 0.3, (64, 64, 2))
>>> tile = (255 * np.exp(-amounts @ [[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])).astype(np.uint8)
>>> transform = fit("macenko", tile, target="veta")
>>> normalised = transform.apply(tile)
>>> normalised.shape, normalised.dtype, transform.fallback
((64, 64, 3), dtype('uint8'), None)
>>> StainTransform.from_json(transform.to_json()) == transform
True
"""

from __future__ import annotations

from wsi.stain.augment import StainAugment
from wsi.stain.config import FitConfig
from wsi.stain.fitting import METHODS, fit
from wsi.stain.statistics import FALLBACKS, LabStatistics, Stains
from wsi.stain.targets import TARGETS
from wsi.stain.transform import StainTransform

__all__ = [
    "FALLBACKS",
    "METHODS",
    "TARGETS",
    "FitConfig",
    "LabStatistics",
    "StainAugment",
    "StainTransform",
    "Stains",
    "fit",
]
