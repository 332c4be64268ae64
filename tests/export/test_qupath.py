"""QuPath files against an emulation of QuPath's reader, the schema where it is at hand, and shapely's areas."""

from __future__ import annotations

import errno
import gzip
import json
import math
import shutil
import subprocess
import tracemalloc
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wsi.export.geojson import read_geojson
from wsi.export.qupath import PathClass, Region, write_regions, write_tiles
from wsi.units import Box

REPOSITORY = Path(__file__).resolve().parents[2]
TUMOUR, OTHER = PathClass("Tumor", (200, 0, 0)), PathClass("Other", (255, 200, 0))
BOUNDS = Box(1000, 2000, 500, 400)


# --- QuPath's reader, as strict as the strictest of its versions 0.4 to 0.7 ----------------------------------------


class QuPathRefusesError(AssertionError):
    """One bad feature, and QuPath imports nothing of the file."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise QuPathRefusesError(what)


def refuse_constant(name: str) -> None:
    raise QuPathRefusesError(f"{name} is no JSON number")


def no_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len({key for key, _ in pairs}) == len(pairs), "a key occurs twice")
    return dict(pairs)


def read_ring(ring: Any, size: tuple[float, float]) -> list[tuple[float, float]]:
    need(isinstance(ring, list) and len(ring) >= 4, "a ring has four points or more")
    for point in ring:
        need(isinstance(point, list) and len(point) == 2, "a point is two numbers")
        for value, last in zip(point, size, strict=True):
            need(type(value) in (int, float) and math.isfinite(value), "a coordinate is a finite number")
            need(0 <= value <= last, "a coordinate lies in the image as QuPath crops it")
            need(round(value, 2) == value, "a coordinate has two decimals")
    need(ring[0] == ring[-1], "Points of LinearRing do not form a closed linestring")
    return [tuple(point) for point in ring]


def read_geometry(geometry: Any, size: tuple[float, float]) -> shapely.Geometry:
    need(isinstance(geometry, dict) and set(geometry) == {"type", "coordinates"}, "a geometry is type and coordinates")
    need(geometry["type"] in {"Polygon", "MultiPolygon"}, "Reduction failed: does not contain coordinates")
    multi = geometry["type"] == "MultiPolygon"
    polygons = geometry["coordinates"] if multi else [geometry["coordinates"]]
    need(len(polygons) > int(multi), "several polygons, or no MultiPolygon")
    rings = [[read_ring(ring, size) for ring in polygon] for polygon in polygons]
    parts = [shapely.Polygon(shell, holes) for shell, *holes in rings]
    shape = shapely.MultiPolygon(parts) if multi else parts[0]
    need(shape.is_valid, f"Reduction failed, possible invalid input: {shapely.is_valid_reason(shape)}")
    need(all(part.area >= 1 for part in parts), "smaller than a pixel: an empty object at (0, 0)")
    return shape


def read_as_qupath(path: Path, size: tuple[float, float] = (BOUNDS.w, BOUNDS.h)) -> list[dict[str, Any]]:
    """Properties of each object, with its shape under "shape" and its identifier under "id"."""
    need(path.name.endswith((".geojson", ".geojson.gz", ".json", ".json.gz")), "no such extension: 0 objects")
    raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    root = json.loads(raw.decode(), parse_constant=refuse_constant, object_pairs_hook=no_double_keys)
    need(root["type"] == "FeatureCollection", "a FeatureCollection")
    objects = []
    for feature in root["features"]:
        need(list(feature) == ["type", "id", "geometry", "properties"] and feature["type"] == "Feature", "a Feature")
        need(str(uuid.UUID(feature["id"])) == feature["id"], "an identifier is a UUID, or QuPath makes another")
        properties = feature["properties"]
        need(properties["objectType"] in {"annotation", "detection", "tile", "cell"}, "an object type is in lower case")
        known = {"objectType", "name", "classification", "isLocked", "measurements", "metadata"}
        need(set(properties) <= known, "a property that QuPath does not know")
        need(isinstance(properties.get("name", ""), str) and properties.get("name", "x"), "a name is not empty")
        need(isinstance(properties.get("isLocked", True), bool), "isLocked is true or false")
        path_class = properties["classification"]
        need(set(path_class) == {"name", "color"}, "Unable to parse PathClass")
        need(path_class["name"] and not set("\r\n") & set(path_class["name"]), "a class has a name of one line")
        color = path_class["color"]
        need(len(color) == 3 and all(type(c) is int and 0 <= c <= 255 for c in color), "a colour is three bytes")
        for value in properties["measurements"].values():
            need(type(value) in (int, float) and math.isfinite(value), "a measurement is a finite number")
        for value in properties.get("metadata", {}).values():
            need(isinstance(value, str), "metadata are strings")
        objects.append(properties | {"shape": read_geometry(feature["geometry"], size), "id": feature["id"]})
    need(len({o["id"] for o in objects}) == len(objects), "identifiers are unique")
    return objects


def some_tiles(path: Path, n: int = 20, **options: Any) -> int:
    boxes = np.column_stack([np.arange(n) * 30.25 + 950, np.full(n, 2100.5), np.full((n, 2), 60.5)])
    values = {
        "prob_tumor": np.linspace(0, 1, n, dtype=np.float32),
        "attention": np.where(np.arange(n) % 2, np.nan, 1e-9),
    }
    options = {"bounds": BOUNDS, "slide_id": "a slide"} | options
    return write_tiles(path, boxes, [OTHER, TUMOUR], np.arange(n) % 2, values, **options)


# --- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiles.geojson", "tiles.geojson.gz"])
def test_tiles_come_back_where_they_were(tmp_path: Path, name: str):
    n = some_tiles(tmp_path / name)
    objects = read_as_qupath(tmp_path / name)
    # Of 20 tiles the last two begin beyond the right edge, at 1500.
    assert n == len(objects) == 19
    for i, tile in enumerate(objects):
        x = i * 30.25 + 950 - 1000
        assert tile["shape"].bounds == pytest.approx((max(x, 0), 100.5, min(x + 60.5, 500), 161), abs=0.006)
        assert tile["objectType"] == "tile"
        assert (
            tile["classification"]
            == [{"name": "Other", "color": [255, 200, 0]}, {"name": "Tumor", "color": [200, 0, 0]}][i % 2]
        )
        assert tile["measurements"]["prob_tumor"] == pytest.approx(i / 19, rel=1e-6)
        assert ("attention" in tile["measurements"]) == (i % 2 == 0), "NaN is left out"


def test_a_half_tile_shift_and_a_forgotten_offset_are_seen(tmp_path: Path):
    box = np.array([[1100.0, 2100.0, 64.0, 64.0]])
    write_tiles(tmp_path / "a.geojson", box, [TUMOUR], np.zeros(1, int), {}, bounds=BOUNDS, slide_id="s")
    (tile,) = read_as_qupath(tmp_path / "a.geojson")
    assert tile["shape"].equals(shapely.box(100, 100, 164, 164))


@given(
    st.lists(
        st.tuples(*[st.floats(-700, 700)] * 2, *[st.floats(0.001, 300)] * 2), max_size=6
    ),
    st.floats(0.3, 600), st.floats(0.3, 600), st.floats(-9, 9),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_is_a_tile_or_left_out(tmp_path: Path, boxes, w, h, corner):
    path, bounds = tmp_path / "a.geojson", Box(corner, -corner, w, h)
    array = np.array(boxes, np.float64).reshape(-1, 4)
    n = write_tiles(
        path, array, [TUMOUR], np.zeros(len(array), int), {"area": array[:, 2]}, bounds=bounds, slide_id="s"
    )
    objects = read_as_qupath(path, (w, h))
    assert len(objects) == n
    common = [b.intersect(bounds) for b in (Box(*box) for box in boxes)]
    clear = [c for c in common if c.w * c.h > 1 + 0.02 * (c.w + c.h)]
    assert len(clear) <= n <= sum(c.w * c.h > 1 - 0.02 * (c.w + c.h + 1) for c in common)
    assert sum(o["shape"].area for o in objects) <= sum(c.w * c.h + 0.02 * (c.w + c.h + 1) for c in common)


def test_the_file_is_as_qupath_writes_it(tmp_path: Path):
    """The layout QuPath 0.5 writes itself, apart from blanks."""
    box = np.array([[1100.0, 2200.25, 256.0, 100.5]])
    write_tiles(
        tmp_path / "a.geojson", box, [TUMOUR], np.zeros(1, int), {"p": np.array([0.93], np.float32)},
        bounds=BOUNDS, slide_id="s", metadata={"model": "é"},
    )  # fmt: skip
    identifier = read_geojson(tmp_path / "a.geojson")[0]["id"]
    assert (tmp_path / "a.geojson").read_text("utf-8").replace("\n", "") == (
        '{"type":"FeatureCollection","metadata":{"model":"é"},"features":[{"type":"Feature","id":"' + identifier + '",'
        '"geometry":{"type":"Polygon","coordinates":[[[100,200.25],[356,200.25],[356,300.75],[100,300.75],[100,200.25]]]},'
        '"properties":{"objectType":"tile","classification":{"name":"Tumor","color":[200,0,0]},"measurements":{"p":0.93}}}]}'
    )


def test_the_same_tiles_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    some_tiles(tmp_path / "a.geojson.gz")
    monkeypatch.setattr("time.time", lambda: 2e9)  # gzip writes the time unless told not to
    some_tiles(tmp_path / "b.geojson.gz")
    some_tiles(tmp_path / "c.geojson.gz", slide_id="another")
    a, b, c = (read_as_qupath(tmp_path / f"{name}.geojson.gz") for name in "abc")
    assert (tmp_path / "a.geojson.gz").read_bytes() == (tmp_path / "b.geojson.gz").read_bytes()
    assert not {o["id"] for o in a} & {o["id"] for o in c}
    assert [o["id"] for o in a] == [o["id"] for o in b]


def long_file(folder: Path) -> tuple[bytes, bytes]:
    """Nine thousand tiles in a.geojson and, in several pieces, in a.geojson.gz: the content of both."""
    n = 9000
    boxes = np.column_stack([np.arange(n) % 95 * 256.25, np.arange(n) // 95 * 256.25, np.full((n, 2), 256.25)])
    for name in ("a.geojson", "a.geojson.gz"):
        write_tiles(
            folder / name, boxes, [TUMOUR], np.zeros(n, int), {"p": np.linspace(0, 1, n)},
            bounds=Box(0, 0, 40_000, 40_000), slide_id="s",
        )  # fmt: skip
    return (folder / "a.geojson").read_bytes(), (folder / "a.geojson.gz").read_bytes()


def test_long_files_are_packed_in_pieces_that_are_read_as_one(tmp_path: Path):
    """By Python, and by zlib piece after piece."""
    text, packed = long_file(tmp_path)
    assert gzip.decompress(packed) == text
    pieces, rest = [], packed
    while rest:
        member = zlib.decompressobj(wbits=31)
        pieces.append(member.decompress(rest))
        assert member.eof and rest[4:8] == bytes(4), "no time"
        rest = member.unused_data
    assert b"".join(pieces) == text and len(pieces) > 1
    assert len(pieces[-1]) > 1 << 20, "Java takes a very short last one for no member"


@pytest.mark.skipif(
    not (shutil.which("java") and shutil.which("javac")), reason="QuPath reads with Java's own gzip: a JDK is needed"
)
def test_packed_files_are_what_java_reads(tmp_path: Path):
    text, _ = long_file(tmp_path)
    source = """import java.io.*; import java.nio.file.*; import java.util.zip.*;
        public class Read { public static void main(String[] a) throws Exception {
            var in = new GZIPInputStream(Files.newInputStream(Path.of(a[0])));
            in.transferTo(System.out); } }"""
    (tmp_path / "Read.java").write_text(source)
    found = subprocess.run(["java", tmp_path / "Read.java", tmp_path / "a.geojson.gz"], capture_output=True, check=True)
    assert found.stdout == text


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    n = 20_000
    boxes = np.column_stack(
        [np.random.default_rng(0).uniform((1000, 2000), (1400, 2400), (n, 2)), np.full((n, 2), 9.0)]
    )
    tracemalloc.start()
    write_tiles(tmp_path / "a.geojson", boxes, [TUMOUR], np.zeros(n, int), {}, bounds=BOUNDS, slide_id="s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < boxes.nbytes * 8 < (tmp_path / "a.geojson").stat().st_size


@pytest.mark.parametrize(
    ("boxes", "index", "values"),
    [
        (np.zeros((2, 3)), [0, 0], [1.0, 1.0]),
        (np.full((2, 4), np.nan), [0, 0], [1.0, 1.0]),
        (np.ones((2, 4)), [0], [1.0, 1.0]),
        (np.ones((2, 4)), [0, 2], [1.0, 1.0]),
        (np.ones((2, 4)), [0, -1], [1.0, 1.0]),
        (np.ones((2, 4)), [0.0, 1.0], [1.0, 1.0]),
        (np.ones((2, 4)), [0, 0], [1.0]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, boxes, index, values):
    with pytest.raises(ValueError):
        write_tiles(
            tmp_path / "a.geojson", boxes, [OTHER, TUMOUR], np.array(index), {"p": np.array(values)},
            bounds=BOUNDS, slide_id="s",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "color"), [("", (0, 0, 0)), (" ", (0, 0, 0)), ("a\nb", (0, 0, 0)), ("a", (0, 0, 256)), ("a", (0, 0))]
)
def test_a_class_qupath_would_refuse_is_refused(name, color):
    with pytest.raises(ValueError, match="QuPath"):
        PathClass(name, color)


def test_lines_written_by_hand_are_what_a_json_encoder_gives(tmp_path: Path):
    name, key = 'a "b" \\ é', 'prob "x" \u2028'
    values = np.array([0.1, 1 / 3, 1e-12, 123456789.0, 5.0, -0.0, np.nan, np.inf], np.float32)
    boxes = np.column_stack([np.arange(8) * 50 + 1000.125, np.full(8, 2000.5), np.full((8, 2), 20.25)])
    write_tiles(
        tmp_path / "a.geojson", boxes, [PathClass(name, (1, 2, 3))], np.zeros(8, int), {key: values, "n": values},
        bounds=BOUNDS, slide_id=name,
    )  # fmt: skip
    lines = (tmp_path / "a.geojson").read_text("utf-8").split("\n")[1:-2]
    assert len(lines) == 8
    for line, value in zip(lines, values, strict=True):
        tile = json.loads(line.rstrip(","), parse_constant=refuse_constant, object_pairs_hook=no_double_keys)
        finite = bool(np.isfinite(value))
        assert tile["properties"]["measurements"] == (
            {key: float(f"{value:.7g}"), "n": float(f"{value:.7g}")} if finite else {}
        )
        assert tile["properties"]["classification"] == {"name": name, "color": [1, 2, 3]}
        assert tile["id"] == str(uuid.UUID(tile["id"])) and uuid.UUID(tile["id"]).version == 5
    for i, tile in enumerate(map(json.loads, (line.rstrip(",") for line in lines))):
        assert tile["id"] == str(uuid.uuid5(uuid.NAMESPACE_URL, f"wsi:{name}/tile/{i}"))


# --- regions -------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, *geometries: shapely.Geometry, bounds: Box = BOUNDS) -> list[dict[str, Any]]:
    path = tmp_path / "regions.geojson"
    n = write_regions(
        path, [Region(g, TUMOUR, f"region {i}") for i, g in enumerate(geometries)], bounds=bounds, slide_id="s"
    )
    objects = read_as_qupath(path, (bounds.w, bounds.h))
    assert len(objects) == n
    return objects


def test_a_region_keeps_its_hole_its_numbers_and_its_lock(tmp_path: Path):
    ring = shapely.box(1100, 2100, 1300, 2300) - shapely.box(1150, 2150, 1200, 2200)
    region = Region(ring, TUMOUR, "largest", {"area_mm2": 1.25, "none": math.nan, "far": math.inf})
    write_regions(tmp_path / "a.geojson", [region], bounds=BOUNDS, slide_id="s", metadata={"model": "m"})
    (found,) = read_as_qupath(tmp_path / "a.geojson")
    assert found["shape"].equals(shapely.box(100, 100, 300, 300) - shapely.box(150, 150, 200, 200))
    assert found["objectType"] == "annotation" and found["isLocked"] is True and found["name"] == "largest"
    assert found["measurements"] == {"area_mm2": 1.25} and found["metadata"] == {"model": "m"}


def test_a_region_is_clipped_to_the_bounds(tmp_path: Path):
    outside, across = shapely.box(0, 0, 900, 900), shapely.box(900, 1900, 1100, 2100)
    (found,) = written(tmp_path, outside, across)
    assert found["shape"].equals(shapely.box(0, 0, 100, 100)) and found["name"] == "region 1"


@pytest.mark.parametrize(
    ("geometry", "area"),
    [
        (shapely.Polygon([(0, 0), (100, 100), (100, 0), (0, 100)]), 5000.0),  # a bow tie
        (shapely.MultiPolygon([shapely.box(0, 0, 60, 60), shapely.box(30, 0, 90, 60)]), 5400.0),  # parts overlap
        (
            shapely.Polygon(shapely.box(0, 0, 50, 50).exterior, [shapely.box(40, 40, 60, 60).exterior.coords]),
            2400.0,
        ),  # a hole crosses the shell
        (shapely.Polygon([(0, 0), (50, 0), (50, 50), (90, 50), (50, 50), (0, 50)]), 2500.0),  # a spike
        (shapely.GeometryCollection([shapely.box(0, 0, 10, 10), shapely.LineString([(0, 0), (99, 99)])]), 100.0),
        (shapely.union_all([shapely.box(0, 0, 10, 10), shapely.box(10, 10, 20, 20)]), 200.0),  # corners touch
        (shapely.union_all([shapely.box(0, 0, 10, 10), shapely.box(50, 50, 50.5, 51.9)]), 100.0),  # below a pixel
        (shapely.box(0, 0, 0.9, 1.0), 0.0),
        (shapely.Polygon([(0, 0), (400, 0.004), (400, 0)]), 0.0),  # thinner than QuPath can tell
        (shapely.Polygon(), 0.0),
        (shapely.box(1 / 3, 1 / 3, 100 / 3, 100 / 3), 33.0**2),
    ],
)
def test_what_qupath_would_refuse_is_repaired(tmp_path: Path, geometry, area):
    found = written(tmp_path, shapely.transform(geometry, lambda xy: xy + np.array(BOUNDS[:2])))
    assert sum(o["shape"].area for o in found) == pytest.approx(area, abs=0.5)
    assert len(found) == (area > 0)


points = st.tuples(st.floats(-20, 130, width=32), st.floats(-20, 130, width=32)) | st.tuples(
    st.integers(0, 6).map(lambda n: n * 20.0), st.integers(0, 6).map(lambda n: n * 20.0)
)
rings = st.lists(points, min_size=3, max_size=9)
crossing = st.builds(shapely.Polygon, rings)
holed = st.builds(lambda shell, hole: shapely.Polygon(shell, [hole]), rings, rings)
slivers = st.builds(
    lambda p, q, w: shapely.LineString([p, q]).buffer(w) if p != q else shapely.Point(p).buffer(w),
    points,
    points,
    st.floats(0.001, 0.6),
)
several = st.lists(crossing | holed | slivers, min_size=1, max_size=4).map(
    lambda parts: shapely.MultiPolygon(
        [p for part in parts for p in shapely.get_parts(part) if p.geom_type == "Polygon"]
    )
)


@given(crossing | holed | slivers | several, st.floats(-3, 3))
@example(shapely.Polygon([(0, 0), (1 / 3, 100), (2 / 3, 0), (1, 100), (100, 100), (100, 0)]), 0.005)
@example(shapely.Polygon([(1, 0), (-1, 0), (0, 20)], [[(0, 0), (0, 1 / 256), (1, 3)]]), 0.0)  # two that share an edge
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_polygon_is_accepted_and_keeps_its_area(tmp_path: Path, geometry, corner):
    bounds = Box(corner, corner / 3, 100.0, 90.555)
    found = written(tmp_path, geometry, bounds=bounds)
    clip = shapely.box(bounds.x, bounds.y, bounds.x + bounds.w, bounds.y + bounds.h)
    rough = shapely.transform(geometry, lambda xy: np.round(xy, 6))  # GEOS fails on the smallest of numbers
    expected = shapely.make_valid(rough, method="structure", keep_collapsed=False).intersection(clip)
    parts = [p for p in shapely.get_parts(shapely.get_parts(expected)) if p.geom_type == "Polygon"]
    small = sum(p.area for p in parts if p.area < 3)  # on either side of one pixel after rounding
    tolerance = 0.02 * expected.length + small + 0.2
    assert sum(o["shape"].area for o in found) == pytest.approx(expected.area, abs=tolerance)


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_files_satisfy_the_schema(tmp_path: Path):
    schema = REPOSITORY.parent / "shared" / "qupath_geojson.schema.json"
    if not schema.is_file():
        pytest.skip("the schema is not here: ../shared/qupath_geojson.schema.json")
    jsonschema = pytest.importorskip("jsonschema")
    some_tiles(tmp_path / "a.geojson", metadata={"model": "m"})
    two = shapely.MultiPolygon([shapely.box(1000, 2000, 1010, 2010), shapely.box(1100, 2100, 1110, 2110)])
    written(tmp_path, two.convex_hull, two)
    write_tiles(tmp_path / "empty.geojson", np.zeros((0, 4)), [], np.zeros(0, int), {}, bounds=BOUNDS, slide_id="s")
    for path in tmp_path.iterdir():
        jsonschema.validate(json.loads(path.read_text()), json.loads(schema.read_text()))


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str):
    some_tiles(tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def regions():
        yield Region(shapely.box(1000, 2000, 1100, 2100), TUMOUR)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_regions(tmp_path / name, regions(), bounds=BOUNDS, slide_id="s")
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before
    with pytest.raises(FileNotFoundError):
        some_tiles(tmp_path / "none" / name)


def test_metadata_are_strings(tmp_path: Path):
    with pytest.raises(ValueError, match="strings"):
        some_tiles(tmp_path / "a.geojson", metadata={"tiles": 3})
    assert not list(tmp_path.iterdir())


def test_the_emulation_refuses_what_qupath_refuses(tmp_path: Path):
    """Or the tests above would say nothing: the table of features that QuPath rejects, one at a time."""
    some_tiles(tmp_path / "good.geojson", 3)
    good = (tmp_path / "good.geojson").read_text()
    bad = [
        ('"color":[255,200,0]', '"colour":[255,200,0]'), (',"color":[255,200,0]', ""), ('"tile"', '"Tile"'),
        ('"prob_tumor":0.5', '"prob_tumor":NaN'), ("[0,161]", "[0,-161]"), (",[0,100.5]]]", ",[0,100.6]]]"),
        ('"type":"Polygon"', '"type":"GeometryCollection"'), ('"name":"Tumor"', '"name":""'), ("[200,0,0]", "[200,0]"),
        ("[[10.5,100.5],[71,100.5]", "[[71,161],[71,100.5]"), ("[0,161]", "[0,160.999]"),
        ("[10.5,100.5],[10.5,161]", "[10.5,161],[10.5,100.5]"),
    ]  # fmt: skip
    read_as_qupath(tmp_path / "good.geojson")
    for old, new in bad:
        assert old in good, old
        (tmp_path / "bad.geojson").write_text(good.replace(old, new))
        with pytest.raises((QuPathRefusesError, KeyError)):
            read_as_qupath(tmp_path / "bad.geojson")


# --- reading -------------------------------------------------------------------------------------------------------


def test_reading_is_tolerant_where_programs_differ(tmp_path: Path):
    feature = {"type": "Feature", "id": "PathAnnotationObject", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    text = json.dumps(feature)
    for i, content in enumerate(
        [
            text,
            f"[{text}]",
            f'{{"type":"FeatureCollection","features":[{text}]}}',
            f'[{{"features":[{text}]}}]',
            "\ufeff" + text,
        ]
    ):
        for name, raw in ((f"{i}.json", content.encode()), (f"{i}.json.gz", gzip.compress(content.encode()))):
            (tmp_path / name).write_bytes(raw)
            assert read_geojson(tmp_path / name) == [feature]
    (tmp_path / "bare.json").write_text('{"type":"Point","coordinates":[1,2]}')
    assert read_geojson(tmp_path / "bare.json")[0]["geometry"] == feature["geometry"]
    (tmp_path / "twice.json").write_text(
        text[:-1] + ',"properties":{"metadata":{"a":"1"},"metadata":{"a":"1"},"x":NaN}}'
    )
    assert read_geojson(tmp_path / "twice.json")[0]["properties"]["metadata"] == {"a": "1"}
    for wrong in ("{}", "3", "{", '{"features":[null]}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ValueError):
            read_geojson(tmp_path / "wrong.json")


def test_what_was_written_is_read(tmp_path: Path):
    n = some_tiles(tmp_path / "a.geojson.gz")
    features = read_geojson(tmp_path / "a.geojson.gz")
    assert len(features) == n
    assert [shapely.from_geojson(json.dumps(f["geometry"])).bounds for f in features] == [
        o["shape"].bounds for o in read_as_qupath(tmp_path / "a.geojson.gz")
    ]


def test_real_files_of_qupath_and_others_are_read(data_dir: Path):
    folder = data_dir / "annotations"
    files = [*folder.glob("wsidicom/qupath_geojson/*.json"), *folder.rglob("*.geojson")]
    assert len(files) >= 9
    for path in files:
        features = read_geojson(path)
        assert features, path
        for feature in features:
            assert shapely.from_geojson(json.dumps(feature["geometry"])).is_valid
    labels = read_geojson(data_dir / "patches/idc_mosaic_slides/idc_14082_tumor.geojson")
    assert {f["properties"]["objectType"] for f in labels} == {"annotation"}
