"""Comparison of two readers on the same cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from wsi.metrics.estimate import Z95, Estimate, labels_and_scores, one_class
from wsi.metrics.roc import delong


@dataclass(frozen=True)
class Difference:
    """First minus second, with the p-value of no difference (None where undefined)."""

    estimate: Estimate
    p_value: float | None


def auroc_difference(labels: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> Difference:
    """Compare two areas under the ROC curve on the same cases (DeLong et al. 1988).

    Examples
    --------
    >>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> result = auroc_difference(labels, [1, 2, 3, 6, 4, 5, 7, 8], [4, 1, 6, 2, 3, 8, 5, 7])
    >>> round(result.estimate.value, 4), round(result.p_value, 3)
    (0.0625, 0.798)
    """
    truth, a = labels_and_scores(labels, first)
    _, b = labels_and_scores(labels, second)
    if one_class(truth):
        return Difference(Estimate.undefined(one_class(truth), len(truth)), None)
    areas, covariance = delong(truth, a, b)
    gap = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if not variance > 1e-18:  # also NaN
        why = "no interval: DeLong's variance of the difference is 0 or undefined"
        return Difference(Estimate(gap, n=len(truth), reason=why), None)
    width = Z95 * math.sqrt(variance)
    p_value = 2 * float(stats.norm.sf(abs(gap) / math.sqrt(variance)))
    return Difference(Estimate(gap, gap - width, gap + width, len(truth), "paired DeLong"), p_value)


def mcnemar(first_right: npt.ArrayLike, second_right: npt.ArrayLike) -> Difference:
    """Compare two accuracies on the same cases by McNemar's exact test.

    Parameters
    ----------
    first_right, second_right : bool (n,)
        Whether each reader was right.

    Examples
    --------
    >>> result = mcnemar([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1])
    >>> result.estimate.value, result.p_value
    (0.75, 0.03125)
    """
    a, b = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"both readers need a list of one length, got {a.shape} and {b.shape}")
    if not len(a):
        return Difference(Estimate.undefined("no cases"), None)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    apart = only_first + only_second
    p_value = float(stats.binomtest(only_first, apart).pvalue) if apart else 1.0
    return Difference(Estimate((only_first - only_second) / len(a), n=len(a)), p_value)
