"""ROC and precision-recall against real CAMELYON16 scores with known values, and scikit-learn."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.calibration import brier, expected_calibration_error
from wsi.metrics.compare import auroc_difference
from wsi.metrics.roc import auprc, auroc, delong, operating_point, proportion, roc_curve, threshold_at


@pytest.fixture(scope="module")
def real() -> dict[str, np.ndarray]:
    """Scores of two methods on the 129 test slides (DIDSR/DeepLearningCamelyon_II, RF_results, CC0)."""
    with (Path(__file__).parent / "data/camelyon16_didsr.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name: np.array([float(row[name]) for row in rows]) for name in ("method_i", "method_ii")}
    size = np.array([row["size"] for row in rows])
    return {**found, "size": size, "truth": (size != "None").astype(int)}


@st.composite
def cases(draw):
    n = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    truth = rng.integers(0, 2, n)
    truth[:2] = 0, 1
    return truth, rng.integers(0, draw(st.sampled_from([3, 10, 10**6])), n) / 7


def test_real_scores(real):
    truth, first, second = real["truth"], real["method_i"], real["method_ii"]
    assert len(truth) == 129 and truth.sum() == 49
    areas, covariance = delong(truth, first, second)
    assert areas == pytest.approx([0.91556122, 0.98392857], abs=1e-8)
    se = np.sqrt(np.diag(covariance))
    assert se == pytest.approx([0.02596570, 0.00873309], abs=1e-8)
    assert (areas[0] - 1.959964 * se[0], areas[0] + 1.959964 * se[0]) == pytest.approx((0.864669, 0.966453), abs=1e-6)
    assert auprc(truth, first).value == pytest.approx(0.88305650, abs=1e-8)
    assert auprc(truth, second).value == pytest.approx(0.97995034, abs=1e-8)
    assert brier(truth, first).value == pytest.approx(0.12689865, abs=1e-8)
    assert brier(truth, second).value == pytest.approx(0.04187212, abs=1e-8)
    assert expected_calibration_error(truth, first, 10).value == pytest.approx(0.11343331, abs=1e-8)
    assert expected_calibration_error(truth, second, 10).value == pytest.approx(0.05779158, abs=1e-8)
    for scores, expected in ((first, 0.714286), (second, 0.918367)):
        point = operating_point(truth, scores, threshold_at(truth, scores, 0.95))
        assert point.sensitivity.value == pytest.approx(expected, abs=1e-6) and point.specificity.value >= 0.95
    for size, n, expected in (("Macro", 22, 0.990909), ("Micro", 27, 0.854167)):
        rows = np.isin(real["size"], (size, "None"))
        assert truth[rows].sum() == n and auroc(truth[rows], first[rows]).value == pytest.approx(expected, abs=1e-6)
    result = auroc_difference(truth, first, second)
    assert result.p_value == pytest.approx(0.00383954, abs=1e-8)
    z = result.estimate.value / math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert z == pytest.approx(-2.891052, abs=1e-6)


def test_intervals_stay_within_one(real):
    area = auroc(real["truth"], real["method_ii"])
    assert area.value + 1.96 * 0.00873309 > 1 > area.high > area.value > area.low > 0.9
    drawn = bootstrap(
        lambda rows: auroc(real["truth"][rows], real["method_i"][rows]).value,
        range(129),
        strata=real["truth"].tolist(),
        n_draws=2000,
    )
    # The specification's stratified bootstrap; its order of draws is not ours.
    assert (drawn.low, drawn.high) == pytest.approx((0.85866, 0.95918), abs=0.004)


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
