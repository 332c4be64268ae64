"""Figures against scikit-learn and literal counting."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from wsi.train.figures import balanced_accuracy, concordance, macro_auroc, risk_of

RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 3, 50)
CALLED = RNG.integers(0, 3, 50)
PROBABILITIES = RNG.dirichlet(np.ones(3), 50).round(1)  # with ties


def test_they_are_scikit_learns() -> None:
    each = [roc_auc_score(c == LABEL, PROBABILITIES[:, c]) for c in range(3)]
    assert macro_auroc(LABEL, PROBABILITIES) == pytest.approx(np.mean(each))
    assert balanced_accuracy(LABEL, CALLED) == pytest.approx(balanced_accuracy_score(LABEL, CALLED))


def test_concordance_counts_pairs() -> None:
    time, event = RNG.integers(1, 9, 30).astype(float), RNG.random(30) < 0.6
    risk = RNG.integers(0, 5, 30).astype(float)
    right = pairs = 0.0
    for i in range(30):
        for j in range(30):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                right += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    assert concordance(time, event, risk) == pytest.approx(right / pairs)
    once = np.array([1.0, 1.0, 1.0]), np.array([True, False, True])  # at one time two events, and one last seen
    assert concordance(*once, np.array([2.0, 1.0, 0.0])) == 0.5
    assert list(risk_of(np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))) == [0, -1, -2]


def test_undefined_is_none() -> None:
    assert macro_auroc(np.zeros(3, int), np.full((3, 2), 0.5)) is None
    assert concordance(np.ones(3), np.zeros(3, bool), np.ones(3)) is None
