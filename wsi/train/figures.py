"""How good probabilities are: AUROC, balanced accuracy, quadratic kappa, concordance. Undefined is None."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Array = npt.NDArray[Any]


def auroc(positive: Array, score: Array) -> float | None:
    """Probability that a positive scores above a negative, ties half (Mann-Whitney); None with one class.

    Examples
    --------
    >>> auroc(np.array([True, False, False]), np.array([0.7, 0.7, 0.1]))
    0.75
    """
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return None
    return float((rankdata(score)[positive].sum() - m * (m + 1) / 2) / (m * n))


def macro_auroc(label: Array, probabilities: Array) -> float | None:
    """Mean AUROC of each class against the rest; of two classes, that of the second. None where no class has one."""
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    found = [auroc(label == c, probabilities[:, c]) for c in classes]
    there = [value for value in found if value is not None]
    return float(np.mean(there)) if there else None


def balanced_accuracy(label: Array, called: Array) -> float:
    """Mean over the classes that are there of the share called right."""
    return float(np.mean([(called[label == c] == c).mean() for c in np.unique(label)]))


def quadratic_kappa(label: Array, called: Array, classes: int) -> float | None:
    """Cohen's kappa with squared distances; None where label and call are one and the same class throughout."""
    observed = np.zeros((classes, classes))
    np.add.at(observed, (label, called), 1)
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(label)
    distance = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    chance = float((distance * expected).sum())
    return None if chance == 0 else 1 - float((distance * observed).sum()) / chance


def concordance(time: Array, event: Array, risk: Array) -> float | None:
    """Share of comparable pairs whose earlier event has the higher risk, ties half (Harrell); None without pairs."""
    comparable = (time[:, None] < time[None, :]) & event[:, None]
    if not comparable.any():
        return None
    above = (risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])
    return float(above[comparable].mean())


def risk_of(probabilities: Array) -> Array:
    """Risk from the probabilities of survival intervals (n, k): minus the expected number of intervals survived."""
    return np.asarray(-(1 - probabilities.cumsum(1))[:, :-1].sum(1))
