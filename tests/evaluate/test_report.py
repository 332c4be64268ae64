"""What a report holds, whoever wrote the names in it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Run
from tests.evaluate.make import scored
from wsi.errors import EvaluationError, OutputError
from wsi.evaluate import plots
from wsi.evaluate.report import REPORTING_ITEMS, Report, leaderboard, packaged_rows, read_about, write_report
from wsi.metrics.calibration import reliability
from wsi.metrics.estimate import Estimate
from wsi.metrics.froc import SlideHits, froc

HOSTILE = "<script>alert(1)</script>\"'&"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def a_report() -> Report:
    y, p = np.array([0, 0, 1, 1], bool), np.array([0.1, 0.6, 0.4, 0.9])
    curve = froc([SlideHits(True, np.array([0.2]), np.array([0.9, 0.0]), 2)])
    pictures = [
        plots.roc_plot({HOSTILE: (y, p)}),
        plots.froc_plot({"one": curve, "two": curve}),
        plots.confusion_plot(np.array([[3, 0], [1, 0]]), ("a", "b")),
        plots.reliability_plot(reliability(y, p)),
        plots.net_benefit_plot(y, p),
        plots.forest_plot(
            {"all": Estimate(0.7, 0.6, 0.8), "none": Estimate.undefined("few"), "$\\frac$": Estimate(0.5)}, "auroc"
        ),
        plots.dice_plot({f"$\\frac${i}": i / 40 for i in range(40)}, Estimate(0.5, 0.4, 0.6)),
        plots.overlap_plot([plots.Overlap("$\\frac$", 0.5, y[None, :], p[None, :] > 0.5)] * 4),
    ]
    results = {"auroc": Estimate(0.75, 0.2, 0.97, 4, "DeLong"), "kappa": Estimate.undefined(HOSTILE)}
    table = [{"slide": HOSTILE, "value": None, "more": [1, 2]}]
    return Report(
        "slides", HOSTILE, {HOSTILE: HOSTILE}, {"n": 4}, results, {"slides": table}, pictures, warnings=(HOSTILE,)
    )


def test_a_page_without_scripts_and_without_anything_from_elsewhere(tmp_path: Path):
    write_report(tmp_path, a_report(), {"intended_use": HOSTILE, "own": "x"})
    text = (tmp_path / "index.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.seen}
    assert all(a["src"].startswith("data:image/png") for tag, a in tags.seen if tag == "img")
    assert sum(tag == "img" for tag, _ in tags.seen) == 8
    assert "http" not in text and "esearch use only" in text
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["reporting"]["intended_use"] == HOSTILE and content["reporting"]["own"] == "x"
    assert content["reporting"]["funding"] is None and set(REPORTING_ITEMS) <= set(content["reporting"])
    assert content["results"]["kappa"] == {**content["results"]["kappa"], "value": None, "reason": HOSTILE}


def test_the_same_report_is_the_same_files(tmp_path: Path):
    for name in "ab":
        write_report(tmp_path / name, a_report())
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 12
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_packaged_rows_name_their_sources():
    exclusions = {row["slide"]: row for row in packaged_rows("camelyon16_exclusions")}
    assert exclusions["test_049"]["task"] == "all" and exclusions["test_114"]["task"] == "lesion"
    assert sum(name.startswith("tumor") for name in exclusions) == 20
    assert all(row["source"] and row["issue"] for row in exclusions.values())
    board = packaged_rows("leaderboard")
    assert all(row["source"] and row["protocol"] for row in board)
    best = next(row for row in board if row["name"] == "HMS & MIT II")
    assert (best["froc"], best["auroc"]) == ("0.807", "0.994")


def test_a_run_without_a_number_stands_last():
    rows = leaderboard("camelyon16", "froc", {"froc": Estimate.undefined("no lesion")}, "here")
    assert rows[-1]["name"] in ("this run", "pathologist without time limit")
    values = [row["froc"] for row in rows if row["froc"] is not None]
    assert values == sorted(values, reverse=True)


def test_answers_that_are_none_and_folders_that_cannot_be_written(tmp_path: Path):
    for text in ("[", "[]", '{"a": 1}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(EvaluationError):
            read_about(tmp_path / "a.json")
    with pytest.raises(EvaluationError, match="no such file"):
        read_about(tmp_path / "none.json")
    with pytest.raises(EvaluationError):
        read_about(tmp_path)
    (tmp_path / "a.json").write_text('{"funding": "none"}')
    assert read_about(tmp_path / "a.json") == {"funding": "none"} and read_about(None) == {}
    with pytest.raises(OutputError):
        write_report(tmp_path / "a.json" / "out", Report("t", "t", {}, {}, {}))


def test_what_no_report_wrote_is_not_written_over(tmp_path: Path, wsi: Run):
    """A table of labels that has the name of one of ours, in the folder that is asked for."""
    (tmp_path / "cases.csv").write_text(text := "id,label,score\na,0,0.1\nb,1,0.2\nc,1,0.3\nd,0,0.4\n")
    words = ("evaluate", "slides", tmp_path / "cases.csv", "--bootstrap", 10)
    code, _, err = wsi(*words, "-o", tmp_path)
    assert code == 2 and "cases.csv: is there already" in err and "another folder" in err
    assert (tmp_path / "cases.csv").read_text() == text and len(list(tmp_path.iterdir())) == 1
    for _ in range(2):  # but a report may be made again
        assert wsi(*words, "-o", tmp_path / "out")[0] == 0
    assert {"report.json", "cases.csv", "index.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        ("camelyon16", "detections/a.csv", ("--annotations", "{}/xml")),
        ("camelyon17", "submission.csv", ("--reference", "{}/reference.csv")),
        ("segmentation", "slides.csv", ("--annotations", "{}/xml", "--labels", "{}/slides.csv")),
    ],
)
def test_files_of_others_outlive_each_task(tmp_path: Path, wsi: Run, task: str, name: str, words: tuple[str, ...]):
    slide = "patient_001_node_0" if task == "camelyon17" else "a"
    scored(tmp_path / "results", slide, np.full((4, 4), 0.75))
    (tmp_path / "xml").mkdir()
    (tmp_path / "reference.csv").write_text("patient,stage\npatient_001.zip,pN0\n")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text := "slide_id,patient\na,1\n")
    words = (*(word.format(tmp_path) for word in words), "--bootstrap", 10)
    code, _, err = wsi("evaluate", task, tmp_path / "results", *words, "-o", tmp_path)
    assert code == 2 and "is there already" in err and (tmp_path / name).read_text() == text
    assert not (tmp_path / "report.json").exists()
    for _ in range(2):
        code, _, err = wsi("evaluate", task, tmp_path / "results", *words, "-o", tmp_path / "out")
        assert code == 0, err
