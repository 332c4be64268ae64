"""What every reader shares: the one read call, and where microns per pixel come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import tifffile

from wsi import native
from wsi.errors import MppError, SlideUnreadable
from wsi.units import Box, Mpp

U8 = npt.NDArray[np.uint8]

#: Plausible microns per pixel: 0.05 is beyond any objective, and 20 is a thumbnail or a default
#: of 72 or 96 dots per inch (353 and 265 um) taken for a resolution.
MPP_RANGE = (0.05, 20.0)

#: A level a little coarser than asked is still the right one: pyramid sizes are rounded to whole pixels.
_LEVEL_TOLERANCE = 1.005

#: Source pixels held at once: larger reads are done in blocks of this size.
_BLOCK_PX = 4_000_000


class GivenMpp(NamedTuple):
    """Microns per level-0 pixel that somebody gave, and who."""

    mpp: float
    source: str


class Slide(ABC):
    """Pixels and their resolution; knows nothing of tiles.

    Attributes
    ----------
    path : str
        As given to ``open_slide``.
    reader : str
        "openslide" or "tiffslide".
    vendor : str
        The format's name, such as "aperio" or "generic-tiff".
    level_sizes : tuple of (int, int)
        Width and height in pixels of each pyramid level, largest first.
    size : (int, int)
        Width and height at level 0.
    mpp : Mpp
        Microns per level-0 pixel.
    mpp_source : str
        Where `mpp` comes from: "vendor:<name>", "tiff-tags", "user" or "manifest".
    bounds : Box
        The scanned part of the level-0 plane; the whole plane where the file names none.
    """

    path: str
    reader: str
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    mpp: Mpp
    mpp_source: str
    bounds: Box

    @property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0."""
        return self.level_sizes[0]

    def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None) -> U8:
        """Read `box` resampled to exactly `out_px`.

        The coarsest level that is at least as fine as asked is read, and every output pixel is the
        area average of the level's pixels below it; positions are exact to 1/4096 of a level pixel.
        Outside the slide, and where the scanner left a hole, is white; alpha is composed on white.

        Parameters
        ----------
        box : Box
            In level-0 pixels; may be fractional and may reach outside the slide.
        out_px : (int, int)
            Output width and height.
        out : uint8 (height, width, 3), optional
            Written in place, and returned.

        Returns
        -------
        uint8 (height, width, 3)
            RGB.

        Raises
        ------
        SlideUnreadable
            The file is damaged there.
        ValueError
            A side is not positive, or a pixel would span more than 1024 pixels of the level.
        """
        out_w, out_h = out_px
        if out_w < 1 or out_h < 1 or not (box.w > 0 and box.h > 0):
            raise ValueError(f"cannot read {box} into {out_w} x {out_h} px: all sides must be positive")
        level = self.level_for(max(min(box.w / out_w, box.h / out_h), 1e-9))
        if out is None:
            out = np.empty((out_h, out_w, 3), np.uint8)
        edges_x = _cell_edges(box.x, box.w, out_w, self.level_sizes[level][0] / self.size[0])
        edges_y = _cell_edges(box.y, box.h, out_h, self.level_sizes[level][1] / self.size[1])
        for rows in _blocks(edges_y, _BLOCK_PX // min(_BLOCK_PX, _span(edges_x))):
            for columns in _blocks(edges_x, _BLOCK_PX // min(_BLOCK_PX, _span(edges_y[rows.start : rows.stop + 1]))):
                self._read_block(
                    level,
                    edges_x[columns.start : columns.stop + 1],
                    edges_y[rows.start : rows.stop + 1],
                    out[rows, columns],
                )
        return out

    def level_for(self, downsample: float) -> int:
        """Return the coarsest level that is at least as fine as `downsample` level-0 pixels a pixel."""
        fine_enough = [
            level
            for level, (w, h) in enumerate(self.level_sizes)
            if max(self.size[0] / w, self.size[1] / h) <= downsample * _LEVEL_TOLERANCE
        ]
        return max(fine_enough, default=0, key=lambda level: self.size[0] / self.level_sizes[level][0])

    def _read_block(self, level: int, edges_x: npt.NDArray[np.int64], edges_y: npt.NDArray[np.int64], out: U8) -> None:
        one = 1 << native.FIXED_POINT_BITS
        x0, y0 = int(edges_x[0]) // one, int(edges_y[0]) // one
        x1, y1 = -(int(edges_x[-1]) // -one), -(int(edges_y[-1]) // -one)
        source = self._read_padded(level, x0, y0, x1 - x0, y1 - y0)
        edges_x, edges_y = edges_x - x0 * one, edges_y - y0 * one
        if out.shape == source.shape and (np.diff(edges_x) == one).all() and (np.diff(edges_y) == one).all():
            out[...] = source
        else:
            native.area_average(source, edges_y, edges_x, out)

    def _read_padded(self, level: int, x: int, y: int, w: int, h: int) -> U8:
        """Read a region of a level, white where it lies outside the level."""
        level_w, level_h = self.level_sizes[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
        if (left, top, right, bottom) == (x, y, x + w, y + h):
            return self._read_level(level, x, y, w, h)
        region = np.full((h, w, 3), 255, np.uint8)
        if left < right and top < bottom:
            region[top - y : bottom - y, left - x : right - x] = self._read_level(
                level, left, top, right - left, bottom - top
            )
        return region

    @abstractmethod
    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> U8:
        """Read pixels [x, x + w) x [y, y + h) of a level, all inside it, exactly as stored; safe from many threads."""

    def tile_px(self, level: int) -> tuple[int, int] | None:
        """Return width and height of a level's stored tiles; None where ``jpeg_tiles`` has nothing to give."""
        return None

    def jpeg_tiles(self, level: int, columns: Sequence[int], rows: Sequence[int]) -> list[bytes | None]:
        """Return stored tiles as they are: each a whole JPEG stream that decodes alone, as RGB.

        Parameters
        ----------
        level : int
            One for which ``tile_px`` is not None.
        columns, rows : sequences of int (n,)
            Of the level's tiles.

        Returns
        -------
        list of n bytes or None
            None where the file holds no bytes, or they are cut short.
        """
        raise NotImplementedError(f"{self.reader} has no JPEG tiles to give")

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as the path and the resolution: the file is opened again where it is needed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve_mpp(path: str, given: GivenMpp | None, found: tuple[float, float] | None, source: str) -> tuple[Mpp, str]:
    """Decide the slide's microns per pixel, or say why it has none.

    Parameters
    ----------
    given : GivenMpp, optional
        Wins.
    found : (float, float), optional
        What the file says, x and y.
    source : str
        Where `found` was found.

    Raises
    ------
    MppError
        Missing, outside ``MPP_RANGE``, or x and y apart by more than 5 %.
    """
    low, high = MPP_RANGE
    remedy = (
        "Give it with --mpp, for wsi tile with --slide-mpp "
        "(microns per pixel at full resolution: about 0.25 for 40x, 0.5 for 20x)"
    )
    if given is not None:
        if not (math.isfinite(given.mpp) and low <= given.mpp <= high):
            what = f"{given.mpp:g} microns per pixel ({given.source}) is outside {low}-{high}"
            raise MppError(path, what, "Give the microns that one full-resolution pixel measures")
        return Mpp(given.mpp, given.mpp), given.source
    if found is None:
        raise MppError(path, "the file does not say how many microns a pixel measures", remedy)
    x, y = found
    if not (math.isfinite(x) and math.isfinite(y) and low <= x <= high and low <= y <= high):
        raise MppError(path, f"the file says {x:g} x {y:g} microns per pixel ({source}), outside {low}-{high}", remedy)
    if abs(x / y - 1) > 0.05:
        raise MppError(path, f"the file says {x:g} x {y:g} microns per pixel ({source}), not square", remedy)
    return Mpp(x, y), source


def refuse_turned(path: str, page: tifffile.TiffPage) -> None:
    """Refuse a TIFF whose Orientation tag asks for a flip or a turn.

    OpenSlide flips each tile in its place and tiffslide ignores the tag: both give a wrong picture.
    """
    orientation = page.tags.valueof("Orientation", 1)
    if orientation not in (0, 1):
        raise SlideUnreadable(
            path, f"has TIFF orientation {int(orientation)}", "Rewrite it with orientation 1 (top left)"
        )


def compose_on_white(rgba: U8) -> U8:
    """Lay straight-alpha RGBA (h, w, 4) on white, rounded to the nearest level: uint8 (h, w, 3)."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    a = alpha.astype(np.uint16)
    return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def _cell_edges(start: float, length: float, n: int, scale: float) -> npt.NDArray[np.int64]:
    """Edges of `n` equal cells over [start, start + length) level-0 px, in 1/4096 px of a level."""
    position = (start + np.arange(n + 1) * (length / n)) * (scale * (1 << native.FIXED_POINT_BITS))
    edges: npt.NDArray[np.int64] = np.rint(position).astype(np.int64)
    if (np.diff(edges) < 1).any():
        raise ValueError(f"cannot enlarge {length:g} level-0 px to {n} px")
    if (np.diff(edges) > native.MAX_CELL_PX << native.FIXED_POINT_BITS).any():
        raise ValueError(
            f"cannot reduce {length:g} level-0 px to {n} px: more than {native.MAX_CELL_PX}-fold for a level"
        )
    return edges


def _span(edges: npt.NDArray[np.int64]) -> int:
    """Source pixels between the first and last edge."""
    return max(1, int(edges[-1] - edges[0]) >> native.FIXED_POINT_BITS)


def _blocks(edges: npt.NDArray[np.int64], max_px: int) -> list[slice]:
    """Cut cells into runs that span at most about `max_px` source pixels (one cell at least)."""
    n = len(edges) - 1
    per_run = max(1, n * max_px // _span(edges))
    return [slice(start, min(start + per_run, n)) for start in range(0, n, per_run)]
