"""GeoJSON that QuPath accepts: geometries, numbers, identifiers, files; and a reader of GeoJSON from any program.

QuPath rejects a whole file for one invalid feature: rings must be closed, geometries valid after rounding to 1/100 px,
numbers finite. Rules: ``ROITypeAdapters.java`` of QuPath 0.4 to 0.7.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import shapely

from wsi.files import read_unpacked, replacing
from wsi.units import Box

Json = dict[str, Any]

#: QuPath keeps coordinates to 1/100 px, and shows objects smaller than a pixel as empty ones at (0, 0).
_DECIMALS = 2
MIN_AREA_PX = 1.0
#: Unite shells, then subtract holes; GEOS's other method fails on a shell without area.
_REPAIR: Json = {"method": "structure", "keep_collapsed": False}
#: Points that a repair adds must be rounded, which may need another repair; one or two suffice in practice.
_MAX_REPAIRS = 10
#: Text per gzip member.
_MEMBER_BYTES = 1 << 20
#: A Python object takes some ten times the text it was written in.
_MAX_READ_BYTES = 256 << 20


def read_geojson(path: str | os.PathLike[str]) -> list[Json]:
    """Read the features of a GeoJSON file in any of the forms that QuPath and other programs write.

    Accepts a FeatureCollection, a list, a single feature or a bare geometry; gzip; a byte order mark; ``NaN``;
    and duplicate keys (QuPath writes ``metadata`` twice), of which the last counts.

    Returns
    -------
    list of dict
        Features as they are in the file, with unchanged coordinates.

    Raises
    ------
    ValueError
        Not JSON, not GeoJSON, or larger than 256 MiB unpacked.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> [f["properties"]["objectType"] for f in read_geojson("regions.geojson")]     # doctest: +SKIP
    ['annotation']
    """
    return features_of(read_unpacked(path, _MAX_READ_BYTES), path)


def features_of(text: bytes, where: str | os.PathLike[str]) -> list[Json]:
    """Return the features of GeoJSON in memory, as ``read_geojson`` does; `where` is named in errors."""
    return list(_features(json.loads(text.decode("utf-8-sig")), os.fspath(where)))


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


def acceptable(geometries: Sequence[shapely.Geometry], bounds: Box, *, clip: bool = True) -> list[Json | None]:
    """Return geometries as GeoJSON that QuPath accepts, relative to the corner of `bounds`; None where nothing is left.

    Parameters
    ----------
    geometries : sequence of shapely.Geometry
        Each consists of polygons, points or one line, in level-0 pixels; need not be valid.
    clip : bool
        Clip to `bounds`.

    Examples
    --------
    >>> acceptable([shapely.LineString([(10, 10), (14, 13.337)])], Box(10, 0, 100, 100))
    [{'type': 'LineString', 'coordinates': [[0, 10], [4, 13.34]]}]
    """
    w, h = within(np.array([bounds.x + bounds.w, bounds.y + bounds.h]), bounds)
    given = np.empty(len(geometries), object)
    given[:] = geometries
    found: list[Json | None] = [None] * len(given)
    with np.errstate(all="ignore"):  # GEOS sets floating-point flags that mean nothing
        simple = shapely.transform(given, lambda xy: np.round(xy - (bounds.x, bounds.y), _DECIMALS))
        x0, y0, x1, y1 = shapely.bounds(simple).T
        inside = (x0 >= 0) & (y0 >= 0) & (x1 <= w) & (y1 <= h) | (not clip)
        areas = shapely.get_dimensions(simple) == 2
        good = np.flatnonzero(areas & inside & shapely.is_valid(simple))  # most are, and are converted together
        for i, shape in zip(good.tolist(), _coordinates(simple[good]), strict=True):
            found[i] = shape
        for i in np.setdiff1d(np.arange(len(given)), good).tolist():
            if simple[i].geom_type in ("Point", "MultiPoint", "LineString"):
                found[i] = _open_shape(simple[i]) if inside[i] and not simple[i].is_empty else None
            else:
                found[i] = _repaired(given[i], bounds, shapely.box(0, 0, w, h) if clip else None)
    return found


def _repaired(geometry: shapely.Geometry, bounds: Box, within: shapely.Polygon | None) -> Json | None:
    # Rounded to 1e-6 px, since GEOS fails on the smallest floating-point numbers.
    moved = shapely.transform(geometry, lambda xy: np.round(xy - (bounds.x, bounds.y), 6))
    found = shapely.make_valid(moved, **_REPAIR)
    if within is not None:
        found = shapely.intersection(found, within)
    for _ in range(_MAX_REPAIRS):
        # Snap rounding (grid_size) cannot make edges cross, unlike rounding each coordinate. The union joins areas that
        # share an edge: a collection of such areas counts as valid, but is no valid MultiPolygon.
        parts = shapely.get_parts(shapely.get_parts(found))
        areas = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
        snapped = shapely.union_all(areas, grid_size=10.0**-_DECIMALS)
        found = shapely.transform(snapped, lambda xy: np.round(xy, _DECIMALS))
        if found.is_valid:
            return _coordinates(np.array([found], object))[0]
        found = shapely.make_valid(found, **_REPAIR)
    return None


def _open_shape(geometry: shapely.Geometry) -> Json:
    """Points and lines as GeoJSON; a MultiPoint needs at least two points in QuPath."""
    points = [[whole(x), whole(y)] for x, y in shapely.get_coordinates(geometry).tolist()]
    if len(points) == 1:
        return {"type": "Point", "coordinates": points[0]}
    return {"type": geometry.geom_type, "coordinates": points}


def _coordinates(geometries: npt.NDArray[np.object_]) -> list[Json | None]:
    """The polygons of each geometry as GeoJSON, without those too small for QuPath."""
    parts, of_parts = shapely.get_parts(geometries, return_index=True)
    parts, of = shapely.get_parts(parts, return_index=True)  # of collections
    kept = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) >= MIN_AREA_PX)
    parts, of_parts = parts[kept], of_parts[of][kept]
    rings, of_rings = shapely.get_rings(parts, return_index=True)
    points, of_points = shapely.get_coordinates(rings, return_index=True)
    written = [[whole(x), whole(y)] for x, y in points.tolist()]
    by_ring = _grouped(written, of_points, len(rings))
    drawn = _grouped(_grouped(by_ring, of_rings, len(parts)), of_parts, len(geometries))
    return [
        None
        if not polygons
        else {"type": "Polygon", "coordinates": polygons[0]}
        if len(polygons) == 1
        else {"type": "MultiPolygon", "coordinates": polygons}
        for polygons in drawn
    ]


def _grouped(items: list[Any], of: npt.NDArray[np.integer], n: int) -> list[list[Any]]:
    """Items, sorted by group `of`, divided into `n` lists."""
    ends = np.cumsum(np.bincount(of, minlength=n)).tolist()
    return [items[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def within(xy: npt.NDArray[np.float64], bounds: Box) -> npt.NDArray[np.float64]:
    """Level-0 points (..., 2) in QuPath's coordinates: relative to `bounds`, clipped to it, with two decimals."""
    last = np.floor(np.array([bounds.w, bounds.h]) * 10**_DECIMALS) / 10**_DECIMALS
    return np.asarray(np.clip(np.round(xy - (bounds.x, bounds.y), _DECIMALS), 0, last))


