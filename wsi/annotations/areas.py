"""The area of lesions: outlines of lesions minus holes, and its raster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import shapely

from wsi.annotations.base import Annotation
from wsi.errors import AnnotationError

Role = Literal["lesion", "hole", "ignore"]

#: Roles of known groups: all spellings in CAMELYON16 and 17, QuPath's own classes, and mask values.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("tumor", "tumour", "_0", "_1", "metastasis", "metastases", "1", "255"), "lesion"),
    **dict.fromkeys(("exclusion", "_2", "normal", "2"), "hole"),
    **dict.fromkeys(("tissue", "pen", "ignore*", "region*"), "ignore"),
}


@dataclass(frozen=True)
class LesionArea:
    """The area of a slide's lesions.

    Attributes
    ----------
    geometry : shapely.Polygon or shapely.MultiPolygon
        Level-0 pixels; empty if there are no lesions.
    warnings : tuple of str
        Assumptions that were made.
    """

    geometry: shapely.Polygon | shapely.MultiPolygon
    warnings: tuple[str, ...] = ()


def lesion_area(
    annotations: Sequence[Annotation], *, roles: Mapping[str, Role] | None = None, where: str | os.PathLike[str] = ""
) -> LesionArea:
    """Return the union of all lesions minus the union of all holes, whatever their order.

    Parameters
    ----------
    annotations : sequence of Annotation
    roles : mapping of group to "lesion", "hole" or "ignore", optional
        Roles of further groups, ignoring case; they override ``ROLES``.
    where : path
        Named in errors.

    Raises
    ------
    AnnotationError
        A group has no role; a guess would change the result.

    Examples
    --------
    >>> outer, inner = shapely.box(0, 0, 10, 10), shapely.box(2, 2, 4, 4)
    >>> lesion_area([Annotation(inner, "_2"), Annotation(outer, "_0"), Annotation(outer, "Tumor")]).geometry.area
    96.0
    """
    known = ROLES | {group.lower(): role for group, role in (roles or {}).items()}
    shapes: dict[Role, list[shapely.Geometry]] = {"lesion": [], "hole": [], "ignore": []}
    warnings = []
    for annotation in annotations:
        group = annotation.group.strip()
        if group.lower() in known:
            role = known[group.lower()]
        elif not group:
            role = "lesion"
            warnings.append("outlines without a group are taken for lesions")
        else:
            remedy = f"Give it one: --group {group!r}=lesion (or hole, or ignore)"
            raise AnnotationError(where or "annotations", f"holds the group {group!r}, whose role is unknown", remedy)
        if shapely.get_dimensions(annotation.geometry) == 2:
            shapes[role].append(annotation.geometry)
        elif role != "ignore":
            warnings.append("points and lines have no area and are left out")
    area = shapely.difference(shapely.union_all(shapes["lesion"]), shapely.union_all(shapes["hole"]))
    parts = [part for part in shapely.get_parts(area) if part.geom_type == "Polygon" and part.area > 0]
    return LesionArea(shapely.MultiPolygon(parts), tuple(dict.fromkeys(warnings)))


def rasterize(
    geometry: shapely.Geometry, size: tuple[int, int], downsample: float, *, at: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Return whether points on a lattice lie inside polygons.

    Parameters
    ----------
    geometry : shapely.Polygon or shapely.MultiPolygon
        Level-0 pixels; valid.
    size : (int, int)
        Width and height of the result.
    downsample : float
        Level-0 pixels per pixel of the result.
    at : float
        Sampling point within a pixel: 0 for the top left corner, as in ASAP's masks and their pyramids; 0.5 for the
        centre.

    Returns
    -------
    bool (height, width)

    Examples
    --------
    >>> rasterize(shapely.box(2, 2, 6, 4), (4, 3), 2.0).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    width, height = size
    # Even-odd rule along each row: each edge that crosses it toggles inside and outside from there on.
    turns = np.zeros((height, width + 1), bool)
    for ring in shapely.get_rings(shapely.get_parts(geometry)):
        xy = shapely.get_coordinates(ring) / downsample - at
        for (x0, y0), (x1, y1) in _upwards(xy[:-1], xy[1:]):
            first, last = max(int(np.ceil(y0)), 0), min(int(np.ceil(y1)), height)
            if first >= last:
                continue
            rows = np.arange(first, last)
            crossing = np.ceil(x0 + (rows - y0) * ((x1 - x0) / (y1 - y0)))
            turns[rows, np.clip(crossing, 0, width).astype(np.intp)] ^= True
    return np.logical_xor.accumulate(turns, axis=1)[:, :width]


def _upwards(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Edges with the lower y first; horizontal ones are dropped, since they cross no row."""
    swap = a[:, 1] > b[:, 1]
    start, stop = np.where(swap[:, None], b, a), np.where(swap[:, None], a, b)
    slanted = start[:, 1] < stop[:, 1]
    return list(zip(map(tuple, start[slanted].tolist()), map(tuple, stop[slanted].tolist()), strict=True))
