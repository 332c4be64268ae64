"""Formats of other viewers, every real file of them that is at hand, and the way to GeoJSON and back."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.annotations.make import asap_xml
from tests.array_slide import ArraySlide
from tests.conftest import Run
from tests.slide.make import section, write_pyramid
from wsi.annotations import Annotation, Frame, read_annotations
from wsi.annotations import base as base_module
from wsi.annotations.convert import write_annotations, write_mask
from wsi.errors import AnnotationError
from wsi.export import geojson as geojson_module
from wsi.slide import open_slide
from wsi.store import PatchStore
from wsi.tissue import find_tissue, tissue_in_image
from wsi.units import Box, Mpp

#: A slide that every file of the real ones fits on; the sizes of most are not known.
FRAME = Frame(origin=(0, 0), size=(120_000, 100_000), mpp=Mpp(0.25, 0.25), centre_nm=(0.0, 0.0))
#: What is in the folder and no annotation.
NOT_ANNOTATIONS = {"rule.json": "GeoJSON", "qupath_example_project.zip": "QuPath project"}


def imagescope(regions: str, attributes: str = 'Name="Tumor"') -> str:
    layer = f'<Annotation Id="1" {attributes}><Regions>{regions}</Regions></Annotation>'
    return f'<Annotations MicronsPerPixel="0.25">{layer}</Annotations>'


def region(points: list[tuple[float, float]], tag: str = "Vertex", **attributes: str) -> str:
    said = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    vertices = "".join(f'<{tag} X="{x}" Y="{y}"/>' for x, y in points)
    return f"<Region {said}><Vertices>{vertices}</Vertices></Region>"


SQUARE = [(100, 100), (200, 100), (200, 200), (100, 200)]
HOLE = [(120, 120), (140, 120), (140, 140), (120, 140)]


def written(tmp_path: Path, text: str, name: str = "a.xml") -> list[Annotation]:
    (tmp_path / name).write_text(text)
    return read_annotations(tmp_path / name, frame=FRAME)


# --- ImageScope, HALO ----------------------------------------------------------------------------------------------


def test_imagescope_shapes_and_holes(tmp_path: Path):
    text = imagescope(
        region(SQUARE, Type="0", NegativeROA="0", Text="first")
        + region(HOLE, Type="0", NegativeROA="1")
        + region([(300, 300), (310, 320)], Type="2")
        + region([(0, 0), (30, 40)], Type="4")
    )
    square, ellipse, ruler = written(tmp_path, text)
    assert square.geometry.equals(shapely.Polygon(SQUARE) - shapely.Polygon(HOLE)) and square.name == "first"
    assert ellipse.geometry.bounds == pytest.approx((300, 300, 310, 320))
    assert ellipse.geometry.area == pytest.approx(math.pi * 5 * 10, rel=1e-3)
    assert ruler.geometry.length == 50 and {a.group for a in (square, ellipse, ruler)} == {"Tumor"}


def test_imagescope_names_its_layers_in_either_way(tmp_path: Path):
    text = imagescope(region(SQUARE, Type="0"), 'LineColor="255"').replace(
        "<Regions>", '<Attributes><Attribute Name="Description" Id="0" Value="Stroma"/></Attributes><Regions>', 1
    )
    assert written(tmp_path, text)[0].group == "Stroma"


def test_halo_shapes(tmp_path: Path):
    text = imagescope(
        region(SQUARE, "V", Type="Polygon", NegativeROA="0")
        + region([(110, 110), (130, 130)], "V", Type="Rectangle", NegativeROA="1")
        + region([(300, 300), (340, 320)], "V", Type="Rectangle", NegativeROA="0")
        + region([(5, 6)], "V", Type="Pin")
    )
    first, box, pin = written(tmp_path, text, "a.annotations")
    assert first.geometry.area == 100 * 100 - 20 * 20
    assert box.geometry.equals(shapely.box(300, 300, 340, 320)) and pin.geometry.equals(shapely.Point(5, 6))


# --- NDP.view ------------------------------------------------------------------------------------------------------


def ndpa(body: str) -> str:
    return f'<?xml version="1.0"?><annotations>{body}</annotations>'


def state(annotation: str) -> str:
    return f'<ndpviewstate id="1"><title>AN1</title><details>d</details>{annotation}</ndpviewstate>'


def nanometres(x: float, y: float) -> tuple[float, float]:
    """Level-0 pixels to NDP.view's coordinates on a slide of 2000 x 1000 px at 0.25 um, 1.2 mm left of the middle."""
    return (x - 1000) * 250 - 1.2e6, (y - 500) * 250 + 0.3e6


