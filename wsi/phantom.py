"""Phantoms: synthetic H&E slides of any size, whose tumours are known to the pixel.

Smooth fields say what lies where (glass, stroma, fat, tumour) and periodic textures how it looks there; both
give concentrations of haematoxylin and eosin, and light is absorbed as Beer and Lambert say:
``RGB = glass * exp(-concentrations @ stains)``. Every tile is drawn by itself, so memory does not grow with
the number of tiles. Nothing here resembles a patient: phantoms try and test the engine, and prove no more.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import shapely
import tifffile
from scipy import fft, ndimage
from scipy.spatial import KDTree

from wsi import native
from wsi.errors import OutputError
from wsi.files import replacing

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

#: Optical density (natural logarithm) of R, G, B for one unit of haematoxylin and of eosin, between the vectors
#: of Ruifrok & Johnston (2001) and Macenko et al. (ISBI 2009). Concentrations reach about 2 and 1.
_STAINS = np.array([[0.61, 0.70, 0.36], [0.20, 0.81, 0.55]])
_INKS = {"green": (1.9, 0.35, 1.2), "blue": (2.0, 1.2, 0.25), "black": (2.3, 2.3, 2.1)}  # likewise
_CODES_PER_UNIT = 100  # concentrations 0 to 2.55 as uint8
_COARSE_PX = 16  # fields are evaluated every so many pixels and drawn out linearly between
_STEP = 4  # between two levels of the pyramid
#: Textures repeat after so many pixels: coprime, so that no two repeat together, of small factors for the FFT.
_PERIODS = {"stroma": 1125, "fat": 1024, "cells": 1331, "tumour": 1183}
_CLASSES = {"tissue": ("Tissue", (150, 200, 150)), "tumours": ("Tumor", (200, 0, 0)), "pen": ("Pen", (90, 90, 90))}
_MAKER = "Aperio Image Library (wsi phantom)"  # readers recognise the first word


@dataclass(frozen=True)
class PhantomConfig:
    """What to draw.

    Attributes
    ----------
    size : (int, int)
        Width and height in level-0 pixels, 1,024 to 100,000 each.
    mpp : float
        Microns per level-0 pixel, 0.1 to 1.
    seed : int
        Of shapes, textures and stain colours; not negative.
    tumours : int
        Number of tumour regions, 0 (a benign slide) to 100.
    tumour_um : tuple of float
        Lengths of further tumours in microns, 60 to half the slide each: about their longest diameter.
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
    tumour_um: tuple[float, ...] = ()
    pen: bool = False
    tile_px: int = 256
    quality: int = 80

    def __post_init__(self) -> None:
        width, height = self.size
        ranges: dict[str, tuple[float, float, float]] = {
            "width": (width, 1024, 100_000),
            "height": (height, 1024, 100_000),
            "mpp": (self.mpp, 0.1, 1),
        }
        ranges |= {"seed": (self.seed, 0, 2**63), "tumours": (self.tumours, 0, 100)}
        ranges |= {"tile_px": (self.tile_px, 64, 1024), "quality": (self.quality, 1, 100)}
        longest = 0.5 * min(self.size) * self.mpp
        ranges |= {f"tumour_um[{i}]": (length, 60, longest) for i, length in enumerate(self.tumour_um)}
        for name, (value, low, high) in ranges.items():
            whole = name != "mpp" and not name.startswith("tumour_um")
            if not low <= value <= high or (whole and value != int(value)):
                raise ValueError(f"phantom: {name}={value!r}, and {low} to {high} is possible")
        if self.tile_px % _COARSE_PX:
            raise ValueError(f"phantom: tile_px={self.tile_px!r} is not a multiple of {_COARSE_PX}")


class Truth(NamedTuple):
    """What was drawn where, in level-0 pixels (pixel (0, 0) spans [0, 1) x [0, 1)), rounded to 1/100 pixel."""

    tumours: shapely.MultiPolygon
    """As many parts as tumours were asked for, each inside `tissue`."""
    tissue: shapely.MultiPolygon
    """Outlines of the pieces; fat counts as tissue."""
    pen: shapely.MultiPolygon
    """Pen strokes; empty where none were asked for."""


