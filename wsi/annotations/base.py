"""An annotation, the frame of its coordinates, and helpers of the readers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely

from wsi.errors import AnnotationError
from wsi.slide import Slide
from wsi.units import Mpp

#: Longer text, after unpacking, is refused: parsing takes many times its size in memory.
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Annotation:
    """An annotation of a slide.

    Attributes
    ----------
    geometry : shapely.Geometry
        Level-0 pixels. Polygons and multipolygons are valid; points and lines are possible.
    group : str
        ASAP's group, QuPath's class, a layer's name, or a mask's value; empty if there is none.
    name : str

    Examples
    --------
    >>> Annotation(shapely.box(0, 0, 10, 10), "Tumor").geometry.area
    100.0
    """

    geometry: shapely.Geometry
    group: str
    name: str = ""


@dataclass(frozen=True)
class Frame:
    """The geometry of a slide on which an annotation file's coordinates may depend (not for ASAP, ImageScope, HALO).

    Attributes
    ----------
    origin : (float, float)
        Corner of the slide's ``bounds`` in level-0 pixels, from which QuPath counts.
    size : (int, int), optional
        Width and height in level-0 pixels: Cytomine counts from the bottom, Sectra in units of the width.
    mpp : Mpp, optional
    centre_nm : (float, float), optional
        Offset from the centre of the glass to the centre of the image, in nanometres: NDP.view counts from the former.

    Examples
    --------
    >>> with open_slide("a.ndpi") as slide:                                                # doctest: +SKIP
    ...     read_annotations("a.ndpi.ndpa", frame=Frame.of(slide))
    """

    origin: tuple[float, float] = (0.0, 0.0)
    size: tuple[int, int] | None = None
    mpp: Mpp | None = None
    centre_nm: tuple[float, float] | None = None

    @classmethod
    def of(cls, slide: Slide) -> Frame:
        """Return the frame of an open slide."""
        return cls((slide.bounds.x, slide.bounds.y), slide.size, slide.mpp, slide.centre_nm)


def valid(geometry: shapely.Geometry) -> shapely.Geometry:
    """Repair outlines that cross themselves, as freehand ones do; parts without area are removed.

    The result is what lies inside a shell and inside none of its holes. So a hole outside its shell has no effect.

    Examples
    --------
    >>> bow_tie = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    >>> bow_tie.is_valid, valid(bow_tie).area
    (False, 2.0)
    """
    if shapely.get_dimensions(geometry) < 2 or shapely.is_valid(geometry):
        return geometry
    if geometry.geom_type not in ("Polygon", "MultiPolygon"):
        return shapely.make_valid(geometry, method="structure", keep_collapsed=False)
    parts = []
    for part in shapely.get_parts(geometry):
        rings = shapely.polygons(shapely.get_rings(part))
        shell, *holes = shapely.make_valid(rings, method="structure", keep_collapsed=False)
        parts.append(shapely.difference(shell, shapely.union_all(holes)))
    return shapely.union_all(parts)


def number(text: Any, where: str | os.PathLike[str]) -> float:
    """Read a coordinate; some programs write a decimal comma, depending on the computer's locale.

    Raises
    ------
    AnnotationError
        It is no number, or not finite.

    Examples
    --------
    >>> number("1,5", "a.xml")
    1.5
    """
    try:
        value = float(text.replace(",", ".") if isinstance(text, str) else text)
    except (TypeError, ValueError, OverflowError):  # overflow: an integer of 400 digits
        raise AnnotationError(where, f"has a coordinate that is no number: {text!r:.40}") from None
    if not math.isfinite(value):
        raise AnnotationError(where, f"has a coordinate that is not finite: {text!r}")
    return value


def shape(kind: str, points: Sequence[tuple[float, float]]) -> shapely.Geometry | None:
    """Build a shape from the points that a viewer stores; an area of fewer than three points is a line or a point.

    Parameters
    ----------
    kind : {"area", "line", "points", "box", "ellipse"}
        Boxes and ellipses fill the extent of their points, of which viewers store two or four.

    Returns
    -------
    shapely.Geometry or None
        None without points.

    Examples
    --------
    >>> shape("area", [(0, 0), (4, 0), (4, 4)]).area, shape("box", [(0, 0), (4, 2)]).area
    (8.0, 8.0)
    """
    if not points:
        return None
    if kind in ("box", "ellipse") and len(points) >= 2:
        (x0, y0), (x1, y1) = np.min(points, axis=0).tolist(), np.max(points, axis=0).tolist()
        if kind == "box":
            return shapely.box(x0, y0, x1, y1)
        turn = np.linspace(0, 2 * np.pi, 129)[:-1]
        x, y = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(turn), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(turn)
        return shapely.Polygon(np.column_stack([x, y]))
    if kind == "area" and len(points) >= 3:
        return valid(shapely.Polygon(points))
    if kind in ("area", "line") and len(points) >= 2:
        return shapely.LineString(points)
    return shapely.Point(points[0]) if len(points) == 1 else shapely.MultiPoint(points)
