"""GeoJSON of QuPath and similar programs; coordinates count from the corner of the slide's bounds."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.errors import ShapelyError

from wsi.annotations.base import MAX_BYTES, Annotation, Frame, shape, valid
from wsi.errors import AnnotationError
from wsi.export.geojson import features_of, read_geojson
from wsi.files import collector_paused

#: Errors of JSON that is not GeoJSON: properties that are a list, a number of 400 digits.
_OTHER_JSON = (AttributeError, TypeError, OverflowError)
#: Features whose outlines are built together.
_BLOCK = 4096
_REMEDY = "Export it again, in parts if it is long"


def read(path: Path, frame: Frame) -> list[Annotation]:
    """Read a GeoJSON file; see ``read_annotations``. The group is the classification's name."""
    try:
        with collector_paused():
            return list(_annotations(read_geojson(path), path, frame))
    except (ValueError, RecursionError, EOFError, zlib.error, *_OTHER_JSON) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(path, f"is no GeoJSON ({error})", _REMEDY) from error


def read_zip(path: Path, frame: Frame) -> list[Annotation]:
    """Read the GeoJSON files in a zip, which QuPath writes on request, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as packed:
            inside = sorted(
                (each for each in packed.infolist() if each.filename.lower().endswith((".geojson", ".json"))),
                key=lambda each: each.filename,
            )
            if any(each.filename.endswith(".qpproj") for each in packed.infolist()):
                raise AnnotationError(
                    path,
                    "is a QuPath project, whose objects (data.qpdata) only QuPath can read",
                    "Export them in QuPath: File > Export objects as GeoJSON",
                )
            total = sum(each.file_size for each in inside)
            if total > MAX_BYTES:
                raise ValueError(f"it is {total / 2**20:,.0f} MiB, and at most {MAX_BYTES / 2**20:,.0f} are read")
            texts = [packed.read(each) for each in inside]  # the sizes it declares are checked by zipfile
        with collector_paused():
            found = [each for text in texts for each in features_of(text, path)]
            return list(_annotations(found, path, frame))
    except (
        zipfile.BadZipFile, ValueError, RecursionError, zlib.error, NotImplementedError, RuntimeError, *_OTHER_JSON
    ) as error:  # fmt: skip
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(path, f"is no zip of GeoJSON ({error})", _REMEDY) from error


def _annotations(features: list[dict[str, Any]], path: Path, frame: Frame) -> Iterator[Annotation]:
    flat = list(_flat(features))
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        for number, (feature, polygon) in enumerate(zip(block, _polygons(block, frame), strict=True), start):
            parts = _parts(_geometry(feature, f"{path}, feature {number}", frame)) if polygon is None else [polygon]
            properties = feature.get("properties") or {}
            group, name = _class_name(properties), str(properties.get("name") or "")
            for part in parts:
                yield Annotation(part, group, name)


def _geometry(feature: dict[str, Any], where: str, frame: Frame) -> shapely.Geometry:
    try:
        with np.errstate(invalid="ignore"):  # NaN is refused below
            geometry = shapely.force_2d(shapely.geometry.shape(feature["geometry"]))
        if not np.isfinite(shapely.get_coordinates(geometry)).all():
            raise ValueError("coordinates that are not finite")
        if feature["geometry"].get("isEllipse") is True:  # QuPath stores the extent of an ellipse
            geometry = shape("ellipse", shapely.get_coordinates(geometry).tolist())
        return shapely.transform(valid(geometry), lambda xy: xy + np.asarray(frame.origin))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ShapelyError) as error:
        raise AnnotationError(where, f"has no usable geometry ({error})", _REMEDY) from error


def _polygons(features: list[dict[str, Any]], frame: Frame) -> npt.NDArray[np.object_]:
    """Do for plain valid polygons together what ``_geometry`` does for one feature; None for all other features."""
    found = np.full(len(features), None, object)
    chosen, rings, sizes, points = [], [], [], []
    for i, feature in enumerate(features):
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict) or geometry.get("type") != "Polygon" or geometry.get("isEllipse"):
            continue
        drawn = geometry.get("coordinates")
        if isinstance(drawn, list) and drawn and all(_closed(ring) for ring in drawn):
            chosen.append(i)
            rings.append(len(drawn))
            for ring in drawn:
                sizes.append(len(ring))
                points += ring
    try:
        xy = np.array(points)
    except ValueError:  # points of different lengths
        return found
    if xy.ndim != 2 or xy.shape[1] < 2 or xy.dtype.kind not in "if" or not np.isfinite(xy).all():
        return found
    lines = shapely.linearrings(xy[:, :2].astype(np.float64), indices=np.repeat(np.arange(len(sizes)), sizes))
    polygons = shapely.polygons(lines, indices=np.repeat(np.arange(len(rings)), rings))
    sound = shapely.is_valid(polygons)
    moved = shapely.transform(polygons[sound], lambda xy: xy + np.asarray(frame.origin))
    found[np.array(chosen, np.intp)[sound]] = moved
    return found


def _closed(ring: Any) -> bool:
    return isinstance(ring, list) and len(ring) >= 4 and ring[0] == ring[-1]


def _flat(features: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Features and their nested children; QuPath's root object, which stands for the image, is left out."""
    for feature in features:
        properties = feature.get("properties") or {}
        if properties.get("objectType") != "root":
            yield feature
        yield from _flat(properties.get("childObjects") or properties.get("children") or [])


def _class_name(properties: dict[str, Any]) -> str:
    """QuPath's class, in the forms of all its versions, or the property ``class`` of other programs."""
    found = properties.get("classification", properties.get("class"))
    if isinstance(found, dict):
        names = found.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(found.get("name") or "")
    return "" if found is None or isinstance(found, list) else str(found)


def _parts(geometry: shapely.Geometry) -> list[shapely.Geometry]:
    """The parts of a collection, which may mix areas and lines, or of several lines, which QuPath cannot hold."""
    mixed = geometry.geom_type in ("GeometryCollection", "MultiLineString")
    return list(shapely.get_parts(geometry)) if mixed else [geometry]
