"""Overlap of regions that are known, and tiles labelled by outlines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.annotations.make import asap_xml, mask_tiff
from tests.evaluate.make import scored
from wsi.annotations import Frame
from wsi.errors import EvaluationError, ResultsError
from wsi.evaluate.cases import read_cohort
from wsi.evaluate.inputs import lesion_mask
from wsi.evaluate.report import write_report
from wsi.evaluate.segmentation import SegmentationConfig, evaluate_segmentation, tile_cases
from wsi.evaluate.tables import evaluate_table

QUICK = SegmentationConfig(n_bootstrap=50)


def archive(tmp_path: Path, **options) -> Path:
    values = np.full((16, 24), 0.125)
    values[4:8, 6:14] = 0.875
    values[4, 6] = 0.625
    scored(tmp_path / "results", "a", values, **options)
    scored(tmp_path / "results", "b", np.full((16, 24), 0.25))
    return tmp_path / "results"


def test_areas_that_are_known(tmp_path: Path):
    """Found are 8 x 4 tiles, drawn 8 x 4 tiles two further right: 24 of 40 are common."""
    results = archive(tmp_path)
    asap_xml(tmp_path / "a.xml", [(shapely.box(8 * 256, 4 * 256, 16 * 256, 8 * 256), "Tumor")])
    report = evaluate_segmentation(results, tmp_path, config=QUICK)
    row = report.tables["slides"][0]
    assert row["iou"] == 24 / 40 and row["dice"] == 2 * 24 / 64
    assert row["hausdorff_um"] == pytest.approx(2 * 256 * 0.243)
    assert row["found_mm2"] == pytest.approx(32 * (256 * 0.243 / 1000) ** 2)
    empty = report.tables["slides"][1]
    assert (
        empty["dice"] is None
        and empty["reason"] == "both are empty"
        and "without an annotation file" in report.warnings[0]
    )
    assert report.results["mean_dice"].value == row["dice"] and report.results["mean_dice"].n == 1
    write_report(tmp_path / "out", report)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"dice.png", "overlap.png"}
    strict = evaluate_segmentation(results, tmp_path, config=SegmentationConfig(threshold=0.75, n_bootstrap=0))
    assert strict.tables["slides"][0]["iou"] == 24 / 39, "a higher threshold takes one tile away"


@pytest.mark.parametrize("threshold", [float("nan"), 1.5])
def test_a_threshold_that_is_no_probability_is_refused(tmp_path: Path, threshold: float):
    with pytest.raises(ResultsError, match="no probability"):
        evaluate_segmentation(archive(tmp_path), tmp_path, config=SegmentationConfig(threshold=threshold))


def test_masks_and_outlines_of_qupath_count_from_other_corners(tmp_path: Path):
    results = archive(tmp_path, origin=(512, 256))
    mask = np.zeros((16 * 256, 24 * 256), np.uint8)
    mask[1024:2048, 1536:3584] = 1
    (tmp_path / "masks").mkdir()
    mask_tiff(tmp_path / "masks/a.tif", mask, levels=3)
    assert evaluate_segmentation(results, tmp_path / "masks", config=QUICK).tables["slides"][0]["iou"] == 1
    (tmp_path / "qupath").mkdir()
    outline = shapely.box(1536 - 512, 1024 - 256, 3584 - 512, 2048 - 256)
    (tmp_path / "qupath/a.geojson").write_text(shapely.to_geojson(outline))
    report = evaluate_segmentation(results, tmp_path / "qupath", config=QUICK)
    assert report.tables["slides"][0]["iou"] == 1 and any("without a group" in each for each in report.warnings)


@pytest.mark.parametrize("defect", ["axes", "half"])
def test_planted_defects_lower_the_overlap(tmp_path: Path, defect: str):
    results = archive(tmp_path)
    right = shapely.box(6 * 256, 4 * 256, 14 * 256, 8 * 256)
    wrong = {"axes": lambda xy: xy[:, ::-1], "half": lambda xy: xy / 2}[defect]
    for shape, low, high in ((right, 1, 1), (shapely.transform(right, wrong), 0, 0.5)):
        asap_xml(tmp_path / "a.xml", [(shape, "Tumor")])
        found = evaluate_segmentation(results, tmp_path, config=QUICK).tables["slides"][0]["iou"]
        assert low <= found <= high


def test_tiles_are_labelled_by_half_their_area(tmp_path: Path):
    results = archive(tmp_path)
    asap_xml(tmp_path / "a.xml", [(shapely.box(6 * 256, 4 * 256, 13.4 * 256, 7.6 * 256), "Tumor")])
    cases, warnings = tile_cases(results, tmp_path)
    assert warnings == ["1 slides without an annotation file are taken to hold no lesion, b for one"]
    assert len(cases.ids) == 2 * 16 * 24 and set(cases.patients) == {"a", "b"}
    labels = cases.labels[: 16 * 24].reshape(16, 24)
    assert labels[4:8, 6:13].all() and labels.sum() == 28 and not cases.labels[16 * 24 :].any()


def two_centres(tmp_path: Path) -> Path:
    """Twenty-four slides of six patients and two centres: of centre x all is found, of centre y half of it."""
    rows = ["slide_id,patient,centre,size\n"]
    for i in range(24):
        values = np.full((8, 8), 0.125)
        values[2:6, 2 : 6 if i % 2 else 4] = 0.875
        scored(tmp_path / "results", f"s{i}", values, mpp=0.2 + i / 1000, tile=16)
        asap_xml(tmp_path / f"s{i}.xml", [(shapely.box(32, 32, 96, 96), "Tumor")])
        rows.append(f"s{i},p{i // 4},{'yx'[i % 2]},{i}\n")
    (tmp_path / "slides.csv").write_text("".join(rows))
    return tmp_path / "results"


def test_subgroups_and_intervals_over_patients(tmp_path: Path):
    results = two_centres(tmp_path)
    cohort = read_cohort(results, tmp_path / "slides.csv", groups=("centre", "size", "mpp"))
    report = evaluate_segmentation(results, tmp_path, config=QUICK, cohort=cohort)
    whole, half = 1.0, 2 * 8 / (8 + 16)
    mean = report.results["mean_dice"]
    assert mean.value == pytest.approx((whole + half) / 2) and mean.n == 6 and "over patients" in mean.method
    assert mean.low is None and "the same" in mean.reason, "each patient has two of either centre"
    assert report.data["patients"] == 6 and report.reporting["partition_unit"] == "patient"
    rows = {(row["column"], row["value"]): row for row in report.tables["subgroups"]}
    assert rows["centre", "x"]["metric"] == whole and rows["centre", "y"]["metric"] == pytest.approx(half)
    assert rows["centre", "x"]["gap"] == pytest.approx((whole - half) / 2) and rows["centre", "x"]["n"] == 12
    small = rows["size", "0 to 7"]
    assert small["metric"] is None and small["n"] == 8 and "fewer than 10" in small["reason"]
    assert ("mpp", "0.2 to 0.207") in rows and [plot.name for plot in report.plots] == ["dice", "overlap", "subgroups"]

    alone = evaluate_segmentation(results, tmp_path, config=QUICK)
    assert alone.results["mean_dice"].n == 24 and alone.results["mean_dice"].low < alone.results["mean_dice"].high
    tiles, _ = tile_cases(results, tmp_path, cohort=cohort)
    assert set(tiles.patients) == {f"p{i}" for i in range(6)} and set(tiles.groups["centre"]) == {"x", "y"}


def test_two_runs_compared(tmp_path: Path):
    """The other run finds half of each slide, or nothing: what is gained on s1, s3 ... is 1 less its Dice."""
    results = two_centres(tmp_path)
    for i in range(24):
        values = np.full((8, 8), 0.125)
        values[2:6, 2:4] = 0.875
        scored(tmp_path / "other", f"s{i}", values, mpp=0.2 + i / 1000, tile=16)
    report = evaluate_segmentation(results, tmp_path, config=QUICK, other=tmp_path / "other")
    gain = report.results["mean_dice_difference"]
    assert gain.value == pytest.approx((1 - 2 / 3) / 2) and 0 < gain.low < gain.value < gain.high < 1 / 3
    assert report.results["mean_iou_difference"].value == pytest.approx((1 - 1 / 2) / 2)
    scored(tmp_path / "other", "one_more", np.zeros((8, 8)))
    with pytest.raises(EvaluationError, match="other slides"):
        evaluate_segmentation(results, tmp_path, config=QUICK, other=tmp_path / "other")


def test_cohorts_that_do_not_fit_are_errors(tmp_path: Path):
    results = two_centres(tmp_path)
    (tmp_path / "short.csv").write_text("slide_id,patient\ns0,p0\n")
    for labels, options, message in (
        ("short.csv", {}, "23 slides, 's1' for one"),
        ("slides.csv", {"groups": ("scanner",)}, "no column 'scanner'"),
        ("slides.csv", {"patient": "case"}, "no column 'case'"),
        (None, {"groups": ("centre",)}, "does not know 'centre'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            read_cohort(results, labels and tmp_path / labels, **options)
    assert set(read_cohort(results, groups=("mpp",)).groups["mpp"]) == {f"s{i}" for i in range(24)}


def test_one_file_for_many_slides_and_no_file_are_errors(tmp_path: Path):
    results = archive(tmp_path)
    for path in (asap_xml(tmp_path / "a.xml", []), tmp_path / "nowhere"):
        with pytest.raises(EvaluationError, match="annotations for 2 slides"):
            evaluate_segmentation(results, path)
        with pytest.raises(EvaluationError, match="annotations for 2 slides"):
            tile_cases(results, path)
    with pytest.raises(ResultsError, match="no results"):
        evaluate_segmentation(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("form", ["a.tif", "a.png"])
def test_a_mask_smaller_than_its_slide_labels_the_tiles_that_it_shows(tmp_path: Path, form: str):
    """One pixel of the mask for 16 of the slide, as outlines of the same area."""
    results = archive(tmp_path)
    mask = np.zeros((256, 384), np.uint8)
    mask[64:128, 96:224] = 1
    (tmp_path / "masks").mkdir()
    if form == "a.tif":
        mask_tiff(tmp_path / "masks/a.tif", mask)
    else:
        Image.fromarray(mask).save(tmp_path / "masks/a.png")
    (tmp_path / "xml").mkdir()
    asap_xml(tmp_path / "xml/a.xml", [(shapely.box(96 * 16, 64 * 16, 224 * 16, 128 * 16), "Tumor")])
    found, expected = (tile_cases(results, tmp_path / name)[0].labels for name in ("masks", "xml"))
    assert expected.sum() == 32 and (found == expected).all()


def test_a_mask_and_its_outline_are_the_same_reference(tmp_path: Path):
    """Off the lattice of the pixels that are compared, which are 16 of the slide: each holds what its centre does."""
    x0, y0, x1, y1 = 1000, 808, 20_008, 2_504
    mask = np.zeros((800, 6_000), np.uint8)
    mask[y0 // 4 : y1 // 4, x0 // 4 : x1 // 4] = 1
    mask_tiff(tmp_path / "a.tif", mask)
    asap_xml(tmp_path / "a.xml", [(shapely.box(x0, y0, x1, y1), "Tumor")])
    frame = Frame(size=(24_000, 3_200))
    of_mask, of_outline = (
        lesion_mask(tmp_path / name, frame=frame, downsample=16, at=0.5)[0] for name in ("a.tif", "a.xml")
    )
    assert of_outline.any() and (of_mask == of_outline).all()


def test_tiles_of_two_runs_are_told_apart_by_where_they_lie(tmp_path: Path):
    """Each run could not read another tile: as many are left, and they are others."""
    for run, lost in (("one", 0), ("two", 40)):
        values = np.full((8, 8), 0.25)
        values.flat[lost] = np.nan
        scored(tmp_path / run, "a", values)
    (tmp_path / "none").mkdir()
    one, two = (tile_cases(tmp_path / run, tmp_path / "none")[0] for run in ("one", "two"))
    assert one.ids[0] == "a/256_0" and two.ids[0] == "a/0_0"
    with pytest.raises(EvaluationError, match="other cases"):
        evaluate_table("patches", one, other=two)


def test_nothing_drawn_and_nothing_found_is_undefined_and_said(tmp_path: Path):
    scored(tmp_path / "results", "a", np.full((4, 4), 0.125))
    (tmp_path / "none").mkdir()
    report = evaluate_segmentation(tmp_path / "results", tmp_path / "none", config=QUICK)
    assert all(
        report.results[name].value is None and report.results[name].reason for name in ("mean_dice", "pooled_iou")
    )
