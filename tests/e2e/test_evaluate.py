"""From slides to a benchmark by the commands alone, on lesions that are known; and what the commands refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import shapely

from benchmarks.camelyon_phantom import asap_xml
from wsi.cli import main
from wsi.phantom import PhantomConfig, write_phantom


def wsi(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["wsi", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


@pytest.fixture(scope="module")
def camelyon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A normal slide and one with two micrometastases and isolated tumour cells, scored."""
    folder = tmp_path_factory.mktemp("camelyon")
    for part in ("slides", "xml", "swapped", "halved"):
        (folder / part).mkdir()
    for name, seed, lengths in (("normal", 51, ()), ("tumour", 52, (800.0, 450.0, 140.0))):
        config = PhantomConfig(size=(3072, 3072), mpp=1.0, seed=seed, tumours=0, tumour_um=lengths)
        tumours = list(write_phantom(folder / f"slides/{name}.tif", config).tumours.geoms)
        if tumours:
            (folder / f"xml/{name}.xml").write_text(asap_xml(tumours))
            swapped = [shapely.transform(each, lambda xy: xy[:, ::-1]) for each in tumours]
            (folder / f"swapped/{name}.xml").write_text(asap_xml(swapped))
            (folder / f"halved/{name}.xml").write_text(
                asap_xml([shapely.transform(t, lambda xy: xy / 2) for t in tumours])
            )
    (folder / "reference.csv").write_text("normal,Normal,phantom,None\ntumour,Tumor,phantom,Micro\n")
    with pytest.MonkeyPatch.context() as patch:
        assert wsi(patch, "score", folder / "slides", "--model", "phantom", "-o", folder / "results", "-q") == 0
    return folder


def evaluated(camelyon: Path, monkeypatch: pytest.MonkeyPatch, task: str, truth: str, *words: object) -> dict:
    out = camelyon / f"out-{task}-{truth}"
    code = wsi(
        monkeypatch, "evaluate", task, camelyon / "results", "--annotations", camelyon / truth, "-o", out,
        "--bootstrap", 50, *words,
    )  # fmt: skip
    assert code == 0
    return json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)