def write_phantom(
    path: str | Path, config: PhantomConfig | None = None, *, progress: Callable[[float], None] | None = None
) -> Truth:
    """Write a phantom slide, and its truth as ``<stem>.truth.geojson`` beside it.

    The slide is an Aperio-like tiled pyramid: JPEG 4:2:0 with shared tables, levels 1, 4, 16, and 64 beyond
    32,768 px, each the area average of the one before. The same configuration gives the same bytes. Memory grows
    by about 300 bytes a pixel of width and not with height.

    Parameters
    ----------
    path : path
        Such as ``phantom.svs``; replaced, whole, if it is there.
    config : PhantomConfig, optional
        Default: 8,192 x 8,192 px at 0.5 mpp with three tumours.
    progress : callable, optional
        Called with the share of the work done, up to 1, after each row of tiles.

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
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     truth = write_phantom(f"{folder}/phantom.svs", PhantomConfig(size=(2048, 1024), tumours=2))
    >>> len(truth.tumours.geoms), truth.tissue.contains(truth.tumours.buffer(-1))
    (2, True)
    """
    path, config = Path(path), config or PhantomConfig()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            scene = _Scene(config)
            with Path(scratch, "spool").open("w+b") as spool:
                _write_tiff(Path(scratch, "slide"), spool, scene, config, progress or (lambda done: None))
            Path(scratch, "slide").replace(path)
        with replacing(path.with_name(f"{path.stem}.truth.geojson")) as file:
            file.write(json.dumps(_geojson(scene.truth, config), separators=(",", ":")).encode())
    except OSError as error:
        # Named by the path asked for: the error's own may be a temporary one.
        raise OutputError.of(OSError(error.errno, error.strerror), path) from error
    return scene.truth


# --- what lies where -------------------------------------------------------------------------------------


class _Blob:
    """A smooth closed outline that touches its box: radius ``(1 + waves(angle)) / |direction|_power``."""

    def __init__(self, rng: np.random.Generator, centre: Any, axes: Any, *, power: float, wobble: float) -> None:
        self.centre, self.axes, self.power = np.asarray(centre, float), np.asarray(axes, float), power
        self.waves = rng.normal(0, wobble, (7, 2)) / np.sqrt(np.arange(1, 8))[:, None]
        self.scale = 1.0
        self.scale = 1 / float((np.abs(self.outline() - self.centre) / self.axes).max())

    def radius(self, angle: F64) -> F64:
        radius = np.ones_like(angle)
        for order, (a, b) in enumerate(self.waves, start=2):
            radius += a * np.cos(order * angle) + b * np.sin(order * angle)
        corner = np.abs(np.cos(angle)) ** self.power + np.abs(np.sin(angle)) ** self.power  # power 2: an ellipse
        return np.asarray(self.scale * radius / corner ** (1 / self.power))

    def outline(self, n: int = 720) -> F64:
        angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
        circle = np.stack([np.cos(angle), np.sin(angle)], 1)
        return np.asarray(self.centre + self.axes * self.radius(angle)[:, None] * circle)

    def depth(self, x: F64, y: F64) -> F64:
        """Return about how many pixels each point lies inside the outline; negative outside."""
        u, v = (x - self.centre[0]) / self.axes[0], (y - self.centre[1]) / self.axes[1]
        return np.asarray((self.radius(np.arctan2(v, u)) - np.hypot(u, v)) * min(self.axes))


