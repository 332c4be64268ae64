"""Uncertainty of a grade: ensemble disagreement, temperature scaling and conformal prediction sets.

Uses NumPy only: probabilities in, numbers out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Uncertainty(NamedTuple):
    """Uncertainty of one grade, in nats.

    Attributes
    ----------
    entropy : float
        Entropy of the ensemble's mean probabilities: total uncertainty.
    mutual_information : float, optional
        That entropy minus the members' mean entropy: the disagreement of the members. None for a single member.
    """

    entropy: float
    mutual_information: float | None


def uncertainty(members: Array) -> Uncertainty:
    """Return the uncertainty of an ensemble's probabilities (m, k).

    References
    ----------
    Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning", ICML 2018, arXiv:1710.07283.

    Examples
    --------
    >>> agree = uncertainty(np.array([[0.5, 0.5], [0.5, 0.5]]))
    >>> round(agree.entropy, 4), agree.mutual_information
    (0.6931, 0.0)
    """
    total = float(_entropy(members.mean(0)))
    if len(members) == 1:
        return Uncertainty(total, None)
    return Uncertainty(total, max(0.0, total - float(_entropy(members).mean())))


def fit_temperature(loss_at: Callable[[float], float]) -> float:
    """Return the temperature in 0.05 to 20 with the least validation loss.

    `loss_at` maps a temperature to the mean negative log likelihood of slides not trained on.

    References
    ----------
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.

    Examples
    --------
    >>> round(fit_temperature(lambda t: (t - 2.0) ** 2), 3)
    2.0
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log_t: loss_at(float(np.exp(log_t))), bounds=np.log((0.05, 20)), method="bounded")
    return float(np.exp(found.x)) if loss_at(float(np.exp(found.x))) < loss_at(1.0) else 1.0


def conformal_threshold(true_class: Array, coverage: float) -> float | None:
    """Return the least probability with which a class belongs to a prediction set of the given coverage.

    `true_class` (n,) is the probability of the true class of slides not trained on, one a patient; `coverage`, in 0..1,
    is the share of sets that should contain it. None where n is too small: ``ceil((n + 1) coverage) > n``.

    References
    ----------
    Split conformal prediction with the score ``1 - p(true)``: Sadinle, Lei & Wasserman, JASA 2019, arXiv:1609.00451.

    Examples
    --------
    >>> conformal_threshold(np.linspace(0.1, 0.9, 9), 0.9), conformal_threshold(np.array([0.5]), 0.9)
    (0.1, None)
    """
    n = len(true_class)
    rank = int(np.ceil((n + 1) * coverage - 1e-9))
    return None if rank > n else float(np.sort(true_class)[n - rank])


def prediction_set(probabilities: Array, threshold: float) -> list[int]:
    """Return the classes whose probability reaches the threshold; possibly none."""
    return [int(i) for i in np.flatnonzero(probabilities >= threshold - 1e-12)]


def _entropy(probabilities: Array) -> Array:
    p = np.asarray(probabilities, np.float64)
    return np.asarray(-(p * np.log(np.clip(p, 1e-300, None))).sum(-1))
