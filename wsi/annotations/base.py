"""One outline."""

from __future__ import annotations

from dataclasses import dataclass

import shapely


@dataclass(frozen=True)
class Annotation:
    """Something drawn on a slide.

    Attributes
    ----------
    geometry : shapely.Geometry
        Level-0 pixels. Polygons and multipolygons are valid; points and lines have no area.
    group : str
        ASAP's group, QuPath's class, or a mask's value; empty where there is none.
    name : str

    Examples
    --------
    >>> Annotation(shapely.box(0, 0, 10, 10), "Tumor").geometry.area
    100.0
    """

    geometry: shapely.Geometry
    group: str
    name: str = ""


def valid(geometry: shapely.Geometry) -> shapely.Geometry:
    """Repair an outline that crosses itself, as freehand ones do; parts without area go.

    Examples
    --------
    >>> bow_tie = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    >>> bow_tie.is_valid, valid(bow_tie).area
    (False, 2.0)
    """
    if shapely.get_dimensions(geometry) < 2 or shapely.is_valid(geometry):
        return geometry
    return shapely.make_valid(geometry, method="structure", keep_collapsed=False)
