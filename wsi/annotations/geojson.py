"""QuPath's GeoJSON and what looks like it; coordinates count from the corner of the slide's bounds."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.errors import ShapelyError

from wsi.annotations.base import Annotation, valid
from wsi.errors import AnnotationError
from wsi.export.qupath import read_geojson


def read(path: Path, origin: tuple[float, float] = (0.0, 0.0)) -> list[Annotation]:
    """Read a GeoJSON file; see ``read_annotations``. The group is the classification's name."""
    try:
        features = read_geojson(path)
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise AnnotationError(path, f"is no GeoJSON ({error})", "Export it from QuPath again") from error
    found = []
    for number, feature in enumerate(features):
        where = f"{path}, feature {number}"
        try:
            with np.errstate(invalid="ignore"):  # GEOS meets NaN before we do
                geometry = shapely.geometry.shape(feature["geometry"])
            if not np.isfinite(shapely.get_coordinates(geometry)).all():
                raise ValueError("coordinates that are not finite")
            moved = shapely.transform(valid(geometry), lambda xy: xy + np.asarray(origin))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ShapelyError) as error:
            raise AnnotationError(where, f"has no usable geometry ({error})", "Export it from QuPath again") from error
        properties = feature.get("properties") or {}
        group, name = _class_name(properties.get("classification")), str(properties.get("name") or "")
        found += [Annotation(part, group, name) for part in _parts(moved)]
    return found


def _class_name(classification: Any) -> str:
    if isinstance(classification, dict):
        names = classification.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(classification.get("name") or "")
    return classification if isinstance(classification, str) else ""


def _parts(geometry: shapely.Geometry) -> list[shapely.Geometry]:
    """A collection mixes areas and lines: each for itself."""
    return list(shapely.get_parts(geometry)) if geometry.geom_type == "GeometryCollection" else [geometry]
