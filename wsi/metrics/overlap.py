"""Overlap of two masks: Dice, IoU, Hausdorff distance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from wsi.metrics.estimate import Bools, Estimate


def _pair(truth: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_]) -> tuple[Bools, Bools]:
    if truth.dtype != bool or found.dtype != bool or truth.shape != found.shape:
        got = f"{truth.dtype} {truth.shape}, {found.dtype} {found.shape}"
        raise ValueError(f"masks must be bool of one shape, got {got}")
    return truth, found


def dice(truth: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_]) -> Estimate:
    """Return ``2 |A and B| / (|A| + |B|)``; undefined where both are empty.

    Examples
    --------
    >>> dice(np.array([True, True, False]), np.array([True, False, False])).value
    0.6666666666666666
    """
    a, b = _pair(truth, found)
    total = int(a.sum()) + int(b.sum())
    return Estimate(2 * int((a & b).sum()) / total, n=1) if total else Estimate.undefined("both are empty", 1)


def iou(truth: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_]) -> Estimate:
    """Return ``|A and B| / |A or B|``; undefined where both are empty.

    Examples
    --------
    >>> iou(np.array([True, True, False]), np.array([True, False, False])).value
    0.5
    """
    a, b = _pair(truth, found)
    total = int((a | b).sum())
    return Estimate(int((a & b).sum()) / total, n=1) if total else Estimate.undefined("both are empty", 1)


def hausdorff(
    truth: npt.NDArray[np.bool_],
    found: npt.NDArray[np.bool_],
    *,
    pixel: tuple[float, float] = (1.0, 1.0),
    percentile: float = 100,
) -> Estimate:
    """Return the Hausdorff distance of the outlines, the larger of both directions.

    An outline is the pixels of a mask with a side on the background or on the border.

    Parameters
    ----------
    truth, found : bool (rows, columns)
    pixel : (float, float)
        Height and width of a pixel, such as in microns: the unit of the result.
    percentile : float
        100 for the largest distance; 95 ignores the farthest twentieth of each outline.

    Returns
    -------
    Estimate
        Undefined where a mask is empty.

    Examples
    --------
    >>> a, b = np.zeros((2, 9, 9), bool)
    >>> a[2:5, 2:5] = b[2:5, 4:7] = True
    >>> hausdorff(a, b, pixel=(0.5, 0.5)).value
    1.0
    """
    a, b = _pair(truth, found)
    if not (a.any() and b.any()):
        return Estimate.undefined("a mask is empty", 1)
    # Outlines have few points, which needs far fewer distances than all pixels.
    outlines = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * pixel for mask in (a, b)]
    far = [np.percentile(cKDTree(to).query(of)[0], percentile) for of, to in (outlines, outlines[::-1])]
    return Estimate(float(max(far)), n=1)
