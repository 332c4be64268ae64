"""Check GeoJSON by QuPath's rules: for one invalid feature, QuPath imports nothing of a file.

Rules: ``QuPathTypeAdapters.java``, ``ROITypeAdapters.java`` and ``PathClassTypeAdapter`` of QuPath 0.4 to 0.7; where
versions differ, the strictest applies.
"""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import shapely
from shapely.errors import ShapelyError

from wsi.export.geojson import read_geojson

_TYPES = ("annotation", "detection", "tile", "cell", "tmaCore", "root")
#: Objects of a type that make QuPath slow.
_MANY = {"annotation": 10_000, "tile": 200_000, "detection": 200_000}


def problems(path: Path) -> list[str]:
    """Return why QuPath would refuse or misread a file: a line per problem, with its count and first feature.

    Raises
    ------
    ValueError
        It is not GeoJSON, or too large to be read.

    Examples
    --------
    >>> problems(Path("regions.geojson"))                                                 # doctest: +SKIP
    ['2 features, first 7: the class has no colour']
    """
    features = read_geojson(path)
    first: dict[str, int] = {}
    often: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    seen: set[str] = set()
    for number, feature in enumerate(features):
        properties, uid = feature.get("properties"), feature.get("id")
        kinds[str(properties.get("objectType", "annotation")) if isinstance(properties, dict) else "annotation"] += 1
        for what in {*_of(feature), *(["the id is there twice"] if isinstance(uid, str) and uid in seen else [])}:
            often[what] += 1
            first.setdefault(what, number)
        if isinstance(uid, str):
            seen.add(uid)
    found = [f"{n} features, first {first[what]}: {what}" for what, n in sorted(often.items())]
    if not path.name.lower().endswith((".geojson", ".json", ".geojson.gz", ".json.gz")):
        found.append("the name ends in nothing that QuPath opens: it would import nothing, and not say so")
    found += [f"{n} of type {kind}: QuPath will be slow" for kind, n in kinds.items() if n > _MANY.get(kind, 10**9)]
    return found


def _of(feature: dict[str, Any]) -> list[str]:
    found = []
    properties = feature.get("properties", {})
    if not isinstance(properties, dict):
        return ["properties are null" if properties is None else "properties are no object"]
    if not _is_uuid(feature.get("id")):
        found.append("the id is no UUID: QuPath makes another")
    if properties.get("objectType") not in _TYPES:
        found.append("no objectType that QuPath knows: it becomes an annotation")
    if "name" in properties and not isinstance(properties["name"], str):
        found.append("the name is no text")
    classification = properties.get("classification")
    if isinstance(classification, list):
        found.append("the class is a list")
    elif isinstance(classification, dict) and classification and not {"color", "colorRGB"} & set(classification):
        found.append("the class has no colour")
    if isinstance(properties.get("color"), str):
        found.append("the colour is text")
    measurements = properties.get("measurements") or {}
    if isinstance(measurements, dict):
        measurements = [{"value": value} for value in measurements.values()]
    pairs = isinstance(measurements, list) and all(isinstance(each, dict) for each in measurements)
    values = [each.get("value") for each in measurements] if pairs else [None]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        found.append("a measurement is no finite number")
    return found + _geometry(feature.get("geometry"))


def _geometry(geometry: Any) -> list[str]:
    if not isinstance(geometry, dict):
        return ["there is no geometry"]
    if geometry.get("type") == "GeometryCollection":
        return ["the geometry is a collection"]
    try:
        nested = {"Polygon": 0, "MultiPolygon": 1}.get(geometry.get("type", ""))
        if nested is not None:
            rings = geometry.get("coordinates") or []
            rings = [ring for polygon in rings for ring in polygon] if nested else rings
            if any(len(ring) < 4 or ring[0] != ring[-1] for ring in rings):
                return ["a ring is not closed"]
        shape = shapely.geometry.shape(geometry)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ShapelyError):
        return ["the geometry is none"]
    if not all(map(math.isfinite, shape.bounds)):
        return ["a coordinate is not finite"]
    if not shape.is_valid:
        return ["the outline crosses itself, its parts overlap, or a hole lies outside"]
    return ["smaller than a pixel: an empty object"] if nested is not None and shape.area < 1e-4 else []


def _is_uuid(text: Any) -> bool:
    try:
        return bool(str(uuid.UUID(text)) == text.lower())
    except (ValueError, AttributeError, TypeError):
        return False


def slides_of(project: Path) -> list[tuple[str, str]]:
    """Return the image name and URI of each slide of a QuPath project.

    Raises
    ------
    ValueError
        It is not a QuPath project.

    Examples
    --------
    >>> slides_of(Path("project.qpproj"))                                                 # doctest: +SKIP
    [('slide_1', 'file:///slides/slide_1.svs')]
    """
    try:
        images = json.loads(project.read_text(encoding="utf-8-sig"))["images"]
        return [(str(each.get("imageName", "")), str(_address(each["serverBuilder"]))) for each in images]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no QuPath project ({error!r})") from error


def _address(builder: dict[str, Any]) -> Any:
    """The URI of a server builder, which may wrap another (rotated, cropped, with other metadata)."""
    return builder["uri"] if "uri" in builder else _address(builder["builder"])