class _Scene:
    """All that is known of a phantom before its pixels."""

    def __init__(self, config: PhantomConfig) -> None:
        # One generator a purpose: a change to one part leaves the draws of the others as they are.
        layout, weather, texture, stain = (np.random.default_rng((config.seed, purpose)) for purpose in range(4))
        self._mpp = config.mpp
        self._pieces = _lay_tissue(layout, config.size)
        tissue = [shapely.Polygon(piece.outline()) for piece in self._pieces]
        self._tumours, tumours = _lay_tumours(layout, config, tissue)
        self._strokes = _draw_strokes(layout, config, self._pieces) if config.pen else []
        pen = [line.buffer(radius) for _, line, radius in self._strokes]
        self.truth = Truth(*(_rounded(parts) for parts in (tumours, tissue, pen)))
        # Noise that never repeats, a node every 100 um: fat lobules, density of cells, direction of fibres.
        self._node_px = 100 / config.mpp
        nodes = (int(side / self._node_px) + 8 for side in reversed(config.size))
        noise = ndimage.gaussian_filter(weather.standard_normal((3, *nodes), np.float32), (0, 1.5, 1.5))
        self._weather = noise * np.float32(2 * np.sqrt(np.pi) * 1.5)  # unit variance again
        self._textures = _draw_textures(texture, config.mpp, config.tile_px)
        stains = _STAINS * (1 + stain.normal(0, 0.06, (2, 3))) * np.exp(stain.normal(0, 0.1, (2, 1)))
        glass = np.array([243, 242, 244]) + stain.normal(0, 2, 3).clip(-6, 6)
        codes = np.arange(256)[:, None] / _CODES_PER_UNIT
        h, e = np.exp(-codes * stains[0]), np.exp(-codes * stains[1])  # (256, 3) each: the light let through
        self._colours = np.rint(glass * h[:, None] * e).astype(np.uint8).reshape(-1, 3)  # of each pair of codes
        self.glass: U8 = self._colours[0]

    def paint(self, left: int, top: int, side: int) -> U8 | None:
        """Return a tile, uint8 (side, side, 3); None where it is all glass."""
        x = left + np.arange(0, side + 1, _COARSE_PX, dtype=float)[None, :]
        y = top + np.arange(0, side + 1, _COARSE_PX, dtype=float)[:, None]
        depth = _deepest(self._pieces, x, y)
        tile = shapely.box(left, top, left + side, top + side)
        strokes = [stroke for stroke in self._strokes if stroke[1].distance(tile) < stroke[2] + 8]
        if depth.max() < -12 / self._mpp and not strokes:
            return None
        rgb: U8 = self._colours.take(self._stain(left, top, side, x, y, depth), axis=0)
        for ink, line, radius in strokes:
            inside = radius - shapely.distance(line, shapely.points(*np.broadcast_arrays(x, y)))
            cover = _ramp(_draw_out(inside), 3)[..., None]
            rgb = np.rint(rgb * np.exp(-cover * np.array(_INKS[ink], np.float32))).astype(np.uint8)
        return rgb

    def _stain(self, left: int, top: int, side: int, x: F64, y: F64, depth: F64) -> npt.NDArray[np.uint16]:
        """Return the concentrations at each pixel, uint16 (side, side): ``haematoxylin << 8 | eosin``."""

        def texture(name: str) -> list[F32]:
            u, v = left % _PERIODS[name], top % _PERIODS[name]
            return [plane[v : v + side, u : u + side] for plane in self._textures[name]]

        at = np.broadcast_arrays(y / self._node_px + 2, x / self._node_px + 2)
        lobule, density, direction = (ndimage.map_coordinates(plane, at, order=1) for plane in self._weather)
        # Stroma: fibres that part into clefts where they are thinnest, and the nuclei ranked below the local density.
        across, along, grain = texture("stroma")
        fibre = along + _ramp(_draw_out(direction), 0.8) * (across - along)
        e = (0.46 + 0.15 * fibre + _draw_out(0.05 * density)) * _ramp(fibre + 1.2, 0.5)
        nucleus, rank = texture("cells")
        h = 0.05 + nucleus * (rank < _draw_out(0.35 + 0.18 * density))
        depth_in_tumour = _deepest(self._tumours, x, y)
        in_tumour = _ramp(_draw_out(depth_in_tumour) + fibre, 1.5 / self._mpp)
        in_fat = _ramp(_draw_out(lobule - 1.1) + 0.12 * fibre, 0.15) * (1 - in_tumour)
        if in_fat.any():
            (wall,) = texture("fat")
            e += in_fat * (0.5 * wall - e)
            h *= 1 - in_fat * (1 - wall)
        if in_tumour.any():
            nucleus, rank, between = texture("tumour")
            h += in_tumour * (0.14 + nucleus * (rank < _draw_out(0.9 + 0.08 * density)) - h)
            e += in_tumour * (between - e)
        e *= 1 - 0.35 * np.minimum(h, 1.5)  # nuclei take little eosin
        cover = _ramp(_draw_out(depth) + 2 * fibre, 3 / self._mpp) * (1 + 0.06 * grain) * _CODES_PER_UNIT
        h8, e8 = (np.clip(c * cover, 0, 255).astype(np.uint16) for c in (h, e))
        return np.asarray(h8 << 8 | e8)


