"""Entropy against SciPy, coverage by counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from wsi.nn.uncertainty import conformal_threshold, fit_temperature, prediction_set, uncertainty


def test_entropies_are_scipys_and_disagreement_is_their_difference() -> None:
    members = np.random.default_rng(0).dirichlet(np.ones(4), 5)
    found = uncertainty(members)
    assert found.entropy == pytest.approx(entropy(members.mean(0)))
    expected = entropy(members.mean(0)) - np.mean([entropy(row) for row in members])
    assert found.mutual_information == pytest.approx(expected)
    assert uncertainty(members[:1]).mutual_information is None
    assert uncertainty(np.array([[1.0, 0.0], [0.0, 1.0]])).mutual_information == pytest.approx(np.log(2))


def test_sets_cover_as_often_as_asked() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        probabilities = rng.dirichlet(np.ones(3), 60)
        truth = np.array([rng.choice(3, p=row) for row in probabilities])
        own = probabilities[np.arange(60), truth]
        threshold = conformal_threshold(own[:59], 0.8)
        assert threshold is not None
        held.append(truth[59] in prediction_set(probabilities[59], threshold))
    assert 0.75 < np.mean(held) < 0.87


def test_too_few_slides_give_no_threshold() -> None:
    assert conformal_threshold(np.array([0.9] * 8), 0.9) is None
    assert conformal_threshold(np.array([0.9] * 9), 0.9) == pytest.approx(0.9)
    assert conformal_threshold(np.array([]), 0.9) is None


def test_the_temperature_is_found_and_never_makes_it_worse() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=4000) * 2
    y = rng.random(4000) < 1 / (1 + np.exp(-z))

    def loss(temperature: float, factor: float = 3.0) -> float:
        scaled = factor * z / temperature
        return float(np.mean(np.logaddexp(0, scaled) - y * scaled))

    assert fit_temperature(loss) == pytest.approx(3, rel=0.15)
    assert fit_temperature(lambda t: 0.0) == 1.0