NDPI = Frame(origin=(0, 0), size=(2000, 1000), mpp=Mpp(0.25, 0.25), centre_nm=(-1.2e6, 0.3e6))


def test_ndpview_counts_from_the_middle_of_the_glass(tmp_path: Path):
    points = "".join("<point><x>{:.0f}</x><y>{:.0f}</y></point>".format(*nanometres(*p)) for p in SQUARE)
    x, y = nanometres(700, 600)
    body = (
        state(f'<annotation type="freehand"><closed>1</closed><pointlist>{points}</pointlist></annotation>')
        + state(f'<annotation type="freehand"><closed>0</closed><pointlist>{points}</pointlist></annotation>')
        + state(f'<annotation type="circle"><x>{x}</x><y>{y}</y><radius>25000</radius></annotation>')
        + state(f'<annotation type="pin"><x>{x}</x><y>{y}</y></annotation>')
    )
    (tmp_path / "a.ndpi.ndpa").write_text(ndpa(body))
    area, line, circle, pin = read_annotations(tmp_path / "a.ndpi.ndpa", frame=NDPI)
    assert area.geometry.equals_exact(shapely.Polygon(SQUARE), 0.01) and (area.group, area.name) == ("AN1", "d")
    assert line.geometry.geom_type == "LineString"
    assert circle.geometry.bounds == pytest.approx((600, 500, 800, 700)) and pin.geometry.coords[0] == (700, 600)
    with pytest.raises(AnnotationError, match="--slide"):
        read_annotations(tmp_path / "a.ndpi.ndpa")


# --- GeoJSON's dialects --------------------------------------------------------------------------------------------


def feature(geometry: dict, **properties: object) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


BOX = {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 20], [0, 20], [0, 0]]]}


@pytest.mark.parametrize(
    ("classification", "group"),
    [
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),
        ("Tumor", "Tumor"),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
        ({"name": "X", "color": None}, "X"),
        ({"name": "X"}, "X"),
        (None, ""),
        ({}, ""),
        (["Tumor"], ""),
    ],
)
def test_classes_as_qupath_wrote_them_over_time(tmp_path: Path, classification, group):
    (found,) = written(tmp_path, json.dumps(feature(BOX, classification=classification)), "a.geojson")
    assert found.group == group


def test_nested_objects_ellipses_and_three_dimensions(tmp_path: Path):
    inner = feature({**BOX, "isEllipse": True}, objectType="annotation", name="inner")
    outer = feature(BOX, objectType="annotation", name="outer", childObjects=[inner])
    root = feature(BOX, objectType="root", childObjects=[outer])
    high = feature({"type": "Polygon", "coordinates": [[[*p, 5] for p in BOX["coordinates"][0]]]})
    lines = feature({"type": "MultiLineString", "coordinates": [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]})
    found = written(tmp_path, json.dumps([root, high, lines]), "a.geojson")
    assert [a.name for a in found[:2]] == ["outer", "inner"] and len(found) == 5
    assert found[1].geometry.area == pytest.approx(math.pi * 5 * 10, rel=1e-3)
    assert not found[2].geometry.has_z and found[2].geometry.area == 200


