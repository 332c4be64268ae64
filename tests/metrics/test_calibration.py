"""Calibration against scikit-learn and literal restatements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from wsi.metrics.calibration import brier, expected_calibration_error, net_benefit, recalibration, reliability


@st.composite
def cases(draw):
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.integers(0, 2, n), rng.integers(0, 21, n) / 20


@given(cases(), st.integers(1, 15))
def test_brier_and_ece_restated(case, n_bins):
    truth, p = case
    assert brier(truth, p).value == pytest.approx(brier_score_loss(truth, p, labels=[0, 1], pos_label=1))
    edges, expected, members = np.linspace(0, 1, n_bins + 1), 0.0, 0
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = [j for j in range(len(p)) if low < p[j] <= high or (i == 0 and p[j] == 0)]
        members += len(inside)
        if inside:
            expected += len(inside) / len(p) * abs(p[inside].mean() - truth[inside].mean())
    assert members == len(p)
    assert expected_calibration_error(truth, p, n_bins).value == pytest.approx(expected)


@given(cases(), st.integers(1, 15))
def test_bins_of_equal_mass_hold_everybody(case, n_bins):
    truth, p = case
    table = reliability(truth, p, n_bins, equal_mass=True)
    assert sum(each.n for each in table) == len(p) and table[0].low == 0 and table[-1].high == 1
    assert all(a.high == b.low for a, b in itertools.pairwise(table))


def test_bins_of_equal_mass_are_equal_where_nothing_ties():
    p = np.linspace(0.001, 0.2, 100)
    table = reliability(np.zeros(100, int), p, 10, equal_mass=True)
    assert [each.n for each in table] == pytest.approx([10] * 10, abs=1)
    assert expected_calibration_error(np.zeros(100, int), p, 10, equal_mass=True).value == pytest.approx(p.mean())


def test_recalibration_finds_what_was_bent():
    rng = np.random.default_rng(3)
    logit = rng.normal(0, 2, 40_000)
    truth = (rng.random(40_000) < 1 / (1 + np.exp(-logit))).astype(int)
    bent = 1 / (1 + np.exp(-(logit * 2 + 1)))  # logit = 0.5 * bent - 0.5
    fit = recalibration(truth, bent)
    assert (fit.slope.value, fit.intercept.value) == pytest.approx((0.5, -0.5), abs=0.05)
    assert fit.slope.high - fit.slope.low < 0.05


@given(st.integers(0, 2**32))
def test_recalibration_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.02, 0.98, 60)
    truth = (rng.random(60) < 0.25 + 0.5 * p).astype(int)
    truth[:4], p[:4] = [0, 1, 0, 1], [0.1, 0.9, 0.95, 0.05]
    x = np.log(p / (1 - p))[:, None]
    model = LogisticRegression(C=1e12, tol=1e-9, solver="newton-cholesky").fit(x, truth)
    fit = recalibration(truth, p)
    assert fit.slope.value == pytest.approx(model.coef_[0, 0], abs=1e-4)
    assert fit.intercept.value == pytest.approx(model.intercept_[0], abs=1e-4)
    assert fit.slope.low < fit.slope.value < fit.slope.high


@pytest.mark.parametrize(
    ("labels", "p", "reason"),
    [
        ([0, 1], [0.5, 0.5], "equal"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], "separated"),
        ([0, 0, 1, 1], [0.1, 0.3, 0.3, 0.4], "separated"),
        ([0, 0, 1, 1], [0.9, 0.8, 0.3, 0.4], "separated"),
        ([1, 1], [0.3, 0.4], "positive"),
        ([], [], "no cases"),
    ],
)
def test_recalibration_that_has_no_answer_says_why(labels, p, reason):
    fit = recalibration(labels, p)
    assert fit.slope.value is None and fit.intercept.value is None and reason in fit.slope.reason


@given(cases(), st.lists(st.integers(1, 19), min_size=1, max_size=5))
def test_net_benefit_restated(case, twentieths):
    truth, p = case
    thresholds = [t / 20 for t in twentieths]
    for t, found in zip(thresholds, net_benefit(truth, p, thresholds), strict=True):
        tp = sum(1 for y, q in zip(truth, p, strict=True) if q >= t and y == 1)
        fp = sum(1 for y, q in zip(truth, p, strict=True) if q >= t and y == 0)
        assert found == pytest.approx(tp / len(p) - fp / len(p) * t / (1 - t))


def test_what_is_no_probability_is_refused():
    for function in (brier, expected_calibration_error, recalibration, lambda a, b: net_benefit(a, b, [0.5])):
        with pytest.raises(ValueError, match="probabilities"):
            function([0, 1], [0.2, 1.2])
    for thresholds in ([0.0], [1.0]):
        with pytest.raises(ValueError, match="thresholds"):
            net_benefit([0, 1], [0.2, 0.3], thresholds)
    assert brier([], []).value is None and expected_calibration_error([], []).value is None
