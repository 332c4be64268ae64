"""What all readers share: ``Slide.read``, and how microns per pixel are determined."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import tifffile

from wsi.errors import MppError, SlideUnreadable
from wsi.result import Stopwatch
from wsi.slide.cells import ONE_PX, Cells, blocks_of, cell_edges, part_of, resample, shrunk
from wsi.units import Box, Mpp

U8 = npt.NDArray[np.uint8]

#: Plausible microns per pixel: no objective reaches 0.05; above 20 is a thumbnail, or the default of 72 or 96 dots per
#: inch (353 and 265 um).
MPP_RANGE = (0.05, 20.0)
#: Microns per pixel given by the user and those of the file contradict each other beyond this ratio.
_CONTRADICTION = 1.1
#: A level may be this much coarser than asked: pyramid sizes are rounded to whole pixels.
_LEVEL_TOLERANCE = 1.005
#: Larger reads are split into blocks of this many source pixels.
_BLOCK_PX = 4_000_000
#: Values of `decode`, see ``open_slide``.
DECODES = ("auto", "full", "fast")
#: A damaged region is split down to parts of this side, to find those that can be read.
_LEAST_PX = 256


class GivenMpp(NamedTuple):
    """Microns per level-0 pixel that override the file's, and who gave them."""

    mpp: float
    source: str