def identifiers(slide_id: str, kind: str, numbers: Sequence[int]) -> Iterator[str]:
    """UUIDs of version 5 (RFC 9562, 5.5) of ``wsi:<slide>/<kind>/<number>``: stable for the same object."""
    name = f"wsi:{slide_id}/{kind}/".encode(errors="backslashreplace")  # names of folders need not be UTF-8
    begun = hashlib.sha1(uuid.NAMESPACE_URL.bytes + name, usedforsecurity=False)
    for number in numbers:
        ended = begun.copy()
        ended.update(b"%d" % number)
        h = ended.hexdigest()
        yield f"{h[:8]}-{h[8:12]}-5{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:32]}"


def whole(value: float) -> float | int:
    """Return an integral value as int, which is written without a decimal point and so a third shorter."""
    return int(value) if value == int(value) else value


def finite(measurements: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite measurements, to seven digits; QuPath 0.4 refuses a file with any other."""
    return {name: float(f"{float(value):.7g}") for name, value in measurements.items() if math.isfinite(value)}


def texts(label: str, values: npt.NDArray[np.floating]) -> list[str]:
    """Return `label` and value as text, as ``finite`` rounds it; empty for values that are not finite."""
    finite = np.isfinite(values).tolist()
    return [f"{label}{value:.7g}" if good else "" for value, good in zip(values.tolist(), finite, strict=True)]


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(value: Any) -> str:
    return _ENCODER.encode(value)


def write_features(path: str | os.PathLike[str], features: Iterator[str], metadata: Mapping[str, str] | None) -> int:
    """Write a FeatureCollection from an iterator of encoded features; return their number."""
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise ValueError("QuPath metadata are strings by name")
    n = 0
    with _opened(path) as file:
        head = f'"metadata":{encode(dict(metadata))},' if metadata else ""
        file.write(f'{{"type":"FeatureCollection",{head}"features":['.encode())
        while some := list(islice(features, 1024)):
            file.write((",\n" if n else "\n").encode() + ",\n".join(some).encode())
            n += len(some)
        file.write(b"\n]}\n")
    return n


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes] | _Gzip]:
    with replacing(path) as file:
        if not os.fspath(path).endswith(".gz"):
            yield file
            return
        packed = _Gzip(file)
        yield packed
        packed.finish()


class _Gzip:
    """Gzip by libdeflate, which takes a third of zlib's time and compresses better, but only whole buffers.

    Each buffer is a member of its own (RFC 1952, 2.2) without name and time, so the same tiles give the same bytes.
    Java's reader in QuPath (17 was tested) continues after a member if more bytes are ``available``, as for files, or
    if at least 19 are left in its buffer. Therefore the last member is a long one, or the only one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._waiting = file, bytearray()

    def write(self, data: bytes) -> None:
        self._waiting += data
        while len(self._waiting) >= 2 * _MEMBER_BYTES:
            self._file.write(imagecodecs.gzip_encode(self._waiting[:_MEMBER_BYTES], level=1))
            del self._waiting[:_MEMBER_BYTES]

    def finish(self) -> None:
        self._file.write(imagecodecs.gzip_encode(self._waiting, level=1))
