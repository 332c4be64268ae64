"""Phantoms: synthetic H&E slides of any size, whose tumours are known to the pixel.

A phantom is drawn tile by tile: smooth fields say what lies where (glass, stroma, fat, tumour), periodic
texture banks say how it looks there, and both give concentrations of haematoxylin and eosin. Light is then
absorbed as Beer and Lambert say, ``RGB = glass * exp(-concentrations @ stains)``. No tile depends on another,
so memory does not grow with the slide.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import shapely
import tifffile
from scipy import ndimage
from scipy.spatial import KDTree

from wsi import native
from wsi.errors import OutputError
from wsi.files import replacing

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

#: Between two levels of the pyramid.
_STEP = 4
#: Smooth fields are evaluated every so many pixels and drawn out linearly between them.
_COARSE_PX = 16
#: Texture banks repeat after so many pixels: primes, so that no two of them repeat together.
_PERIODS = {"stroma": 1021, "fat": 1151, "cells": 1279, "tumour": 1087}
#: Stain vectors in optical density (natural logarithm) of R, G, B: haematoxylin and eosin after
#: Macenko et al., ISBI 2009. Concentrations reach about 2 and 1.
_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_MAKER = "Aperio Image Library v12 (wsi phantom)"  # readers recognise the first word
_CODES_PER_UNIT = 100  # concentrations 0 to 2.55 as uint8
_INKS = {"green": (1.9, 0.35, 1.2), "blue": (2.0, 1.2, 0.25), "black": (2.3, 2.3, 2.1)}  # optical density
_COLOURS = {"Tumor": (200, 0, 0), "Tissue": (150, 200, 150), "Pen": (90, 90, 90)}


@dataclass(frozen=True)
class PhantomConfig:
    """What to draw.

    Attributes
    ----------
    size : (int, int)
        Width and height in level-0 pixels, 1,024 to 100,000 each.
    mpp : float
        Microns per level-0 pixel, 0.1 to 2.
    seed : int
        Shapes, textures and stain colours; not negative.
    tumours : int
        Number of tumour regions, 0 (a benign slide) to 100.
    pen : bool
        Draw a green, a blue and a black pen stroke.
    tile_px : int
        Side of a TIFF tile, a multiple of 16 from 64 to 1,024.
    quality : int
        JPEG quality, 1 to 100.

    Raises
    ------
    ValueError
        One of them is out of range.
    """

    size: tuple[int, int] = (8192, 8192)
    mpp: float = 0.5
    seed: int = 0
    tumours: int = 3
    pen: bool = False
    tile_px: int = 256
    quality: int = 80

    def __post_init__(self) -> None:
        ranges = {"tumours": (0, 100), "tile_px": (64, 1024), "quality": (1, 100), "seed": (0, 2**63 - 1)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"phantom: {name}={getattr(self, name)!r} is outside {low} to {high}")
        if len(self.size) != 2 or not all(int(side) == side and 1024 <= side <= 100_000 for side in self.size):
            raise ValueError(f"phantom: size={self.size!r} is not a width and a height of 1024 to 100000 pixels")
        if not 0.1 <= self.mpp <= 2:
            raise ValueError(f"phantom: mpp={self.mpp!r} is outside 0.1 to 2 microns per pixel")
        if self.tile_px % 16:
            raise ValueError(f"phantom: tile_px={self.tile_px!r} is not a multiple of 16")


class Truth(NamedTuple):
    """What was drawn where.

    Attributes
    ----------
    tumours : shapely.MultiPolygon
        As many parts as tumours were asked for; inside `tissue`.
    tissue : shapely.MultiPolygon
        Outlines of the pieces, fat included.
    pen : shapely.MultiPolygon
        Pen strokes; empty without them.

    All in level-0 pixels, pixel (0, 0) spanning [0, 1) x [0, 1), rounded to 1/100 pixel.
    """

    tumours: shapely.MultiPolygon
    tissue: shapely.MultiPolygon
    pen: shapely.MultiPolygon


def write_phantom(
    path: str | Path, config: PhantomConfig | None = None, *, progress: Callable[[float], None] | None = None
) -> Truth:
    """Write a phantom slide, and its truth as ``<stem>.truth.geojson`` beside it.

    The slide is an Aperio-like tiled pyramid (JPEG 4:2:0 with shared tables; levels 1, 4, 16, and 64 beyond
    32,768 px; each is the area average of the one below it before compression). The same configuration gives
    the same bytes. Memory does not grow with the slide's height, and by 240 bytes a pixel of its width.

    Parameters
    ----------
    path : path
        Such as ``phantom.svs`` or ``phantom.tif``; replaced if it is there.
    config : PhantomConfig, optional
        Default: 8,192 x 8,192 px at 0.5 mpp with three tumours.
    progress : callable, optional
        Called with the share of the work done, 0 to 1, after each row of tiles.

    Returns
    -------
    Truth
        Outlines in level-0 pixels; the GeoJSON holds the same.

    Raises
    ------
    ValueError
        The tumours asked for find no room.
    OutputError
        `path` cannot be written.

    Examples
    --------
    >>> truth = write_phantom("phantom.svs", PhantomConfig(size=(2048, 1024)))  # doctest: +SKIP
    >>> len(truth.tumours.geoms)                                                # doctest: +SKIP
    3
    """
    path, config = Path(path), config or PhantomConfig()
    scene = _Scene(config)
    try:
        with replacing(path) as file, tempfile.TemporaryFile(dir=path.parent) as spool:
            _write_tiff(file, spool, scene, config, progress or (lambda done: None))
        with replacing(path.with_name(f"{path.stem}.truth.geojson")) as file:
            file.write(json.dumps(_geojson(scene.truth, config), separators=(",", ":")).encode())
    except OSError as error:
        raise OutputError.of(error, path) from error
    return scene.truth


# --- what lies where -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Blob:
    """A smooth closed outline around a centre: radius ``(1 + waves(angle)) / |direction|_p``, scaled by `axes`."""

    centre: F64  # (2,) level-0 px
    axes: F64  # (2,) level-0 px
    power: float  # 2 is an ellipse; more fills the corners of its box
    waves: F64  # (k, 2) amplitudes of cos and sin of 2, 3, ... times the angle
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", 1.0)
        reach = np.abs(self.outline() - self.centre) / self.axes
        object.__setattr__(self, "scale", 1 / reach.max())  # touches its box, never crosses it

    @classmethod
    def draw(cls, rng: np.random.Generator, centre: Any, axes: Any, *, power: float, wobble: float) -> _Blob:
        waves = rng.normal(0, wobble, (7, 2)) / np.sqrt(np.arange(1, 8))[:, None]
        return cls(np.array(centre, float), np.array(axes, float), power, waves)

    def radius(self, angle: F64) -> F64:
        radius = np.full_like(angle, 1.0)
        for order, (a, b) in enumerate(self.waves, start=2):
            radius += a * np.cos(order * angle) + b * np.sin(order * angle)
        power = self.power
        return self.scale * radius / (np.abs(np.cos(angle)) ** power + np.abs(np.sin(angle)) ** power) ** (1 / power)

    def outline(self, n: int = 720) -> F64:
        angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
        return self.centre + self.axes * self.radius(angle)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)

    def depth(self, x: F64, y: F64) -> F64:
        """Return about how many pixels each point lies inside the outline; negative outside."""
        u, v = (x - self.centre[0]) / self.axes[0], (y - self.centre[1]) / self.axes[1]
        return (self.radius(np.arctan2(v, u)) - np.hypot(u, v)) * min(self.axes)


class _Scene:
    """All that is known of a phantom before its pixels; `paint` makes any tile of it."""

    def __init__(self, config: PhantomConfig) -> None:
        # One generator a purpose: a change to one part leaves the others' draws as they are.
        layout, weather, texture, stain = (np.random.default_rng((config.seed, purpose)) for purpose in range(4))
        self._mpp = config.mpp
        self._pieces = _lay_tissue(layout, config.size)
        tissue = [shapely.Polygon(piece.outline()) for piece in self._pieces]
        self._tumours, tumours = _lay_tumours(layout, config, tissue)
        strokes = _draw_strokes(layout, config, self._pieces) if config.pen else {}
        self._strokes = [(_INKS[ink], line, radius) for ink, (line, radius) in strokes.items()]
        pen = [line.buffer(radius) for line, radius in strokes.values()]
        self.truth = Truth(*(_multipolygon(parts) for parts in (tumours, tissue, pen)))
        # Noise that never repeats: fat lobules, density of cells, direction of fibres; a node every 100 um.
        self._noise_px = 100 / config.mpp
        nodes = (int(side / self._noise_px) + 8 for side in reversed(config.size))
        noise = ndimage.gaussian_filter(weather.standard_normal((3, *nodes), np.float32), (0, 1.5, 1.5))
        self._noise = noise * np.float32(2 * np.sqrt(np.pi) * 1.5)  # back to unit variance
        self._bank = _texture_bank(texture, config.mpp, config.tile_px)
        stains = _STAINS * (1 + stain.normal(0, 0.07, (2, 3)))
        stains *= np.linalg.norm(_STAINS, axis=1, keepdims=True) / np.linalg.norm(stains, axis=1, keepdims=True)
        stains *= np.exp(stain.normal(0, 0.12, (2, 1)))
        glass = 243 + stain.normal(0, 2, 3).clip(-6, 6)
        codes = np.arange(256) / _CODES_PER_UNIT
        h, e = (np.exp(-codes[:, None] * vector) for vector in stains)  # (256, 3) each: transmitted share
        #: Colour of each pair of concentration codes, uint8 (256 * 256, 3).
        self._colours = np.rint(glass * h[:, None] * e[None]).astype(np.uint8).reshape(-1, 3)
        self.glass: U8 = self._colours[0]

    def paint(self, left: int, top: int, side: int) -> U8 | None:
        """Return a tile, uint8 (side, side, 3); None where it is all glass."""
        x = left + np.arange(0, side + 1, _COARSE_PX, dtype=float)[None, :]
        y = top + np.arange(0, side + 1, _COARSE_PX, dtype=float)[:, None]
        tissue = _deepest(self._pieces, x, y)
        strokes = [(ink, r - shapely.distance(line, shapely.points(*np.broadcast_arrays(x, y))))
                   for ink, line, r in self._strokes
                   if line.distance(shapely.box(left, top, left + side, top + side)) < r + 1]
        inside = tissue.max() > -12 / self._mpp
        if not inside and not strokes:
            return None
        codes = self._stain_tile(left, top, side, x, y, tissue) if inside else np.zeros((side, side), np.uint16)
        rgb: U8 = self._colours.take(codes, axis=0)
        for ink, depth in strokes:
            cover = _ramp(_upsample(depth), 3.0)[..., None]
            rgb = np.rint(rgb * np.exp(-cover * np.array(ink, np.float32))).astype(np.uint8)
        return rgb

    def _stain_tile(self, left: int, top: int, side: int, x: F64, y: F64, depth: F64) -> npt.NDArray[np.uint16]:
        """Return the pair of concentrations at each pixel, uint16 (side, side): ``haematoxylin << 8 | eosin``."""

        def texture(name: str) -> list[F32]:
            u, v = left % _PERIODS[name], top % _PERIODS[name]
            return [plane[v : v + side, u : u + side] for plane in self._bank[name]]

        at = np.broadcast_arrays(y / self._noise_px + 2, x / self._noise_px + 2)
        fat, density, direction = (ndimage.map_coordinates(plane, at, order=1) for plane in self._noise)
        fibre_a, fibre_b, grain = texture("stroma")
        a = _ramp(_upsample(direction), 0.8)
        fibre = fibre_b + a * (fibre_a - fibre_b)
        # Stroma: fibres, and cells where their rank is below the local density.
        e = 0.44 + 0.15 * fibre + _upsample(0.05 * density)
        nucleus, rank = texture("cells")
        h = 0.05 + nucleus * (rank < _upsample(0.35 + 0.18 * density))
        # Collagen parts into clefts where fibres are thinnest.
        e *= _ramp(fibre + 1.15, 0.5)
        in_tumour: F32 | None = None
        tumour_depth = _deepest(self._tumours, x, y)
        if tumour_depth.max() > -4 / self._mpp:
            in_tumour = _ramp(_upsample(tumour_depth) + grain, 1.5 / self._mpp)
        in_fat = _upsample(np.maximum(fat - 0.75, -3)) + 0.15 * fibre
        if in_fat.max() > -0.2:
            weight = _ramp(in_fat, 0.15)
            if in_tumour is not None:
                weight *= 1 - in_tumour
            (wall,) = texture("fat")
            e += weight * (wall * 0.5 - e)
            h *= 1 - weight * (1 - wall)
        if in_tumour is not None:
            crowd, crowd_rank, matrix = texture("tumour")
            dense = crowd * (crowd_rank < _upsample(0.93 + 0.08 * density))
            h += in_tumour * (0.16 + dense - h)
            e += in_tumour * (matrix - e)
        e *= 1 - 0.35 * np.minimum(h, 1.5)  # nuclei take little eosin
        cover = _ramp(_upsample(depth) + 3 * grain, 3 / self._mpp)
        h, e = (np.clip((c + 0.04 * grain) * cover * _CODES_PER_UNIT, 0, 255).astype(np.uint16) for c in (h, e))
        return h << 8 | e


def _lay_tissue(rng: np.random.Generator, size: tuple[int, int]) -> list[_Blob]:
    """Cut the slide in three cells, and put one piece in each."""
    width, height = size
    first, second = rng.uniform(0.5, 0.6), rng.uniform(0.42, 0.58)
    # (x, y, w, h), as shares of the longer and of the shorter side
    cells = np.array([(0, 0, first, 1), (first, 0, 1 - first, second), (first, second, 1 - first, 1 - second)])
    if rng.random() < 0.5:
        cells[:, 0] = 1 - cells[:, 0] - cells[:, 2]
    if height > width:
        cells = cells[:, [1, 0, 3, 2]]
    cells *= np.array([width, height, width, height])
    return [_Blob.draw(rng, (x + w / 2, y + h / 2), (0.47 * w, 0.47 * h), power=3, wobble=0.05) for x, y, w, h in cells]


def _lay_tumours(
    rng: np.random.Generator, config: PhantomConfig, tissue: list[shapely.Polygon]
) -> tuple[list[_Blob], list[shapely.Polygon]]:
    """Put tumours into the tissue, apart from each other; each try is a little smaller."""
    blobs: list[_Blob] = []
    outlines: list[shapely.Polygon] = []
    radius = 0.12 * min(config.size)
    while len(blobs) < config.tumours:
        if radius < 30 / config.mpp:
            raise ValueError(f"phantom: no room for {config.tumours} tumours on a slide of {config.size} pixels")
        centre = rng.uniform((0, 0), config.size)
        blob = _Blob.draw(rng, centre, radius * rng.uniform(0.7, 1, 2), power=2, wobble=0.07)
        whole = shapely.Polygon(blob.outline(360))
        home = max(tissue, key=lambda piece: piece.intersection(whole).area)
        outline = home.intersection(whole)
        alone = all(outline.distance(other) > 0.25 * radius for other in outlines)
        if alone and outline.geom_type == "Polygon" and outline.area > 0.7 * whole.area:
            blobs.append(blob)
            outlines.append(outline)
        else:
            radius *= 0.99
    return blobs, outlines


def _draw_strokes(
    rng: np.random.Generator, config: PhantomConfig, pieces: list[_Blob]
) -> dict[str, tuple[shapely.LineString, float]]:
    """Draw an arc along a piece, a wave over one, and a dash beside one: centre line and half width each."""
    strokes = {}
    for ink, piece, reach, part in zip(_INKS, pieces, (1.03, 0.6, 1.0), (0.3, 0.15, 0.05), strict=True):
        n = 720
        start, count = int(rng.integers(n)), int(part * n)
        turn = (start + np.arange(count)) % n
        shake = 1 + 0.01 * np.sin(np.arange(count) / 9 + rng.uniform(0, 6))
        points = piece.centre + (piece.outline(n)[turn] - piece.centre) * reach * shake[:, None]
        strokes[ink] = (shapely.LineString(points), min(0.012 * min(config.size), 400 / config.mpp))
    return strokes


def _multipolygon(parts: list[shapely.Polygon]) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([shapely.set_precision(part, 0.01) for part in parts])


# --- how it looks there ----------------------------------------------------------------------------------


def _texture_bank(rng: np.random.Generator, mpp: float, tile_px: int) -> dict[str, list[F32]]:
    """Draw periodic textures, float32 (period + tile_px, period + tile_px) each, so that any tile is a slice."""
    p = _PERIODS["stroma"]
    fibres = [_noise(rng, p, (1.2 / mpp, 14 / mpp)) + 0.7 * _noise(rng, p, (0.6 / mpp, 9 / mpp)) for _ in range(2)]
    # Wavy: each row of the noise is read along a curve.
    sway = [12 / mpp * _noise(rng, p, (25 / mpp, 25 / mpp)) for _ in range(2)]
    rows, columns = np.mgrid[:p, :p].astype(np.float32)
    a, b = (
        ndimage.map_coordinates(f, (rows + s, columns), order=1, mode="grid-wrap")
        for f, s in zip(fibres, sway, strict=True)
    )
    bank = {"stroma": [a / a.std(), b.T / b.std(), _noise(rng, p, (0.8, 0.8))]}
    bank["cells"] = _nuclei(rng, _PERIODS["cells"], mpp, spacing_um=15, radius_um=(2.4, 3.6), stretch=(1.0, 2.2), amount=1.5)
    p = _PERIODS["tumour"]
    crowd = _nuclei(rng, p, mpp, spacing_um=11.5, radius_um=(4.0, 6.2), stretch=(1.0, 1.5), amount=1.45)
    bank["tumour"] = [*crowd, 0.34 + 0.07 * _noise(rng, p, (3 / mpp, 3 / mpp))]
    bank["fat"] = [_foam(rng, _PERIODS["fat"], 55 / mpp, 1.6 / mpp)]
    return {name: [np.pad(t, (0, tile_px), mode="wrap").astype(np.float32) for t in planes] for name, planes in bank.items()}


def _noise(rng: np.random.Generator, period: int, sigma: tuple[float, float]) -> F32:
    """Smooth periodic noise of unit variance, float32 (period, period)."""
    noise = ndimage.gaussian_filter(rng.standard_normal((period, period), np.float32), sigma, mode="wrap")
    return np.asarray(noise / noise.std(), np.float32)


def _jittered(rng: np.random.Generator, period: int, spacing: float) -> F64:
    """Points (n, 2) about `spacing` pixels apart on a torus."""
    n = max(2, round(period / spacing))
    lattice = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2)
    lattice = lattice + np.stack([0.5 * (lattice[:, 1] % 2), np.zeros(n * n)], 1)
    return np.asarray(((lattice + rng.uniform(-0.32, 0.32, lattice.shape)) * (period / n)) % period)


def _nuclei(
    rng: np.random.Generator,
    period: int,
    mpp: float,
    *,
    spacing_um: float,
    radius_um: tuple[float, float],
    stretch: tuple[float, float],
    amount: float,
) -> list[F32]:
    """Draw nuclei: haematoxylin, and the rank (0 to 1) of the nucleus each pixel belongs to."""
    stain, ranks = np.zeros((period, period), np.float32), np.ones((period, period), np.float32)
    for x, y in _jittered(rng, period, spacing_um / mpp):
        radius, long, angle = rng.uniform(*radius_um) / mpp, rng.uniform(*stretch), rng.uniform(0, np.pi)
        reach = int(radius * long) + 2
        u, v = np.arange(-reach, reach + 1)[None, :] - x % 1, np.arange(-reach, reach + 1)[:, None] - y % 1
        along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        inside = radius - np.hypot(along / long, across)  # px from the membrane
        shape = np.clip(inside + 0.5, 0, 1) * (0.75 + 0.25 * np.exp(-inside / max(radius / 4, 0.5)))
        at = np.ix_((int(y) + np.arange(-reach, reach + 1)) % period, (int(x) + np.arange(-reach, reach + 1)) % period)
        ranks[at] = np.where(shape > stain[at], np.float32(rng.random()), ranks[at])
        stain[at] = np.maximum(stain[at], shape * rng.uniform(0.75, 1.15))
    chromatin = 1 + 0.16 * _noise(rng, period, (0.7 / mpp, 0.7 / mpp))
    return [amount * stain * chromatin, ranks]


def _foam(rng: np.random.Generator, period: int, spacing: float, wall: float) -> F32:
    """Thin walls between round cells, float32 (period, period): 1 on a wall, 0 in a vacuole."""
    every = 2 if period > 4 * spacing else 1
    tree = KDTree(_jittered(rng, period, spacing), boxsize=period)
    at = np.arange(0, period, every, dtype=float)
    d, _ = tree.query(np.stack(np.meshgrid(at, at), -1), k=3)
    # Smaller where three cells meet, so corners are rounded off with wall.
    gap = (d[..., 1] - d[..., 0]) * (d[..., 2] - d[..., 0]) / (d[..., 1] + d[..., 2] - 2 * d[..., 0] + 1e-6)
    walls = np.clip(1.5 - gap / wall, 0, 1).astype(np.float32)
    if every == 1:
        return walls
    steps = np.mgrid[:period, :period].astype(np.float32) / every
    return np.asarray(ndimage.map_coordinates(walls, steps, order=1, mode="nearest"))


def _deepest(blobs: list[_Blob], x: F64, y: F64) -> F64:
    """Depth inside the union of blobs, float64 (rows, columns); very negative far from all."""
    depth = np.full((y.size, x.size), -1e6)
    for blob in blobs:
        near = blob.axes + 64
        if (np.abs(np.clip(blob.centre, (x[0, 0], y[0, 0]), (x[0, -1], y[-1, 0])) - blob.centre) < near).all():
            depth = np.maximum(depth, blob.depth(x, y))
    return depth


def _ramp(value: F32, width: float) -> F32:
    """Rise from 0 to 1 over `width` around 0."""
    return np.clip(value * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _upsample(nodes: npt.NDArray[np.floating]) -> F32:
    """Draw out (m + 1, n + 1) nodes linearly to the pixel centres between them, float32 (16 m, 16 n)."""
    t = ((np.arange(_COARSE_PX) + 0.5) / _COARSE_PX).astype(np.float32)
    g = nodes.astype(np.float32)
    g = (g[:-1, None] + (g[1:] - g[:-1])[:, None] * t[:, None]).reshape(-1, g.shape[1])
    return np.asarray((g[:, :-1, None] + (g[:, 1:] - g[:, :-1])[..., None] * t).reshape(len(g), -1))


# --- the file --------------------------------------------------------------------------------------------


class _Encoder:
    """JPEG tiles without the tables, which all of them share."""

    def __init__(self, glass: U8, side: int, quality: int) -> None:
        self.quality = quality
        self.tables = b""
        self._glass = glass
        self._empty = self.encode(np.full((side, side, 3), glass, np.uint8))

    def encode(self, tile: U8 | None) -> bytes:
        """Encode a tile, uint8 (side, side, 3); None is one of glass."""
        if tile is None:
            return self._empty
        tables, stream = _split_tables(imagecodecs.jpeg8_encode(tile, self.quality, subsampling=(2, 2)))
        self.tables = self.tables or tables
        if tables != self.tables:
            raise AssertionError("the JPEG encoder changed its tables between two tiles")
        return stream


def _split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """Split a JPEG into its quantisation and Huffman tables and all the rest; JFIF markers are dropped."""
    tables, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while (marker := jpeg[at + 1]) != 0xDA:  # start of scan
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker in (0xDB, 0xC4):
            tables += jpeg[at:end]
        elif marker == 0xC0:
            rest += jpeg[at:end]
        at = end
    return tables + b"\xff\xd9", rest + jpeg[at:]


class _Level:
    """A level above the first: a row of its tiles fills from below, is encoded, spooled, and averaged on."""

    def __init__(self, sizes: list[tuple[int, int]], glass: U8, encoder: _Encoder, side: int, spool: IO[bytes]) -> None:
        self.size = sizes[0]
        self.above = _Level(sizes[1:], glass, encoder, side, spool) if len(sizes) > 1 else None
        self._glass, self._encoder, self._side, self._spool = glass, encoder, side, spool
        self._spans: list[tuple[int, int]] = []  # where each tile lies in the spool
        self._row = np.empty((side, -(-self.size[0] // side) * side, 3), np.uint8)
        self._row[:] = glass
        self.rows: list[U8] = []  # pixels, kept of the coarsest level only, for the thumbnail

    def put(self, column: int, row: int, tile: U8) -> None:
        """Take the average of a tile of the level below."""
        quarter = self._side // _STEP
        x, y = column * quarter, row % _STEP * quarter
        edges = np.arange(quarter + 1, dtype=np.int64) * (_STEP << native.FIXED_POINT_BITS)
        native.area_average(tile, edges, edges, self._row[y : y + quarter, x : x + quarter])

    def end_row(self, row: int, *, last: bool) -> None:
        """Know that the level below has no more tiles in `row`."""
        if row % _STEP < _STEP - 1 and not last:
            return
        for column, left in enumerate(range(0, self._row.shape[1], self._side)):
            tile = np.ascontiguousarray(self._row[:, left : left + self._side])
            empty = bool((tile == self._glass).all())
            stream = self._encoder.encode(None if empty else tile)
            self._spans.append((self._spool.tell(), len(stream)))
            self._spool.write(stream)
            if self.above and not empty:
                self.above.put(column, row // _STEP, tile)
        if self.above:
            self.above.end_row(row // _STEP, last=last)
        else:
            self.rows.append(self._row.copy())
        self._row[:] = self._glass

    def tiles(self) -> Iterator[bytes]:
        """Return the encoded tiles, row by row."""
        for start, length in self._spans:
            self._spool.seek(start)
            yield self._spool.read(length)


def _write_tiff(
    file: IO[bytes], spool: IO[bytes], scene: _Scene, config: PhantomConfig, progress: Callable[[float], None]
) -> None:
    side = config.tile_px
    sizes = [config.size]
    for _ in range(3 if max(config.size) > 32_768 else 2):
        sizes.append((-(-sizes[-1][0] // _STEP), -(-sizes[-1][1] // _STEP)))
    encoder = _Encoder(scene.glass, side, config.quality)
    level = _Level(sizes[1:], scene.glass, encoder, side, spool)
    columns, rows = (-(-length // side) for length in config.size)

    def tiles() -> Iterator[bytes]:
        for row in range(rows):
            for column in range(columns):
                tile = scene.paint(column * side, row * side, side)
                if tile is not None:
                    level.put(column, row, tile)
                yield encoder.encode(tile)
            level.end_row(row, last=row == rows - 1)
            progress((row + 1) / rows)

    def page(tiff: tifffile.TiffWriter, size: tuple[int, int], tiles: Iterator[bytes], note: str) -> None:
        tiff.write(
            tiles,
            shape=(size[1], size[0], 3),
            dtype=np.uint8,
            tile=(side, side),
            jpegtables=encoder.tables,
            description=f"{_MAKER}\r\n{config.size[0]}x{config.size[1]} ({side}x{side}) {note}",
            **common,
        )

    common: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "subsampling": (2, 2), "metadata": None}
    common |= {"software": False, "resolution": (1e4 / config.mpp,) * 2, "resolutionunit": "centimeter"}
    note = f"JPEG/YCC Q={config.quality}|AppMag = {10 / config.mpp:g}|MPP = {config.mpp:g}"
    # No JPEG of a slide below 10^9 pixels comes near the 4 GiB of a classic TIFF.
    with tifffile.TiffWriter(file, bigtiff=config.size[0] * config.size[1] > 1e9) as tiff:
        page(tiff, config.size, tiles(), note)
        levels = [level]
        while levels[-1].above:
            levels.append(levels[-1].above)
        # Aperio's second page is a thumbnail, in strips, and readers count on it.
        w, h = levels[-1].size
        image = np.concatenate(levels[-1].rows)[:h, :w]
        every = -(-max(w, h) // 1024)
        tiff.write(image[::every, ::every], description=f"{_MAKER}\r\nthumbnail", rowsperstrip=16, **common)
        for each in levels:
            page(tiff, each.size, each.tiles(), f"-> {each.size[0]}x{each.size[1]} {note}")


def _geojson(truth: Truth, config: PhantomConfig) -> dict[str, Any]:
    """GeoJSON as QuPath imports it: a feature an outline, in level-0 pixels."""
    features = []
    for name, outlines in (("Tissue", truth.tissue), ("Tumor", truth.tumours), ("Pen", truth.pen)):
        for number, outline in enumerate(outlines.geoms):
            rings = [[[round(c, 2) for c in point] for point in ring.coords] for ring in (outline.exterior, *outline.interiors)]
            features.append(
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{config}/{name}/{number}")),
                    "geometry": {"type": "Polygon", "coordinates": rings},
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": name, "color": list(_COLOURS[name])},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}
