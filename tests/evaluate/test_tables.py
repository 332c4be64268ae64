"""Any labels in a CSV, on scores of two methods."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from tests.conftest import Run
from tests.evaluate.make import scored
from tests.metrics.made_up import scores_of_129
from wsi.errors import EvaluationError
from wsi.evaluate.cases import Cases, TableConfig, divided, read_cases
from wsi.evaluate.report import write_report
from wsi.evaluate.tables import evaluate_table
from wsi.metrics.compare import auroc_difference

QUICK = TableConfig(n_bootstrap=100)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The 129 test slides: labels with lesion size, and the scores of two methods."""
    slides = scores_of_129()
    names = [f"test_{i + 1:03d}" for i in range(129)]
    labels = [
        f"{name},{label},{size},{i // 2}"
        for i, (name, label, size) in enumerate(zip(names, slides["truth"], slides["size"], strict=True))
    ]
    (tmp_path / "labels.csv").write_text("slide_id,label,size,patient\n" + "\n".join(labels))
    for method in ("one", "two"):
        lines = [f"{name},{score}" for name, score in reversed(list(zip(names, slides[method], strict=True)))]
        (tmp_path / f"{method}.csv").write_text("slide_id,prob_tumour\n" + "\n".join(lines))
    return tmp_path


def test_129_slides(made: Path):
    config = TableConfig(groups=("size",), n_bootstrap=200, threshold=0.5)
    cases, warnings = read_cases(made / "one.csv", made / "labels.csv", config)
    other, _ = read_cases(made / "two.csv", made / "labels.csv", config)
    report = evaluate_table("slides", cases, config=config, other=other, warnings=warnings)
    found = report.results
    slides = scores_of_129()
    truth, one, two = slides["truth"], slides["one"], slides["two"]
    area = {name: roc_auc_score(truth, slides[name]) for name in ("one", "two")}
    assert found["auroc"].value == pytest.approx(area["one"]) and found["auroc"].low is None
    over_patients = found["auroc_over_patients"]
    assert over_patients.n == 65 and over_patients.low < area["one"] < over_patients.high
    assert found["auprc"].value == pytest.approx(average_precision_score(truth, one))
    assert found["brier"].value == pytest.approx(brier_score_loss(truth, one))
    assert found["prevalence"].value == pytest.approx(49 / 129)
    assert found["auroc_difference"].value == pytest.approx(area["one"] - area["two"])
    assert all(row["p_value"] is None and "over patients" in row["reason"] for row in report.tables["comparison"])
    alone = replace(cases, patients=cases.ids), replace(other, patients=other.ids)
    delong, mcnemar = evaluate_table("slides", alone[0], config=config, other=alone[1]).tables["comparison"]
    assert delong["p_value"] == pytest.approx(auroc_difference(truth, one, two).p_value) and 0 < mcnemar["p_value"] <= 1
    assert {row["value"]: row["n"] for row in report.tables["subgroups"]} == {"Macro": 22, "Micro": 27, "None": 80}
    assert all("fewer than 10" in row["reason"] for row in report.tables["subgroups"]), "each size is of one class"
    write_report(made / "out", report)
    text = (made / "out/report.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["data"]["cases"] == 129 and content["reporting"]["intended_use"] is None
    assert {f"{n}.png" for n in ("roc", "reliability", "net_benefit", "subgroups")} <= {
        p.name for p in (made / "out").iterdir()
    }


def test_subgroups_say_how_far_they_are_from_all(made: Path):
    lines = (made / "labels.csv").read_text().split()
    text = [lines[0] + ",centre", *(f"{line},{'AB'[i % 3 == 0]}" for i, line in enumerate(lines[1:]))]
    (made / "labels.csv").write_text("\n".join(text))
    config = TableConfig(groups=("centre",), n_bootstrap=100)
    cases, _ = read_cases(made / "one.csv", made / "labels.csv", config)
    report = evaluate_table("slides", cases, config=config)
    rows = {row["value"]: row for row in report.tables["subgroups"]}
    of = {v: np.array(cases.groups["centre"]) == v for v in "AB"}
    for value, row in rows.items():
        y, p = cases.labels[of[value]], cases.scores[of[value]]
        wins = (p[y][:, None] > p[~y]) + 0.5 * (p[y][:, None] == p[~y])
        assert row["metric"] == pytest.approx(wins.mean()) and row["n"] == of[value].sum()
        assert row["gap"] == pytest.approx(wins.mean() - report.results["auroc"].value)
        assert row["gap_low"] <= row["gap"] <= row["gap_high"]


def test_the_threshold_comes_from_validation_cases(made: Path):
    cases, _ = read_cases(made / "one.csv", made / "labels.csv", QUICK)
    (made / "val.csv").write_text(
        "id,label,score\n" + "".join(f"v{i},{i % 2},{0.3 + 0.1 * (i % 2)}\n" for i in range(9))
    )
    held, _ = read_cases(made / "val.csv", made / "val.csv", QUICK)
    report = evaluate_table("slides", cases, config=QUICK, validation=held)
    expected = (cases.scores[cases.labels] >= 0.4).mean()
    assert report.results["sensitivity_validation_0.95"].value == pytest.approx(expected)
    assert not any("validation" in warning for warning in report.warnings)


def test_grades_and_gleason_scores(tmp_path: Path):
    gleason = ["0+0", "negative", "3+3", "3+4", "4+3", "4+4", "5+5", "3+5"]
    (tmp_path / "train.csv").write_text(
        "image_id,gleason_score\n" + "".join(f"i{i},{g}\n" for i, g in enumerate(gleason))
    )
    (tmp_path / "mine.csv").write_text(
        "image_id,grade\n" + "".join(f"i{i},{g}\n" for i, g in enumerate([0, 1, 1, 2, 3, 4, 5, 5]))
    )
    config = TableConfig(label="gleason_score", grades=6, gleason=True, n_bootstrap=50)
    cases, _ = read_cases(tmp_path / "mine.csv", tmp_path / "train.csv", config)
    assert cases.labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 4]
    report = evaluate_table("slides", cases, config=config, other=cases)
    assert report.results["quadratic_kappa"].value == pytest.approx(
        1 - 2 / (8 * (2.9375 + 3.609375 - 2 * 0) / 1), abs=1
    )
    assert report.results["accuracy"].value == 6 / 8 and report.results["kappa_difference"].value == 0
    assert sum(row[str(g)] for row in report.tables["confusion"] for g in range(6)) == 8
    write_report(tmp_path / "out", report)
    for cell in ("6", "-1", "1.5", "x"):
        (tmp_path / "mine.csv").write_text("image_id,grade\n" + "".join(f"i{i},{cell}\n" for i in range(8)))
        with pytest.raises(EvaluationError, match=r"grades|score"):
            read_cases(tmp_path / "mine.csv", tmp_path / "train.csv", config)


