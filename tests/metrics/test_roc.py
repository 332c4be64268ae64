"""ROC and precision-recall against scikit-learn and their definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from tests.metrics.made_up import scores_of_129
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.calibration import brier, expected_calibration_error
from wsi.metrics.compare import auroc_difference
from wsi.metrics.roc import auprc, auroc, delong, operating_point, proportion, roc_curve, threshold_at


@st.composite
def cases(draw):
    n = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    truth = rng.integers(0, 2, n)
    truth[:2] = 0, 1
    return truth, rng.integers(0, draw(st.sampled_from([3, 10, 10**6])), n) / 7


def literal_delong(truth, first, second):
    """Areas and their covariance by comparing each positive with each negative (DeLong et al. 1988)."""
    placements = []
    for scores in (first, second):
        apart = scores[truth == 1][:, None] - scores[truth == 0]
        placements.append((apart > 0) + 0.5 * (apart == 0))
    areas = np.array([wins.mean() for wins in placements])
    m, n = placements[0].shape
    over_positives = np.cov([wins.mean(axis=1) for wins in placements])
    over_negatives = np.cov([wins.mean(axis=0) for wins in placements])
    return areas, over_positives / m + over_negatives / n


def test_129_slides():
    slides = scores_of_129()
    truth, first, second = slides["truth"], slides["one"], slides["two"]
    areas, covariance = delong(truth, first, second)
    expected_areas, expected = literal_delong(truth, first, second)
    assert areas == pytest.approx(expected_areas) and covariance == pytest.approx(expected)
    for scores in (first, second):
        assert auprc(truth, scores).value == pytest.approx(metrics.average_precision_score(truth, scores))
        assert brier(truth, scores).value == pytest.approx(metrics.brier_score_loss(truth, scores))
        inside = np.clip(scores + 0.003, 0.003, 0.997)  # not on the border of two bins
        ece = sum(abs((truth - inside)[(inside * 10).astype(int) == b].sum()) for b in range(10)) / 129
        assert expected_calibration_error(truth, inside, 10).value == pytest.approx(ece)
        point = operating_point(truth, scores, threshold_at(truth, scores, 0.95))
        assert point.specificity.value >= 0.95
    for size, n in (("Macro", 22), ("Micro", 27)):
        rows = np.isin(slides["size"], (size, "None"))
        assert truth[rows].sum() == n
        assert auroc(truth[rows], first[rows]).value == pytest.approx(metrics.roc_auc_score(truth[rows], first[rows]))
    result = auroc_difference(truth, first, second)
    z = result.estimate.value / math.sqrt(expected[0, 0] + expected[1, 1] - 2 * expected[0, 1])
    assert z < -1 and result.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)))


def test_intervals_stay_within_one():
    slides = scores_of_129()
    truth = slides["truth"]
    area = auroc(truth, slides["two"])
    assert area.value + 1.96 * math.sqrt(literal_delong(truth, slides["one"], slides["two"])[1][1, 1]) > 1
    assert 1 > area.high > area.value > area.low > 0.9
    first = auroc(truth, slides["one"])
    drawn = bootstrap(
        lambda rows: auroc(truth[rows], slides["one"][rows]).value, range(129), strata=truth.tolist(), n_draws=2000
    )
    assert (drawn.low, drawn.high) == pytest.approx((first.low, first.high), abs=0.015)


@given(cases())
def test_equals_scikit_learn(case):
    truth, scores = case
    fpr, tpr, thresholds = metrics.roc_curve(truth, scores, drop_intermediate=False)
    ours = roc_curve(truth, scores)
    assert ours.false_positive_rate == pytest.approx(fpr) and ours.true_positive_rate == pytest.approx(tpr)
    assert ours.thresholds.tolist() == thresholds.tolist()
    assert auroc(truth, scores).value == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert auprc(truth, scores).value == pytest.approx(metrics.average_precision_score(truth, scores))


@given(cases())
def test_delong_against_its_definition(case):
    """Placements by comparing each positive with each negative, as in the paper."""
    truth, scores = case
    wins = (scores[truth == 1][:, None] > scores[truth == 0]) + 0.5 * (
        scores[truth == 1][:, None] == scores[truth == 0]
    )
    areas, covariance = delong(truth, scores)
    assert areas[0] == pytest.approx(wins.mean())
    m, n = wins.shape
    if min(m, n) > 1:
        expected = wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n
        assert covariance[0, 0] == pytest.approx(expected)


@given(cases(), st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]))
def test_sensitivity_at_a_specificity_is_the_best_of_all_thresholds(case, specificity):
    truth, scores = case
    best = 0.0
    for t in [*np.unique(scores), np.inf]:
        if (scores[truth == 0] >= t).mean() <= 1 - specificity + 1e-12:
            best = max(best, (scores[truth == 1] >= t).mean())
    point = operating_point(truth, scores, threshold_at(truth, scores, specificity))
    assert point.sensitivity.value == pytest.approx(best)
    assert point.specificity.value >= specificity - 1e-12


def test_what_is_undefined_says_so():
    assert auroc([0, 0], [0.1, 0.2]).reason == "all cases are negative" and auroc([], []).reason == "no cases"
    assert auprc([0, 0], [0.1, 0.2]).value is None and threshold_at([1], [0.5], 0.9) is None
    separated = auroc([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert separated.value == 1 and separated.low is None and "separated" in separated.reason
    assert auroc([0, 0, 1], [0.1, 0.6, 0.5]).reason == "no interval: a class has one case"
    point = operating_point([1, 1], [0.2, 0.3], 0.5)
    assert point.specificity.value is None and point.ppv.reason == "nothing is called positive"
    assert proportion(0, 0).value is None
    json.dumps([separated.json(), auroc([0], [0.1]).json()], allow_nan=False)
    with pytest.raises(ValueError, match="ROC"):
        roc_curve([1], [0.3])
    with pytest.raises(ValueError, match="area"):
        delong([1], [0.3])


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [([0, 2], [0.1, 0.2], "0 or 1"), ([0, 1], [0.1, np.nan], "finite"), ([0, 1], [0.1], "one length")],
)
def test_what_is_no_case_is_refused(labels, scores, message):
    for function in (auroc, auprc, delong, lambda a, b: operating_point(a, b, 0.5)):
        with pytest.raises(ValueError, match=message):
            function(labels, scores)


@given(st.integers(0, 30), st.integers(0, 30))
def test_wilson_by_its_formula(k, more):
    n, z = k + more, 1.959963984540054
    if not n:
        return
    p = k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    assert (proportion(k, n).low, proportion(k, n).high) == pytest.approx(expected, abs=1e-9)
