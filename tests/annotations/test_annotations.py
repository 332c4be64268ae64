"""Annotations of real programs, and files that are none."""

from __future__ import annotations

import gzip
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.annotations.make import asap_xml, mask_tiff
from wsi.annotations import Annotation, Frame, lesion_area, rasterize, read_annotations, read_mask
from wsi.annotations.base import valid
from wsi.annotations.convert import write_annotations
from wsi.errors import AnnotationError
from wsi.units import Box

SQUARE = shapely.box(100, 200, 300, 260)


def test_asap_orders_points_and_keeps_groups(tmp_path: Path):
    cross = shapely.Polygon([(0, 0), (40, 0), (40, 10), (20, 5)])
    found = read_annotations(asap_xml(tmp_path / "a.xml", [(SQUARE, "_0"), (cross, "None")]))
    assert [a.group for a in found] == ["_0", ""] and found[0].name == "Annotation 0"
    assert found[0].geometry.equals(SQUARE) and found[1].geometry.equals(cross)
    spline = read_annotations(asap_xml(tmp_path / "s.xml", [(SQUARE, "_2")], kind="Spline"))
    assert spline[0].geometry.equals(SQUARE)


def test_real_files_of_asap(data_dir: Path):
    folder = data_dir / "annotations"
    (dot,) = read_annotations(folder / "wsidicom/asap/asap-dot.xml")
    assert dot.geometry.geom_type == "Point"
    (polygon,) = read_annotations(folder / "wsidicom/asap/asap-polygon.xml")
    assert polygon.geometry.is_valid and len(polygon.geometry.exterior.coords) == 7
    assert polygon.geometry.bounds == pytest.approx((22693.1875, 16551.1797, 23067.4531, 16710.6367))
    kinds = {}
    for name in ("classification", "detection", "segmentation"):
        found = read_annotations(folder / f"wsiprocess_asap/CMU-1_{name}.xml")
        assert found and all(a.geometry.is_valid for a in found)
        kinds[name] = [a.geometry.geom_type for a in found]
    assert kinds["segmentation"] == ["Polygon"] * 4
    # One "polygon" of this real file is a single click: kept, as the point it is.
    assert kinds["detection"].count("Point") + kinds["classification"].count("Point") >= 1


def test_one_slide_as_xml_and_as_geojson(data_dir: Path):
    folder = data_dir / "patches/idc_mosaic_slides"
    xml = lesion_area(read_annotations(folder / "idc_14082_tumor_asap.xml")).geometry
    geojson = read_annotations(folder / "idc_14082_tumor.geojson")
    roles = {annotation.group: "lesion" for annotation in geojson}
    assert xml.symmetric_difference(lesion_area(geojson, roles=roles).geometry).area == 0
    labels = np.asarray(Image.open(folder / "idc_14082_grid50_labels.png"))
    assert (rasterize(xml, (56, 47), 50.0, at=0.5) == (labels == 2)).all()


def test_real_files_of_qupath(data_dir: Path):
    folder = data_dir / "annotations/wsidicom/qupath_geojson"
    kinds = {path.stem: [a.geometry.geom_type for a in read_annotations(path)] for path in folder.glob("*.json")}
    assert kinds["qupath-point"] == ["Point"] and kinds["qupath-line"] == ["LineString"]
    assert kinds["qupath-rectangle"] == ["Polygon"]
    (box,) = read_annotations(folder / "qupath-rectangle.json", origin=(1000, 50))
    assert box.geometry.bounds == (27268, 15348, 27478, 15524)


def test_polygons_of_a_hundred_camelyon_slides_survive_our_xml(data_dir: Path, tmp_path: Path):
    """Real lesions, written as ASAP's XML and read again: the union of positives less the negatives."""
    with zipfile.ZipFile(data_dir / "camelyon/camelyon16_tumor_polygons_json.zip") as archive:
        for name in archive.namelist()[::10]:
            outlines = json.loads(archive.read(name))
            shapes = [
                (shapely.Polygon(part["vertices"]), group)
                for kind, group in (("positive", "_0"), ("negative", "_2"))
                for part in outlines[kind]
                if len(part["vertices"]) > 3
            ]
            area = lesion_area(read_annotations(asap_xml(tmp_path / "a.xml", shapes))).geometry
            buffered = [(shape.buffer(0) if not shape.is_valid else shape, group) for shape, group in shapes]
            expected = shapely.union_all([s for s, g in buffered if g == "_0"]).difference(
                shapely.union_all([s for s, g in buffered if g == "_2"])
            )
            assert area.is_valid and area.area == pytest.approx(expected.area, rel=1e-3), name