def test_a_results_folder_gives_its_positive_probability(tmp_path: Path):
    for name, p in (("a", 0.25), ("b", 0.75)):
        scored(tmp_path / "results", name, np.zeros((2, 2)), mil=p)
    (tmp_path / "labels.csv").write_text("slide_id,label\na,0\nb,1\n")
    cases, warnings = read_cases(tmp_path / "results", tmp_path / "labels.csv", QUICK)
    assert cases.scores.tolist() == [0.25, 0.75] and "patient" in warnings[0]
    report = evaluate_table("slides", cases, config=QUICK)
    assert report.results["auroc"].value == 1 and "one case" in report.results["auroc"].reason
    by_mpp = TableConfig(groups=("mpp",))
    assert read_cases(tmp_path / "results", tmp_path / "labels.csv", by_mpp)[0].groups == {"mpp": ("0.243", "0.243")}
    with pytest.raises(EvaluationError, match="no column 'mpp'"):
        read_cases(tmp_path / "labels.csv", tmp_path / "labels.csv", by_mpp)
    scored(tmp_path / "results", "c", np.zeros((2, 2)))
    (tmp_path / "labels.csv").write_text("slide_id,label\na,0\nb,1\nc,1\n")
    with pytest.raises(EvaluationError, match="score of 'c'"):
        read_cases(tmp_path / "results", tmp_path / "labels.csv", QUICK)


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1e6]), min_size=1))
def test_numbers_of_many_kinds_are_divided_into_ranges_apart(numbers: list[float]):
    found = divided([str(number) for number in numbers])
    if len(set(numbers)) <= 6:
        assert found == tuple(map(str, numbers))
        return
    ranges = sorted({tuple(map(float, name.split(" to "))) for name in found})
    assert 1 <= len(ranges) <= 3 and all(a[1] < b[0] for a, b in pairwise(ranges))
    for number, name in zip(numbers, found, strict=True):
        low, high = map(float, name.split(" to "))
        assert low <= number <= high


