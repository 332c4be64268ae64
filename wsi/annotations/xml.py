"""XML of ASAP, ImageScope, HALO and NDP.view, distinguished by the root element.

Coordinates of the first three are level-0 pixels of the whole plane.

- ASAP (``annotation/XmlRepository.cpp``): ``Coordinate`` elements, sorted by ``Order``; rings are not closed. A spline
  is read as the polygon of its control points, as in ASAP's own masks.
- ImageScope and HALO: layers (``Annotation``) of regions; ``NegativeROA="1"`` is a hole in its layer.
- NDP.view (``.ndpa``): nanometres from the centre of the glass. The position of the image on the glass is in the slide
  only (``XOffsetFromSlideCentre``), so the slide must be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
import shapely
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from wsi.annotations.base import MAX_BYTES, Annotation, Frame, number, shape, valid
from wsi.errors import AnnotationError
from wsi.files import read_unpacked

_ASAP = {
    **dict.fromkeys(("polygon", "spline", "rectangle"), "area"),
    "measurement": "line",
    **dict.fromkeys(("dot", "pointset"), "points"),
}
#: Types are numbers in ImageScope, names in HALO and others.
_REGIONS = {
    **dict.fromkeys(("", "0", "polygon", "freehand"), "area"),
    **dict.fromkeys(("1", "rectangle"), "area"),
    **dict.fromkeys(("2", "ellipse"), "ellipse"),
    **dict.fromkeys(("3", "4", "ruler", "arrow", "line", "polyline"), "line"),
    **dict.fromkeys(("5", "pin", "pins", "points"), "points"),
}
_NDPA = {
    **dict.fromkeys(("freehand", "rectangle"), "area"),
    **dict.fromkeys(("linearmeasure", "freehandline", "pointer", "arrow", "ruler"), "line"),
    **dict.fromkeys(("pin", "point"), "points"),
}


def read(path: Path, frame: Frame) -> list[Annotation]:
    """Read an XML file; see ``read_annotations``."""
    try:
        root = fromstring(read_unpacked(path, MAX_BYTES), forbid_dtd=True)
    except DefusedXmlException as error:
        what = "declares a DTD or entities, which can be harmful"
        raise AnnotationError(path, what, "Save it again with the program it is from") from error
    except (ParseError, ValueError, LookupError) as error:
        raise AnnotationError(path, f"is damaged XML ({error})", "Save it again") from error
    if root.tag == "ASAP_Annotations":
        return list(_asap(root, path))
    if root.tag == "Annotations":
        return list(_imagescope(root, path))
    if root.tag == "annotations":
        return list(_ndpview(root, path, frame))
    what = f"is no annotation file (its root is {root.tag!r})"
    raise AnnotationError(path, what, "Known: XML of ASAP, ImageScope, HALO, NDP.view")


def _asap(root: Any, path: Path) -> Iterator[Annotation]:
    for i, element in enumerate(root.iterfind("./Annotations/Annotation")):
        where = f"{path}, annotation {i} {element.get('Name', '')!r}"
        points: dict[int, tuple[float, float]] = {}
        for each in element.iterfind("./Coordinates/Coordinate"):
            order = int(number(each.get("Order"), where))
            if order in points:
                raise AnnotationError(where, f"has a coordinate twice: {dict(each.attrib)}")
            points[order] = number(each.get("X"), where), number(each.get("Y"), where)
        geometry = shape(_kind(element.get("Type", ""), _ASAP, where), [points[order] for order in sorted(points)])
        if geometry is not None:
            group = element.get("PartOfGroup", "")
            yield Annotation(geometry, "" if group == "None" else group, element.get("Name", ""))


def _imagescope(root: Any, path: Path) -> Iterator[Annotation]:
    for i, layer in enumerate(root.iterfind("./Annotation")):
        group = layer.get("Name") or next(
            (text for each in layer.iterfind("./Attributes/Attribute") if (text := each.get("Value"))), ""
        )
        drawn, holes = [], []
        for j, region in enumerate(layer.iterfind("./Regions/Region")):
            where = f"{path}, layer {i}, region {j}"
            points = [
                (number(each.get("X"), where), number(each.get("Y"), where))
                for each in region.iterfind("./Vertices/*")
                if each.tag in ("Vertex", "V")
            ]
            named = region.get("GeoShape") or region.get("Type", "")
            kind = _kind(named, _REGIONS, where)
            if named.lower() in ("1", "rectangle") and len(points) == 2:
                kind = "box"
            geometry = shape(kind, points)
            if geometry is None:
                continue
            if region.get("NegativeROA", "0").lower() in ("1", "true") and shapely.get_dimensions(geometry) == 2:
                holes.append(geometry)
            else:
                drawn.append(Annotation(geometry, group, region.get("Text") or ""))
        hole = shapely.union_all(holes)
        for each in drawn:
            left = each.geometry
            if holes and shapely.get_dimensions(left) == 2:
                left = valid(shapely.difference(left, hole))
            if not left.is_empty:
                yield Annotation(left, each.group, each.name)


def _ndpview(root: Any, path: Path, frame: Frame) -> Iterator[Annotation]:
    if frame.size is None or frame.mpp is None or frame.centre_nm is None:
        what = "measures in nanometres from the centre of the glass"
        raise AnnotationError(path, what, "Give its NDPI slide: wsi import --slide")
    nm_per_px = np.array(frame.mpp) * 1000
    corner = np.array(frame.size) / 2 - np.array(frame.centre_nm) / nm_per_px
    for i, state in enumerate(root.iterfind("./ndpviewstate")):
        where = f"{path}, annotation {i}"
        group, name = (state.findtext(tag) or "" for tag in ("title", "details"))
        for each in state.iterfind("./annotation"):
            kind = each.get("type", "").lower()
            if kind == "circle":
                x, y, r = (number(each.findtext(tag), where) for tag in ("x", "y", "radius"))
                geometry = shape("ellipse", [(x - r, y - r), (x + r, y + r)])
            else:
                points = [
                    (number(point.findtext("x"), where), number(point.findtext("y"), where))
                    for point in each.iterfind("./pointlist/point")
                ] or [(number(each.findtext("x"), where), number(each.findtext("y"), where))]
                is_line = kind == "freehand" and (each.findtext("closed") or "1").strip() == "0"
                geometry = shape("line" if is_line else _kind(kind, _NDPA, where), points)
            if geometry is not None:
                yield Annotation(shapely.transform(geometry, lambda xy: xy / nm_per_px + corner), group, name)


def _kind(name: str, known: dict[str, str], where: str) -> str:
    if name.lower() not in known:
        raise AnnotationError(where, f"is of type {name!r}", f"Known: {', '.join(filter(None, known))}")
    return known[name.lower()]
