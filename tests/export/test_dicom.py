"""Annotations and heatmaps, read back by highdicom; and what is said where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Run
from tests.export.make import marked_results
from wsi.export.dicom import export_dicom
from wsi.export.rasters import slide_raster
from wsi.scored import scored_slides


def results_of(slide: Path, folder: Path, *, coarser: float = 2, **grid: int) -> None:
    """Results of a marked slide that claim to be of `slide`, at `coarser` times its microns per pixel."""
    from wsi.slide import open_slide

    with open_slide(str(slide)) as opened:
        size, mpp = opened.size, opened.mpp.x
    marked_results(folder, size=size, mpp=mpp, tile_mpp=mpp * coarser, **({"tile_px": 50} | grid))
    numbers = json.loads((folder / "a/result.json").read_text())
    (folder / "a/result.json").write_text(json.dumps(numbers | {"slide": str(slide)}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "grid", [{"coarser": 2}, {"coarser": 1, "tile_px": 64, "stride_px": 48}, {"coarser": 3.7, "stride_px": 29}]
)
def test_highdicom_reads_every_tile_where_it_was(tmp_path: Path, data_dir: Path, grid: dict[str, Any]):
    import highdicom
    import pydicom

    slide = max((data_dir / "wsi/dicom_cmu1_small_region").glob("*.dcm"), key=lambda path: path.stat().st_size)
    results_of(slide, tmp_path / "r", **grid)
    (row,) = export_dicom(tmp_path / "r", tmp_path / "out")
    again = export_dicom(tmp_path / "r", tmp_path / "again")
    assert row["tiles"] == again[0]["tiles"] > 10
    found = highdicom.ann.annread(tmp_path / "out/a.ann.dcm")
    source = pydicom.dcmread(slide, stop_before_pixels=True)
    assert found.StudyInstanceUID == source.StudyInstanceUID
    assert found.ReferencedImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    scored = scored_slides(tmp_path / "r")["a"]
    tiles = scored.tiles(scored.store())
    boxes = tiles.grid.boxes()
    count = 0
    for group in found.get_annotation_groups():
        name = group.label
        corners = np.array(group.get_graphic_data(coordinate_type="2D"))
        names, values, _ = group.get_measurements()
        column = [each.meaning for each in names].index("prob_tumour")
        for shape, p in zip(corners, values[:, column], strict=True):
            i = int(np.abs(boxes[:, :2] - shape.min(axis=0)).sum(axis=1).argmin())
            assert np.abs(shape.max(axis=0) - boxes[i, :2] - boxes[i, 2:]).max() < 0.01
            assert p == pytest.approx(tiles.probabilities[i, 1], abs=1e-6) and (p >= 0.5) == (name == "tumour")
            count += 1
    assert count == len(tiles.rows)

    heatmap = highdicom.imread(tmp_path / "out/a.heatmap.dcm")
    values = heatmap.get_total_pixel_matrix(dtype=np.float32)
    assert np.array_equal(values, slide_raster(scored).values[0], equal_nan=True)
    to_slide = [
        highdicom.spatial.ImageToReferenceTransformer.for_image(each, for_total_pixel_matrix=True)
        for each in (heatmap, source)
    ]
    cells = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 7.0]])
    half_a_pixel_mm = float(source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0]) / 2
    apart = to_slide[0](cells) - to_slide[1](cells * tiles.grid.stride)
    assert np.abs(apart).max() < half_a_pixel_mm / 100


@pytest.mark.filterwarnings("ignore")
def test_a_header_without_a_patient_is_a_warning(tmp_path: Path, data_dir: Path):
    results_of(data_dir / "wsi/dicom/jpeg.dicom", tmp_path / "r")
    (row,) = export_dicom(tmp_path / "r", tmp_path / "out")
    assert row["tiles"] == 0 and "PatientID" in row["warnings"][0] and not list((tmp_path / "out").iterdir())


def test_a_slide_that_is_no_dicom_says_so(tmp_path: Path):
    marked_results(tmp_path / "r")
    (tmp_path / "a.tif").write_bytes(b"no DICOM")
    numbers = json.loads((tmp_path / "r/a/result.json").read_text())
    (tmp_path / "r/a/result.json").write_text(json.dumps(numbers | {"slide": str(tmp_path / "a.tif")}))
    (row,) = export_dicom(tmp_path / "r", tmp_path / "out")
    assert row["tiles"] == 0 and "no DICOM" in row["warnings"][0]


def test_without_highdicom_the_command_says_what_to_install(tmp_path: Path, wsi: Run, monkeypatch: pytest.MonkeyPatch):
    marked_results(tmp_path / "r")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    code, _, err = wsi("export", "dicom", tmp_path / "r", "-o", tmp_path / "out")
    assert code == 2 and "wsi[dicom]" in err