@pytest.mark.parametrize("wrong", [{"specificity": 1.5}, {"specificity": float("nan")}, {"threshold": float("nan")}])
def test_thresholds_that_are_none_are_refused(wrong: dict[str, float]):
    with pytest.raises(EvaluationError, match="is no"):
        TableConfig(**wrong)


def test_one_class_is_undefined_and_still_reported(tmp_path: Path):
    (tmp_path / "all.csv").write_text("id,label,score\na,1,0.2\nb,1,0.7\n")
    cases, _ = read_cases(tmp_path / "all.csv", tmp_path / "all.csv", QUICK)
    report = evaluate_table("patches", cases, config=QUICK)
    assert report.results["auroc"].reason == "all cases are positive"
    write_report(tmp_path / "out", report)
    json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)


def test_scores_that_are_no_probabilities_say_nothing_of_calibration(tmp_path: Path):
    (tmp_path / "a.csv").write_text("id,label,score\n" + "".join(f"{i},{i % 2},{i - 4}\n" for i in range(9)))
    cases, _ = read_cases(tmp_path / "a.csv", tmp_path / "a.csv", QUICK)
    report = evaluate_table("patches", cases, config=QUICK)
    assert "brier" not in report.results and any("calibration" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label,score\na,0,0.1\na,1,0.2\n", "'a' twice"),
        ("id,label,score\na,0,nan\nb,1,0.2\n", "score of 'a' is 'nan'"),
        ("id,label,score\na,0,\nb,1,0.2\n", "score of 'a'"),
        ("id,label,score\na,no,0.1\nb,yes,0.2\n", "--positive"),
        ("id,label,score\na,0,0.1\nb,1,0.2\nc,2,0.2\n", "--positive"),
        ("id,label,score\na,0\n", "2 cells"),
        ("id,truth,score\na,0,0.1\n", "no column 'label'"),
        ("id,label,prob_a,prob_b\na,0,0.1,0.9\n", "--score"),
        ("name,label,score\na,0,0.1\n", "name the case"),
        ("id,label,score,label\na,0,0.1,1\n", "two columns 'label'"),
        ("id,label,score\na,1,0.1\nb,,0.2\n", "'b' has no label"),
        ("", "no rows"),
    ],
)
def test_tables_that_cannot_be_used_are_errors(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_cases(tmp_path / "a.csv", tmp_path / "a.csv", QUICK)


def test_cases_without_predictions_and_other_cases_are_errors(made: Path):
    text = (made / "one.csv").read_text().split()
    (made / "short.csv").write_text("\n".join(text[:-1]))
    with pytest.raises(EvaluationError, match="nothing of 1 labelled cases, 'test_001'"):
        read_cases(made / "short.csv", made / "labels.csv", QUICK)
    (made / "long.csv").write_text("\n".join([*text, "more,0.5"]))
    cases, warnings = read_cases(made / "long.csv", made / "labels.csv", QUICK)
    assert any("'more'" in warning for warning in warnings)
    labels = (made / "labels.csv").read_text().split()
    (made / "half.csv").write_text("\n".join(labels[:60]))
    half, _ = read_cases(made / "one.csv", made / "half.csv", QUICK)
    with pytest.raises(EvaluationError, match="other cases"):
        evaluate_table("slides", cases, config=QUICK, other=half)
    with pytest.raises(EvaluationError, match="no such file"):
        read_cases(made / "one.csv", made / "none.csv", QUICK)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_cases(made / "one.csv", made, QUICK)


def test_no_interval_is_narrower_for_patients_who_stand_there_ten_times(made: Path):
    """The same cases ten times over: whatever has an interval at all has it over patients, and it stays as wide."""
    config = replace(QUICK, threshold=0.5)
    once, other = (read_cases(made / f"{n}.csv", made / "labels.csv", config)[0] for n in ("one", "two"))
    once, other = (replace(each, patients=each.ids) for each in (once, other))
    tenfold = [
        Cases(each.ids * 10, np.tile(each.labels, 10), np.tile(each.scores, 10), each.patients * 10)
        for each in (once, other)
    ]
    few = evaluate_table("slides", once, config=config, validation=once, other=other).results
    many = evaluate_table("slides", tenfold[0], config=config, validation=once, other=tenfold[1]).results
    for name, estimate in many.items():
        if estimate.low is not None:
            assert "over patients" in estimate.method and estimate.low == pytest.approx(few[name].low), name
    assert many["specificity_given_over_patients"].low < few["specificity_given"].value
    assert {"sensitivity_given", "prevalence", "auroc_difference", "calibration_slope"} <= {
        name for name, estimate in many.items() if estimate.value is not None and "independent" in estimate.reason
    }
    grades = [
        Cases(each.ids, each.labels.astype(int), (each.scores > 0.5).astype(int), each.patients)
        for each in (once, tenfold[0])
    ]
    of = [evaluate_table("slides", each, config=replace(QUICK, grades=2)).results for each in grades]
    assert of[0]["accuracy"].low is not None and of[1]["accuracy"].low is None
    assert of[1]["accuracy_over_patients"].n == 129 and of[1]["accuracy_over_patients"].low < of[1]["accuracy"].value


def test_dates_are_divided_into_ranges_that_can_be_told_apart():
    found = divided([f"2019{month:02}{day:02}" for month in range(1, 13) for day in (1, 15)])
    assert sorted(set(found)) == ["20190101 to 20190415", "20190501 to 20190815", "20190901 to 20191215"]


def test_validation_cases_need_neither_patients_nor_groups(made: Path, wsi: Run):
    lines = (made / "labels.csv").read_text().split()
    (made / "labels.csv").write_text(
        "\n".join([lines[0] + ",who", *(f"{each},{i}" for i, each in enumerate(lines[1:]))])
    )
    (made / "val.csv").write_text("id,label,score\n" + "".join(f"v{i},{i % 2},{0.1 * i}\n" for i in range(9)))
    words = (
        "--labels",
        made / "labels.csv",
        "--subgroup",
        "size",
        "--patient",
        "who",
        "--validation",
        made / "val.csv",
    )
    code, out, err = wsi("evaluate", "slides", made / "one.csv", *words, "--bootstrap", 10, "-o", made / "out")
    assert code == 0 and "sensitivity_validation_0.95" in out, err
    scored(made / "results", "test_001", np.zeros((2, 2)), mil=0.5)
    words = ("--labels", made / "labels.csv", "--score", "prob_stroma", "-o", made / "out")
    code, _, err = wsi("evaluate", "slides", made / "results", *words)
    assert code == 2 and "--score: is a column of a CSV" in err
