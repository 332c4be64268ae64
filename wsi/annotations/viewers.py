"""JSON and tables of other viewers: Darwin V7, Sectra, Cytomine, HistomicsTK; and GeoJSON named ``.json``.

The formats were inferred from files that the programs wrote. Sectra measures both axes in one unit, taken to be the
slide's width (the areas and lengths that the viewer prints beside outlines agree with that to 0.03 %). Cytomine's WKT
counts from the bottom left corner. The others use level-0 pixels of the whole plane.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.errors import ShapelyError

from wsi.annotations import geojson
from wsi.annotations.base import MAX_BYTES, Annotation, Frame, number, shape, valid
from wsi.errors import AnnotationError
from wsi.files import read_unpacked


def read(path: Path, frame: Frame) -> list[Annotation]:
    """Read the JSON of a viewer; see ``read_annotations``."""
    try:
        root = json.loads(read_unpacked(path, MAX_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError) as error:
        raise AnnotationError(path, f"is no JSON ({error})", "Export it again") from error
    items = root if isinstance(root, list) else [root]
    first = items[0] if items and isinstance(items[0], dict) else {}
    try:
        if isinstance(first.get("annotations"), list) and "item" in first:
            return list(_darwin(first["annotations"], path))
        if isinstance(first.get("content"), list) and "slideId" in first:
            return list(_sectra(items, path, frame))
        if "annotation" in first or "location" in first or "collection" in first:
            return list(_cytomine(items, path, frame))
    except (KeyError, TypeError, AttributeError, IndexError, ShapelyError) as error:
        raise AnnotationError(path, f"is damaged ({error!r})", "Export it again") from error
    return geojson.read(path, frame)


def read_table(path: Path, frame: Frame) -> list[Annotation]:
    """Read HistomicsTK's table of contours: columns ``group``, ``coords_x``, ``coords_y``; tabs or commas."""
    found = []
    try:
        text = read_unpacked(path, MAX_BYTES).decode("utf-8-sig")
    except ValueError as error:
        raise AnnotationError(path, f"is no table in UTF-8 ({error})", "Export it again") from error
    limit = csv.field_size_limit(MAX_BYTES)  # a setting of the whole process
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text[:4096] else ","))
    except csv.Error as error:
        raise AnnotationError(path, f"is no table ({error})", "Export it again") from error
    finally:
        csv.field_size_limit(limit)
    for line, row in enumerate(rows, 2):
        where = f"{path}, row {line}"
        try:
            xs, ys = ((row[axis] or "").split(",") for axis in ("coords_x", "coords_y"))
            group = row["group"]
        except KeyError as error:
            raise AnnotationError(path, f"has no column {error}", "Known: contours of HistomicsTK") from None
        if len(xs) != len(ys):
            raise AnnotationError(where, f"has {len(xs)} x and {len(ys)} y", "Export it again")
        geometry = shape("area", [(number(x, where), number(y, where)) for x, y in zip(xs, ys, strict=True)])
        if geometry is not None and not geometry.is_empty:
            found.append(Annotation(geometry, group or ""))
    return found


def _darwin(items: list[Any], path: Path) -> Iterator[Annotation]:
    """Darwin's polygons; their rings may be holes and islands in any order, so the even-odd rule applies."""
    for i, each in enumerate(items):
        where, name = f"{path}, annotation {i}", str(each.get("name", ""))
        if "polygon" in each:
            rings = each["polygon"].get("paths") or [each["polygon"]["path"]]
            areas = [shape("area", _points(ring, where)) for ring in rings]
            geometry: Any = reduce(shapely.symmetric_difference, [a for a in areas if a is not None])
        elif "keypoint" in each:
            geometry = shape("points", _points([each["keypoint"]], where))
        elif "line" in each:
            geometry = shape("line", _points(each["line"]["path"], where))
        elif "ellipse" in each:
            centre, radius = each["ellipse"]["center"], each["ellipse"]["radius"]
            box = [{axis: centre[axis] + sign * radius[axis] for axis in "xy"} for sign in (-1, 1)]
            circle = shape("ellipse", _points(box, where))
            geometry = shapely.affinity.rotate(circle, number(each["ellipse"].get("angle", 0), where), use_radians=True)
        elif "bounding_box" in each:
            x, y, w, h = (number(each["bounding_box"][key], where) for key in "xywh")
            geometry = shapely.box(x, y, x + w, y + h)
        else:
            continue  # a tag of the whole image
        if geometry is not None:
            yield Annotation(valid(geometry), name)


def _sectra(items: list[Any], path: Path, frame: Frame) -> Iterator[Annotation]:
    width, _ = _size(path, frame, "in widths of the slide")
    for i, each in enumerate(items):
        where = f"{path}, annotation {i}"
        kind = {"area": "area", "polyline": "line", "line": "line", "arrow": "line"}.get(each["type"].lower(), "points")
        geometry = shape(kind, _points(each["content"], where))
        if geometry is not None:
            yield Annotation(shapely.transform(geometry, lambda xy: xy * width), "", str(each.get("name") or ""))


def _cytomine(items: list[Any], path: Path, frame: Frame) -> Iterator[Annotation]:
    _, height = _size(path, frame, "from the bottom of the slide")
    for item in items:
        for each in item.get("collection") or [item.get("annotation", item)]:
            geometry = shapely.from_wkt(str(each["location"]))
            if not np.isfinite(shapely.get_coordinates(geometry)).all():
                raise AnnotationError(path, "has coordinates that are not finite", "Export it again")
            upright = shapely.transform(geometry, lambda xy: xy * (1, -1) + (0, height))
            yield Annotation(valid(upright), ", ".join(map(str, each.get("term") or ())))


def _points(ring: list[dict[str, Any]], where: str) -> list[tuple[float, float]]:
    return [(number(point["x"], where), number(point["y"], where)) for point in ring]


def _size(path: Path, frame: Frame, how: str) -> tuple[int, int]:
    if frame.size is None:
        raise AnnotationError(path, f"measures {how}", "Give the slide: wsi import --slide")
    return frame.size
