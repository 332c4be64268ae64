"""The bootstrap over patients, and McNemar."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.compare import auroc_difference, mcnemar
from wsi.metrics.estimate import Estimate
from wsi.metrics.roc import auroc


def test_draws_patients_whole():
    patients = ["a", "b", "a", "c", "c", "c"]
    seen = []
    bootstrap(lambda rows: seen.append(sorted(rows)) or 0.0, patients, n_draws=50)
    own = {"a": [0, 2], "b": [1], "c": [3, 4, 5]}
    for rows in seen[1:]:
        counts = np.bincount(rows, minlength=6)
        assert all(len(set(counts[own[name]])) == 1 for name in own)
        assert sum(counts[own[name][0]] for name in own) == 3


def test_strata_keep_their_size():
    labels = np.array([0] * 7 + [1] * 5)
    seen = []
    bootstrap(lambda rows: seen.append(labels[rows].sum()) or 0.0, range(12), strata=labels.tolist(), n_draws=50)
    assert set(seen) == {5} and len(seen) > 1
    bootstrap(lambda rows: seen.append(labels[rows].sum()) or 0.0, range(12), n_draws=50)
    assert len(set(seen)) > 1


@pytest.mark.parametrize(("positives", "rows"), [(1, 1), (4, 1), (4, 9), (5, 1)])
def test_a_class_of_few_patients_gives_no_interval(positives: int, rows: int):
    """However many rows each has; of five there is one."""
    truth = np.repeat([0] * 20 + [1] * positives, rows)
    score = np.random.default_rng(0).random(len(truth))
    patients = np.repeat(np.arange(20 + positives), rows).tolist()
    found = bootstrap(lambda i: auroc(truth[i], score[i]).value, patients, strata=truth.tolist(), n_draws=100)
    assert found.value == auroc(truth, score).value
    if positives < 5:
        assert found.low is found.high is None
        assert found.reason == "no interval: fewer than 5 patients of a class"
    else:
        assert found.low < found.value < found.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 5)  # five identical rows a patient: rows alone would be overconfident
        patients = np.repeat(np.arange(40), 5).tolist()
        found = bootstrap(lambda rows: float(values[rows].mean()), patients, n_draws=200, seed=seed)  # noqa: B023
        covered += found.low <= 0 <= found.high
    assert 175 <= covered <= 199


def test_the_same_seed_is_the_same_interval():
    values = np.arange(9.0)

    def of(seed: int) -> Estimate:
        return bootstrap(lambda rows: float(values[rows].mean()), range(9), n_draws=100, seed=seed)

    assert of(1) == of(1) != of(2)


def test_what_is_undefined_says_so():
    assert bootstrap(lambda rows: None, ["a", "b"]).reason == "undefined on these cases"
    assert bootstrap(lambda rows: 0.5, ["a", "a"]).reason == "no interval: fewer than two patients"
    rare = bootstrap(lambda rows: 1.0 if len(set(rows)) == 6 else None, range(6), n_draws=200)
    assert rare.value == 1 and rare.low is None and "most draws" in rare.reason and "of 200 draws" in rare.method


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_by_its_formula(only_first, only_second, both):
    a = [1] * only_first + [0] * only_second + [1] * both
    b = [0] * only_first + [1] * only_second + [1] * both
    result, n = mcnemar(a, b), only_first + only_second
    if not a:
        assert result.p_value is None and result.estimate.value is None
        return
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    assert result.p_value == pytest.approx(min(1.0, 2 * tail) if n else 1.0)
    assert result.estimate.value == pytest.approx((sum(a) - sum(b)) / len(a))


def test_differences_that_are_undefined_say_so():
    same = auroc_difference([0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4])
    assert same.estimate.value == 0 and same.p_value is None and "variance" in same.estimate.reason
    assert auroc_difference([1, 1], [1, 2], [2, 1]).estimate.reason == "all cases are positive"
    with pytest.raises(ValueError, match="one length"):
        mcnemar([1], [1, 0])


def test_an_estimate_holds_no_nan():
    for wrong in ({"value": float("nan")}, {"value": 1.0, "low": float("inf")}, {"value": None}):
        with pytest.raises(ValueError, match="estimate"):
            Estimate(**wrong)
    assert str(Estimate(0.5)) == "0.500" and str(Estimate.undefined("x")) == "undefined: x"
