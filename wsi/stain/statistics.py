"""The measured statistics of a slide's colour, and the reasons why a slide cannot be measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsi.errors import StainError

F64 = npt.NDArray[np.float64]
Vector = tuple[float, float, float]

#: Reasons why a fit fell back, and their meaning.
FALLBACKS = {
    "blank": "no pixel is tissue",
    "few-pixels": "less than 500 pixels, or 1 %, are tissue",
    "one-colour": "tissue has one colour, or one stain alone: two stains cannot be told apart",
    "small-angle": "the two stains found are less than 5 degrees apart",
    "flat": "a channel of CIELAB does not vary",
    "gain": "the target is so unlike that a difference between pixels would grow more than 4.8 times",
}

#: Least number, and least share of all pixels, of tissue pixels that can be measured.
MIN_PIXELS, MIN_FRACTION = 500, 0.01
#: Ratio of the second variance to the first below which tissue has one colour.
MIN_VARIANCE_RATIO = 1e-3
#: Stains closer than this are one stain.
MIN_ANGLE_DEG = 5.0
#: A larger gain turns noise into colour; up to here products of table rows fit in float32 (see od_tables).
MAX_GAIN = 4.8


class Unmeasurable(StainError):
    """The pixels cannot be measured; `reason` is a key of ``FALLBACKS``."""

    def __init__(self, reason: str, where: str = "pixels") -> None:
        self.reason = reason
        super().__init__(where, FALLBACKS[reason])


@dataclass(frozen=True)
class Stains:
    """Colour and strength of two stains on one slide.

    Attributes
    ----------
    vectors : (3 floats, 3 floats)
        Optical density of red, green and blue of one unit of each stain; haematoxylin first.
    max_amounts : (float, float)
        Full strength: 99th percentile of each stain's amount.
    n_px : int
        Tissue pixels measured; 0 for published values.
    variances : 3 floats, or none
        Eigenvalues of the covariance of optical density, ascending, where they were computed.

    Raises
    ------
    StainError
        Values that are not finite or not positive, or stains less than 5 degrees apart.

    Examples
    --------
    >>> Stains(((0.65, 0.70, float("nan")), (0.07, 0.99, 0.11)), (1.0, 1.0))
    Traceback (most recent call last):
    wsi.errors.StainError: stain vectors: must be finite numbers
    """

    vectors: tuple[Vector, Vector]
    max_amounts: tuple[float, float]
    n_px: int = 0
    variances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if np.shape(self.vectors) != (2, 3) or np.shape(self.max_amounts) != (2,):
            raise StainError("stain vectors", "must be two of three numbers, with two amounts")
        if not all(map(math.isfinite, (*self.vectors[0], *self.vectors[1], *self.max_amounts))):
            raise StainError("stain vectors", "must be finite numbers")
        if not (min(self.max_amounts) > 0 and self.angle_deg >= MIN_ANGLE_DEG):
            raise StainError("stain vectors", f"need positive amounts and {MIN_ANGLE_DEG:g} degrees between them")

    @property
    def angle_deg(self) -> float:
        """Angle between the two stains; 0 where one vector has no length."""
        first, second = np.asarray(self.vectors)
        return angle_deg(first, second)

    @classmethod
    def of(cls, vectors: F64, max_amounts: F64, n_px: int, variances: F64 | None = None) -> Stains:
        """Make from arrays (2, 3) and (2,); raise Unmeasurable where they are no valid measurement."""
        if not angle_deg(*vectors) >= MIN_ANGLE_DEG:
            raise Unmeasurable("small-angle")
        if not (max_amounts > 1e-3).all():
            raise Unmeasurable("one-colour")
        h, e = vectors.tolist()
        eigenvalues = () if variances is None else tuple(map(float, variances))
        return cls((tuple(h), tuple(e)), tuple(max_amounts.tolist()), n_px, eigenvalues)


@dataclass(frozen=True)
class LabStatistics:
    """Mean and standard deviation of CIELAB (D65) over tissue.

    Attributes
    ----------
    mean, std : 3 floats
        Of L (0 to 100), a and b; population standard deviation.
    n_px : int
        Tissue pixels measured.
    """

    mean: Vector
    std: Vector
    n_px: int = 0

    def __post_init__(self) -> None:
        if np.shape(self.mean) != (3,) or np.shape(self.std) != (3,):
            raise StainError("CIELAB statistics", "must be three means and three deviations")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise StainError("CIELAB statistics", "must be finite numbers and positive deviations")


def angle_deg(first: F64, second: F64) -> float:
    """Angle between two vectors (3,); 0 where one has no length."""
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    cosine = float(first @ second) / lengths if lengths > 0 else 1.0
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