def test_geojson_of_all_shapes(tmp_path: Path):
    path = tmp_path / "a.geojson.gz"
    geometry = shapely.geometry.mapping(SQUARE)
    features = [
        {
            "type": "Feature",
            "geometry": geometry,
            "properties": {"classification": {"name": "Tumor", "color": [1, 2, 3]}},
        },
        {"type": "Feature", "geometry": geometry, "properties": {"classification": {"names": ["Tumor", "In situ"]}}},
        {"type": "Feature", "geometry": geometry, "properties": {"classification": "Stroma", "name": "x"}},
        {"type": "Feature", "geometry": geometry},
        {"type": "GeometryCollection", "geometries": [geometry, {"type": "Point", "coordinates": [1, 2]}]},
    ]
    path.write_bytes(gzip.compress(json.dumps({"type": "FeatureCollection", "features": features}).encode()))
    found = read_annotations(path)
    assert [a.group for a in found] == ["Tumor", "Tumor: In situ", "Stroma", "", "", ""]
    assert found[2].name == "x" and found[-1].geometry.geom_type == "Point"


# --- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tumour", [1, 255])
@pytest.mark.parametrize("levels", [1, 4])
def test_masks_of_either_value(tmp_path: Path, tumour: int, levels: int):
    mask = np.zeros((256, 512), np.uint8)
    mask[64:128, 200:300] = tumour
    path = mask_tiff(tmp_path / "a.tif", mask, levels=levels)
    assert (read_mask(path, downsample=8) == mask[::8, ::8]).all()
    found = read_annotations(path)
    assert lesion_area(found).geometry.equals(shapely.box(200, 64, 300, 128))
    assert read_mask(path, downsample=8, size=(512, 256)).shape == (32, 64)
    assert read_mask(path, downsample=32, size=(2048, 1024)).shape == (32, 64), "a mask at a quarter of the slide"


def test_a_mask_of_another_size_is_refused(tmp_path: Path):
    path = mask_tiff(tmp_path / "a.tif", np.zeros((256, 512), np.uint8))
    for size in ((256 + 700, 512 + 700), (5120, 256), (512 * 3 + 900, 256 * 3)):
        with pytest.raises(AnnotationError, match="the slide"):
            read_mask(path, size=size)
    with pytest.raises(AnnotationError, match="per 4 of the slide, and one per 2, no multiple"):
        read_mask(path, downsample=2, size=(2048, 1024))
    with pytest.raises(AnnotationError, match="no multiple of that"):  # finer than asked for, and of no use
        read_mask(path, downsample=32, size=(512 * 3, 256 * 3))


