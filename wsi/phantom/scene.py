"""The scene of a phantom: outlines of tissue, tumours and pen strokes, and the pixels of any tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

from wsi.phantom.textures import F32, F64, PERIODS, draw_textures

U8 = npt.NDArray[np.uint8]

#: Optical density (natural logarithm) of R, G, B for one unit of haematoxylin and of eosin, between the vectors
#: of Ruifrok & Johnston (2001) and Macenko et al. (ISBI 2009). Concentrations reach about 2 and 1.
_STAINS = np.array([[0.61, 0.70, 0.36], [0.20, 0.81, 0.55]])
_INKS = {"green": (1.9, 0.35, 1.2), "blue": (2.0, 1.2, 0.25), "black": (2.3, 2.3, 2.1)}  # likewise
_CODES_PER_UNIT = 100  # concentrations 0 to 2.55 as uint8
_COARSE_PX = 16  # spacing of the nodes of smooth fields, which are interpolated linearly


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of a phantom.

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
        A value is out of range.
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
    """Outlines in level-0 pixels (pixel (0, 0) spans [0, 1) x [0, 1)), rounded to 1/100 pixel."""

    tumours: shapely.MultiPolygon
    """As many parts as tumours were asked for, each inside `tissue`."""
    tissue: shapely.MultiPolygon
    """Outlines of the pieces; fat counts as tissue."""
    pen: shapely.MultiPolygon
    """Pen strokes; empty where none were asked for."""


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
        """Return the approximate distance of each point from the outline in pixels; negative outside."""
        u, v = (x - self.centre[0]) / self.axes[0], (y - self.centre[1]) / self.axes[1]
        return np.asarray((self.radius(np.arctan2(v, u)) - np.hypot(u, v)) * min(self.axes))


class Scene:
    """Everything about a phantom that does not depend on the tile."""

    def __init__(self, config: PhantomConfig) -> None:
        # One generator a purpose: a change to one part does not change the others' random numbers.
        layout, weather, texture, stain = (np.random.default_rng((config.seed, purpose)) for purpose in range(4))
        self._mpp = config.mpp
        self._pieces = _lay_tissue(layout, config.size)
        tissue = [shapely.Polygon(piece.outline()) for piece in self._pieces]
        self._tumours, tumours = _lay_tumours(layout, config, tissue)
        self._strokes = _draw_strokes(layout, config, self._pieces) if config.pen else []
        pen = [line.buffer(radius) for _, line, radius in self._strokes]
        self.truth = Truth(*(_rounded(parts) for parts in (tumours, tissue, pen)))
        # Aperiodic noise with a node every 100 um: fat lobules, density of cells, direction of fibres.
        self._node_px = 100 / config.mpp
        nodes = (int(side / self._node_px) + 8 for side in reversed(config.size))
        noise = ndimage.gaussian_filter(weather.standard_normal((3, *nodes), np.float32), (0, 1.5, 1.5))
        self._weather = noise * np.float32(2 * np.sqrt(np.pi) * 1.5)  # unit variance again
        self._textures = draw_textures(texture, config.mpp, config.tile_px)
        stains = _STAINS * (1 + stain.normal(0, 0.06, (2, 3))) * np.exp(stain.normal(0, 0.1, (2, 1)))
        glass = np.array([243, 242, 244]) + stain.normal(0, 2, 3).clip(-6, 6)
        codes = np.arange(256)[:, None] / _CODES_PER_UNIT
        h, e = np.exp(-codes * stains[0]), np.exp(-codes * stains[1])  # (256, 3) each: transmitted light
        self._colours = np.rint(glass * h[:, None] * e).astype(np.uint8).reshape(-1, 3)  # for each pair of codes
        self.glass: U8 = self._colours[0]

    def paint(self, left: int, top: int, side: int) -> U8 | None:
        """Return a tile, uint8 (side, side, 3); None if it is all glass."""
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
            u, v = left % PERIODS[name], top % PERIODS[name]
            return [plane[v : v + side, u : u + side] for plane in self._textures[name]]

        at = np.broadcast_arrays(y / self._node_px + 2, x / self._node_px + 2)
        lobule, density, direction = (ndimage.map_coordinates(plane, at, order=1) for plane in self._weather)
        # Stroma: fibres with clefts where they are thinnest, and the nuclei ranked below the local density.
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
    """Divide the slide into three cells with one piece of tissue each."""
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
    """Place tumours in the tissue, apart from each other: first those of given length, then shrinking trials."""
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
    """Place one tumour of `length` pixels inside the tissue, at least 150 um from others."""
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
    """Draw one pen stroke a piece, along or across it: ink, centre line, half width in pixels."""
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
    """Depth inside the union of blobs, float64 (rows, columns); very negative far outside."""
    depth = np.full((y.size, x.size), -1e6)
    for blob in blobs:
        nearest = np.clip(blob.centre, (x[0, 0], y[0, 0]), (x[0, -1], y[-1, 0]))
        if (np.abs(nearest - blob.centre) < blob.axes + 64).all():
            depth = np.maximum(depth, blob.depth(x, y))
    return depth


def _draw_out(nodes: npt.NDArray[np.floating]) -> F32:
    """Interpolate (m + 1, n + 1) nodes linearly at the pixel centres between them, float32 (16 m, 16 n)."""
    t = ((np.arange(_COARSE_PX) + 0.5) / _COARSE_PX).astype(np.float32)
    g = nodes.astype(np.float32)
    g = (g[:-1, None] + (g[1:] - g[:-1])[:, None] * t[:, None]).reshape(-1, g.shape[1])
    return np.asarray((g[:, :-1, None] + (g[:, 1:] - g[:, :-1])[..., None] * t).reshape(len(g), -1))


def _ramp(value: F32, width: float) -> F32:
    """Rise from 0 to 1 over `width` around 0."""
    return np.asarray(np.clip(value * np.float32(1 / width) + np.float32(0.5), 0, 1))
