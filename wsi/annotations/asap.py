"""ASAP's XML, the format of CAMELYON's annotations.

``Annotation`` elements with ``Coordinate`` children, X and Y in level-0 pixels, to be ordered by ``Order``; rings are
not closed (``annotation/XmlRepository.cpp`` of ASAP). A spline is taken by its control points, as ASAP's own masks do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import shapely
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from wsi.annotations.base import Annotation, valid
from wsi.errors import AnnotationError

_AREAS = ("polygon", "spline", "rectangle")
_LINES = ("measurement",)


def read(path: Path, origin: tuple[float, float] = (0.0, 0.0)) -> list[Annotation]:
    """Read an XML file; see ``read_annotations``. `origin` is of no use here."""
    try:
        root = parse(path, forbid_dtd=True).getroot()
    except DefusedXmlException as error:
        raise AnnotationError(path, "declares a DTD or entities, which can harm", "Save it from ASAP again") from error
    except (ParseError, ValueError, LookupError) as error:
        raise AnnotationError(path, f"is damaged XML ({error})", "Save it from ASAP again") from error
    if root is None or root.tag != "ASAP_Annotations":
        tag = None if root is None else root.tag
        raise AnnotationError(path, f"is no annotation file of ASAP (its root is {tag!r})", "Give ASAP's XML")
    found = []
    for number, element in enumerate(root.iterfind("./Annotations/Annotation")):
        where = f"{path}, annotation {number} {element.get('Name', '')!r}"
        geometry = _geometry(element.get("Type", ""), _points(element, where), where)
        if geometry is not None:
            group = element.get("PartOfGroup", "")
            found.append(Annotation(geometry, "" if group == "None" else group, element.get("Name", "")))
    return found


def _points(element: Any, where: str) -> list[tuple[float, float]]:
    points = {}
    for each in element.iterfind("./Coordinates/Coordinate"):
        try:
            order = int(each.get("Order"))
            # Some versions of ASAP write the decimal comma of the computer they run on.
            x, y = (float(each.get(axis).replace(",", ".")) for axis in ("X", "Y"))
        except (TypeError, ValueError, AttributeError):
            raise AnnotationError(where, f"has a coordinate that is none: {dict(each.attrib)}") from None
        if not (math.isfinite(x) and math.isfinite(y)) or order in points:
            raise AnnotationError(where, f"has a coordinate that is not finite, or is there twice: {dict(each.attrib)}")
        points[order] = (x, y)
    return [points[order] for order in sorted(points)]


def _geometry(kind: str, points: list[tuple[float, float]], where: str) -> shapely.Geometry | None:
    """Build the shape; an area of fewer than three points is the line or point that is left of it."""
    kind = kind.lower()
    if kind not in (*_AREAS, *_LINES, "dot", "pointset"):
        raise AnnotationError(where, f"is of type {kind!r}", f"Known: {', '.join(_AREAS)}, measurement, dot, pointset")
    if not points:
        return None
    if kind in _AREAS and len(points) >= 3:
        return valid(shapely.Polygon(points))
    if kind in (*_AREAS, *_LINES) and len(points) >= 2:
        return shapely.LineString(points)
    return shapely.Point(points[0]) if len(points) == 1 else shapely.MultiPoint(points)