def _lay_tissue(rng: np.random.Generator, size: tuple[int, int]) -> list[_Blob]:
    """Cut the slide in three cells, and put one piece in each."""
    a, b = rng.uniform(0.5, 0.6), rng.uniform(0.42, 0.58)
    cells = np.array([(0, 0, a, 1), (a, 0, 1 - a, b), (a, b, 1 - a, 1 - b)])  # x, y, w, h
    if rng.random() < 0.5:
        cells[:, 0] = 1 - cells[:, 0] - cells[:, 2]
    if size[1] > size[0]:
        cells = cells[:, [1, 0, 3, 2]]
    return [
        _Blob(rng, (x + w / 2, y + h / 2), (0.47 * w, 0.47 * h), power=3, wobble=0.05)
        for x, y, w, h in cells * np.tile(size, 2)
    ]


def _lay_tumours(
    rng: np.random.Generator, config: PhantomConfig, tissue: list[shapely.Polygon]
) -> tuple[list[_Blob], list[shapely.Polygon]]:
    """Put tumours into the tissue, apart from each other, each try a little smaller; first those of given length."""
    blobs: list[_Blob] = []
    outlines: list[shapely.Polygon] = []
    for length in sorted(config.tumour_um, reverse=True):
        blob, outline = _lay_tumour_of(length / config.mpp, rng, config, tissue, outlines)
        blobs.append(blob)
        outlines.append(outline)
    radius = 0.12 * min(config.size)
    while len(blobs) < config.tumours + len(config.tumour_um):
        radius *= 0.995
        if radius < 30 / config.mpp:
            raise ValueError(f"phantom: no room for {config.tumours} tumours on {config.size[0]} x {config.size[1]} px")
        blob = _Blob(rng, rng.uniform(0, config.size), radius * rng.uniform(0.7, 1, 2), power=2, wobble=0.07)
        whole = shapely.Polygon(blob.outline())
        outline = max((piece.intersection(whole) for piece in tissue), key=lambda part: part.area)
        apart = all(outline.distance(other) > 0.25 * radius for other in outlines)
        if apart and outline.geom_type == "Polygon" and outline.area > 0.7 * whole.area:
            blobs.append(blob)
            outlines.append(outline)
    return blobs, outlines


def _lay_tumour_of(
    length: float,
    rng: np.random.Generator,
    config: PhantomConfig,
    tissue: list[shapely.Polygon],
    others: list[shapely.Polygon],
) -> tuple[_Blob, shapely.Polygon]:
    """Put one tumour of `length` pixels wholly into the tissue, 150 um and more from others."""
    for _ in range(2000):
        short = length * rng.uniform(0.7, 0.95)
        axes = np.array((length, short) if rng.random() < 0.5 else (short, length)) / 2
        blob = _Blob(rng, rng.uniform(axes, np.array(config.size) - axes), axes, power=2, wobble=0.03)
        outline = shapely.Polygon(blob.outline())
        if any(piece.contains(outline) for piece in tissue) and all(
            outline.distance(other) > 150 / config.mpp for other in others
        ):
            return blob, outline
    raise ValueError(f"phantom: no room for a tumour of {length * config.mpp:g} um")


def _draw_strokes(
    rng: np.random.Generator, config: PhantomConfig, pieces: list[_Blob]
) -> list[tuple[str, shapely.LineString, float]]:
    """Draw one pen stroke a piece, along it or over it: ink, centre line, half width in pixels."""
    strokes = []
    for ink, piece, reach, part in zip(_INKS, pieces, (1.02, 0.6, 0.95), (0.3, 0.2, 0.1), strict=True):
        turn = rng.integers(720) + np.arange(int(720 * part))
        shake = 1 + 0.01 * np.sin(np.arange(len(turn)) / 9)
        line = piece.centre + (piece.outline(720)[turn % 720] - piece.centre) * reach * shake[:, None]
        strokes.append((ink, shapely.LineString(line), min(0.012 * min(config.size), 400 / config.mpp)))
    return strokes


