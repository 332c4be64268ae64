"""QuPath's GeoJSON and what looks like it; coordinates count from the corner of the slide's bounds."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.errors import ShapelyError

from wsi.annotations.base import MAX_BYTES, Annotation, Frame, shape, valid
from wsi.errors import AnnotationError
from wsi.export.geojson import features_of, read_geojson


def read(path: Path, frame: Frame) -> list[Annotation]:
    """Read a GeoJSON file; see ``read_annotations``. The group is the classification's name."""
    try:
        return list(_annotations(read_geojson(path), path, frame))
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(path, f"is no GeoJSON ({error})", "Export it from QuPath again") from error


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
        found = [each for text in texts for each in features_of(text, path)]
        return list(_annotations(found, path, frame))
    except (zipfile.BadZipFile, ValueError, RecursionError, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(path, f"is no zip of GeoJSON ({error})", "Export it from QuPath again") from error


def _annotations(features: list[dict[str, Any]], path: Path, frame: Frame) -> Iterator[Annotation]:
    for number, feature in enumerate(_flat(features)):
        where = f"{path}, feature {number}"
        try:
            with np.errstate(invalid="ignore"):  # GEOS meets NaN before we do
                geometry = shapely.force_2d(shapely.geometry.shape(feature["geometry"]))
            if not np.isfinite(shapely.get_coordinates(geometry)).all():
                raise ValueError("coordinates that are not finite")
            if feature["geometry"].get("isEllipse") is True:  # QuPath keeps its extent, and draws the ellipse
                geometry = shape("ellipse", shapely.get_coordinates(geometry).tolist())
            moved = shapely.transform(valid(geometry), lambda xy: xy + np.asarray(frame.origin))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ShapelyError) as error:
            raise AnnotationError(where, f"has no usable geometry ({error})", "Export it from QuPath again") from error
        properties = feature.get("properties") or {}
        group, name = _class_name(properties), str(properties.get("name") or "")
        for part in _parts(moved):
            yield Annotation(part, group, name)


def _flat(features: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Features, and those nested in them as QuPath nests objects; its root object stands for the image."""
    for feature in features:
        properties = feature.get("properties") or {}
        if properties.get("objectType") != "root":
            yield feature
        yield from _flat(properties.get("childObjects") or properties.get("children") or [])


def _class_name(properties: dict[str, Any]) -> str:
    """QuPath's class in the ways it was written over time; else what other programs call ``class``."""
    found = properties.get("classification", properties.get("class"))
    if isinstance(found, dict):
        names = found.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(found.get("name") or "")
    return "" if found is None or isinstance(found, list) else str(found)


def _parts(geometry: shapely.Geometry) -> list[shapely.Geometry]:
    """A collection mixes areas and lines, and several lines are no object of QuPath: each for itself."""
    mixed = geometry.geom_type in ("GeometryCollection", "MultiLineString")
    return list(shapely.get_parts(geometry)) if mixed else [geometry]
