"""The QuPath project: what QuPath would read of it, and where a known mark comes to lie."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY, Run
from tests.export.make import marked_results
from tests.export.test_qupath import QuPathRefusesError, read_as_qupath
from wsi.errors import OutputError, ResultsError
from wsi.export.project import QuPathConfig, export_qupath, shards
from wsi.grid import TileGrid
from wsi.store import PatchStore
from wsi.units import Box, Mpp

BOUNDS = Box(700, 300, 2000, 1600)


def objects(out: Path, slide_id: str, size: tuple[float, float]) -> list[dict]:
    files = sorted((out / "objects" / slide_id).iterdir())
    found = [each for file in files for each in read_as_qupath(file, size)]
    assert len({each["id"] for each in found}) == len(found)
    return found


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("mpp", "tile_mpp", "stride"), [(0.25, 0.5, None), (0.2431, 0.5, None), (0.25, 1.0, 16), (0.5, 0.37, 64)]
)
def test_a_known_mark_is_hit_within_half_a_pixel(tmp_path: Path, bounds, crop, mpp, tile_mpp, stride):
    made = marked_results(tmp_path / "r", mpp=mpp, tile_mpp=tile_mpp, stride_px=stride, bounds=bounds)
    export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(crop=crop, threshold=0.9))
    frame = made.bounds if crop else Box(0, 0, *made.size)
    mark = np.array([made.mark.x, made.mark.y, made.mark.x + made.mark.w, made.mark.y + made.mark.h])
    expected = mark - np.array([frame.x, frame.y] * 2)
    found = objects(tmp_path / "out", "a", (frame.w, frame.h))
    (tile,) = [o for o in found if o["measurements"].get("prob_tumour", 0) > 0.97]
    assert np.abs(np.array(tile["shape"].bounds) - expected).max() <= 0.505  # files keep a hundredth of a pixel
    assert tile["classification"]["name"] == "tumour" and tile["objectType"] == "tile"
    if stride is None or stride == 64:
        (region,) = [o for o in found if o["classification"]["name"] == "tumour" and o["objectType"] == "annotation"]
        assert np.abs(np.array(region["shape"].bounds) - expected).max() <= 0.505  # files keep a hundredth of a pixel
        assert region["measurements"]["area_mm2"] == pytest.approx(made.mark.w * made.mark.h * mpp**2 / 1e6, rel=0.02)
    (tissue,) = [o for o in found if o["classification"]["name"] == "Tissue"]
    assert tissue["shape"].bounds == pytest.approx(
        (made.bounds.x - frame.x, made.bounds.y - frame.y,
         made.bounds.x - frame.x + made.bounds.w / 2, made.bounds.y - frame.y + made.bounds.h)
    )  # fmt: skip


def test_measurements_threshold_and_type(tmp_path: Path):
    made = marked_results(tmp_path / "r", stride_px=32)
    (row,) = export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(threshold=0.2, object_type="annotation"))
    found = objects(tmp_path / "out", "a", made.size)
    tiles = [o for o in found if "prob_tumour" in o["measurements"]]
    assert row["tiles"] == len(tiles) == len(made.grid) and {o["objectType"] for o in tiles} == {"annotation"}
    for tile in tiles:
        values = tile["measurements"]
        p = np.array([values["prob_stroma"], values["prob_tumour"]], np.float64)
        # Ties of rounding aside, the class follows the threshold that was asked for.
        assert (tile["classification"]["name"] == "tumour") == (p[1] >= 0.2) or abs(p[1] - 0.2) < 1e-6
        entropy = -sum(q * np.log2(q) for q in p if q > 0)
        assert values["uncertainty"] == pytest.approx(entropy, abs=1e-5)
    ranks = sorted(o["measurements"]["attention_percentile"] for o in tiles)
    assert ranks == pytest.approx(np.arange(len(tiles)) * 100 / len(tiles), abs=1e-4)
    regions = [o for o in found if "major_axis_um" in o["measurements"]]
    assert regions and all(o["metadata"]["threshold"] == "0.2" for o in regions)


def test_tiles_without_a_score_are_not_there_and_nothing_is_zero(tmp_path: Path):
    made = marked_results(tmp_path / "r", unreadable=(0, 5))
    (row,) = export_qupath(tmp_path / "r", tmp_path / "out")
    assert row["tiles"] == len(made.grid) - 2


def test_shards_hold_every_tile_once_and_keep_its_identifier(tmp_path: Path):
    made = marked_results(tmp_path / "r")
    export_qupath(tmp_path / "r", tmp_path / "one")
    (row,) = export_qupath(tmp_path / "r", tmp_path / "many", QuPathConfig(max_tiles=100))
    assert row["tile_files"] == len(list((tmp_path / "many/objects/a").glob("tiles-*"))) == -(-len(made.grid) // 96)
    one, many = objects(tmp_path / "one", "a", made.size), objects(tmp_path / "many", "a", made.size)
    assert {o["id"]: o["shape"].wkt for o in one} == {o["id"]: o["shape"].wkt for o in many}
    export_qupath(tmp_path / "r", tmp_path / "many")  # an earlier export had more files
    assert len(objects(tmp_path / "many", "a", made.size)) == len(one)


@pytest.mark.parametrize("most", [1, 3, 7, 10, 1000])
def test_any_shards_are_a_partition(most: int):
    rng = np.random.default_rng(most)
    for _ in range(30):
        rows = np.sort(rng.integers(0, rng.integers(1, 9), rng.integers(0, 60)))
        parts = list(shards(rows, most))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(rows)))
        assert all(part.stop - part.start <= most for part in parts) and len(parts) >= 1


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    marked_results(tmp_path / "r")
    for name in ("x", "y"):
        export_qupath(tmp_path / "r", tmp_path / name)
    files = [path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_the_project_has_what_qupaths_own_has(tmp_path: Path):
    """Keys of a project that QuPath wrote, as far as its reader asks for them (``DefaultProject.loadProject``)."""
    marked_results(tmp_path / "r", "b c")
    marked_results(tmp_path / "r", "a")
    export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(crop=False))
    project = json.loads((tmp_path / "out/project.qpproj").read_text())
    assert {"version", "createTimestamp", "modifyTimestamp", "lastID", "images"} <= set(project)
    assert [image["imageName"] for image in project["images"]] == ["a", "b c"]
    assert len({image["entryID"] for image in project["images"]}) == 2 == project["lastID"]
    for image in project["images"]:
        builder = image["serverBuilder"]
        assert builder["builderType"] == "uri" and builder["args"] == ["--no-crop"]
        assert builder["uri"] == f"file:///slides/{image['imageName'].replace(' ', '%20')}.tif"
        assert (tmp_path / "out/objects" / image["imageName"]).is_dir()
    classes = json.loads((tmp_path / "out/classifiers/classes.json").read_text())["pathClasses"]
    assert {each["name"]: each["color"] for each in classes}["tumour"] == -3670016  # QuPath's own Tumor, as it packs it
    script = (tmp_path / "out/scripts/import_wsi.groovy").read_text()
    assert "objects/" in script and script.count("{") == script.count("}")


def test_what_a_user_changed_in_the_project_stays(tmp_path: Path):
    marked_results(tmp_path / "r", "a")
    export_qupath(tmp_path / "r", tmp_path / "out")
    path = tmp_path / "out/project.qpproj"
    project = json.loads(path.read_text())
    project["images"][0]["metadata"] = {"ward": "7"}
    rotated = {"builderType": "rotated", "builder": {"builderType": "uri", "uri": "file:///mine.tif"}}
    project["images"].append({"serverBuilder": rotated, "entryID": 9, "imageName": "mine", "metadata": {}})
    path.write_text(json.dumps(project | {"lastID": 9, "version": "0.6.0"}))
    (tmp_path / "out/classifiers/classes.json").write_text("{}")
    marked_results(tmp_path / "r", "b")
    export_qupath(tmp_path / "r", tmp_path / "out")
    after = json.loads(path.read_text())
    assert after["images"][:2] == project["images"] and after["version"] == "0.6.0"
    assert [(image["imageName"], image["entryID"]) for image in after["images"]] == [("a", 1), ("mine", 9), ("b", 10)]
    assert (tmp_path / "out/classifiers/classes.json").read_text() == "{}" and after["lastID"] == 10
    objects_before = (tmp_path / "out/objects/a/tiles.geojson.gz").stat().st_mtime_ns
    with pytest.raises(ResultsError, match="other frame"):
        export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(crop=False))
    assert (tmp_path / "out/objects/a/tiles.geojson.gz").stat().st_mtime_ns == objects_before
    for damage in ("{", "[]", '{"images": [{}]}'):
        path.write_text(damage)
        with pytest.raises(ResultsError, match="no QuPath project"):
            export_qupath(tmp_path / "r", tmp_path / "out")
        assert path.read_text() == damage


def test_bioformats_shows_the_whole_plane(tmp_path: Path):
    made = marked_results(tmp_path / "r", bounds=BOUNDS)
    numbers = json.loads((tmp_path / "r/a/result.json").read_text())
    (tmp_path / "r/a/result.json").write_text(json.dumps(numbers | {"vendor": "ome-tiff"}))
    export_qupath(tmp_path / "r", tmp_path / "out")
    (image,) = json.loads((tmp_path / "out/project.qpproj").read_text())["images"]
    assert "BioFormats" in image["serverBuilder"]["providerClassName"]
    found = objects(tmp_path / "out", "a", made.size)
    (tile,) = [o for o in found if o["measurements"].get("prob_tumour", 0) > 0.97]
    assert tile["shape"].bounds[:2] == (made.mark.x, made.mark.y)


def test_the_files_satisfy_the_schema(tmp_path: Path):
    schema = REPOSITORY.parent / "shared" / "qupath_geojson.schema.json"
    if not schema.is_file():
        pytest.skip("the schema is not here: ../shared/qupath_geojson.schema.json")
    jsonschema = pytest.importorskip("jsonschema")
    marked_results(tmp_path / "r", stride_px=48, bounds=BOUNDS)
    for object_type in ("tile", "annotation"):
        export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(object_type=object_type, simplify_um=3))
        for path in (tmp_path / "out/objects/a").iterdir():
            jsonschema.validate(json.loads(gzip.decompress(path.read_bytes())), json.loads(schema.read_text()))


def test_an_empty_slide_is_exported_and_says_so(tmp_path: Path):
    marked_results(tmp_path / "r")
    folder = tmp_path / "r/a"
    grid = TileGrid.cover((3000, 2000), slide_mpp=Mpp(1, 1), mpp=1.0, tile_px=100).keep(np.zeros(600, bool))
    import shutil

    shutil.rmtree(folder / "store.zarr")
    PatchStore.create(folder / "store.zarr", grid, {"probabilities": ((2,), "float32")})
    (row,) = export_qupath(tmp_path / "r", tmp_path / "out")
    assert row["tiles"] == 0 and row["regions"] == 1 and "no tile" in row["warnings"][0]
    assert objects(tmp_path / "out", "a", (3000, 2000))


def test_what_is_no_results_folder_is_refused(tmp_path: Path):
    with pytest.raises(ResultsError, match="no results"):
        export_qupath(tmp_path, tmp_path / "out")
    marked_results(tmp_path / "r")
    numbers = json.loads((tmp_path / "r/a/result.json").read_text())
    (tmp_path / "r/a/result.json").write_text(json.dumps(numbers | {"slide": "s3://bucket/a.tif"}))
    (row,) = export_qupath(tmp_path / "r", tmp_path / "out")
    assert row["tiles"] and "not in the project" in row["warnings"][0]
    assert json.loads((tmp_path / "out/project.qpproj").read_text())["images"] == []
    kept = (tmp_path / "r/a/regions.geojson").read_text()
    for damage in ("{", None):
        (tmp_path / "r/a/regions.geojson").unlink()
        if damage:
            (tmp_path / "r/a/regions.geojson").write_text(damage)
        with pytest.raises(ResultsError, match=r"regions\.geojson: cannot be read"):
            export_qupath(tmp_path / "r", tmp_path / "out")
    (tmp_path / "r/a/regions.geojson").write_text(kept)
    del numbers["class_names"]
    (tmp_path / "r/a/result.json").write_text(json.dumps(numbers))
    with pytest.raises(ResultsError, match="no scores"):
        export_qupath(tmp_path / "r", tmp_path / "out")
    for wrong in ({"threshold": 2.0}, {"simplify_um": -1.0}, {"max_tiles": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QuPathConfig(**wrong)


def test_pseudonyms_leave_no_trace_of_the_name(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r", "Doe_John")
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    code, out, _ = wsi(
        "export", "qupath", tmp_path / "r", "-o", tmp_path / "out", "--pseudonymise", tmp_path / "key", "--json"
    )
    assert code == 0
    (row,) = json.loads(out)
    assert row["slide_id"].startswith("s-") and "Doe" not in out
    assert not (tmp_path / "out/project.qpproj").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert "Doe" not in str(path.relative_to(tmp_path / "out"))
        if path.is_file():
            raw = path.read_bytes()
            assert b"Doe" not in (gzip.decompress(raw) if path.suffix == ".gz" else raw)
    (tmp_path / "key").write_text("short")
    for key, says in (("key", "is no key"), ("none", "cannot be read")):
        code, _, err = wsi("export", "qupath", tmp_path / "r", "-o", tmp_path / "p", "--pseudonymise", tmp_path / key)
        assert code == 2 and says in err and not (tmp_path / "p").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r")
    (tmp_path / "file").write_text("")
    code, _, err = wsi("export", "qupath", tmp_path / "r", "-o", tmp_path / "file")
    assert code == 2 and "cannot be written" in err and OutputError.__name__ not in err


# --- outlines ------------------------------------------------------------------------------------------------------


def test_thousands_of_tiny_regions_become_few_objects_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkerboard of tumour; one annotation each would end QuPath, so the small ones are joined."""
    monkeypatch.setattr("wsi.export.project.MAX_REGIONS", 2000)
    n = 150
    folder = tmp_path / "r/a"
    marked_results(tmp_path / "r")
    import shutil

    shutil.rmtree(folder / "store.zarr")
    grid = TileGrid.cover((n * 10, n * 10), slide_mpp=Mpp(0.25, 0.25), mpp=0.25, tile_px=10)
    odd = ((grid.rows + grid.columns) % 2).astype(np.float32)
    store = PatchStore.create(folder / "store.zarr", grid, {"probabilities": ((2,), "float32")})
    store.put("probabilities", np.stack([1 - odd, odd], axis=1))
    (row,) = export_qupath(tmp_path / "r", tmp_path / "out")
    found = [o for o in objects(tmp_path / "out", "a", (3000, 2000)) if o["objectType"] == "annotation"]
    red = [o["shape"] for o in found if o["classification"]["name"] == "tumour"]
    assert len(red) == row["regions"] - 1 == 2000 + 5 and sum(shape.area for shape in red) == n * n / 2 * 100


