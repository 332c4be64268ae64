"""The whole of CAMELYON16 on slides whose lesions are known, against the literal official script."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import shapely

from tests.annotations.make import asap_xml, mask_tiff
from tests.evaluate.make import scored
from tests.metrics import official
from wsi.errors import AnnotationError, EvaluationError
from wsi.evaluate.camelyon16 import evaluate_camelyon16
from wsi.evaluate.camelyon16_slides import Camelyon16Config
from wsi.evaluate.cases import read_cohort
from wsi.evaluate.detect import DetectConfig
from wsi.evaluate.report import write_report
from wsi.metrics.froc import find_lesions

QUICK = Camelyon16Config(n_bootstrap=20)
TILE = 256


def lesions_of(i: int) -> list[tuple[shapely.Polygon, str]]:
    """A large lesion with a hole, and a speck of isolated tumour cells."""
    return [
        (shapely.box(2048, 1024 + 512 * i, 5120, 3584), "Tumor" if i % 2 else "_0"),
        (shapely.box(2560, 2600, 3200, 3000), "Exclusion" if i % 2 else "_2"),
        (shapely.box(7200, 3200, 7400, 3400), "_1"),
    ]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two tumour and two normal slides of 9,216 x 4,096 px: heatmaps, outlines, reference."""
    rng = np.random.default_rng(1)
    (tmp_path / "xml").mkdir()
    for i, (name, tumour) in enumerate((("a", True), ("b", False), ("c", True), ("d", False))):
        values = rng.integers(0, 80, (16, 36)) / 128
        if tumour:
            values[6:12, 9:19] = 0.75 + rng.integers(0, 30, (6, 10)) / 128
            values[12, 28] = 0.875
            asap_xml(tmp_path / f"xml/{name.upper()}.xml", lesions_of(i // 2))
        values[0, :4] = np.nan
        scored(tmp_path / "results", name, values, mil=0.5 + 0.4 * tumour - 0.01 * i)
    reference = "a,Tumor,IDC,Macro\nb,Normal,IDC,None\nc,Tumor,IDC,Micro\nd,Normal,None,None\n"
    (tmp_path / "reference.csv").write_text(reference)
    return tmp_path


def official_score(archive: Path, detections: Path) -> float:
    fps, tps, lesions = [], [], 0
    for i, name in enumerate("abcd"):
        tumour = name in "ac"
        mask = np.zeros((128, 288), np.uint8)
        if tumour:
            (outer, _), (hole, _), (speck, _) = lesions_of(i // 2)
            area = outer.union(speck).difference(hole)
            x, y = np.meshgrid(np.arange(288) * 32 + 1e-6, np.arange(128) * 32 + 1e-6)
            mask[shapely.contains_xy(area, x, y)] = 255
        labels = official.evaluation_mask(mask) if tumour else mask.astype(int)
        itc = official.itc_labels(labels)
        rows = [[float(c) for c in row] for row in csv.reader((detections / f"{name}.csv").read_text().splitlines())]
        fp, tp, n = official.false_and_true_positives(rows, labels, itc, tumour)
        fps, tps, lesions = fps + fp, tps + tp, lesions + n
    return official.score(fps, tps, lesions, 4)


@pytest.mark.parametrize("method", ["nms", "components"])
def test_equals_the_official_script_on_the_files_it_writes(archive: Path, method: str):
    config = Camelyon16Config(DetectConfig(method, 0.5), n_bootstrap=20)
    report = evaluate_camelyon16(
        archive / "results", archive / "xml", out=archive / "out", reference=archive / "reference.csv", config=config
    )
    assert report.results["froc"].value == official_score(archive, archive / "out/detections")
    assert report.data["lesions_that_count"] == 2 and report.data["isolated_tumour_cells"] == 2
    assert sum(row["on_isolated_cells"] for row in report.tables["slides"]) >= (method == "nms")
    assert report.results["auroc_mil"].value == 1 and not report.warnings
    assert set(report.results) >= {"auroc_max_probability_macro", "auroc_max_probability_micro", "froc_fp_normal"}
    assert [row["name"] for row in report.leaderboard].count("this run") == 1
    # And from the detection files alone the same comes out.
    again = evaluate_camelyon16(archive / "out/detections", archive / "xml", out=archive / "two", config=config)
    assert again.results["froc"] == report.results["froc"]
    write_report(archive / "out", report)
    assert json.loads((archive / "out/report.json").read_text())["results"]["froc"]["value"] is not None
    assert {path.name for path in (archive / "out").iterdir()} >= {
        "index.html", "froc.png", "roc.png", "subgroups.png", "results.csv",
    }  # fmt: skip


def test_masks_of_either_value_give_what_outlines_give(archive: Path):
    expected = evaluate_camelyon16(archive / "results", archive / "xml", out=archive / "out", config=QUICK)
    for folder, value in (("ones", 1), ("full", 255)):
        (archive / folder).mkdir()
        for i, name in ((0, "a"), (1, "c")):
            (outer, _), (hole, _), (speck, _) = lesions_of(i)
            mask = np.zeros((4096, 9216), np.uint8)
            for shape, fill in ((outer, value), (speck, value), (hole, 0)):
                x0, y0, x1, y1 = map(int, shape.bounds)
                mask[y0:y1, x0:x1] = fill
            mask_tiff(archive / folder / f"{name}_mask.tif", mask, levels=6)
        found = evaluate_camelyon16(archive / "results", archive / folder, out=archive / "out", config=QUICK)
        assert found.results == expected.results


@pytest.mark.parametrize("defect", ["axes", "half", "double", "tile"])
def test_planted_defects_lower_the_score(archive: Path, defect: str):
    """Axes exchanged, one pyramid level too many or too few, ten tiles aside."""
    right = evaluate_camelyon16(archive / "results", archive / "xml", out=archive / "out", config=QUICK)
    move = {
        "axes": lambda p, x, y: (p, y, x),
        "half": lambda p, x, y: (p, x // 2, y // 2),
        "double": lambda p, x, y: (p, x * 2, y * 2),
        "tile": lambda p, x, y: (p, x + 14 * TILE, y),
    }[defect]
    (archive / "wrong").mkdir()
    for path in (archive / "out/detections").glob("*.csv"):
        rows = [move(*map(float, row)) for row in csv.reader(path.read_text().splitlines())]
        (archive / "wrong" / path.name).write_text("".join(f"{p},{x:.0f},{y:.0f}\n" for p, x, y in rows))
    wrong = evaluate_camelyon16(archive / "wrong", archive / "xml", out=archive / "two", config=QUICK)
    assert right.results["froc"].value == 1 and wrong.results["froc"].value < 0.75


def test_subgroups_are_what_their_slides_give_alone(tmp_path: Path):
    """Two centres of twenty slides each; at b every second lesion is missed, and normal slides look like tumours."""
    rows = ["slide_id,centre,patient\n"]
    reference = ""
    for i in range(40):
        centre, tumour, name = "ab"[i % 2], i % 4 < 2, f"s{i:02}"
        values = np.full((10, 10), 0.25)
        values[4:6, 4:6] = 0.5 + i / 128 if (tumour and (centre == "a" or i % 8 == 1)) or (centre == "b") else 0.25
        if tumour and centre == "b" and i % 8 == 5:
            values[4:6, 4:6], values[1, 8] = 0.25, 0.9
        scored(tmp_path / "results", name, values)
        if tumour:
            asap_xml(tmp_path / f"{name}.xml", [(shapely.box(900, 900, 1700, 1700), "Tumor")])
        rows.append(f"{name},{centre},p{i // 4}\n")
        reference += f"{name},{'Tumor' if tumour else 'Normal'},IDC,{'Macro' if tumour else 'None'}\n"
    (tmp_path / "slides.csv").write_text("".join(rows))
    (tmp_path / "reference.csv").write_text(reference)
    arguments = {"out": tmp_path / "out", "reference": tmp_path / "reference.csv", "config": QUICK}
    cohort = read_cohort(tmp_path / "results", tmp_path / "slides.csv", groups=("centre", "mpp"))
    report = evaluate_camelyon16(tmp_path / "results", tmp_path, cohort=cohort, **arguments)
    rows = {(row["column"], row["value"]): row for row in report.tables["subgroups"]}
    assert set(rows) == {("centre", "a"), ("centre", "b"), ("mpp", "0.243")}
    for centre in "ab":
        lines = [line for line in reference.splitlines() if "ab"[int(line[1:3]) % 2] == centre]
        (tmp_path / "some.csv").write_text("\n".join(lines))
        alone = evaluate_camelyon16(
            tmp_path / "results", tmp_path, out=tmp_path / "alone", reference=tmp_path / "some.csv", config=QUICK
        )
        row = rows["centre", centre]
        assert row["slides"] == 20 and row["lesions"] == alone.data["lesions_that_count"] == 10
        assert row["froc"] == alone.results["froc"].value and row["froc_low"] <= row["froc"] <= row["froc_high"]
        assert row["auroc"] == alone.results["auroc_max_probability"].value
        assert row["froc_gap"] == pytest.approx(row["froc"] - report.results["froc"].value)
    assert rows["centre", "b"]["froc"] < rows["centre", "a"]["froc"] - 0.2
    gaps = [rows["centre", centre] for centre in "ab"]
    assert all(row["froc_gap_low"] <= row["froc_gap"] <= row["froc_gap_high"] for row in gaps)
    every = rows["mpp", "0.243"]
    assert every["froc_gap_low"] is None, "of all it is 0, however they are drawn"
    assert every["froc"] == report.results["froc"].value and every["froc_gap"] == every["auroc_gap"] == 0
    write_report(tmp_path / "out", report)
    assert (tmp_path / "out/froc_subgroups.png").exists()


def test_results_of_the_official_rules_own_making_are_said(tmp_path: Path):
    """One confidence is no threshold, so nothing was found; and a slide of 4 um is taken for one of 0.243."""
    values = np.zeros((16, 16))
    values[4:6, 4:6] = 0.9
    asap_xml(tmp_path / "s.xml", [(shapely.box(1024, 1024, 1536, 1536), "Tumor")])
    scored(tmp_path / "results", "s", values, mpp=4.0)
    for true_mpp, said in ((False, True), (True, False)):
        config = Camelyon16Config(DetectConfig("components"), true_mpp=true_mpp)
        report = evaluate_camelyon16(tmp_path / "results", tmp_path / "s.xml", out=tmp_path / "out", config=config)
        assert any("--true-mpp" in warning for warning in report.warnings) == said
    found = report.results["froc"]
    assert found.value == 0 and found.low is None and "fewer than two slides" in str(found.reason)
    assert report.tables["slides"][0]["found"] == 1 and any("FROC is 0" in warning for warning in report.warnings)


def test_true_resolution_uses_each_slides_own(tmp_path: Path):
    """The same slide at half the resolution: by its own microns all stays, by the official constant it shrinks."""
    values = np.zeros((16, 16))
    values[12, 12] = 0.6
    values[4:6, 4:6] = 0.9  # 512 px: 124 um at 0.243, isolated cells; 249 um and more at 0.486
    asap_xml(tmp_path / "s.xml", [(shapely.box(1024, 1024, 1536, 1536), "Tumor")])
    scored(tmp_path / "results", "s", values, mpp=0.486)
    for true_mpp, itc in ((False, 1), (True, 0)):
        config = Camelyon16Config(true_mpp=true_mpp, n_bootstrap=0)
        report = evaluate_camelyon16(tmp_path / "results", tmp_path / "s.xml", out=tmp_path / "out", config=config)
        assert report.data["isolated_tumour_cells"] == itc
    assert report.results["froc"].value == 1
    square = np.pad(np.ones((32, 32), bool), 64)  # masks of about 7.8 um a pixel: 16 px of the slide
    (axis,) = find_lesions(square, mpp=0.486, downsample=16).major_axis_um
    assert report.tables["lesions"][0]["major_axis_um"] == pytest.approx(axis, abs=0.01)
    assert any("lowest confidence" in warning for warning in report.warnings)
    with pytest.raises(EvaluationError, match="true-mpp"):
        evaluate_camelyon16(tmp_path / "out/detections", tmp_path / "s.xml", out=tmp_path / "o2", config=config)


def test_known_bad_slides_are_left_out(tmp_path: Path):
    for name in ("test_001", "test_049", "test_114", "test_003"):
        values = np.full((16, 16), 0.25)
        values[4:9, 4:9] = 0.25 if name == "test_003" else 0.75
        scored(tmp_path / "results", name, values)
        if name in ("test_001", "test_049"):
            asap_xml(tmp_path / f"{name}.xml", [(shapely.box(1024, 1024, 2304, 2304), "Tumor")])
    rows = [("test_001", "Tumor"), ("test_049", "Tumor"), ("test_114", "Tumor"), ("test_003", "Normal")]
    (tmp_path / "reference.csv").write_text("".join(f"{name},{label},IDC,None\n" for name, label in rows))
    arguments = {"out": tmp_path / "out", "reference": tmp_path / "reference.csv"}
    report = evaluate_camelyon16(tmp_path / "results", tmp_path, config=QUICK, **arguments)
    assert [row["slide"] for row in report.tables["slides"]] == ["test_001", "test_003", "test_114"]
    assert report.data["slides_for_froc"] == 2 and report.data["tumour_slides"] == 2
    assert {(row["slide"], row["task"]) for row in report.exclusions} == {("test_049", "all"), ("test_114", "lesion")}
    assert all(row["source"] for row in report.exclusions)
    everything = Camelyon16Config(exclude=False, n_bootstrap=0)
    with pytest.raises(EvaluationError, match="test_114"):
        evaluate_camelyon16(tmp_path / "results", tmp_path, config=everything, **arguments)
    (tmp_path / "own.csv").write_text("slide,task,issue,source\nTEST_001,all,why,who\n")
    own = Camelyon16Config(exclusions=tmp_path / "own.csv", n_bootstrap=0)
    (tmp_path / "reference.csv").write_text("test_001,Tumor,,\ntest_003,Normal,,\ntest_049,Tumor,,\n")
    report = evaluate_camelyon16(tmp_path / "results", tmp_path, config=own, **arguments)
    assert [row["slide"] for row in report.tables["slides"]] == ["test_003", "test_049"]
    assert any("test_114" in warning for warning in report.warnings), "what the reference does not name is said"


# --- bad input ---------------------------------------------------------------------------------------------------


def run(archive: Path, **changes) -> object:
    arguments = {"out": archive / "out", "reference": archive / "reference.csv", "config": QUICK} | changes
    results = arguments.pop("results", archive / "results")
    return evaluate_camelyon16(results, arguments.pop("annotations", archive / "xml"), **arguments)


def test_a_detection_file_that_is_missing_or_no_csv_is_an_error(archive: Path):
    run(archive)
    sound = (archive / "out/detections/a.csv").read_bytes()
    for damaged in (b"0.5,1,2\n0.5,1,\xe9\n", b"1" * 200_000, b"0.5,1\n", b"0.5,1,2\n,,\n"):
        (archive / "out/detections/a.csv").write_bytes(damaged)
        with pytest.raises(EvaluationError, match=r"a\.csv"):
            run(archive, results=archive / "out/detections", out=archive / "two")
    (archive / "out/detections/a.csv").write_bytes(sound)
    (archive / "out/detections/b.csv").unlink()
    with pytest.raises(EvaluationError, match=r"1 slides of the reference, b for one.*empty file"):
        run(archive, results=archive / "out/detections", out=archive / "two")


def test_detections_outside_are_counted_and_warned_of(archive: Path):
    run(archive)
    with (archive / "out/detections/b.csv").open("a") as file:
        file.write("0.9,-5,10\n")
    report = run(archive, results=archive / "out/detections", out=archive / "two")
    row = next(row for row in report.tables["slides"] if row["slide"] == "b")
    assert row["outside"] == 1 and any("1 detections lie outside" in warning for warning in report.warnings)


def test_duplicate_detections_are_warned_of(archive: Path):
    run(archive)
    with (archive / "out/detections/a.csv").open("a") as file:
        file.write("0.5,1,1\n0.5,1,1\n")
    report = run(archive, results=archive / "out/detections", out=archive / "two")
    assert any("twice" in warning for warning in report.warnings)


def test_a_mask_of_another_size_is_an_error(archive: Path):
    (archive / "masks").mkdir()
    for name in "ac":
        mask_tiff(archive / f"masks/{name}_mask.tif", np.ones((2048, 9216), np.uint8))
    with pytest.raises(AnnotationError, match="9216 x 2048 px, the slide 9216 x 4096"):
        run(archive, annotations=archive / "masks")


def test_an_unknown_group_is_an_error(archive: Path):
    asap_xml(archive / "xml/A.xml", [*lesions_of(0), (shapely.box(0, 0, 900, 900), "DCIS")])
    with pytest.raises(AnnotationError, match=r"A\.xml: holds the group 'DCIS'.*--group"):
        run(archive)
    run(archive, config=Camelyon16Config(roles={"dcis": "ignore"}, n_bootstrap=0))


def test_an_empty_annotation_is_an_error_where_there_must_be_a_lesion(archive: Path):
    asap_xml(archive / "xml/A.xml", [])
    with pytest.raises(EvaluationError, match=r"a: is a tumour slide in the reference, and A\.xml holds no lesion"):
        run(archive)
    report = run(archive, reference=None)
    assert any("holds no lesion" in w for w in report.warnings) and report.data["tumour_slides"] == 1


def test_a_reference_that_disagrees_is_an_error(archive: Path):
    text = (archive / "reference.csv").read_text()
    for wrong, message in (
        (text.replace("a,Tumor", "a,Normal"), "is normal in the reference"),
        (text.replace("a,Tumor", "a,tumour"), "'tumour' of a slide"),
        (text + "a,Tumor,IDC,Macro\n", "twice"),
        (text + "A.tif,Tumor,IDC,Macro\n", "'A.tif' twice"),
        (text + "e,Normal,IDC,None\n", "e for one"),
        (text + "e,Normal\n", "2 cells"),
        ("", "no rows"),
    ):
        (archive / "reference.csv").write_text(wrong)
        with pytest.raises(EvaluationError, match=message):
            run(archive)


def test_slides_of_one_class_are_undefined_and_not_zero(archive: Path):
    (archive / "reference.csv").write_text("b,Normal,IDC,None\nd,Normal,IDC,None\n")
    report = run(archive)
    assert report.results["froc"].value is None and report.results["froc"].reason == "no lesion that counts"
    assert report.results["auroc_max_probability"].reason == "all cases are negative"
    write_report(archive / "out", report)
    json.loads((archive / "out/report.json").read_text(), parse_constant=pytest.fail)


def test_two_annotations_of_one_slide_and_one_of_many_are_errors(archive: Path):
    with pytest.raises(EvaluationError, match="is one file"):
        run(archive, annotations=archive / "xml/A.xml")
    asap_xml(archive / "xml/a_mask.xml", lesions_of(0))
    with pytest.raises(EvaluationError, match="both belong to a"):
        run(archive)
    for missing in ("annotations", "results"):
        with pytest.raises(EvaluationError, match="no"):
            run(archive, **{missing: archive / "nowhere"})
    (archive / "empty").mkdir()
    with pytest.raises(EvaluationError, match="no detection files"):
        run(archive, results=archive / "empty", reference=None)


def test_names_of_exclusions_are_compared_as_those_of_the_reference(archive: Path):
    """With .tif; and what is left out of all stays out of all where a further row leaves it out of lesions."""
    (archive / "own.csv").write_text("slide,task,issue,source\nA.tif,all,w,w\na.tif,lesion,w,w\nb.TIF,note,w,w\n")
    report = run(archive, config=Camelyon16Config(exclusions=archive / "own.csv", n_bootstrap=0))
    assert [row["slide"] for row in report.tables["slides"]] == ["b", "c", "d"]
    (archive / "results/a").rename(archive / "a")
    report = run(archive, config=Camelyon16Config(exclusions=archive / "own.csv", n_bootstrap=0))
    assert [row["slide"] for row in report.tables["slides"]] == ["b", "c", "d"]


def test_detection_files_that_differ_by_case_alone_are_an_error(archive: Path):
    run(archive)
    (archive / "out/detections/A.csv").write_text("0.5,1,2\n")
    with pytest.raises(EvaluationError, match=r"holds A and a|holds a and A"):
        run(archive, results=archive / "out/detections", out=archive / "two")
