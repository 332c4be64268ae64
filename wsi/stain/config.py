"""The settings of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsi.errors import StainError


@dataclass(frozen=True)
class FitConfig:
    """How stains are measured and mapped.

    Attributes
    ----------
    io : float
        Intensity of glass plus one, which has optical density 0. With the default, white stays white.
    published : bool
        Follow the published programs, including the cast on glass; see the table in ``wsi.stain``. Macenko's `io` is
        240, Vahadane's 255.
    alpha : float
        Percentile, from either end, of Macenko's extreme directions.
    beta : float
        A pixel is tissue where every channel's optical density is at least this.
    sparsity : float
        Vahadane's weight of the sum of amounts, in optical density.
    mpp : float
        Microns per pixel at which a slide is sampled; never finer than the slide is.
    tile_px : int
        Side of the sampled tiles, in pixels at `mpp`.
    n_tiles : int
        Maximum number of sampled tiles, evenly spaced over the tissue.

    References
    ----------
    Constants: M. Macenko et al., ISBI 2009, and its MATLAB version by M. Veta; A. Vahadane et al., IEEE TMI 35 (2016).

    Examples
    --------
    >>> FitConfig(io=0)
    Traceback (most recent call last):
    wsi.errors.StainError: io=0: the intensity of glass plus one must be from 1 to 256
    """

    io: float = 256.0
    published: bool = False
    alpha: float = 1.0
    beta: float = 0.15
    sparsity: float = 0.02
    mpp: float = 1.0
    tile_px: int = 128
    n_tiles: int = 200

    def __post_init__(self) -> None:
        checks = {
            "io": (1 <= self.io <= 256, "the intensity of glass plus one must be from 1 to 256"),
            "alpha": (0 <= self.alpha < 50, "the percentile must be from 0 to below 50"),
            "beta": (0 <= self.beta < 5, "the optical density must be from 0 to below 5"),
            "sparsity": (0 <= self.sparsity < 1, "the weight must be from 0 to below 1"),
            "mpp": (math.isfinite(self.mpp) and self.mpp > 0, "must be positive microns per pixel"),
            "tile_px": (self.tile_px >= 1, "a tile must be at least 1 px wide"),
            "n_tiles": (self.n_tiles >= 1, "at least one tile must be sampled"),
        }
        for name, (fine, what) in checks.items():
            if not fine:
                raise StainError(f"{name}={getattr(self, name):g}", what)