def test_rings_that_are_open_cross_or_lie_outside(tmp_path: Path):
    opened = feature({"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 20], [0, 20]]]})
    bow_tie = feature({"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]})
    outside = feature(
        {"type": "Polygon", "coordinates": [BOX["coordinates"][0], [[30, 30], [31, 30], [31, 31], [30, 30]]]}
    )
    found = written(tmp_path, json.dumps([opened, bow_tie, outside]), "a.geojson")
    assert [a.geometry.area for a in found] == [200, 50, 200]
    assert all(a.geometry.is_valid for a in found)


def test_geojson_in_a_zip_as_qupath_writes_it(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("a.geojson", json.dumps(feature(BOX, name="one")))
        packed.writestr("b.geojson", json.dumps(feature(BOX, name="two")))
    assert [a.name for a in read_annotations(tmp_path / "a.zip")] == ["one", "two"]
    (tmp_path / "b.zip").write_bytes(b"PK nothing")
    with pytest.raises(AnnotationError, match="zip"):
        read_annotations(tmp_path / "b.zip")


# --- too much, and hostile -----------------------------------------------------------------------------------------


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module, name in ((base_module, "MAX_BYTES"), (geojson_module, "_MAX_READ_BYTES")):
        monkeypatch.setattr(module, name, 1 << 20)
    for module in ("xml", "viewers", "geojson"):
        monkeypatch.setattr(f"wsi.annotations.{module}.MAX_BYTES", 1 << 20)
    blanks = b" " * (3 << 20)
    text = json.dumps(feature(BOX)).encode()
    (tmp_path / "a.geojson.gz").write_bytes(gzip.compress(blanks + text))
    (tmp_path / "a.geojson").write_bytes(blanks + text)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(blanks + text))
    (tmp_path / "a.xml").write_bytes(b"<ASAP_Annotations>" + blanks + b"</ASAP_Annotations>")
    (tmp_path / "a.xml.gz").write_bytes(gzip.compress(b"<ASAP_Annotations>" + blanks + b"</ASAP_Annotations>"))
    (tmp_path / "a.tsv").write_bytes(b"group\tcoords_x\tcoords_y\n" + blanks)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.geojson", blanks + text)
    for name in ("a.geojson.gz", "a.geojson", "a.json.gz", "a.xml", "a.xml.gz", "a.tsv", "a.zip"):
        with pytest.raises(AnnotationError, match=r"3 MiB|more than 1 MiB"):
            read_annotations(tmp_path / name)


def test_a_gigabyte_of_geojson_is_refused_with_its_size(tmp_path: Path):
    with (tmp_path / "a.geojson").open("wb") as file:
        file.truncate(1 << 30)  # a sparse file: nothing is written, and nothing may be read
    with pytest.raises(AnnotationError, match="1,024 MiB, and at most 256"):
        read_annotations(tmp_path / "a.geojson")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.xml", imagescope(region([(1, 2), ("x", 3), (4, 5)], Type="0"))),
        ("a.xml", imagescope(region([(1, 2), ("inf", 3), (4, 5)], Type="0"))),
        ("a.xml", imagescope(region(SQUARE, Type="Heart"))),
        ("a.xml", '<!DOCTYPE a [<!ENTITY x "y">]>' + imagescope(region(SQUARE, Type="0"), 'Name="&x;"')),
        (
            "a.ndpa",
            ndpa(state('<annotation type="pin"><pointlist><point><x>1</x></point></pointlist></annotation>')),
        ),
        ("a.ndpa", ndpa(state('<annotation type="heart"><x>1</x><y>2</y></annotation>'))),
        ("a.json", '{"item": {}, "annotations": [{"name": "a", "polygon": {}}]}'),
        ("a.json", '{"item": {}, "annotations": [7]}'),
        ("a.json", '{"slideId": "a", "type": "Area", "content": [{"x": 1}]}'),
        ("a.txt", '{"annotation": {"location": "POLYGON ((0 0, 1 1"}}'),
        ("a.txt", '{"annotation": {"location": null}}'),
        ("a.json", "{}"),
        ("a.json", "[]x"),
        ("a.tsv", "a\tb\n1\t2\n"),
        ("a.tsv", "group\tcoords_x\tcoords_y\na\t1,2,3\t4,5\n"),
        ("a.tsv", "group\tcoords_x\tcoords_y\na\t1,2,x\t4,5,6\n"),
        ("a.json", '{"item": {}, "annotations": [{"name": "a", "keypoint": {"x": 1%s, "y": 2}}]}' % ("0" * 400)),
        (
            "a.json",
            '{"item": {}, "annotations": [{"name": "a", "ellipse": '
            '{"center": {"x": 1, "y": 2}, "radius": {"x": 1, "y": 2}, "angle": "steep"}}]}',
        ),
    ],
)
def test_what_is_damaged_is_refused_by_name(tmp_path: Path, name: str, text: str):
    with pytest.raises(AnnotationError, match=rf"a\{name[1:]}"):
        written(tmp_path, text, name)


def test_a_table_with_the_line_ends_of_old_macs(tmp_path: Path):
    (one,) = written(tmp_path, "group\tcoords_x\tcoords_y\ra\t1,9,9\t1,1,9\r", "a.tsv")
    assert one.group == "a" and one.geometry.area == 32


def test_a_picture_is_no_mask(tmp_path: Path):
    """Of 255 greys each speck would be an outline: half a minute for these 300 px, and hours for a slide's."""
    values = np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(AnnotationError, match="254 values, as pictures do"):
        read_annotations(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    [
        '{"slideId": "a", "type": "Area", "content": [{"x": 0.1, "y": 0.1}]}',
        '{"annotation": {"location": "POINT (1 2)"}}',
    ],
)
def test_formats_that_count_in_the_slides_size_ask_for_it(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AnnotationError, match="--slide"):
        read_annotations(tmp_path / "a.json")


# --- real files ----------------------------------------------------------------------------------------------------


def test_every_real_file_is_imported_and_comes_back(data_dir: Path, tmp_path: Path):
    """To GeoJSON and back: the same areas, lengths and places within 0.01 px; what is none says what it is."""
    files = [path for path in sorted((data_dir / "annotations").rglob("*")) if path.is_file()]
    assert len(files) >= 25
    for path in files:
        if path.name in NOT_ANNOTATIONS:
            with pytest.raises(AnnotationError, match=NOT_ANNOTATIONS[path.name]):
                read_annotations(path, frame=FRAME)
            continue
        if path.suffix == ".png":  # of a part of a slide, which is not the slide's place
            with pytest.raises(AnnotationError, match="Give a mask of this slide"):
                read_annotations(path, frame=FRAME)
        found = read_annotations(path, frame=Frame() if path.suffix == ".png" else FRAME)
        assert found, path
        target, bounds = tmp_path / "a.geojson", Box(1000, 500, 10, 10)
        sizes = shapely.area([a.geometry for a in found])
        shown = [a for a, size in zip(found, sizes, strict=True) if size >= 1 or shapely.get_dimensions(a.geometry) < 2]
        assert write_annotations(target, found, bounds=bounds, slide_id="s") == len(shown), path
        again = read_annotations(target, origin=(1000, 500))
        assert [(a.group.strip(), a.name) for a in shown] == [(a.group, a.name) for a in again]
        for before, after in zip(shown, again, strict=True):
            a, b = before.geometry, after.geometry
            assert np.abs(np.array(a.bounds) - b.bounds).max() <= 0.0051, path
            assert abs(a.area - b.area) <= 0.01 * max(a.length, 1), path
            if shapely.get_num_coordinates(a) < 2000:
                assert shapely.hausdorff_distance(a, b) <= 0.01, path


def test_sectra_agrees_with_the_area_and_length_it_prints(data_dir: Path):
    """5.33 mm2 and 5.93 mm stand beside the outlines; one unit is then 23.63 mm on both axes."""
    folder = data_dir / "annotations/wsidicom/sectra"
    frame = Frame(size=(94_520, 40_000), mpp=Mpp(0.25, 0.25))
    (area,) = read_annotations(folder / "pathologycore-area.json", frame=frame)
    (line,) = read_annotations(folder / "pathologycore-polyline.json", frame=frame)
    assert area.geometry.area * 0.25**2 / 1e6 == pytest.approx(5.33, rel=2e-3)
    assert line.geometry.length * 0.25 / 1e3 == pytest.approx(5.93, rel=2e-3)


def test_cytomine_agrees_with_the_area_and_centre_it_prints(data_dir: Path):
    path = data_dir / "annotations/wsidicom/cytomine/cytomine-circle.txt"
    said = json.loads(path.read_text())["annotation"]
    (circle,) = read_annotations(path, frame=FRAME)
    assert circle.geometry.area == pytest.approx(said["area"], rel=1e-6)
    assert circle.geometry.centroid.y == pytest.approx(100_000 - said["centroid"]["y"], abs=0.01)


def test_darwin_keeps_holes(data_dir: Path):
    path = data_dir / "annotations/dlup/103S.json"
    found = read_annotations(path)
    stroma = next(a.geometry for a in found if a.group == "stroma (area)")
    paths = json.loads(path.read_text())["annotations"][1]["polygon"]["paths"]
    rings = [shapely.Polygon([(p["x"], p["y"]) for p in ring]) for ring in paths]
    x, y = np.random.default_rng(0).uniform(*np.array(stroma.bounds).reshape(2, 2), (2000, 2)).T
    odd = sum(shapely.contains_xy(ring, x, y).astype(int) for ring in rings) % 2 == 1
    assert len(rings) == 6 and (shapely.contains_xy(stroma, x, y) == odd).all()


# --- the command ---------------------------------------------------------------------------------------------------


def test_import_renames_and_tells(tmp_path: Path, wsi: Run):
    asap_xml(tmp_path / "a.xml", [(shapely.box(0, 0, 10, 20), "_0"), (shapely.box(5, 5, 6, 6), "_2")])
    code, out, _ = wsi("import", tmp_path / "a.xml", "-o", tmp_path / "out", "--class", "_0=Tumor", "--json")
    assert code == 0 and json.loads(out)[0]["groups"] == {"Tumor": 1, "_2": 1}
    assert [a.group for a in read_annotations(tmp_path / "out/a.geojson")] == ["Tumor", "_2"]
    code, out, _ = wsi("import", tmp_path / "a.xml", "-o", tmp_path / "out")
    assert "2 annotations (_0 1, _2 1)" in out
    for wrong in (("--class", "x"), ("--slide", tmp_path)):
        assert wsi("import", tmp_path / "a.xml", "-o", tmp_path / "out", *wrong)[0] == 2
    assert wsi("import", tmp_path / "a.xml", tmp_path / "a.xml", "-o", tmp_path / "out")[0] == 2
    (tmp_path / "folder.json").mkdir()
    for name in ("none.xml", "folder.json"):
        code, _, err = wsi("import", tmp_path / name, "-o", tmp_path / "out")
        assert code == 2 and f"{name}: cannot be read" in err


def test_import_counts_from_the_slides_bounds(data_dir: Path, tmp_path: Path, wsi: Run):
    slides = data_dir / "patches/idc_mosaic_slides"
    xml = slides / "idc_14082_tumor_asap.xml"
    code, _, err = wsi("import", xml, "--slide", slides / "idc_14082.tif", "--slide-mpp", "4", "-o", tmp_path)
    assert code == 0, err
    before, after = (read_annotations(path) for path in (xml, tmp_path / "idc_14082_tumor_asap.geojson"))
    assert sum(a.geometry.area for a in before) == pytest.approx(sum(a.geometry.area for a in after))


# --- where to look -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, Box(100, 60, 700, 500)])
def test_a_mask_is_tissue_within_outlines_and_outside_exclusions(tmp_path: Path, bounds: Box | None):
    """Against points in polygons, and tissue as it is found."""
    slide = ArraySlide(section(), 4.0, bounds)
    tissue = find_tissue(slide)
    roi, other = shapely.Point(350, 300).buffer(220), shapely.box(600, 80, 800, 400)
    hole, ignored = shapely.box(300, 250, 380, 330), shapely.box(640, 100, 700, 200)
    drawn = [Annotation(roi, "Tumor bed"), Annotation(other, ""), Annotation(shapely.Point(1, 1), "note")]
    drawn += [Annotation(hole, "Exclusion"), Annotation(ignored, "Ignore*")]
    xy = np.random.default_rng(0).uniform((0, 0), slide.size, (20_000, 2))
    inside = tissue.fraction(np.column_stack([xy, np.full((len(xy), 2), 1e-3)])) > 0.5
    for given, where in (
        (drawn, (roi | other) - hole - ignored),
        (drawn[3:], shapely.box(0, 0, *slide.size) - hole - ignored),
        ([], shapely.box(0, 0, *slide.size)),
    ):
        area = write_mask(tmp_path / "a.png", given, slide)
        found = tissue_in_image(str(tmp_path / "a.png"), slide)
        at = found.fraction(np.column_stack([xy, np.full((len(xy), 2), 1e-3)])) > 0.5
        assert np.mean(at != (inside & shapely.contains_xy(where, *xy.T))) < 0.03, "but for edges of mask pixels"
        assert area == pytest.approx(found.area_mm2, rel=0.03) and 0 < area <= tissue.area_mm2


def test_import_says_where_to_score(tmp_path: Path, wsi: Run):
    for name in ("a", "b"):
        write_pyramid(tmp_path / f"{name}.tif", [section()], 4.0)
        asap_xml(
            tmp_path / f"{name}.xml",
            [(shapely.box(100, 100, 500, 500), "bed"), (shapely.box(200, 200, 300, 500), "_2")],
        )
    outlines = (tmp_path / "a.xml", tmp_path / "b.xml")
    (tmp_path / "slides").mkdir()
    for name in ("a.tif", "b.tif"):
        (tmp_path / name).rename(tmp_path / "slides" / name)
    code, out, err = wsi("import", *outlines, "--slide", tmp_path / "slides", "--mask", "-o", tmp_path / "m")
    assert code == 0 and "2 annotations (bed 1, _2 1), " in out, err
    code, _, err = wsi(
        "tile", tmp_path / "m/slides.csv", "--mpp", 4, "--tile", 20, "--pixels", "none", "--min-tissue", 0.5, "-o",
        tmp_path / "s", "--workers", 1,
    )  # fmt: skip
    assert code == 0, err
    where = shapely.box(100, 100, 500, 500) - shapely.box(200, 200, 300, 500)
    for name in ("a", "b"):
        boxes = PatchStore.open(tmp_path / "s" / name / "store.zarr").grid.boxes()
        tiles = shapely.box(*boxes[:, :2].T, *(boxes[:, :2] + boxes[:, 2:]).T)
        assert len(tiles) > 50 and (shapely.area(shapely.intersection(tiles, where)) > 0.4 * 400).all()
    code, _, err = wsi("import", *outlines, "--mask", "-o", tmp_path / "n")
    assert code == 2 and "--slide" in err
    asap_xml(tmp_path / "a.xml", [(shapely.box(0, 0, 900, 700), "Exclusion")])
    _, _, err = wsi("import", tmp_path / "a.xml", "--slide", tmp_path / "slides/a.tif", "--mask", "-o", tmp_path / "n")
    assert "no tissue is left" in err


def test_import_writes_over_nothing_of_the_users(tmp_path: Path, wsi: Run):
    for name in ("a", "b"):
        write_pyramid(tmp_path / f"{name}.tif", [section()], 4.0)
        asap_xml(tmp_path / f"{name}.xml", [(shapely.box(100, 100, 500, 500), "bed")])
    masks = ("--mask", "-o", tmp_path / "m")
    for name in ("a", "b"):  # one by one: the manifest names both
        assert wsi("import", tmp_path / f"{name}.xml", "--slide", tmp_path / f"{name}.tif", *masks)[0] == 0
    listed = (tmp_path / "m/slides.csv").read_text()
    assert [line.split(",")[1] for line in listed.splitlines()] == ["mask", "a.png", "b.png"]
    code, _, err = wsi("import", tmp_path / "m/a.png", "--slide", tmp_path / "a.tif", *masks)
    assert code == 2 and "would be written over" in err
    code, _, err = wsi("import", tmp_path / "a.xml", tmp_path / "b.xml", "--slide", tmp_path / "a.tif", *masks)
    assert code == 2 and "same slide" in err
    (tmp_path / "m/slides.csv").write_text("slide,label\na.tif,1\n")
    code, _, err = wsi("import", tmp_path / "a.xml", "--slide", tmp_path / "a.tif", *masks)
    assert code == 2 and "slides.csv: is there already" in err
    assert (tmp_path / "m/slides.csv").read_text() == "slide,label\na.tif,1\n"


def test_a_mask_smaller_than_its_slide_lies_where_it_did(tmp_path: Path, wsi: Run):
    write_pyramid(tmp_path / "a.tif", [section()], 4.0)
    box = shapely.box(100, 100, 500, 500)
    asap_xml(tmp_path / "a.xml", [(box, "bed")])
    said = ("--slide", tmp_path / "a.tif", "--mask")
    assert wsi("import", tmp_path / "a.xml", *said, "-o", tmp_path / "m")[0] == 0
    with open_slide(str(tmp_path / "a.tif")) as slide:
        Image.open(tmp_path / "m/a.png").resize((slide.size[0] // 4, slide.size[1] // 4), 0).save(tmp_path / "a.png")
        found = read_annotations(tmp_path / "a.png", frame=Frame.of(slide))
    where = shapely.union_all([each.geometry for each in found])
    assert where.area > 0 and where.difference(box.buffer(8)).area == 0


def test_a_mask_that_has_changed_is_another_configuration(tmp_path: Path, wsi: Run):
    write_pyramid(tmp_path / "a.tif", [section()], 4.0)
    tile = ("tile", tmp_path / "m/slides.csv", "--mpp", 4, "--tile", 20, "--pixels", "none", "-o", tmp_path / "s")
    for right, code in ((500, 0), (500, 0), (300, 2)):
        asap_xml(tmp_path / "a.xml", [(shapely.box(100, 100, right, 500), "bed")])
        words = ("import", tmp_path / "a.xml", "--slide", tmp_path / "a.tif", "--mask", "-o", tmp_path / "m")
        assert wsi(*words)[0] == 0
        found, _, err = wsi(*tile)
        assert found == code, err
    assert "it has changed" in err
