"""QuPath GeoJSON: tiles as detections, regions as annotations.

QuPath rejects a whole file for one invalid feature. Therefore classes always have a colour, rings are closed,
geometries are valid after rounding, and numbers are finite.

Coordinates are full-resolution pixels of the image as QuPath shows it. If the file records the scanned area (MIRAX,
Leica), QuPath crops to it; so its corner is subtracted, and everything is clipped to it.
Rules and measurements: ``ROITypeAdapters.java``, ``PathClassTypeAdapter`` and ``OpenslideImageServer.java`` of
QuPath 0.4 to 0.7.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import shapely

from wsi.export.geojson import (
    MIN_AREA_PX,
    Json,
    acceptable,
    encode,
    finite,
    identifiers,
    texts,
    whole,
    within,
    write_features,
)
from wsi.units import Box

#: Tiles formatted at once: enough for NumPy to be efficient, in little memory.
_BLOCK = 2048
#: Regions formatted at once; they may have many points each.
_REGIONS = 512


@dataclass(frozen=True)
class PathClass:
    """A QuPath class.

    Attributes
    ----------
    name : str
        Not empty, one line. ``"Tumor: Positive"`` is a derived class; a name ending in ``*`` is ignored by QuPath.
    color : (int, int, int)
        Red, green, blue, 0 to 255. QuPath refuses a file with a class that has none.

    Raises
    ------
    ValueError
        An empty name, a line break in it, or a colour out of range.

    Examples
    --------
    >>> PathClass("Tumor", (200, 0, 0)).name
    'Tumor'
    """

    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not self.name.strip() or "\n" in self.name or "\r" in self.name:
            raise ValueError(f"a QuPath class needs a name of one line, got {self.name!r}")
        if len(self.color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in self.color):
            raise ValueError(f"a QuPath colour is three integers from 0 to 255, got {self.color!r}")

    def _json(self) -> Json:
        return {"name": self.name, "color": list(self.color)}


@dataclass(frozen=True)
class Region:
    """An annotation to write.

    Attributes
    ----------
    geometry : shapely.Geometry
        Polygons, points or one line, in level-0 pixels; holes are kept, invalid geometries are repaired.
    path_class : PathClass, optional
    name : str
    measurements : dict of str to float
        Non-finite ones are left out.
    """

    geometry: shapely.Geometry
    path_class: PathClass | None
    name: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)


def write_tiles(
    path: str | os.PathLike[str],
    boxes: npt.NDArray[np.float64],
    classes: Sequence[PathClass],
    class_index: npt.NDArray[np.integer],
    measurements: Mapping[str, npt.NDArray[np.floating]],
    *,
    bounds: Box,
    slide_id: str,
    metadata: Mapping[str, str] | None = None,
    object_type: str = "tile",
    first: int = 0,
) -> int:
    """Write tiles, one QuPath object each, with only a block of them in memory.

    Parameters
    ----------
    path : path
        Gzipped if the name ends in ``.gz``. Written under a temporary name and renamed, so it is never partial.
    boxes : float64 (n, 4)
        x, y, w, h in level-0 pixels.
    class_index : int (n,)
        The index of each tile's class in `classes`.
    measurements : mapping of str to float (n,)
        Written with seven digits, the precision of QuPath's float32; non-finite values are left out.
    bounds : Box
        The slide's ``bounds``: coordinates are relative to its corner and clipped to it.
    slide_id : str
        Object ids are derived from it and the tile's number, so the same slide gives the same file.
    metadata : mapping of str to str, optional
        Written once, beside ``features``; QuPath ignores it, other programs may read it.
    object_type : {"tile", "detection", "annotation"}
        Tiles and detections are cheap in QuPath. Annotations can be edited, but thousands of them are slow.
    first : int
        Number of the first tile within its slide, if the slide's tiles are written to several files.

    Returns
    -------
    int
        Tiles written: fewer than n if some lie outside `bounds`.

    Raises
    ------
    ValueError
        The arrays' shapes or values do not match.
    OSError
        The file cannot be written.

    Notes
    -----
    QuPath holds the whole file in memory while it reads it; about 200,000 tiles work well.

    Examples
    --------
    >>> tumor, other = PathClass("Tumor", (200, 0, 0)), PathClass("Other", (255, 200, 0))
    >>> write_tiles(                                                          # doctest: +SKIP
    ...     "tiles.geojson.gz", grid.boxes(), [other, tumor], (p > 0.5).astype(int), {"prob_tumor": p},
    ...     bounds=slide.bounds, slide_id="slide_1")
    """
    boxes, class_index = np.asarray(boxes, np.float64), np.asarray(class_index)
    n = len(boxes)
    if boxes.shape != (n, 4) or not np.isfinite(boxes).all():
        raise ValueError(f"boxes must be finite and (n, 4), got {boxes.shape}")
    if class_index.shape != (n,) or class_index.dtype.kind not in "iu":
        raise ValueError(f"class_index must be {n} integers, got {class_index.dtype} {class_index.shape}")
    if n and (class_index.min() < 0 or class_index.max() >= len(classes)):
        raise ValueError(f"class_index must be from 0 to {len(classes) - 1}")
    for name, values in measurements.items():
        if np.shape(values) != (n,):
            raise ValueError(f"measurement {name!r} must be {n} numbers, got {np.shape(values)}")
    corners = within(np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), bounds).reshape(n, 4)
    visible = (corners[:, 2:] - corners[:, :2]).clip(0).prod(axis=1) >= MIN_AREA_PX
    if object_type not in ("tile", "detection", "annotation"):
        raise ValueError(f"object_type must be tile, detection or annotation, got {object_type!r}")
    class_json = [encode(c._json()) for c in classes]
    labels = [f"{encode(name)}:" for name in measurements]

    def features() -> Iterator[str]:
        # Formatted by hand, and tested against a JSON encoder, which takes ten times as long.
        for start in range(0, n, _BLOCK):
            chosen = start + np.flatnonzero(visible[start : start + _BLOCK])
            ids = identifiers(slide_id, "tile", (first + chosen).tolist())
            # Tiles of a grid share their edges: few distinct numbers occur many times.
            edges, which = np.unique(corners[chosen].T, return_inverse=True)
            written = np.array([repr(whole(edge)) for edge in edges.tolist()], object)
            x0s, y0s, x1s, y1s = written[which.reshape(4, -1)].tolist()
            called = class_index[chosen].tolist()
            columns = zip(labels, measurements.values(), strict=True)
            numbers = [texts(label, values[chosen]) for label, values in columns]
            measured = [",".join(filter(None, row)) for row in zip(*numbers, strict=True)] or [""] * len(chosen)
            for uid, x0, y0, x1, y1, k, found in zip(ids, x0s, y0s, x1s, y1s, called, measured, strict=True):
                yield (
                    f'{{"type":"Feature","id":"{uid}","geometry":{{"type":"Polygon","coordinates":'
                    f"[[[{x0},{y0}],[{x1},{y0}],[{x1},{y1}],[{x0},{y1}],[{x0},{y0}]]]}},"
                    f'"properties":{{"objectType":"{object_type}","classification":{class_json[k]},'
                    f'"measurements":{{{found}}}}}}}'
                )

    return write_features(path, features(), metadata)


def write_regions(
    path: str | os.PathLike[str],
    regions: Iterable[Region],
    *,
    bounds: Box,
    slide_id: str,
    metadata: Mapping[str, str] | None = None,
    clip: bool = True,
) -> int:
    """Write regions, one locked QuPath annotation each.

    A geometry is repaired, rounded to 1/100 px so that it stays valid, and clipped to `bounds` unless `clip` is false.
    Its parts of less than one square pixel are left out.

    Parameters
    ----------
    path, bounds, slide_id
        As in ``write_tiles``.
    metadata : mapping of str to str, optional
        Written with each annotation, where QuPath (0.5 and later) shows it, and once beside ``features``.
    clip : bool
        Clip to `bounds`; annotations that people drew may extend beyond it and are not clipped.

    Returns
    -------
    int
        Annotations written: fewer than given if nothing of a region is left.

    Raises
    ------
    OSError
        The file cannot be written.

    Examples
    --------
    >>> region = Region(shapely.box(0, 0, 50, 40), PathClass("Tumor", (200, 0, 0)), "largest", {"area_px": 2000.0})
    >>> write_regions(                                                        # doctest: +SKIP
    ...     "regions.geojson", [region], bounds=slide.bounds, slide_id="slide_1")
    """

    def features() -> Iterator[str]:
        numbered = enumerate(regions)
        while some := list(islice(numbered, _REGIONS)):
            shapes = acceptable([region.geometry for _, region in some], bounds, clip=clip)
            ids = identifiers(slide_id, "region", [i for i, _ in some])
            for (_, region), geometry, uid in zip(some, shapes, ids, strict=True):
                if geometry is None:
                    continue
                properties = {
                    "objectType": "annotation",
                    **({"name": region.name} if region.name else {}),
                    **({"classification": region.path_class._json()} if region.path_class else {}),
                    "isLocked": True,
                    "measurements": finite(region.measurements),
                    **({"metadata": dict(metadata)} if metadata else {}),
                }
                yield encode({"type": "Feature", "id": uid, "geometry": geometry, "properties": properties})

    return write_features(path, features(), metadata)