class Slide(ABC):
    """A slide: pixels and their resolution.

    Attributes
    ----------
    path : str
        As given to ``open_slide``.
    reader : str
        "tiff", "openslide" or "tiffslide".
    vendor : str
        Name of the format, such as "aperio" or "generic-tiff".
    level_sizes : tuple of (int, int)
        Width and height in pixels of each pyramid level, largest first.
    size : (int, int)
        Width and height at level 0.
    mpp : Mpp
        Microns per level-0 pixel.
    mpp_source : str
        Where `mpp` comes from: "vendor:<name>", "tiff-tags", "user" or "manifest".
    overridden : Mpp, optional
        The file's own microns per pixel, if the `mpp` that was given differs by more than 10 %.
    bounds : Box
        The scanned part of the level-0 plane; the whole plane if the file names none.
    centre_nm : (float, float), optional
        From the centre of the glass to the centre of the image, in nanometres; only in Hamamatsu's files.
    """

    path: str
    reader: str
    vendor: str
    level_sizes: tuple[tuple[int, int], ...]
    mpp: Mpp
    mpp_source: str
    bounds: Box
    overridden: Mpp | None = None
    centre_nm: tuple[float, float] | None = None
    decode: str = "full"

    @cached_property
    def spent(self) -> Stopwatch:
        """Seconds summed over threads, by "read" (bytes; only of our TIFF reader), "decode" and "cut"."""
        return Stopwatch()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0."""
        return self.level_sizes[0]

    def read(
        self,
        box: Box,
        out_px: tuple[int, int],
        out: U8 | None = None,
        *,
        damage: list[Box] | None = None,
        level: int | None = None,
    ) -> U8:
        """Read `box`, resampled to exactly `out_px`.

        Reads the coarsest level that is at least as fine as asked for. Every output pixel is the area average of the
        level pixels that it covers; positions are exact to 1/4096 of a level pixel. Outside the slide and where nothing
        was scanned the result is white; transparency is composed on white.

        Parameters
        ----------
        box : Box
            In level-0 pixels; may be fractional and may reach outside the slide.
        out_px : (int, int)
            Output width and height.
        out : uint8 (height, width, 3), optional
            Written in place, and returned.
        damage : list of Box, optional
            If given, damaged parts of the file read as white and are added to this list, in level-0 pixels. Otherwise
            damage is an error.
        level : int, optional
            The level to read from; default: chosen as above.

        Returns
        -------
        uint8 (height, width, 3)
            RGB.

        Raises
        ------
        SlideUnreadable
            The file is damaged there, and `damage` was not given.
        ValueError
            A side is not positive, or an output pixel would span more than 1024 pixels of the level.
        """
        out_w, out_h = out_px
        if out_w < 1 or out_h < 1 or not (box.w > 0 and box.h > 0):
            raise ValueError(f"cannot read {box} into {out_w} x {out_h} px: all sides must be positive")
        if level is None:
            level = self.level_for(min(box.w / out_w, box.h / out_h))
        per_px = self.scale(level)
        edges_x, edges_y = cell_edges(box.x, box.w, out_w, per_px[0]), cell_edges(box.y, box.h, out_h, per_px[1])
        shrink = min(self.shrink_along(level, 0, edges_x), self.shrink_along(level, 1, edges_y))
        x, y = shrunk(edges_x, shrink), shrunk(edges_y, shrink)
        if out is None:
            out = np.empty((out_h, out_w, 3), np.uint8)
        for rows in blocks_of(y, _BLOCK_PX // min(_BLOCK_PX, x.last - x.first)):
            part_y = part_of(y, rows)
            for columns in blocks_of(x, _BLOCK_PX // min(_BLOCK_PX, part_y.last - part_y.first)):
                part_x = part_of(x, columns)
                source = self._read_padded(level, part_x, part_y, damage)
                resample(source, part_x, part_y, out[rows, columns])
        return out

    def shrink_along(self, level: int, axis: int, edges: npt.NDArray[np.int64]) -> int:
        """Return by how much the decoder may reduce a level for these edges; see `decode` of ``open_slide``."""
        side = self.level_sizes[level][axis]
        for shrink in self.shrinks(level):
            if self.decode == "fast":
                fits = int(np.diff(edges).min()) >= shrink * ONE_PX
            else:
                fits = not int(np.bitwise_or.reduce(edges)) % (shrink * ONE_PX)
            inside = side % shrink == 0 or (edges[-1] <= side // shrink * shrink * ONE_PX)
            if fits and inside:
                return shrink
        return 1

    def scale(self, level: int) -> tuple[float, float]:
        """Return pixels of a level per level-0 pixel, along x and y."""
        w, h = self.level_sizes[level]
        return w / self.size[0], h / self.size[1]

    def shrinks(self, level: int) -> Sequence[int]:
        """Return the factors by which the decoder can reduce a level, largest first."""
        return ()

    def tile_px(self, level: int) -> tuple[int, int] | None:
        """Return width and height of a level's stored tiles; None if the reader does not give access to them."""
        return None

    def read_tiles(
        self, level: int, shrink: int, tiles: Sequence[tuple[int, int]], out: Sequence[U8]
    ) -> list[str | None]:
        """Decode entire stored tiles, given by column and row, padding included; only where ``tile_px`` is not None.

        They are written to `out`, uint8 (tile height / shrink, tile width / shrink, 3) each, white where the file has
        no tile or cannot be decoded. Return for each tile why it cannot be decoded, or None.
        """
        raise NotImplementedError(f"{self.reader} has no stored tiles to give")

    def holds_jpeg(self, level: int) -> bool:
        """Whether the level's tiles are JPEG, for ``jpeg_tiles``."""
        return False

    def jpeg_tiles(self, level: int, tiles: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Return stored tiles, given by column and row, undecoded: each a complete JPEG stream of RGB pixels.

        None where the file has no tile, or only part of it. Only of levels that ``holds_jpeg``.
        """
        raise NotImplementedError(f"{self.reader} has no JPEG tiles to give")

    def level_for(self, downsample: float) -> int:
        """Return the coarsest level with at most `downsample` level-0 pixels per pixel; 0 if there is none."""
        full_w, full_h = self.size
        coarseness = {level: max(full_w / w, full_h / h) for level, (w, h) in enumerate(self.level_sizes)}
        fine_enough = [level for level, px in coarseness.items() if px <= downsample * _LEVEL_TOLERANCE]
        return max(fine_enough, default=0, key=lambda level: full_w / self.level_sizes[level][0])

    def _read_padded(self, level: int, across: Cells, down: Cells, damage: list[Box] | None) -> U8:
        """Read a region of a level, white where it lies outside the level."""
        x, y, w, h, shrink = across.first, down.first, across.last - across.first, down.last - down.first, across.shrink
        level_w, level_h = (side // shrink for side in self.level_sizes[level])
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
        inside = (left, top, right, bottom) == (x, y, x + w, y + h)
        if inside and damage is None:
            return self._read_level(level, shrink, x, y, w, h)
        region = np.full((h, w, 3), 255, np.uint8)
        if left < right and top < bottom:
            part = level, shrink, left, top, right - left, bottom - top
            if damage is None:
                pixels = self._read_level(*part)
            else:
                pixels, places = self._read_sound(*part)
                px = [shrink / scale for scale in self.scale(level)]  # level-0 pixels a pixel
                damage += [Box(i * px[0], j * px[1], m * px[0], n * px[1]) for i, j, m, n in places]
            region[top - y : bottom - y, left - x : right - x] = pixels
        return region

    @abstractmethod
    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> U8:
        """Read pixels [x, x + w) x [y, y + h) of a level, all inside it, exactly as stored; must be thread-safe.

        `shrink` is 1 or one of ``shrinks``; coordinates are then those of the reduced level.
        """

    def _read_sound(
        self, level: int, shrink: int, x: int, y: int, w: int, h: int
    ) -> tuple[U8, list[tuple[int, int, int, int]]]:
        """Read like ``_read_level``, but white where the file is damaged; also return those areas (x, y, w, h)."""
        try:
            return self._read_level(level, shrink, x, y, w, h), []
        except SlideUnreadable:
            if max(w, h) <= _LEAST_PX:
                return np.full((h, w, 3), 255, np.uint8), [(x, y, w, h)]
        if w >= h:
            one, two = (x, y, w // 2, h), (x + w // 2, y, w - w // 2, h)
        else:
            one, two = (x, y, w, h // 2), (x, y + h // 2, w, h - h // 2)
        (first, lost), (second, lost_too) = self._read_sound(level, shrink, *one), self._read_sound(level, shrink, *two)
        return np.concatenate([first, second], axis=1 if w >= h else 0), lost + lost_too

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as the arguments of the constructor: unpickling opens the file again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def numbers_in(properties: Mapping[str, Any], *names: str) -> Any:
    """Return properties as a tuple of floats; None if one is missing or not a number."""
    try:
        return tuple(float(properties[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return None


def resolve_mpp(
    path: str, given: GivenMpp | None, found: tuple[float, ...] | None, source: str
) -> tuple[Mpp, str, Mpp | None]:
    """Return a slide's ``mpp``, ``mpp_source`` and ``overridden``: from `given`, or else what the file says.

    `found` is the file's microns per pixel along x and y, and `source` where in the file they stand. Raises MppError if
    they are missing, outside ``MPP_RANGE``, or differ by more than 5 %.
    """
    low, high = MPP_RANGE
    remedy = "Give it with --slide-mpp (microns per pixel at full resolution: about 0.25 for 40x, 0.5 for 20x)"
    if given is not None:
        if not (math.isfinite(given.mpp) and low <= given.mpp <= high):
            what = f"{given.mpp:g} microns per pixel ({given.source}) is outside {low}-{high}"
            raise MppError(path, what, "Give the microns that one full-resolution pixel measures")
        return Mpp(given.mpp, given.mpp), given.source, _contradicted(given.mpp, found)
    if found is None:
        raise MppError(path, "the file does not say how many microns a pixel measures", remedy)
    x, y = found
    if not (math.isfinite(x) and math.isfinite(y) and low <= x <= high and low <= y <= high):
        raise MppError(path, f"the file says {x:g} x {y:g} microns per pixel ({source}), outside {low}-{high}", remedy)
    if abs(x / y - 1) > 0.05:
        raise MppError(path, f"the file says {x:g} x {y:g} microns per pixel ({source}), not square", remedy)
    return Mpp(x, y), source, None


def _contradicted(given: float, found: tuple[float, ...] | None) -> Mpp | None:
    """Return the file's microns per pixel if they are plausible and more than 10 % off those given."""
    if found is None or not all(MPP_RANGE[0] <= own <= MPP_RANGE[1] for own in found):
        return None
    return Mpp(*found) if max(max(given / own, own / given) for own in found) > _CONTRADICTION else None


def refuse_turned(path: str, page: tifffile.TiffPage) -> None:
    """Refuse a TIFF with an Orientation other than 1: OpenSlide flips each tile alone, tiffslide ignores the tag."""
    orientation = page.tags.valueof("Orientation", 1)
    if orientation not in (0, 1):
        shown = int(orientation) if isinstance(orientation, int) else repr(orientation)[:40]
        raise SlideUnreadable(path, f"has TIFF orientation {shown}", "Rewrite it with orientation 1 (top left)")


def compose_on_white(rgba: U8) -> U8:
    """Compose straight-alpha RGBA (h, w, 4) on white, rounded to nearest: uint8 (h, w, 3)."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    a = alpha.astype(np.uint16)
    return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def extent(there: npt.NDArray[np.bool_], tile_px: tuple[int, int], size: tuple[int, int]) -> Box:
    """Return the bounding box of the tiles that are stored, bool (rows, columns), as OpenSlide and QuPath have it."""
    whole = Box(0, 0, *size)
    if there.all() or not there.any():
        return whole
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    (w, h), (x, y) = tile_px, (int(columns[0]), int(rows[0]))
    return Box(x * w, y * h, (int(columns[-1]) + 1 - x) * w, (int(rows[-1]) + 1 - y) * h).intersect(whole)