def _rounded(parts: list[shapely.Polygon]) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([shapely.set_precision(part, 0.01) for part in parts])


def _deepest(blobs: list[_Blob], x: F64, y: F64) -> F64:
    """Depth inside the union of blobs, float64 (rows, columns); very negative far from all."""
    depth = np.full((y.size, x.size), -1e6)
    for blob in blobs:
        nearest = np.clip(blob.centre, (x[0, 0], y[0, 0]), (x[0, -1], y[-1, 0]))
        if (np.abs(nearest - blob.centre) < blob.axes + 64).all():
            depth = np.maximum(depth, blob.depth(x, y))
    return depth


def _draw_out(nodes: npt.NDArray[np.floating]) -> F32:
    """Draw (m + 1, n + 1) nodes out linearly to the pixel centres between them, float32 (16 m, 16 n)."""
    t = ((np.arange(_COARSE_PX) + 0.5) / _COARSE_PX).astype(np.float32)
    g = nodes.astype(np.float32)
    g = (g[:-1, None] + (g[1:] - g[:-1])[:, None] * t[:, None]).reshape(-1, g.shape[1])
    return np.asarray((g[:, :-1, None] + (g[:, 1:] - g[:, :-1])[..., None] * t).reshape(len(g), -1))


def _ramp(value: F32, width: float) -> F32:
    """Rise from 0 to 1 over `width` around 0."""
    return np.asarray(np.clip(value * np.float32(1 / width) + np.float32(0.5), 0, 1))


# --- how it looks there ----------------------------------------------------------------------------------


def _draw_textures(rng: np.random.Generator, mpp: float, tile_px: int) -> dict[str, list[F32]]:
    """Draw the periodic textures, float32 (period + tile_px, period + tile_px), so that any tile is a slice."""
    p = _PERIODS["stroma"]
    directions = []
    for _ in range(2):
        fibre = _noise(rng, p, (1.2 / mpp, 14 / mpp)) + 0.7 * _noise(rng, p, (0.6 / mpp, 9 / mpp))
        rows, columns = np.mgrid[:p, :p] + 12 / mpp * _noise(rng, p, (25 / mpp, 25 / mpp)) * [[[1]], [[0]]]  # wavy
        fibre = ndimage.map_coordinates(fibre, (rows, columns), order=1, mode="grid-wrap")
        directions.append(fibre / fibre.std())
    cells = _nuclei(rng, _PERIODS["cells"], mpp, spacing=15, radius=(2.4, 3.6), stretch=2.2, amount=1.5)
    crowd = _nuclei(rng, _PERIODS["tumour"], mpp, spacing=11.5, radius=(3.6, 5.8), stretch=1.5, amount=1.4)
    textures = {
        "stroma": [directions[0], directions[1].T, _noise(rng, p, (0.8, 0.8))],
        "cells": cells,
        "tumour": [*crowd, 0.34 + 0.07 * _noise(rng, _PERIODS["tumour"], (3 / mpp, 3 / mpp))],
        "fat": [_foam(rng, _PERIODS["fat"], spacing=55 / mpp, wall=1.6 / mpp)],
    }
    return {
        name: [np.pad(plane, (0, tile_px), mode="wrap").astype(np.float32) for plane in planes]
        for name, planes in textures.items()
    }


def _noise(rng: np.random.Generator, period: int, sigma: tuple[float, float]) -> F32:
    """Gaussian-filtered periodic noise of unit variance, float32 (period, period)."""
    spectrum = fft.rfft2(rng.standard_normal((period, period), np.float32))
    noise = fft.irfft2(ndimage.fourier_gaussian(spectrum, sigma, n=period), s=(period, period))
    return np.asarray(noise / noise.std(), np.float32)


def _scatter(rng: np.random.Generator, period: int, spacing: float) -> F64:
    """Points (n, 2) about `spacing` pixels apart on a torus: a shaken hexagonal lattice."""
    n = max(2, round(period / spacing))
    row, column = np.divmod(np.arange(n * n), n)
    lattice = np.stack([column + 0.5 * (row % 2), row], 1) + rng.uniform(-0.4, 0.4, (n * n, 2))
    return np.asarray(lattice * (period / n) % period)