def test_the_emulation_refuses_what_qupath_does(tmp_path: Path):
    """One bad feature rejects the file: the reader of these tests must see it."""
    marked_results(tmp_path / "r")
    export_qupath(tmp_path / "r", tmp_path / "out")
    path = tmp_path / "out/objects/a/regions.geojson.gz"
    good = json.loads(gzip.decompress(path.read_bytes()))
    read_as_qupath(path, (3000, 2000))
    for damage in ({"color": None}, {"names": ["a"]}):
        bad = json.loads(json.dumps(good))
        bad["features"][0]["properties"]["classification"] |= damage
        path.write_bytes(gzip.compress(json.dumps(bad).encode()))
        with pytest.raises((QuPathRefusesError, TypeError)):
            read_as_qupath(path, (3000, 2000))


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path):
    marked_results(tmp_path / "r")
    export_qupath(tmp_path / "r", tmp_path / "out", QuPathConfig(max_tiles=100))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/objects/a").iterdir()}
    assert len(before) > 3
    regions = tmp_path / "r/a/regions.geojson"
    whole = regions.read_bytes()
    regions.write_bytes(whole[:-9])
    with pytest.raises(ResultsError, match="regions"):
        export_qupath(tmp_path / "r", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out/objects/a").iterdir()} == before
    regions.write_bytes(whole)
    export_qupath(tmp_path / "r", tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out/objects/a").iterdir())
    assert left == ["regions.geojson.gz", "tiles.geojson.gz"]
