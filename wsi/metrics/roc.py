"""Two classes and a score: ROC and precision-recall, with the intervals of DeLong and of Wilson."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from wsi.metrics.estimate import F64, Z95, Bools, Estimate, labels_and_scores, one_class


class RocCurve(NamedTuple):
    """Points from (0, 0) to (1, 1); a case is positive where its score reaches the threshold."""

    false_positive_rate: F64
    true_positive_rate: F64
    thresholds: F64
    """Falling; the first is infinite."""


def roc_curve(labels: npt.ArrayLike, scores: npt.ArrayLike) -> RocCurve:
    """Return all points of the ROC curve, one for each distinct score; ValueError for a single class.

    Examples
    --------
    >>> roc_curve([0, 1, 1], [0.1, 0.1, 0.8]).true_positive_rate.tolist()
    [0.0, 0.5, 1.0]
    """
    truth, values = labels_and_scores(labels, scores)
    if one_class(truth):
        raise ValueError(f"no ROC curve: {one_class(truth)}")
    fp, tp, thresholds = _counts(truth, values)
    start = np.zeros(1)
    return RocCurve(
        np.concatenate([start, fp / fp[-1]]),
        np.concatenate([start, tp / tp[-1]]),
        np.concatenate([[np.inf], thresholds]),
    )


def _counts(truth: Bools, values: F64) -> tuple[F64, F64, F64]:
    """Negatives and positives that reach each distinct score, in falling order of scores."""
    thresholds, of = np.unique(-values, return_inverse=True)
    positive = np.bincount(of, weights=truth, minlength=len(thresholds))
    negative = np.bincount(of, weights=~truth, minlength=len(thresholds))
    return np.cumsum(negative), np.cumsum(positive), -thresholds


def delong(labels: npt.ArrayLike, *scores: npt.ArrayLike) -> tuple[F64, F64]:
    """Return areas under the ROC curve and their covariance (DeLong et al. 1988, by mid-ranks: Sun & Xu 2014).

    Parameters
    ----------
    labels : (n,)
        0 or 1. ValueError for a single class.
    scores : one or more (n,)
        Of the same cases.

    Returns
    -------
    areas : float64 (k,)
        Ties count half.
    covariance : float64 (k, k)
        NaN where a class has a single case.

    Examples
    --------
    >>> areas, covariance = delong([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    >>> areas.tolist(), covariance.round(4).tolist()
    ([0.75], [[0.125]])
    """
    pairs = [labels_and_scores(labels, each) for each in scores]
    truth = pairs[0][0]
    if one_class(truth):
        raise ValueError(f"no area under the curve: {one_class(truth)}")
    m, n = int(truth.sum()), int((~truth).sum())
    of_positives, of_negatives = np.empty((len(pairs), m)), np.empty((len(pairs), n))
    for i, (_, values) in enumerate(pairs):
        rank = stats.rankdata(values)
        of_positives[i] = (rank[truth] - stats.rankdata(values[truth])) / n  # share of negatives below each
        of_negatives[i] = 1 - (rank[~truth] - stats.rankdata(values[~truth])) / m
    if min(m, n) < 2:
        return of_positives.mean(axis=1), np.full((len(pairs), len(pairs)), np.nan)
    covariance = np.cov(of_positives) / m + np.cov(of_negatives) / n
    return of_positives.mean(axis=1), np.atleast_2d(covariance)


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Estimate:
    """Return the area under the ROC curve with DeLong's interval.

    The interval is symmetric in the logit, and so stays within 0 and 1, unlike the plain one.

    Examples
    --------
    >>> print(auroc([0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.35, 0.8, 0.2, 0.9]))
    0.889 (0.261 to 0.995)
    >>> print(auroc([1, 1], [0.2, 0.3]))
    undefined: all cases are positive
    """
    truth, values = labels_and_scores(labels, scores)
    if one_class(truth):
        return Estimate.undefined(one_class(truth), len(truth))
    areas, covariance = delong(truth, values)
    area, se = float(areas[0]), math.sqrt(covariance[0, 0])
    if not se > 0 or not 0 < area < 1:
        why = "a class has one case" if math.isnan(se) else "DeLong's variance is 0 here (the classes are separated)"
        return Estimate(area, n=len(truth), reason=f"no interval: {why}")
    centre, width = math.log(area / (1 - area)), Z95 * se / (area * (1 - area))
    low, high = (1 / (1 + math.exp(-v)) for v in (centre - width, centre + width))
    return Estimate(area, low, high, len(truth), "DeLong, logit")


def auprc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Estimate:
    """Return average precision, ``sum (R_n - R_(n-1)) P_n``; an uninformative score reaches the prevalence.

    Examples
    --------
    >>> round(auprc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value, 4)
    0.8333
    """
    truth, values = labels_and_scores(labels, scores)
    if not truth.any():
        return Estimate.undefined(one_class(truth), len(truth))
    fp, tp, _ = _counts(truth, values)
    return Estimate(float((np.diff(tp, prepend=0) / tp[-1] * tp / (tp + fp)).sum()), n=len(truth))


def threshold_at(labels: npt.ArrayLike, scores: npt.ArrayLike, specificity: float) -> float | None:
    """Return the threshold of highest sensitivity among those that keep `specificity`.

    Choose it on validation cases: chosen on the test cases it is optimistic.

    Returns
    -------
    float, optional
        Infinite where every finite threshold has too many false positives; None for a single class.

    Examples
    --------
    >>> threshold_at([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], specificity=0.95)
    0.8
    """
    truth, values = labels_and_scores(labels, scores)
    if one_class(truth):
        return None
    curve = roc_curve(truth, values)
    kept = curve.false_positive_rate <= 1 - specificity + 1e-12
    # argmax takes the first point, which has the highest threshold, of equals.
    best = int(np.argmax(np.where(kept, curve.true_positive_rate, -1)))
    return float(curve.thresholds[best])


@dataclass(frozen=True)
class OperatingPoint:
    """Performance at a threshold; intervals are Wilson's, and undefined for an empty denominator."""

    threshold: float
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate


def operating_point(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> OperatingPoint:
    """Return sensitivity, specificity and predictive values where scores reach `threshold`.

    Examples
    --------
    >>> print(operating_point([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.3).sensitivity)
    1.000 (0.342 to 1.000)
    """
    truth, values = labels_and_scores(labels, scores)
    called = values >= threshold
    hits, refused = int((called & truth).sum()), int((~called & ~truth).sum())
    return OperatingPoint(
        float(threshold),
        proportion(hits, int(truth.sum()), "no positive case"),
        proportion(refused, int((~truth).sum()), "no negative case"),
        proportion(hits, int(called.sum()), "nothing is called positive"),
        proportion(refused, int((~called).sum()), "nothing is called negative"),
    )


def proportion(k: int, n: int, nobody: str = "no cases") -> Estimate:
    """Return k of n with Wilson's interval (Wilson 1927).

    Examples
    --------
    >>> print(proportion(9, 10))
    0.900 (0.596 to 0.982)
    """
    if not n:
        return Estimate.undefined(nobody)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return Estimate(k / n, float(interval.low), float(interval.high), n, "Wilson")
