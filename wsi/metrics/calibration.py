"""Calibration of probabilities: Brier, reliability, recalibration, net benefit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from wsi.metrics.estimate import F64, Z95, Bools, Estimate, labels_and_scores, one_class

#: Least distance of a probability from 0 and 1 before its logit is taken.
_CLIP = 1e-6


def _probabilities(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[Bools, F64]:
    truth, p = labels_and_scores(labels, probabilities)
    if len(p) and (p.min() < 0 or p.max() > 1):
        raise ValueError(f"probabilities must be from 0 to 1, got {p.min():g} to {p.max():g}")
    return truth, p


def brier(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> Estimate:
    """Return the mean squared difference of probability and label (Brier 1950, two classes).

    Examples
    --------
    >>> brier([0, 1], [0.5, 0.5]).value
    0.25
    """
    truth, p = _probabilities(labels, probabilities)
    return Estimate(float(((p - truth) ** 2).mean()), n=len(p)) if len(p) else Estimate.undefined("no cases")


class ReliabilityBin(NamedTuple):
    """Cases with a probability in (low, high]; the first bin includes 0."""

    low: float
    high: float
    n: int
    probability: float | None
    """Mean probability; None where the bin is empty."""
    frequency: float | None
    """Share of positives."""


def reliability(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, n_bins: int = 10, *, equal_mass: bool = False
) -> list[ReliabilityBin]:
    """Return the observed frequency of positives in bins of probability.

    Parameters
    ----------
    labels, probabilities : (n,)
        Probability of the positive class.
    n_bins : int
    equal_mass : bool
        Bins with about the same number of cases instead of the same width; ties may give fewer bins.

    Examples
    --------
    >>> reliability([0, 1, 1, 1], [0.1, 0.2, 0.8, 0.9], 2)[1]
    ReliabilityBin(low=0.5, high=1.0, n=2, probability=0.8500000000000001, frequency=1.0)
    """
    truth, p = _probabilities(labels, probabilities)
    edges = np.linspace(0, 1, n_bins + 1)
    if equal_mass and len(p):
        edges = np.unique(np.concatenate([[0.0], np.quantile(p, edges[1:-1], method="higher"), [1.0]]))
    of = np.clip(np.searchsorted(edges, p) - 1, 0, len(edges) - 2)
    table = []
    for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = of == i
        n = int(inside.sum())
        means = (float(p[inside].mean()), float(truth[inside].mean())) if n else (None, None)
        table.append(ReliabilityBin(low, high, n, *means))
    return table


def expected_calibration_error(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, n_bins: int = 10, *, equal_mass: bool = False
) -> Estimate:
    """Return the mean difference between probability and frequency over the bins of ``reliability``.

    With few cases it is biased upwards, by about ``sqrt(n_bins / n)``: report it with intercept and slope.

    Examples
    --------
    >>> round(expected_calibration_error([0, 1, 1, 1], [0.1, 0.2, 0.8, 0.9], 2).value, 3)
    0.25
    """
    table = reliability(labels, probabilities, n_bins, equal_mass=equal_mass)
    n = sum(each.n for each in table)
    if not n:
        return Estimate.undefined("no cases")
    gaps = (each.n * abs(each.probability - each.frequency) for each in table if each.n)  # type: ignore[operator]
    return Estimate(sum(gaps) / n, n=n)


@dataclass(frozen=True)
class Recalibration:
    """``logit P(positive) = intercept + slope * logit p``; 0 and 1 where calibrated, slope < 1 where overconfident."""

    intercept: Estimate
    slope: Estimate


def recalibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> Recalibration:
    """Fit calibration intercept and slope by maximum likelihood (Cox 1958), with Wald intervals.

    Probabilities are clipped to 1e-6 from 0 and 1.

    Returns
    -------
    Recalibration
        Undefined where one class is missing, all probabilities are equal, or the classes are separated.

    Examples
    --------
    >>> labels = np.arange(1000) % 10 < np.repeat([2, 8], 500)        # 20 % of some, 80 % of others
    >>> fit = recalibration(labels, np.repeat([0.1, 0.9], 500))       # overconfident
    >>> abs(fit.intercept.value) < 1e-9, round(fit.slope.value, 3)
    (True, 0.631)
    """
    truth, p = _probabilities(labels, probabilities)
    n = len(p)
    x = special.logit(np.clip(p, _CLIP, 1 - _CLIP))
    why = one_class(truth) or ("all probabilities are equal" if np.ptp(x) == 0 else "")
    if not why:
        highest, lowest = x[truth].max(), x[truth].min()
        if x[~truth].max() <= lowest or highest <= x[~truth].min():
            why = "the classes are separated: the slope has no finite estimate"
    if why:
        return Recalibration(Estimate.undefined(why, n), Estimate.undefined(why, n))
    design = np.stack([np.ones(n), x], axis=1)
    beta = np.zeros(2)
    for _ in range(100):
        q = special.expit(design @ beta)
        information = (design * (q * (1 - q))[:, None]).T @ design
        step = np.linalg.solve(information, design.T @ (truth - q))
        loss = _loss(truth, design @ beta)
        while _loss(truth, design @ (beta + step)) > loss + 1e-12:  # Newton overshoots on flat parts
            step /= 2
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    width = Z95 * np.sqrt(np.diag(np.linalg.inv(information)))
    intercept, slope = (
        Estimate(float(b), float(b - w), float(b + w), n, "Wald") for b, w in zip(beta, width, strict=True)
    )
    return Recalibration(intercept, slope)


def _loss(truth: Bools, logits: F64) -> float:
    return float(np.logaddexp(0, np.where(truth, -logits, logits)).sum())


def net_benefit(labels: npt.ArrayLike, probabilities: npt.ArrayLike, thresholds: npt.ArrayLike) -> F64:
    """Return the net benefit of acting on probabilities from each threshold on (Vickers & Elkin 2006).

    ``TP / n - FP / n * t / (1 - t)``; acting on everyone gives ``prevalence - (1 - prevalence) * t / (1 - t)``,
    acting on nobody 0.

    Parameters
    ----------
    labels, probabilities : (n,)
    thresholds : (k,)
        Above 0 and below 1.

    Returns
    -------
    float64 (k,)

    Raises
    ------
    ValueError
        No cases, or a threshold outside that range.

    Examples
    --------
    >>> net_benefit([0, 1, 1, 0], [0.1, 0.6, 0.9, 0.7], [0.5]).tolist()
    [0.25]
    """
    truth, p = _probabilities(labels, probabilities)
    t = np.atleast_1d(np.asarray(thresholds, np.float64))
    if not len(p) or not ((t > 0) & (t < 1)).all():
        raise ValueError("net benefit needs cases, and thresholds above 0 and below 1")
    hits = len(p) - np.searchsorted(np.sort(p[truth]), t) - (~truth).sum()
    false = (~truth).sum() - np.searchsorted(np.sort(p[~truth]), t)
    return np.asarray((hits - false * t / (1 - t)) / len(p))