@pytest.mark.parametrize(("slide", "scale"), [((800, 608), 2), ((820, 623), 2.05), ((390, 290), 1), ((404, 306), 1)])
def test_a_mask_of_a_small_slide_lies_where_it_did(tmp_path: Path, slide: tuple[int, int], scale: float):
    """Of 400 x 304 px: half of the slide, a little less, padded to whole tiles, and a few pixels short."""
    mask = np.zeros((304, 400), np.uint8)
    mask[64:128, 200:300] = 1
    path = mask_tiff(tmp_path / "a.tif", mask)
    (found,) = read_annotations(path, frame=Frame(size=slide))
    assert np.array(found.geometry.bounds) == pytest.approx(np.array([200, 64, 300, 128]) * scale, rel=1e-3)
    if scale == int(scale):
        assert (read_mask(path, downsample=4, size=slide) == mask[:: 4 // int(scale), :: 4 // int(scale)]).all()
        return
    with pytest.raises(AnnotationError, match="whole fraction"):
        read_mask(path, downsample=8, size=slide)


def test_where_in_its_pixel_a_mask_is_asked(tmp_path: Path):
    """As outlines are: a mask and its outline are one area, wherever in a pixel it is looked for."""
    mask = np.zeros((96, 128), np.uint8)
    mask[21:70, 37:111] = 1
    path = mask_tiff(tmp_path / "a.tif", mask)
    for at in (0.0, 0.5):
        drawn = rasterize(shapely.box(37, 21, 111, 70), (16, 12), 8, at=at)
        assert (read_mask(path, downsample=8, at=at).astype(bool) == drawn).all()


@given(st.lists(st.tuples(st.integers(0, 700), st.sampled_from([0, 1, 2, 5, 128, 255])), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_damaged_mask_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]):
    mask = np.zeros((96, 128), np.uint8)
    mask[20:50, 30:90] = 1
    path = mask_tiff(tmp_path_factory.getbasetemp() / "damaged.tif", mask, levels=2)
    damaged = bytearray(path.read_bytes())
    for at, value in changes:
        damaged[at % len(damaged)] = value
    path.write_bytes(damaged)
    for read in (read_annotations, read_mask):
        with suppress(AnnotationError):
            read(path)


def test_a_mask_whose_channels_lie_apart(tmp_path: Path):
    mask = np.zeros((3, 64, 80), np.uint8)
    mask[0, 10:20, 30:50] = 255
    tifffile.imwrite(tmp_path / "a.tif", mask, photometric="rgb", planarconfig="separate", metadata=None)
    assert (read_mask(tmp_path / "a.tif", downsample=1) == mask[0]).all()


def test_masks_as_png_and_in_colour(tmp_path: Path):
    mask = np.zeros((40, 60, 3), np.uint8)
    mask[10:20, 5:9, 0] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png", downsample=1) == mask[..., 0]).all()
    assert read_annotations(tmp_path / "a.png")[0].group == "255"


def test_masks_that_are_none_are_refused(tmp_path: Path):
    (tmp_path / "a.tif").write_bytes(b"II*\0 nothing")
    (tmp_path / "b.png").write_bytes(b"nothing")
    mask_tiff(tmp_path / "c.tif", np.zeros((64, 64), np.float32))
    for name in ("a.tif", "b.png", "c.tif"):
        with pytest.raises(AnnotationError):
            read_mask(tmp_path / name, downsample=1)
    for name in ("none.tif", "none.png", "none.xml", "none.geojson"):
        with pytest.raises(FileNotFoundError):
            read_annotations(tmp_path / name)


# --- lesions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("_0", "_2"), ("Tumor", "Exclusion"), ("metastases", "normal"), ("_1", "exclusion")])
def test_holes_win_in_any_order_and_spelling(names: tuple[str, str]):
    lesion, hole = names
    inner = Annotation(shapely.box(110, 210, 120, 220), hole)
    outer = Annotation(SQUARE, lesion)
    for order in ([inner, outer, outer], [outer, inner]):
        assert lesion_area(order).geometry.area == SQUARE.area - 100


def test_an_unknown_group_is_refused_and_can_be_named():
    annotations = [Annotation(SQUARE, "DCIS"), Annotation(shapely.box(0, 0, 9, 9), "Tissue")]
    with pytest.raises(AnnotationError, match="DCIS"):
        lesion_area(annotations, where="tumor_001.xml")
    assert lesion_area(annotations, roles={"dcis": "lesion"}).geometry.equals(shapely.MultiPolygon([SQUARE]))
    assert lesion_area(annotations, roles={"DCIS": "ignore"}).geometry.is_empty


def test_what_is_taken_for_granted_is_said():
    found = lesion_area([Annotation(SQUARE, ""), Annotation(shapely.Point(1, 2), "Tumor")])
    assert found.geometry.area == SQUARE.area and len(found.warnings) == 2
    assert lesion_area([]).geometry.is_empty


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_raster_is_what_lies_inside(seed: int):
    rng = np.random.default_rng(seed)
    blobs = [shapely.Point(rng.uniform(-10, 70, 2)).buffer(rng.uniform(2, 25), 3) for _ in range(rng.integers(1, 5))]
    shape = shapely.difference(shapely.union_all(blobs), shapely.Point(rng.uniform(0, 60, 2)).buffer(9, 3))
    downsample, at = float(rng.choice([1.0, 2.5, 4.0])), float(rng.choice([0.0, 0.5]))
    size = tuple(rng.integers(1, 40, 2).tolist())
    x, y = (np.arange(n) * downsample + at * downsample for n in size)
    expected = shapely.contains_xy(shape, *np.meshgrid(x, y))
    edge = shapely.distance(shape.boundary, shapely.points(*np.meshgrid(x, y))) < 1e-9
    found = rasterize(shape, size, downsample, at=at)
    assert found.shape == expected.shape and (found == expected)[~edge].all()


# --- files that are none -----------------------------------------------------------------------------------------

BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "aaaaaaaaaa"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;&x;&x;">]>
<ASAP_Annotations><Annotations><Annotation Name="&y;"/></Annotations></ASAP_Annotations>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:///etc/passwd"><ASAP_Annotations/>"""


def one(coordinate: str, kind: str = "Polygon") -> str:
    return (
        f'<ASAP_Annotations><Annotations><Annotation Name="n" Type="{kind}" PartOfGroup="g"><Coordinates>{coordinate}'
        "</Coordinates></Annotation></Annotations></ASAP_Annotations>"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "harm"),
        (OUTSIDE, "harm"),
        ("<a", "damaged"),
        ("", "damaged"),
        ("<kml/>", "no annotation file"),
        (one('<Coordinate Order="0" X="a" Y="1"/>'), "coordinate"),
        (one('<Coordinate Order="0" Y="1"/>'), "coordinate"),
        (one('<Coordinate X="1" Y="1"/>'), "coordinate"),
        (one('<Coordinate Order="0" X="nan" Y="1"/>'), "not finite"),
        (one('<Coordinate Order="0" X="1" Y="1"/><Coordinate Order="0" X="2" Y="1"/>'), "twice"),
        (one('<Coordinate Order="0" X="1" Y="1"/>', "Heart"), "type"),
    ],
)
def test_hostile_and_damaged_xml_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(AnnotationError, match=message) as caught:
        read_annotations(tmp_path / "a.xml")
    assert str(tmp_path / "a.xml") in str(caught.value)