def _nuclei(
    rng: np.random.Generator,
    period: int,
    mpp: float,
    *,
    spacing: float,
    radius: tuple[float, float],
    stretch: float,
    amount: float,
) -> list[F32]:
    """Draw nuclei (lengths in microns): their haematoxylin, and at each pixel the rank, 0 to 1, of its nucleus."""
    stain, ranks = np.zeros((period, period), np.float32), np.ones((period, period), np.float32)
    for x, y in _scatter(rng, period, spacing / mpp):
        r, long, turn = rng.uniform(*radius) / mpp, rng.uniform(1, stretch), rng.uniform(0, np.pi)
        box = np.arange(-int(r * long) - 2, int(r * long) + 3)
        u, v = box[None, :] - x % 1, box[:, None] - y % 1
        a, b = (u * np.cos(turn) + v * np.sin(turn)) / long, v * np.cos(turn) - u * np.sin(turn)
        inside = r - np.hypot(a, b)  # px from the membrane, where chromatin is densest
        shade = rng.uniform(0.75, 1.15) * (0.7 + 0.3 * np.exp(-np.maximum(inside, 0) / (r / 4)))
        shape = shade * np.clip(inside + 0.5, 0, 1)
        at = np.ix_((int(y) + box) % period, (int(x) + box) % period)
        ranks[at] = np.where(shape > 0, np.minimum(ranks[at], rng.random()), ranks[at])
        stain[at] = np.maximum(stain[at], shape)
    return [amount * stain * (1 + 0.15 * _noise(rng, period, (0.7 / mpp, 0.7 / mpp))), ranks]


def _foam(rng: np.random.Generator, period: int, *, spacing: float, wall: float) -> F32:
    """Thin walls between rounded cells, float32 (period, period): 1 on a wall, 0 in a vacuole."""
    half = np.arange(0, period + 2, 2)  # at every other pixel: the walls are smooth
    tree = KDTree(_scatter(rng, period, spacing), boxsize=period)
    d, _ = tree.query(np.stack(np.meshgrid(half % period, half % period), -1), k=3)
    d2, d3 = d[..., 1] - d[..., 0], d[..., 2] - d[..., 0]
    walls = np.clip(1.5 - d2 * d3 / (d2 + d3 + 1e-6) / wall, 0, 1)  # corners, where three cells meet, fill up
    return np.asarray(ndimage.map_coordinates(walls, np.mgrid[:period, :period] / 2, order=1), np.float32)


# --- the file --------------------------------------------------------------------------------------------


class _Encoder:
    """JPEG tiles without the tables, which all of them share."""

    def __init__(self, glass: U8, side: int, quality: int) -> None:
        self._quality = quality
        jpeg = self._jpeg(np.full((side, side, 3), glass, np.uint8))
        segments, at = {0xDB: b"", 0xC4: b"", 0xC0: b"", 0xE0: b""}, 2
        while jpeg[at + 1] != 0xDA:  # start of scan
            end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
            segments[jpeg[at + 1]] += jpeg[at:end]
            at = end
        self._head, self._frame = jpeg[:at], b"\xff\xd8" + segments[0xC0]
        self.tables = b"\xff\xd8" + segments[0xDB] + segments[0xC4] + b"\xff\xd9"
        self._glass = self._frame + jpeg[at:]

    def encode(self, tile: U8 | None) -> bytes:
        """Encode a tile, uint8 (side, side, 3); None is one of glass."""
        if tile is None:
            return self._glass
        jpeg = self._jpeg(tile)
        if not jpeg.startswith(self._head):
            raise RuntimeError("the JPEG encoder gave two tiles different tables")
        return self._frame + jpeg[len(self._head) :]

    def _jpeg(self, tile: U8) -> bytes:
        return bytes(imagecodecs.jpeg8_encode(tile, self._quality, subsampling=(2, 2)))


