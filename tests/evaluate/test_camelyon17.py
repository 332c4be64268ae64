"""Stages of CAMELYON17 against the official submission and sizes that are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from tests.evaluate.make import scored
from wsi.errors import EvaluationError
from wsi.evaluate.camelyon17 import evaluate_camelyon17
from wsi.evaluate.report import write_report
from wsi.metrics.kappa import PN_STAGES


def test_an_official_submission(data_dir: Path, tmp_path: Path):
    folder = data_dir / "camelyon"
    report = evaluate_camelyon17(
        folder / "camelyon17_submission_subset.csv", folder / "camelyon17_reference_subset.csv", out=tmp_path
    )
    assert report.results["kappa"].value == pytest.approx(0.8889, abs=5e-5)
    assert report.results["kappa"].n == 5 and "patients" in report.results["kappa"].method
    assert report.data == {**report.data, "patients": 5, "slides": 25}
    assert [row["name"] for row in report.leaderboard if row["kappa"] and row["kappa"] > 0.8][-1] == "this run"


def test_a_reference_against_itself(data_dir: Path, tmp_path: Path):
    path = data_dir / "camelyon/camelyon17_stage_labels.csv"
    report = evaluate_camelyon17(path, path, out=tmp_path, n_bootstrap=50)
    assert report.results["kappa"].value == report.results["slide_kappa"].value == 1
    patients = {line.split("_node")[0] for line in path.read_text().lower().splitlines() if line.endswith(",itc")}
    assert report.results["sensitivity_itc"].n == len(patients) < 35 and report.data["patients"] == 100


#: Tiles of 256 px at 0.243 um are 62 um: a row of n is about n * 62 um long.
SIZES = {"negative": 0, "itc": 2, "micro": 8, "macro": 34}


def results_of(tmp_path: Path, stages: dict[str, list[str]]) -> Path:
    for patient, nodes in stages.items():
        for i, stage in enumerate(nodes):
            values = np.full((4, 40), 0.125)
            values[1, : SIZES[stage]] = 0.875
            scored(tmp_path / "results", f"{patient}_node_{i}", values)
    return tmp_path / "results"


def reference_of(tmp_path: Path, stages: dict[str, str]) -> Path:
    path = tmp_path / "reference.csv"
    path.write_text("patient,stage\n" + "".join(f"{name},{stage}\n" for name, stage in stages.items()))
    return path


def test_sizes_become_slide_labels_and_patient_stages(tmp_path: Path):
    nodes = {
        "patient_000": ["negative"] * 5,
        "patient_001": ["itc", "negative", "negative", "negative", "negative"],
        "patient_002": ["micro", "itc", "negative", "negative", "negative"],
        "patient_003": ["macro", "micro", "micro", "itc", "negative"],
        "patient_004": ["macro", "micro", "micro", "macro", "negative"],
    }
    truth = dict(zip((f"{name}.zip" for name in nodes), PN_STAGES, strict=True))
    results = results_of(tmp_path, nodes)
    report = evaluate_camelyon17(results, reference_of(tmp_path, truth), out=tmp_path / "out", n_bootstrap=50)
    assert report.results["kappa"].value == 1 and not report.warnings
    write_report(tmp_path / "out", report)
    with (tmp_path / "out/submission.csv").open() as file:
        rows = {row["patient"]: row["stage"] for row in csv.DictReader(file)}
    assert {name: rows[name] for name in truth} == truth
    assert [rows[f"patient_003_node_{i}.tif"] for i in range(5)] == nodes["patient_003"]
    # What was written is read again, and gives the same.
    again = evaluate_camelyon17(tmp_path / "out/submission.csv", tmp_path / "reference.csv", out=tmp_path / "two")
    assert again.results["kappa"].value == 1
    # At a threshold that nothing reaches every node is negative: a constant, wrong prediction.
    strict = evaluate_camelyon17(results, tmp_path / "reference.csv", out=tmp_path / "three", threshold=0.95)
    expected = cohen_kappa_score(list(truth.values()), ["pN0"] * 5, labels=list(PN_STAGES), weights="quadratic")
    assert strict.results["kappa"].value == pytest.approx(expected) == 0
    assert {row["predicted"] for row in strict.tables["stages"]} == {"pN0"}


def test_constant_stages_are_undefined_with_a_reason(tmp_path: Path):
    path = reference_of(tmp_path, {"patient_000.zip": "pN1", "patient_001.zip": "pN1"})
    report = evaluate_camelyon17(path, path, out=tmp_path)
    assert report.results["kappa"].value is None and "same" in report.results["kappa"].reason
    write_report(tmp_path / "out", report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,stage\npatient_001.zip,pN0\n", "says nothing of 1 patients, patient_000.zip"),
        ("patient,stage\npatient_000.zip,pn0\n", "'pn0'"),
        ("patient,stage\npatient_000.zip,pN0\npatient_000.zip,pN1\n", "twice"),
        ("patient,stage\npatient_000.zip,pN0\nPatient_000.zip,pN1\n", "twice"),
        ("name,stage\npatient_000.zip,pN0\n", "Columns"),
        ("patient,stage\npatient_000.zip\n", "1 cells"),
        ("patient,stage\n", "no rows"),
        ("patient,stage\npatient_000_node_0.tif,pN0\n", "'pN0'"),
    ],
)
def test_submissions_that_cannot_be_compared_are_errors(tmp_path: Path, text: str, message: str):
    reference = reference_of(tmp_path, {"patient_000.zip": "pN0"})
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        evaluate_camelyon17(tmp_path / "mine.csv", reference, out=tmp_path)


def test_a_node_without_results_is_an_error_and_odd_names_are_said(tmp_path: Path):
    results = results_of(tmp_path, {"patient_000": ["macro", "itc"]})
    scored(results, "elsewhere", np.zeros((2, 2)))
    truth = {"patient_000.zip": "pN1"}
    report = evaluate_camelyon17(results, reference_of(tmp_path, truth), out=tmp_path / "out", n_bootstrap=0)
    assert len(report.warnings) == 2 and "elsewhere" in report.warnings[0] and "than 5" in report.warnings[1]
    with pytest.raises(EvaluationError, match="patient_000_node_4"):
        evaluate_camelyon17(results, reference_of(tmp_path, truth | {"patient_000_node_4.tif": "micro"}), out=tmp_path)


def test_slides_of_a_patient_are_drawn_together(tmp_path: Path):
    """Half of the patients are right in all five slides, half in none: ten things are known, not fifty."""
    stages = {f"patient_{i:03}_node_{k}.tif": "itc" for i in range(10) for k in range(5)}
    stages |= {f"patient_{i:03}.zip": "pN0(i+)" for i in range(10)}
    found = {name: "negative" if "node" in name and name < "patient_005" else each for name, each in stages.items()}
    (tmp_path / "mine.csv").write_text("patient,stage\n" + "".join(f"{n},{s}\n" for n, s in found.items()))
    report = evaluate_camelyon17(tmp_path / "mine.csv", reference_of(tmp_path, stages), out=tmp_path, n_bootstrap=500)
    for name in ("slide_accuracy", "sensitivity_itc"):
        share = report.results[name]
        assert share.value == 0.5 and share.n == 10 and share.high - share.low > 0.5, "of 50 slides it were 0.27"