def test_xml_with_a_decimal_comma_and_with_nothing(tmp_path: Path):
    (tmp_path / "a.xml").write_text(one('<Coordinate Order="0" X="1,5" Y="2"/>', "Dot"))
    assert read_annotations(tmp_path / "a.xml")[0].geometry.x == 1.5
    (tmp_path / "b.xml").write_text(one(""))
    assert read_annotations(tmp_path / "b.xml") == []
    (tmp_path / "c.xml").write_text(one('<Coordinate Order="0" X="1" Y="2"/><Coordinate Order="1" X="3" Y="2"/>'))
    assert read_annotations(tmp_path / "c.xml")[0].geometry.length == 2
    (tmp_path / "d.xml").write_text("<ASAP_Annotations/>")
    assert read_annotations(tmp_path / "d.xml") == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"type": "Topology"}',
        "[" * 100_000,
        '{"type": "Feature", "geometry": null}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, "a"], [2, 2], [0, 0]]]}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2], [0, 0]]]}}',
        '{"type": "Feature", "geometry": {"type": "Heart", "coordinates": []}}',
    ],
)
def test_damaged_geojson_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(AnnotationError, match=r"a\.geojson"):
        read_annotations(tmp_path / "a.geojson")


def test_formats_that_are_unknown_are_named(tmp_path: Path):
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(AnnotationError, match=r"Known: \.xml"):
        read_annotations(tmp_path / "a.docx")


