"""Stain augmentation for training: random changes to the amounts of the stains, in optical density."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.errors import StainError
from wsi.slide.base import U8
from wsi.stain.pixels import checked
from wsi.stain.ruifrok import EOSIN, HAEMATOXYLIN
from wsi.stain.statistics import F64, MAX_GAIN, Stains
from wsi.stain.transform import od_tables, with_residual

_RUIFROK = Stains((HAEMATOXYLIN, EOSIN), (1.0, 1.0))


@dataclass(frozen=True)
class StainAugment:
    """Multiplies each tile's stains by random factors; glass stays white.

    Attributes
    ----------
    strength : float
        The amounts of each stain, and of the rest, are multiplied by independent factors from 1 - strength to 1 +
        strength.
    stains : Stains
        Vectors of the stains, default Ruifrok's haematoxylin and eosin. Their amounts are not used.

    References ---------- D. Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a
    reference to train distilled stain-invariant convolutional networks", IEEE Trans Med Imaging 37 (2018) 2126. Their
    additive change of the amounts is left out, since it stains the glass.

    Examples
    --------
    >>> tiles = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    >>> augment = StainAugment(strength=0.1)
    >>> shaken = augment(tiles, seed=1)
    >>> bool((augment(tiles[2:], seed=1, first=2) == shaken[2:]).all())
    True
    """

    strength: float = 0.1
    stains: Stains = _RUIFROK

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and 0 <= self.strength <= 1):
            raise StainError(f"strength={self.strength:g}", "must be from 0 to 1")
        extremes = np.array(list(itertools.product((0.0, 2.0), repeat=3)))  # between them no map amplifies more
        if np.abs(self._matrices(extremes)).max() > MAX_GAIN:
            raise StainError("stains", "are too much alike to be shaken one by one")

    def __call__(self, rgb: U8, *, seed: int, first: int = 0, out: U8 | None = None) -> U8:
        """Augment a batch.

        Parameters
        ----------
        rgb : uint8 (n, h, w, 3)
            C-contiguous.
        seed : int
            Tile i depends only on (seed, first + i), and not on the batch: new factors need a new `seed` or `first`.
        first : int
            Number of the first tile.
        out : uint8 (n, h, w, 3), optional
            C-contiguous, not overlapping `rgb`; written in place, and returned.

        Returns
        -------
        uint8 (n, h, w, 3)

        Raises
        ------
        StainError
            Another dtype or shape, empty, or strided.
        """
        checked(rgb)
        out = np.empty(rgb.shape, np.uint8) if out is None else out
        if rgb.ndim != 4 or out.shape != rgb.shape or out.dtype != np.uint8 or np.may_share_memory(rgb, out):
            raise StainError("rgb", f"must be uint8 (n, h, w, 3), and out another such: {rgb.shape}, {out.shape}")
        if not (rgb.flags.c_contiguous and out.flags.c_contiguous):
            raise StainError("rgb", "and out must be C-contiguous")
        matrices = self._matrices(np.stack([self._factors(seed, first + i) for i in range(len(rgb))]))
        for tile, matrix, place in zip(rgb, matrices, out, strict=True):
            native.od_map(tile, *od_tables(matrix, 256.0), place)
        return out

    def _factors(self, seed: int, number: int) -> F64:
        return 1 + self.strength * np.random.default_rng([seed, number]).uniform(-1, 1, 3)

    def _matrices(self, factors: npt.NDArray[np.float64]) -> F64:
        """Return the maps in optical density (n, 3, 3) that multiply amounts by `factors` (n, 3)."""
        columns = with_residual(self.stains).T
        return (columns * factors[:, None, :]) @ np.linalg.inv(columns)