def test_lesions_are_found_where_they_are(camelyon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--true-mpp", "--reference", camelyon / "reference.csv")
    right = evaluated(camelyon, monkeypatch, "camelyon16", "xml", *arguments, "--subgroup", "mpp")
    (row,) = (camelyon / "out-camelyon16-xml/subgroups.csv").read_text().splitlines()[1:]
    assert row.startswith("mpp,1.0,2,1,2,") and "fewer than 10 lesions" in row
    assert right["data"]["lesions_that_count"] == 2 and right["data"]["isolated_tumour_cells"] == 1
    assert right["results"]["froc"]["value"] >= 0.9
    assert right["results"]["auroc_max_probability"]["value"] == right["results"]["auroc_mil"]["value"] == 1
    for defect in ("swapped", "halved"):
        wrong = evaluated(camelyon, monkeypatch, "camelyon16", defect, *arguments)
        assert wrong["results"]["froc"]["value"] < right["results"]["froc"]["value"] - 0.15


def test_a_third_slide_score(
    camelyon: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on the very slides it is applied to: only that the commands fit together."""
    words = ("--reference", camelyon / "reference.csv", "-o", camelyon / "forest")
    assert wsi(monkeypatch, "train", "slide-features", camelyon / "results", *words) == 0
    assert "2 slides, 1 positive\ncross-validated AUROC undefined: fewer than two" in capsys.readouterr().out
    found = evaluated(camelyon, monkeypatch, "camelyon16", "xml", "--true-mpp", "--slide-model", camelyon / "forest")
    assert found["results"]["auroc_random_forest"]["value"] == 1
    rows = (camelyon / "out-camelyon16-xml/slide_scores.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["max_probability", "mil", "random_forest"]


def test_regions_overlap_with_what_was_drawn(camelyon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = evaluated(camelyon, monkeypatch, "segmentation", "xml")
    assert right["results"]["pooled_iou"]["value"] > 0.6
    for defect in ("swapped", "halved"):
        assert evaluated(camelyon, monkeypatch, "segmentation", defect)["results"]["pooled_iou"]["value"] < 0.3
    tiles = evaluated(camelyon, monkeypatch, "patches", "xml")
    assert tiles["results"]["auroc"]["value"] > 0.95 and tiles["data"]["patients"] == 2
    (camelyon / "cohort.csv").write_text("slide_id,patient,centre\nnormal,p,a\ntumour,p,b\n")
    words = ("--labels", camelyon / "cohort.csv", "--subgroup", "centre", "--subgroup", "mpp")
    for task in ("segmentation", "patches"):
        report = evaluated(camelyon, monkeypatch, task, "xml", *words)
        assert report["data"]["patients"] == 1 and report["reporting"]["subgroups"] == "centre, mpp"
    rows = "".join(f"{i},{i},{i % 2},{0.2 + 0.6 * (i % 2)}\n" for i in range(20))
    (camelyon / "held.csv").write_text("slide_id,patient,truth,said\n" + rows)
    words = ("--validation", camelyon / "held.csv", "--label", "truth", "--score", "said")  # columns of that table
    assert any("validation" in name for name in evaluated(camelyon, monkeypatch, "patches", "xml", *words)["results"])


def test_a_real_slide_with_its_outlines(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lesion of 5 mm on a slide of 4 um a pixel, of a patient that no training saw."""
    folder = data_dir / "patches" / "idc_mosaic_slides"
    assert wsi(monkeypatch, "score", folder / "idc_14082.tif", "--model", "idc-breast", "-o", tmp_path / "a", "-q") == 0
    text = (folder / "idc_14082_tumor_asap.xml").read_text()
    swapped = tmp_path / "swapped.xml"
    swapped.write_text(text.replace(" X=", " Z=").replace(" Y=", " X=").replace(" Z=", " Y="))

    def report(task: str, truth: Path, *words: object) -> dict:
        out = tmp_path / f"{task}-{truth.stem}"
        assert wsi(monkeypatch, "evaluate", task, tmp_path / "a", "--annotations", truth, "-o", out, *words) == 0
        return json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)

    truth = folder / "idc_14082_tumor_asap.xml"
    # Detections down to 0.05: of more than one confidence, without which the official rule gives 0 (none lies outside).
    words = ("--true-mpp", "--detect-threshold", "0.05")
    right, wrong = (report("camelyon16", path, *words) for path in (truth, swapped))
    assert right["data"]["lesions_that_count"] == 1 and right["results"]["froc"]["value"] == 1
    assert wrong["results"]["froc"]["value"] < 1
    assert "all cases are positive" in right["results"]["auroc_max_probability"]["reason"]
    capsys.readouterr()
    report("camelyon16", truth)
    assert "--true-mpp" in capsys.readouterr().err
    right, wrong = (report("segmentation", path) for path in (truth, swapped))
    assert right["results"]["mean_dice"]["value"] > 0.9 and wrong["results"]["mean_dice"]["value"] < 0.5
    assert right["results"]["mean_dice"]["low"] is None


def test_slides_by_their_labels(
    camelyon: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (camelyon / "labels.csv").write_text("slide_id,label\nnormal,benign\ntumour,sick\n")
    words = ("--labels", camelyon / "labels.csv", "--positive", "sick", "-o", camelyon / "slides-out", "--json")
    assert wsi(monkeypatch, "evaluate", "slides", camelyon / "results", *words) == 0
    assert json.loads(capsys.readouterr().out)["results"]["auroc"]["value"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("camelyon16", "{}/results", "-o", "{}/x"), "--annotations"),
        (("camelyon16", "{}/results", "--annotations", "{}/xml", "-o", "{}/x", "--group", "Tumor"), "NAME=lesion"),
        (("camelyon16", "{}/results", "--annotations", "{}/xml", "-o", "{}/x", "--fp", "none"), "all or normal"),
        (
            ("camelyon16", "{}/results", "--annotations", "{}/xml", "-o", "{}/x", "--detect", "none"),
            "nms or components",
        ),
        (("camelyon17", "{}/none.csv", "--reference", "{}/reference.csv", "-o", "{}/x"), "Columns"),
        (("segmentation", "{}/xml", "--annotations", "{}/xml", "-o", "{}/x"), "no results"),
        # What would be passed over in silence.
        (
            ("camelyon16", "{}/results", "--annotations", "{}/xml", "-o", "{}/x", "--labels", "{}/cohort.csv"),
            "Name one with --subgroup",
        ),
        (
            ("camelyon16", "{}/xml", "--annotations", "{}/xml", "-o", "{}/x", "--slide-model", "{}/forest"),
            "--slide-model: is for heatmaps",
        ),
        (
            ("camelyon17", "{}/reference.csv", "--reference", "{}/reference.csv", "-o", "{}/x", "--threshold", "0.5"),
            "not for stages",
        ),
        (("slides", "{}/results", "-o", "{}/x", "--isup", "--threshold", "2"), "not for grades"),
        (("patches", "{}/p.csv", "-o", "{}/x", "--group", "Tumor=lesion"), "--annotations"),
        (("patches", "{}/results", "--annotations", "{}/xml", "-o", "{}/x", "--positive", "2"), "not for outlines"),
    ],
)
def test_calls_that_make_no_sense_are_one_line_and_2(
    camelyon: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert wsi(monkeypatch, "evaluate", *(word.format(camelyon) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("wsi: ") and message in error and "Traceback" not in error