def test_many_outlines_at_once_are_what_one_by_one_gives(tmp_path: Path):
    """Nine thousand in several blocks, sound ones among all others, against shapely one by one."""
    rng = np.random.default_rng(0)
    geometries: list[dict[str, Any]] = []
    for i in range(9000):
        x, y = (rng.random(2) * 5000).round(2).tolist()
        ring = [[x, y], [x + 9.5, y], [x + 9, y + 8.25], [x, y + 9], [x, y]]
        hole = [[x + 2, y + 2], [x + 4, y + 2], [x + 2, y + 4], [x + 2, y + 2]]
        solid = {"type": "Polygon", "coordinates": [[[*xy, 1.0] for xy in ring]]}
        geometries.append(
            [
                {"type": "Polygon", "coordinates": [ring]},
                {"type": "Polygon", "coordinates": [ring, hole]},
                {"type": "Polygon", "coordinates": [[[round(u) for u in xy] for xy in ring]]},
                {"type": "Polygon", "coordinates": [ring[:-1]]},  # open
                {"type": "Polygon", "coordinates": [[ring[0], ring[2], ring[1], ring[3], ring[0]]]},  # crosses itself
                {"type": "Point", "coordinates": [x, y]} if i < 5000 else solid,
                {"type": "MultiPolygon", "coordinates": [[ring], [[[u + 50, v] for u, v in ring]]]},
            ][0 if i % 3 else i // 3 % 7]
        )  # fmt: skip
    features = [
        {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": f"class {i % 4}"}}}
        for i, geometry in enumerate(geometries)
    ]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    found = read_annotations(tmp_path / "a.geojson", origin=(100.5, 7.25))
    assert [each.group for each in found] == [f"class {i % 4}" for i in range(9000)]
    expected = []
    for geometry in geometries:
        alone = shapely.force_2d(shapely.geometry.shape(geometry))
        expected.append(shapely.transform(valid(alone), lambda xy: xy + np.array([100.5, 7.25])))
    assert shapely.equals_exact([each.geometry for each in found], expected).all()
    # And back: each ring rounded by itself, as text.
    n = write_annotations(tmp_path / "b.geojson", found, bounds=Box(100.5, 7.25, 1, 1), slide_id="s")
    written = json.loads((tmp_path / "b.geojson").read_text())["features"]
    assert n == len(written) == len(found), "nothing is smaller than a pixel"
    checked = 0
    for feature, geometry in zip(written, geometries, strict=True):
        if geometry["type"] == "Polygon" and shapely.geometry.shape(geometry).is_valid:
            rings = [ring if ring[0] == ring[-1] else [*ring, ring[0]] for ring in geometry["coordinates"]]
            rounded = [[[round(u, 2) for u in xy[:2]] for xy in ring] for ring in rings]
            assert feature["geometry"] == {"type": "Polygon", "coordinates": rounded}
            checked += 1
    assert checked > 7000


def test_one_bad_outline_among_thousands_is_named(tmp_path: Path):
    square = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}
    for bad in (
        {"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 0], [9, 9], [0, 0]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [9, 0, 1], [9, 9], [0, 0]]]},
        {"type": "Polygon", "coordinates": [[[0, 0], [9, "x"], [9, 9], [0, 0]]]},
        {"type": "Polygon", "coordinates": [[[0], [9], [9], [0]]]},
        {"type": "Polygon", "coordinates": 5},
        {"type": "Nothing"},
        None,
    ):
        features = [{"type": "Feature", "geometry": each, "properties": {}} for each in [*[square] * 5000, bad]]
        (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        with pytest.raises(AnnotationError, match="feature 5000: has no usable geometry"):
            read_annotations(tmp_path / "a.geojson")


@pytest.mark.parametrize("properties", ["[1]", '"x"', '{"childObjects": [1]}', '{"childObjects": "ab"}', None])
def test_json_that_is_no_geojson_is_named(tmp_path: Path, properties: str | None) -> None:
    last = "1" + "0" * 400 if properties is None else "9"
    ring = f"[[0, 0], [9, 0], [9, {last}], [0, 0]]"
    text = f'{{"type": "Polygon", "coordinates": [{ring}]}}, "properties": {properties or "null"}'
    (tmp_path / "a.geojson").write_text(f'{{"type": "Feature", "geometry": {text}}}')
    with pytest.raises(AnnotationError, match=r"a\.geojson"):
        read_annotations(tmp_path / "a.geojson")
