"""QuPath GeoJSON: tiles as detections, regions as annotations.

QuPath rejects a whole file for one feature it dislikes, so everything here is for not writing that feature:
classes always have a colour, rings are closed, geometries are valid after rounding, numbers are finite.

Coordinates are full-resolution pixels of the image as QuPath shows it: where the file names the scanned part
(MIRAX, Leica), QuPath crops to it, so its corner is subtracted and everything is clipped to it.
Rules and measurements: ``ROITypeAdapters.java``, ``PathClassTypeAdapter`` and ``OpenslideImageServer.java`` of
QuPath 0.4 to 0.7.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import shapely

from wsi.files import read_unpacked, replacing
from wsi.units import Box

Json = dict[str, Any]

#: QuPath keeps coordinates to 1/100 px, and shows what is smaller than a pixel as an empty object at (0, 0).
_DECIMALS = 2
_MIN_AREA_PX = 1.0
#: Shells are joined and holes taken out of them; GEOS's other method fails on a shell without area.
_REPAIR: Json = {"method": "structure", "keep_collapsed": False}
#: What a repair adds must be rounded again; it settles at once or twice.
_MAX_REPAIRS = 10
#: A Python object takes some ten times the text it was written in.
_MAX_READ_BYTES = 256 << 20
#: Tiles formatted at once: enough for NumPy to pay, little enough to be no memory.
_BLOCK = 2048


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
    geometry : shapely.Polygon or shapely.MultiPolygon
        Level-0 pixels; holes are kept. Need not be valid: it is repaired.
    path_class : PathClass
    name : str
    measurements : dict of str to float
        Non-finite ones are left out.
    """

    geometry: shapely.Polygon | shapely.MultiPolygon
    path_class: PathClass
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
    """Write tiles, one QuPath object each, without holding more than a block of them in memory.

    Parameters
    ----------
    path : path
        Gzipped when the name ends in ``.gz``. Written beside and renamed, so it is whole or not there.
    boxes : float64 (n, 4)
        x, y, w, h in level-0 pixels.
    classes : sequence of PathClass
    class_index : int (n,)
        Which of `classes` each tile is.
    measurements : mapping of str to float (n,)
        Written with seven digits, which is what QuPath's float32 holds; non-finite values are left out.
    bounds : Box
        The slide's ``bounds``: subtracted, and clipped to.
    slide_id : str
        Identifiers are made of it and the tile's position, so the same slide gives the same file.
    metadata : mapping of str to str, optional
        Written once, beside ``features``; QuPath skips it, other programs may read it.
    object_type : {"tile", "detection", "annotation"}
        Tiles and detections are cheap in QuPath; thousands of annotations are not, but can be edited.
    first : int
        Number of the first of these tiles in its slide, where a slide's tiles are written to several files.

    Returns
    -------
    int
        Tiles written; less than n where some lie outside `bounds`.

    Raises
    ------
    ValueError
        Arrays that do not fit together.
    OSError
        The file cannot be written.

    Notes
    -----
    QuPath holds the whole file in memory while it reads it: about 200,000 tiles are comfortable.

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
    corners = _within(np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), bounds).reshape(n, 4)
    visible = (corners[:, 2:] - corners[:, :2]).clip(0).prod(axis=1) >= _MIN_AREA_PX
    if object_type not in ("tile", "detection", "annotation"):
        raise ValueError(f"object_type must be tile, detection or annotation, got {object_type!r}")
    class_json = [_encode(c._json()) for c in classes]
    labels = [f"{_encode(name)}:" for name in measurements]

    def features() -> Iterator[str]:
        # A JSON encoder takes ten times as long for these few shapes of text, which are tested against one.
        for start in range(0, n, _BLOCK):
            chosen = start + np.flatnonzero(visible[start : start + _BLOCK])
            ids = _ids(slide_id, "tile", (first + chosen).tolist())
            x0s, y0s, x1s, y1s = ([repr(_number(v)) for v in side] for side in corners[chosen].T.tolist())
            called = class_index[chosen].tolist()
            numbers = [
                _texts(label, values[chosen]) for label, values in zip(labels, measurements.values(), strict=True)
            ]
            measured = [",".join(filter(None, row)) for row in zip(*numbers, strict=True)] or [""] * len(chosen)
            for uid, x0, y0, x1, y1, k, found in zip(ids, x0s, y0s, x1s, y1s, called, measured, strict=True):
                yield (
                    f'{{"type":"Feature","id":"{uid}","geometry":{{"type":"Polygon","coordinates":'
                    f"[[[{x0},{y0}],[{x1},{y0}],[{x1},{y1}],[{x0},{y1}],[{x0},{y0}]]]}},"
                    f'"properties":{{"objectType":"{object_type}","classification":{class_json[k]},'
                    f'"measurements":{{{found}}}}}}}'
                )

    return _write(path, features(), metadata)


def write_regions(
    path: str | os.PathLike[str],
    regions: Iterable[Region],
    *,
    bounds: Box,
    slide_id: str,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write regions, one locked QuPath annotation each.

    A geometry is clipped to `bounds`, repaired, rounded to 1/100 px so that it stays valid, and left out with its
    parts of less than one square pixel.

    Parameters
    ----------
    path : path
        Gzipped when the name ends in ``.gz``. Written beside and renamed, so it is whole or not there.
    regions : iterable of Region
    bounds : Box
        The slide's ``bounds``: subtracted, and clipped to.
    slide_id : str
        Identifiers are made of it and the region's position, so the same slide gives the same file.
    metadata : mapping of str to str, optional
        Written with each annotation, where QuPath (0.5 and later) shows it, and once beside ``features``.

    Returns
    -------
    int
        Annotations written; fewer than given where nothing of a region is left.

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
        for i, region in enumerate(regions):
            geometry = _acceptable(region.geometry, bounds)
            if geometry is None:
                continue
            (uid,) = _ids(slide_id, "region", [i])
            properties = {
                "objectType": "annotation",
                **({"name": region.name} if region.name else {}),
                "classification": region.path_class._json(),
                "isLocked": True,
                "measurements": _finite(region.measurements),
                **({"metadata": dict(metadata)} if metadata else {}),
            }
            yield _encode({"type": "Feature", "id": uid, "geometry": geometry, "properties": properties})

    return _write(path, features(), metadata)


def read_geojson(path: str | os.PathLike[str]) -> list[Json]:
    """Read the features of a GeoJSON file, in whichever shape QuPath or another program wrote it.

    Accepts a FeatureCollection, a list, a single feature or a bare geometry; gzip; a byte order mark; ``NaN``;
    and keys that occur twice (QuPath writes ``metadata`` so), of which the last counts.

    Parameters
    ----------
    path : path

    Returns
    -------
    list of dict
        Each a Feature as it stands in the file: coordinates are not moved.

    Raises
    ------
    ValueError
        Not JSON, not GeoJSON, or more of it than 256 MiB, unpacked.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> [f["properties"]["objectType"] for f in read_geojson("regions.geojson")]     # doctest: +SKIP
    ['annotation']
    """
    raw = read_unpacked(path, _MAX_READ_BYTES)
    return list(_features(json.loads(raw.decode("utf-8-sig")), os.fspath(path)))


def _features(node: Any, where: str) -> Iterator[Json]:
    if isinstance(node, list):
        for item in node:
            yield from _features(item, where)
    elif isinstance(node, dict) and isinstance(node.get("features"), list):
        yield from _features(node["features"], where)
    elif isinstance(node, dict) and node.get("type") == "Feature":
        yield node
    elif isinstance(node, dict) and ("coordinates" in node or "geometries" in node):
        yield {"type": "Feature", "geometry": node, "properties": {"objectType": "annotation"}}
    else:
        raise ValueError(f"{where}: is not GeoJSON")


def _acceptable(geometry: shapely.Geometry, bounds: Box) -> Json | None:
    """Return the geometry as QuPath accepts it, or None where nothing is left of it."""
    w, h = _within(np.array([bounds.x + bounds.w, bounds.y + bounds.h]), bounds)
    with np.errstate(all="ignore"):  # GEOS leaves floating-point flags behind that say nothing of its result
        simple = shapely.transform(geometry, lambda xy: np.round(xy - (bounds.x, bounds.y), _DECIMALS))
        (x0, y0, x1, y1), kind = simple.bounds, simple.geom_type
        if kind.endswith("Polygon") and x0 >= 0 and y0 >= 0 and x1 <= w and y1 <= h and simple.is_valid:
            return _coordinates(simple)  # most are; what follows takes ten times as long
        # GEOS fails on the smallest of floating-point numbers: a millionth of a pixel is small enough.
        moved = shapely.transform(geometry, lambda xy: np.round(xy - (bounds.x, bounds.y), 6))
        found = shapely.intersection(shapely.make_valid(moved, **_REPAIR), shapely.box(0, 0, w, h))
        for _ in range(_MAX_REPAIRS):
            # Snap rounding: unlike rounding each coordinate, it cannot make edges cross.
            snapped = shapely.set_precision(found, 10.0**-_DECIMALS)
            found = shapely.transform(snapped, lambda xy: np.round(xy, _DECIMALS))
            if found.is_valid:
                return _coordinates(found)
            found = shapely.make_valid(found, **_REPAIR)
    return None


def _coordinates(geometry: shapely.Geometry) -> Json | None:
    """The polygons in it that QuPath can show, as GeoJSON."""
    parts = [
        part
        for part in shapely.get_parts(shapely.get_parts(geometry))
        if part.geom_type == "Polygon" and part.area >= _MIN_AREA_PX
    ]
    if not parts:
        return None
    polygons = [
        [
            [[_number(x), _number(y)] for x, y in shapely.get_coordinates(ring).tolist()]
            for ring in shapely.get_rings(part)
        ]
        for part in parts
    ]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _within(xy: npt.NDArray[np.float64], bounds: Box) -> npt.NDArray[np.float64]:
    """Level-0 points (..., 2) as QuPath counts them: from the corner of `bounds`, inside it, two decimals."""
    last = np.floor(np.array([bounds.w, bounds.h]) * 10**_DECIMALS) / 10**_DECIMALS
    return np.asarray(np.clip(np.round(xy - (bounds.x, bounds.y), _DECIMALS), 0, last))


def _ids(slide_id: str, kind: str, numbers: Sequence[int]) -> Iterator[str]:
    """UUIDs of version 5 (RFC 9562, 5.5) of ``wsi:<slide>/<kind>/<number>``: the same object always gets the same."""
    begun = hashlib.sha1(uuid.NAMESPACE_URL.bytes + f"wsi:{slide_id}/{kind}/".encode(), usedforsecurity=False)
    for number in numbers:
        ended = begun.copy()
        ended.update(b"%d" % number)
        h = ended.hexdigest()
        yield f"{h[:8]}-{h[8:12]}-5{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:32]}"


def _number(value: float) -> float | int:
    """Whole numbers without a decimal point: a third less to read."""
    return int(value) if value == int(value) else value


def _finite(measurements: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones, to seven digits. QuPath 0.4 refuses a file that holds any other."""
    return {name: float(f"{float(value):.7g}") for name, value in measurements.items() if math.isfinite(value)}


def _texts(label: str, values: npt.NDArray[np.floating]) -> list[str]:
    """What ``_finite`` gives, as text: empty for what is not finite."""
    finite = np.isfinite(values).tolist()
    return [f"{label}{value:.7g}" if good else "" for value, good in zip(values.tolist(), finite, strict=True)]


def _encode(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _write(path: str | os.PathLike[str], features: Iterator[str], metadata: Mapping[str, str] | None) -> int:
    """Write a FeatureCollection as the features come; return how many."""
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise ValueError("QuPath metadata are strings by name")
    n = 0
    with _opened(path) as file:
        head = f'"metadata":{_encode(dict(metadata))},' if metadata else ""
        file.write(f'{{"type":"FeatureCollection",{head}"features":['.encode())
        while some := list(islice(features, 1024)):
            file.write((",\n" if n else "\n").encode() + ",\n".join(some).encode())
            n += len(some)
        file.write(b"\n]}\n")
    return n


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    with replacing(path) as file:
        if not os.fspath(path).endswith(".gz"):
            yield file
            return
        # No name and no time inside: the same tiles are the same bytes.
        with gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
