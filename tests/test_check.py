"""What files are, what is wrong with them, and what they would tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile

from tests.conftest import Run
from tests.export.make import marked_results
from tests.slide.make import section, write_pyramid
from wsi.annotations import Annotation
from wsi.annotations.convert import write_annotations
from wsi.check import check, phi
from wsi.export.bags import export_bags
from wsi.export.project import export_qupath
from wsi.export.rasters import export_rasters
from wsi.export.rules import problems

GOOD = {
    "type": "Feature",
    "id": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]]},
    "properties": {
        "objectType": "tile",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "measurements": {"p": 0.5},
    },
}


def geojson(path: Path, *features: dict) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def polygon(*points: tuple[float, float]) -> dict:
    return GOOD | {"geometry": {"type": "Polygon", "coordinates": [list(points)]}}


def with_(**properties: object) -> dict:
    return GOOD | {"properties": GOOD["properties"] | properties}


#: What the readers of QuPath 0.4.4, 0.5.1 and 0.6.0 were seen to refuse or to mistake, by what is said of it.
BAD = [
    (with_(classification={"name": "Tumor"}), "no colour"),
    (with_(classification=["Tumor"]), "list"),
    (with_(name=None), "name"),
    (with_(color="#ff0000"), "colour is text"),
    (with_(objectType="Tile"), "annotation"),
    (with_(measurements={"p": None}), "finite"),
    (with_(measurements={"p": True}), "finite"),
    (GOOD | {"geometry": None}, "no geometry"),
    (GOOD | {"properties": None}, "null"),
    (GOOD | {"id": "1"}, "UUID"),
    (GOOD | {"geometry": {"type": "GeometryCollection", "geometries": []}}, "collection"),
    (polygon((0, 0), (9, 0), (9, 9), (0, 9)), "not closed"),
    (polygon((0, 0), (9, 9), (9, 0), (0, 9), (0, 0)), "crosses"),
    (polygon((0, 0), (0.001, 0), (0.001, 0.001), (0, 0)), "smaller than a pixel"),
]


@pytest.mark.parametrize(("feature", "what"), BAD)
def test_what_qupath_would_refuse_is_told(tmp_path: Path, feature: dict, what: str):
    (line,) = problems(geojson(tmp_path / "a.geojson", {**feature, "id": feature["id"]}))
    assert what in line and "1 features, first 0" in line


@pytest.mark.parametrize(
    ("feature", "what"),
    [
        (GOOD | {"id": ["a"]}, "UUID"),
        (GOOD | {"properties": [1]}, "properties are no object"),
        (with_(measurements=[1]), "finite"),
        (with_(measurements=7), "finite"),
        (GOOD | {"geometry": {"type": ["Polygon"], "coordinates": []}}, "geometry is none"),
        (GOOD | {"geometry": {"type": "Polygon", "coordinates": [1, 2]}}, "geometry is none"),
    ],
)
def test_json_of_other_shapes_is_told_and_ends_nothing(tmp_path: Path, wsi: Run, feature: dict, what: str):
    path = geojson(tmp_path / "a.geojson", feature)
    assert any(what in line for line in problems(path))
    code, _, err = wsi("check", path)
    assert code in (0, 2, 3) and "Traceback" not in err


@pytest.mark.parametrize(
    "classification", ["Tumor", None, {}, {"names": ["A", "B"], "color": [1, 2, 3]}, {"name": "A", "colorRGB": -1}]
)
def test_what_qupath_accepts_is_no_problem(tmp_path: Path, classification):
    assert problems(geojson(tmp_path / "a.geojson", with_(classification=classification))) == []
    assert "twice" in problems(geojson(tmp_path / "a.geojson", GOOD, GOOD))[0]
    assert "import nothing" in problems(geojson(tmp_path / "a.txt", GOOD))[0]


def test_our_own_files_have_no_problem(tmp_path: Path):
    marked_results(tmp_path / "r")
    export_qupath(tmp_path / "r", tmp_path / "out")
    assert [check(tmp_path / "r").problems, check(tmp_path / "r").kind] == [[], "results of wsi"]
    found = check(tmp_path / "out")
    assert found.kind == "QuPath project" and found.problems == ["a: its slide is not where the project says"]
    write_annotations(tmp_path / "a.geojson", [Annotation(shapely.box(0, 0, 9, 9), "x")], slide_id="a")
    assert check(tmp_path / "a.geojson").problems == [] and check(tmp_path / "a.geojson").facts["groups"] == {"x": 1}


def test_results_tell_what_is_missing_or_damaged(tmp_path: Path):
    for name in ("a", "b", "c", "d", "e"):
        marked_results(tmp_path / "r", name)
    next(path for path in sorted((tmp_path / "r/a/store.zarr/probabilities/c").rglob("*")) if path.is_file()).unlink()
    (tmp_path / "r/b/result.json").unlink()
    (tmp_path / "r/c/failure.json").write_text("{}")
    (tmp_path / "r/d/result.json").write_text("{")
    (tmp_path / "r/e/regions.geojson").write_text("{")
    (tmp_path / "r/d/seconds.json").write_text("{}")
    text = " | ".join(check(tmp_path / "r").problems)
    assert (
        "a: probabilities" in text
        and "b: was not finished" in text
        and "c: failed" in text
        and "d: result.json" in text
    )


def test_bags_slides_masks_and_unknown_files(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((5, 3), np.float32)
    found = check(tmp_path / "a.h5")
    assert found.kind == "bags of features" and found.facts["tiles"] == 5 and "no coordinates" in found.problems[0]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.full((5, 3), np.nan, np.float32)
    assert "not finite" in check(tmp_path / "a.h5").problems[0]
    write_pyramid(tmp_path / "a.tif", [section()], 0.5)
    assert check(tmp_path / "a.tif").kind == "slide"
    tifffile.imwrite(tmp_path / "m.tif", np.zeros((64, 64), np.uint8))
    assert check(tmp_path / "m.tif").kind in ("mask image", "unknown")
    (tmp_path / "a.docx").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    for text, n in (('{"task": "mil"}', 0), ("{", 1), ("[1]", 1)):
        (tmp_path / "model/config.json").write_text(text)
        found = check(tmp_path / "model")
        assert found.kind == "model folder" and len(found.problems) == n
    for name in ("a.docx", "empty"):
        assert check(tmp_path / name).kind == "unknown" and check(tmp_path / name).problems


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_what_we_export_is_known(tmp_path: Path, version: str):
    pytest.importorskip("anndata")
    marked_results(tmp_path / "r", "Doe_John", features=4)
    export_bags(tmp_path / "r", tmp_path / "s", "spatialdata")
    for kind in ("ome-tiff", "ome-zarr", "png"):
        export_rasters(tmp_path / "r", tmp_path / kind, kind, version=version)
    kinds = {"s": "SpatialData store", "ome-tiff": "OME-TIFF image", "ome-zarr": "OME-Zarr image", "png": "mask image"}
    for folder, kind in kinds.items():
        (path,) = (tmp_path / folder).iterdir()
        assert (check(path).kind, check(path).problems) == (kind, [])
        assert (check(tmp_path / folder).kind, check(tmp_path / folder).facts) == ("folder", {kind: 1})
        assert any("Doe_John" in what for _, _, what in phi(tmp_path / folder))
    store = tmp_path / "s/Doe_John.zarr"
    (store / "shapes/tiles/shapes.parquet").unlink()
    assert check(store).problems == ["shapes/tiles: has no shapes.parquet"]
    (store / "zarr.json").write_text("[]")
    assert check(store).problems and check(tmp_path / "s").problems
    (image,) = (tmp_path / "ome-zarr").iterdir()
    shutil.rmtree(image / "0")
    assert check(image).problems == ["level 0 is not there"]


def test_a_slide_that_does_not_say_its_resolution_is_still_one(tmp_path: Path):
    tifffile.imwrite(tmp_path / "a.tif", section(), tile=(64, 64), photometric="rgb")
    found = check(tmp_path / "a.tif")
    assert found.kind == "slide" and found.facts["size_px"] == [900, 700] and "--slide-mpp" in found.problems[0]
    (tmp_path / "b.docx").write_text("")
    assert check(tmp_path).facts == {"slide": 1, "unknown": 1} and len(check(tmp_path).problems) == 2


def test_phi_of_results_names_places_and_no_values(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r", "Doe_John")
    (tmp_path / "r/Doe_John/seconds.json").write_text("{}")
    table = pa.table({"slide_id": ["Doe_John"], "slide": ["/slides/Doe_John.svs"]})
    pq.write_table(table, tmp_path / "r/slides.parquet")
    (tmp_path / "r/Doe_John.h5").write_bytes(b"")
    (tmp_path / "r/cut.parquet").write_bytes(b"PAR1")
    found = set(phi(tmp_path / "r"))
    assert {("slides.parquet", "text", "path of a file"), ("slides.parquet", "text", "name of a slide")} <= found
    assert ("Doe_John.h5", "file name", "name of a slide") in found
    assert not any(file == "cut.parquet" for file, *_ in found)
    assert ("Doe_John/result.json", "text", "path of a file") in found
    assert ("Doe_John/result.json", "text", "name of a slide") in found
    assert ("Doe_John", "name of a folder", "name of a slide") in found
    pq.write_table(
        pa.table({"slide_id": ["Doe_John"], "slide": ["/slides/Doe_John.tif"]}), tmp_path / "r/slides.parquet"
    )
    shutil.rmtree(tmp_path / "r/Doe_John/store.zarr")
    found = set(phi(tmp_path / "r"))
    assert {("slides.parquet", "text", what) for what in ("path of a file", "name of a slide")} <= found
    code, out, _ = wsi("check", tmp_path / "r", "--phi", "--json")
    assert code == 0 and "/slides" not in out and json.loads(out)


def test_phi_of_a_slide(data_dir: Path):
    found = set(phi(data_dir / "wsi/aperio/CMU-1-Small-Region.svs"))
    names = {what for _, _, what in found}
    assert {"label", "macro", "aperio.Date", "aperio.User", "aperio.Filename", "ImageDescription"} <= names
    assert not {"openslide.mpp-x", "aperio.MPP"} & names


def test_the_command(tmp_path: Path, wsi: Run):
    geojson(tmp_path / "a.geojson", polygon((0, 0), (9, 0), (9, 9), (0, 9)))
    code, out, _ = wsi("check", tmp_path / "a.geojson")
    assert code == 2 and "problem: QuPath: 1 features" in out
    geojson(tmp_path / "a.geojson", GOOD)
    code, out, _ = wsi("check", tmp_path / "a.geojson", "--json")
    assert code == 0 and json.loads(out)["kind"] == "annotations"
    assert wsi("check", tmp_path / "none")[0] == 2
