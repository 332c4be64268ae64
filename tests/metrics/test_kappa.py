"""Kappa and stages against scikit-learn, the official submission and the 100 patients of CAMELYON17."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from wsi.metrics.kappa import NODE_STAGES, PN_STAGES, confusion, isup_grade, node_stage, patient_stage, quadratic_kappa

ORACLE = """pN0 pN0 pN0(i+) pN1mi pN1 pN2 pN1 pN0 pN2 pN1mi / pN0 pN0(i+) pN0 pN1mi pN1mi pN2 pN2 pN0 pN0 pN1"""


def grades(names: list[str]) -> list[int]:
    return [PN_STAGES.index(name) for name in names]


def patients(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["patient"]: row["stage"] for row in csv.DictReader(file)}


def test_the_oracle_of_the_specification():
    truth, found = (grades(part.split()) for part in ORACLE.split(" / "))
    assert quadratic_kappa(truth, found, 5).value == pytest.approx(0.5643153527)


@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_equals_scikit_learn(n_classes, pairs):
    truth, found = np.array(pairs).T % n_classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cohen_kappa_score(truth, found, labels=list(range(n_classes)), weights="quadratic")
    ours = quadratic_kappa(truth, found, n_classes)
    if np.isnan(expected):
        assert ours.value is None and "same" in ours.reason and ours.n == len(pairs)
    else:
        assert ours.value == pytest.approx(expected, abs=1e-12)


def test_stages_of_all_patients_of_camelyon17(data_dir: Path):
    stages = patients(data_dir / "camelyon/camelyon17_stage_labels.csv")
    names = [name for name in stages if name.endswith(".zip")]
    assert len(names) == 100
    for name in names:
        nodes = [stage for node, stage in stages.items() if node.startswith(name[:-4] + "_node")]
        assert len(nodes) == 5 and patient_stage(nodes) == stages[name], name


def test_kappa_of_an_official_submission(data_dir: Path):
    truth = patients(data_dir / "camelyon/camelyon17_reference_subset.csv")
    found = patients(data_dir / "camelyon/camelyon17_submission_subset.csv")
    names = [name for name in truth if name.endswith(".zip")]
    kappa = quadratic_kappa(grades([truth[n] for n in names]), grades([found[n] for n in names]), 5)
    assert kappa.value == pytest.approx(0.8889, abs=5e-5) and kappa.n == 5


def test_what_is_undefined_says_so():
    assert quadratic_kappa([], [], 3).reason == "no cases"
    assert quadratic_kappa([0, 0], [1, 1], 3).value == 0.0, "a constant that is wrong agrees no better than chance"
    json.dumps(quadratic_kappa([2, 2], [2, 2], 3).json(), allow_nan=False)


@pytest.mark.parametrize("wrong", [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0.5, 1], [0, 1]), ([0], [0, 1])])
def test_grades_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="grades"):
        quadratic_kappa(*wrong, 3)


def test_sizes_at_the_limits():
    sizes = {0: "negative", 0.001: "itc", 0.2: "itc", 0.2000001: "micro", 2.0: "micro", 2.0000001: "macro"}
    assert {mm: node_stage(mm) for mm in sizes} == sizes
    assert node_stage(0.1, 200) == "itc" and node_stage(0.1, 201) == "micro" and node_stage(3, 1) == "macro"
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="size"):
            node_stage(wrong)


@given(st.lists(st.sampled_from(NODE_STAGES), min_size=1, max_size=12))
def test_stages_against_the_rules_spelled_out(nodes):
    count = {stage: nodes.count(stage) for stage in NODE_STAGES}
    positive = count["micro"] + count["macro"]
    rules = {
        "pN0": positive == 0 and count["itc"] == 0,
        "pN0(i+)": positive == 0 and count["itc"] > 0,
        "pN1mi": positive > 0 and count["macro"] == 0,
        "pN1": count["macro"] > 0 and 1 <= positive <= 3,
        "pN2": count["macro"] > 0 and positive >= 4,
    }
    assert [stage for stage, applies in rules.items() if applies] == [patient_stage(nodes)]


def test_stages_and_scores_of_other_names_are_refused():
    for nodes in ([], ["Macro"], ["pN0"]):
        with pytest.raises(ValueError, match="nodes"):
            patient_stage(nodes)
    for score in ("", "3", "2+2", "ISUP 3"):
        with pytest.raises(ValueError, match="Gleason"):
            isup_grade(score)
    assert isup_grade(" Negative ") == 0 and isup_grade("3 + 5") == 4
    assert confusion([], [], 2).tolist() == [[0, 0], [0, 0]]
