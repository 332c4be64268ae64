"""Performance measures for training, beyond ``wsi.metrics``: several classes, survival. Undefined is None."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.metrics.roc import auroc

Array = npt.NDArray[Any]


def macro_auroc(label: Array, probabilities: Array) -> float | None:
    """Mean one-against-rest AUROC over the classes; of two classes, that of the second. None where none is defined."""
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    found = [auroc(label == c, probabilities[:, c]).value for c in classes]
    there = [value for value in found if value is not None]
    return float(np.mean(there)) if there else None


def balanced_accuracy(label: Array, called: Array) -> float:
    """Mean recall over the classes that occur."""
    return float(np.mean([(called[label == c] == c).mean() for c in np.unique(label)]))


def best_threshold(positive: Array, score: Array) -> float:
    """Threshold of the highest balanced accuracy for bool (n,) and scores (n,); the middle one of several."""
    candidates = np.linspace(0.05, 0.95, 181)
    right = np.array([(score >= t)[positive].mean() + (score < t)[~positive].mean() for t in candidates])
    best = candidates[right >= right.max() - 1e-12]
    return round(float(best[len(best) // 2]), 3)


def threshold_of(chosen: Array, label: Array, probabilities: Array) -> float:
    """Choose the threshold of the classes bool (k,) together; 0.5 where all cases, or none, are of these classes."""
    positive = chosen[label]
    if positive.all() or not positive.any():
        return 0.5
    return best_threshold(positive, probabilities[:, chosen].sum(1))


def concordance(time: Array, event: Array, risk: Array) -> float | None:
    """Harrell's C: share of comparable pairs whose earlier event has the higher risk, ties half; None without pairs.

    A patient censored at the time of another's event counts as later, as in Cox's risk sets. Two events at the same
    time are not comparable.
    """
    later = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & ~event[None, :])
    comparable = later & event[:, None]
    if not comparable.any():
        return None
    above = (risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])
    return float(above[comparable].mean())


def risk_of(probabilities: Array) -> Array:
    """Risk from survival probabilities (n, k): minus the expected number of intervals survived."""
    return np.asarray(-(1 - probabilities.cumsum(1))[:, :-1].sum(1))