class _Level:
    """A level above the first: a row of its tiles fills from below, is encoded, spooled, and averaged on."""

    def __init__(self, sizes: list[tuple[int, int]], glass: U8, encoder: _Encoder, side: int, spool: IO[bytes]) -> None:
        self.size = sizes[0]
        self.above = _Level(sizes[1:], glass, encoder, side, spool) if len(sizes) > 1 else None
        self.rows: list[U8] = []  # pixels, kept of the coarsest level alone
        self._glass, self._encoder, self._side, self._spool = glass, encoder, side, spool
        self._spans: list[tuple[int, int]] = []  # where each tile lies in the spool
        self._row = np.tile(glass, (side, -(-self.size[0] // side) * side, 1))

    def put(self, column: int, row: int, tile: U8) -> None:
        """Take the average of a tile of the level below."""
        quarter = self._side // _STEP
        x, y = column * quarter, row % _STEP * quarter
        edges = np.arange(quarter + 1, dtype=np.int64) * (_STEP << native.FIXED_POINT_BITS)
        native.area_average(tile, edges, edges, self._row[y : y + quarter, x : x + quarter])

    def end_row(self, row: int, *, last: bool) -> None:
        """Go on once the level below has no more tiles for this level's row."""
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
    path: Path, spool: IO[bytes], scene: _Scene, config: PhantomConfig, progress: Callable[[float], None]
) -> None:
    side = config.tile_px
    sizes = [config.size]
    for _ in range(3 if max(config.size) > 32_768 else 2):
        sizes.append((-(-sizes[-1][0] // _STEP), -(-sizes[-1][1] // _STEP)))
    encoder = _Encoder(scene.glass, side, config.quality)
    level = _Level(sizes[1:], scene.glass, encoder, side, spool)

    def tiles() -> Iterator[bytes]:
        columns, rows = (-(-length // side) for length in config.size)
        for row in range(rows):
            for column in range(columns):
                tile = scene.paint(column * side, row * side, side)
                if tile is not None:
                    level.put(column, row, tile)
                if column == columns - 1:  # before the last yield, after which nobody comes back
                    level.end_row(row, last=row == rows - 1)
                    progress((row + 1) / rows)
                yield encoder.encode(tile)

    full = f"{config.size[0]}x{config.size[1]}"
    notes = f"({side}x{side}) JPEG/YCC Q={config.quality}|AppMag = {10 / config.mpp:g}|MPP = {config.mpp:g}"
    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "subsampling": (2, 2), "metadata": None}
    options |= {"software": False, "resolution": (1e4 / config.mpp,) * 2, "resolutionunit": "centimeter"}
    tiled = options | {"dtype": np.uint8, "tile": (side, side), "jpegtables": encoder.tables}
    # Below 10^9 pixels no JPEG comes near the 4 GiB of a classic TIFF.
    with tifffile.TiffWriter(path, bigtiff=config.size[0] * config.size[1] > 1e9) as tiff:
        tiff.write(tiles(), shape=(*config.size[::-1], 3), description=f"{_MAKER}\r\n{full} {notes}", **tiled)
        levels = [level]
        while levels[-1].above:
            levels.append(levels[-1].above)
        # Aperio's second page is a thumbnail in strips, and readers take the second page for one.
        w, h = levels[-1].size
        every = -(-max(w, h) // 1024)
        thumbnail = np.concatenate(levels[-1].rows)[:h:every, :w:every]
        tiff.write(thumbnail, description=f"{_MAKER}\r\nthumbnail of {full}", rowsperstrip=16, **options)
        for each in levels:
            (w, h), shape = each.size, (*each.size[::-1], 3)
            tiff.write(each.tiles(), shape=shape, description=f"{_MAKER}\r\n{full} -> {w}x{h} {notes}", **tiled)


def _geojson(truth: Truth, config: PhantomConfig) -> dict[str, Any]:
    """Describe the truth as QuPath imports it: a feature an outline, in level-0 pixels."""
    features = []
    for part, (name, color) in _CLASSES.items():
        for number, outline in enumerate(getattr(truth, part).geoms):
            rings = [shapely.get_coordinates(ring).round(2).tolist() for ring in (outline.exterior, *outline.interiors)]
            features.append(
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{config}/{name}/{number}")),
                    "geometry": {"type": "Polygon", "coordinates": rings},
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": name, "color": list(color)},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}
