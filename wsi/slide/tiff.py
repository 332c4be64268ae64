"""Our own reader of tiled TIFF pyramids: gives stored tiles decoded, reduced while decoding, or undecoded.

Supports generic TIFF (such as CAMELYON's, written by ASAP), Aperio SVS, Philips TIFF and OME-TIFF with SubIFDs. It
refuses everything else with ``UnknownFormat``, and ``open_slide`` then tries OpenSlide.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import defusedxml.ElementTree
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

import wsi.slide.lzw  # noqa: F401  LZW is checked before tifffile decodes it
from wsi.errors import NotRgb, SlideError, SlideUnreadable, UnknownFormat, brief
from wsi.slide.base import U8, GivenMpp, Slide, extent, resolve_mpp
from wsi.slide.cells import put
from wsi.slide.source import Source
from wsi.slide.tiffcheck import check_tiff
from wsi.units import Box

_ELSEWHERE = "Convert it to a pyramidal TIFF"
_AGAIN = "Copy it from the source again"

#: TIFF compressions that tifffile decodes for us, bit for bit as OpenSlide: none, LZW, Deflate, ZSTD, JPEG 2000 of RGB.
_LOSSLESS = {1, 5, 8, 32946, 50000}
_JPEG2000 = {33005, 34712}
_JPEG = 7
_RGB, _YCBCR, _GREY = 2, 6, 1
_MICRONS = ("\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "um")

#: By how much libjpeg may reduce while decoding, by chroma subsampling: where the PSNR against the area average is over
#: 45 dB on H&E. 4:2:2 loses chroma rows from 1/4 on.
_SHRINKS = {"420": (8, 4, 2), "444": (8, 4, 2), "Gray": (8, 4, 2), "422": (2,)}
#: Decoded tiles held at once while a region is assembled.
_AT_ONCE_BYTES = 1 << 26
#: Limit on a JPEG's scans: encoders write ten at most, and each costs the decoder a pass over all pixels.
MAX_SCANS = 64
#: Adobe's APP14 marker: the components are RGB, not YCbCr. Aperio omits it.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"

#: What an Orientation (TIFF 6.0, tag 274) does: swap the axes, flip vertically, flip horizontally.
_TURNS = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


@dataclass(frozen=True)
class _Level:
    size: tuple[int, int]
    tile_px: tuple[int, int]
    offsets: npt.NDArray[np.int64]  # of each tile, row by row
    counts: npt.NDArray[np.int64]  # bytes of each tile; 0 if it is not stored
    columns: int
    codec: _Jpeg | _Other


class TiffReader(Slide):
    """A tiled TIFF pyramid."""

    reader = "tiff"

    def __init__(self, path: str, given: GivenMpp | None = None, decode: str = "auto") -> None:
        self.path = path
        self.decode = decode
        self._given = given
        self._source = Source(path)
        try:
            check_tiff(self._source.read, self._source.size, path)
            with self._source.open() as stream, tifffile.TiffFile(stream) as tiff:
                self._describe(tiff)
        except SlideError:
            self._source.close()
            raise
        except Exception as error:  # on a damaged file tifffile may raise anything
            self._source.close()
            raise UnknownFormat(path, f"is not a TIFF that can be read ({brief(error)})", _ELSEWHERE) from error

    def _describe(self, tiff: tifffile.TiffFile) -> None:
        first = tiff.pages.first
        self.vendor, found, source = _vendor(tiff)
        pages = _level_pages(self.path, tiff, self.vendor)
        if pages is None:
            raise UnknownFormat(self.path, "is no tiled TIFF pyramid that this reader is sure of", _ELSEWHERE)
        self._levels = tuple(_level(self.path, page, self._source) for page in pages)
        self._downsamples: list[int] | None = None
        if self.vendor == "philips":  # levels are stored padded to whole tiles; the description gives their sizes
            self._downsamples = _philips(first.description)[1]
            w, h = self._levels[0].size
            sizes = [(w // n, h // n) for n in self._downsamples if 1 <= n <= min(w, h)]
            stored = [level.size for level in self._levels]
            if len(sizes) != len(stored) or any(a > c or b > d for (a, b), (c, d) in zip(sizes, stored, strict=True)):
                raise UnknownFormat(self.path, "describes other levels than it holds", _ELSEWHERE)
            self._levels = tuple(replace(level, size=size) for level, size in zip(self._levels, sizes, strict=True))
        orientations = {int(page.tags.valueof("Orientation", 1)) or 1 for page in pages}
        orientation = orientations.pop()
        if orientations or orientation not in _TURNS:
            shown = " and ".join(map(str, sorted(orientations | {orientation})))
            raise SlideUnreadable(self.path, f"has TIFF orientation {shown}", "Rewrite it with orientation 1")
        self._turn = _TURNS[orientation]
        swap = self._turn[0]
        self.level_sizes = tuple((h, w) if swap else (w, h) for w, h in (level.size for level in self._levels))
        if self.vendor == "aperio" and any((level.counts == 0).any() for level in self._levels):
            raise UnknownFormat(self.path, "is an Aperio file with missing tiles", _ELSEWHERE)
        self.mpp, self.mpp_source, self.overridden = resolve_mpp(self.path, self._given, found, source)
        level, self.bounds = self._levels[0], Box(0, 0, *self.size)
        if not any(self._turn):
            self.bounds = extent((level.counts > 0).reshape(-1, level.columns), level.tile_px, self.size)

    def scale(self, level: int) -> tuple[float, float]:
        """Return pixels of a level per level-0 pixel: Philips's exact downsamples, else by the sizes."""
        if self._downsamples is None:
            return super().scale(level)
        return 1 / self._downsamples[level], 1 / self._downsamples[level]

    def shrinks(self, level: int) -> Sequence[int]:
        """Return the reductions that the level's codec supports; none if full decoding was asked for."""
        return () if self.decode == "full" else self._levels[level].codec.shrinks

    def tile_px(self, level: int) -> tuple[int, int] | None:
        """Return width and height of the level's tiles; None if the slide is turned."""
        return None if any(self._turn) else self._levels[level].tile_px

    def read_tiles(
        self, level: int, shrink: int, tiles: Sequence[tuple[int, int]], out: Sequence[U8]
    ) -> list[str | None]:
        stored = self._levels[level]
        numbers, counts, blobs = self._blobs(level, tiles)
        problems: list[str | None] = []
        with self.spent("decode"):
            for number, count, data, target in zip(numbers, counts, blobs, out, strict=True):
                problem = None
                if count == 0:
                    target[...] = 255
                elif len(data) < count:
                    problem = "the file ends before the tile does"
                else:
                    try:
                        stored.codec.decode(data, number, shrink, target)
                    except Exception as error:  # noqa: BLE001  every codec has errors of its own
                        problem = brief(error)
                if problem is not None:
                    target[...] = 255
                problems.append(problem)
        return problems

    def holds_jpeg(self, level: int) -> bool:
        return isinstance(self._levels[level].codec, _Jpeg) and not any(self._turn)

    def jpeg_tiles(self, level: int, tiles: Sequence[tuple[int, int]]) -> list[bytes | None]:
        stored = self._levels[level]
        if not isinstance(stored.codec, _Jpeg):
            raise SlideUnreadable(self.path, f"level {level} is not stored as JPEG", "Keep its pixels as zstd or jpeg")
        streams: list[bytes | None] = []
        for count, data in zip(*self._blobs(level, tiles)[1:], strict=True):
            whole = bytes(data).rstrip(b"\0")  # some writers pad tiles
            is_whole = 0 < count == len(data) and whole.startswith(b"\xff\xd8") and whole.endswith(b"\xff\xd9")
            streams.append(stored.codec.stream(memoryview(whole)) if is_whole else None)
        return streams

    def _blobs(self, level: int, tiles: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], list[memoryview]]:
        """Read stored tiles: return their indices, the lengths that they should have, and their bytes."""
        stored = self._levels[level]
        numbers = [row * stored.columns + column for column, row in tiles]
        offsets, counts = stored.offsets[numbers].tolist(), stored.counts[numbers].tolist()
        try:
            with self.spent("read"):
                return numbers, counts, self._source.ranges(offsets, counts)
        except OSError as error:
            raise SlideUnreadable(self.path, f"cannot be read ({error})", "Try again, or copy it nearer") from error

    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> U8:
        region, problems = self._assemble(level, shrink, x, y, w, h)
        if problems:
            (column, row), why = next(iter(problems.items()))
            at = f"x {column * self._levels[level].tile_px[0]}, y {row * self._levels[level].tile_px[1]}"
            raise SlideUnreadable(self.path, f"is damaged at level {level}, {at} ({why})", _AGAIN)
        return region

    def _read_sound(
        self, level: int, shrink: int, x: int, y: int, w: int, h: int
    ) -> tuple[U8, list[tuple[int, int, int, int]]]:
        region, problems = self._assemble(level, shrink, x, y, w, h)
        if problems and any(self._turn):
            return region, [(x, y, w, h)]
        tile_w, tile_h = (side // shrink for side in self._levels[level].tile_px)
        return region, [(column * tile_w, row * tile_h, tile_w, tile_h) for column, row in problems]

    def _assemble(
        self, level: int, shrink: int, x: int, y: int, w: int, h: int
    ) -> tuple[U8, dict[tuple[int, int], str]]:
        """Assemble a region from stored tiles, white where one is damaged; return why, by (column, row)."""
        swap, flip_y, flip_x = self._turn
        shown_w, shown_h = (side // shrink for side in self.level_sizes[level])
        if flip_x:
            x = shown_w - x - w
        if flip_y:
            y = shown_h - y - h
        if swap:
            x, y, w, h = y, x, h, w
        tile_w, tile_h = (side // shrink for side in self._levels[level].tile_px)
        columns, rows = range(x // tile_w, -(-(x + w) // tile_w)), range(y // tile_h, -(-(y + h) // tile_h))
        region, damaged = np.empty((h, w, 3), np.uint8), dict[tuple[int, int], str]()
        at_once = max(1, _AT_ONCE_BYTES // (tile_w * tile_h * 3))
        runs = [(columns[i : i + at_once], row) for row in rows for i in range(0, len(columns), at_once)]
        for run, row in runs:
            decoded = np.empty((len(run), tile_h, tile_w, 3), np.uint8)
            problems = self.read_tiles(level, shrink, [(column, row) for column in run], list(decoded))
            for column, tile, problem in zip(run, decoded, problems, strict=True):
                if problem is not None:
                    damaged[column, row] = problem
                put(tile, column * tile_w, row * tile_h, region, x, y)
        region = region.swapaxes(0, 1) if swap else region
        return np.ascontiguousarray(region[:: -1 if flip_y else 1, :: -1 if flip_x else 1]), damaged

    def close(self) -> None:
        self._source.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.path, self._given, self.decode)


class _Jpeg:
    """JPEG tiles with tables that a level's tiles share (TIFF Technical Note 2)."""

    def __init__(self, tables: bytes | None, colours: str, tile_px: tuple[int, int], shrinks: tuple[int, ...]) -> None:
        self.shrinks = shrinks
        self._expected = (tile_px[1], tile_px[0], colours)
        self._head = jpeg_head(tables, colours)
        self._known = b"\0"  # header of the last checked tile: the right size and colours, and a single scan

    def stream(self, data: memoryview) -> bytes:
        """Join the shared tables and a tile to a complete JPEG stream."""
        if data[:2].tobytes() != b"\xff\xd8":
            raise ValueError("is not JPEG")
        return b"".join((self._head, data[2:]))

    def decode(self, data: memoryview, tile: int, shrink: int, out: U8) -> None:
        """Decode a tile into uint8 (height / shrink, width / shrink, 3); raises anything if it is damaged."""
        stream = self.stream(data)
        height, width, _ = self._expected
        if not stream.startswith(self._known):  # tiles mostly share a header, and a check costs a tenth of decoding
            if stream.count(b"\xff\xda") > MAX_SCANS:
                raise ValueError(f"is a JPEG of more than {MAX_SCANS} scans")
            found = simplejpeg.decode_jpeg_header(stream)[:3]
            if found != self._expected:
                raise ValueError(f"is a JPEG of {found[1]} x {found[0]} px in {found[2]}")
            self._known = _one_scan(stream) or b"\0"
        target = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
        simplejpeg.decode_jpeg(
            stream, min_height=height // shrink, min_width=width // shrink, min_factor=shrink, buffer=target
        )
        if target is not out:
            out[...] = target


def _one_scan(stream: bytes) -> bytes | None:
    """Return the header of a baseline JPEG whose first scan has all components, else None.

    libjpeg refuses a further scan after such a one, so every stream with this header takes a single pass.
    """
    place = 2
    components = None
    while len(stream) >= place + 4 and stream[place] == 0xFF:
        kind, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4], "big")
        if kind in (0xC0, 0xC1) and components is None:
            components = stream[place + 9]
        elif kind == 0xDA:
            return stream[: place + 2 + length] if stream[place + 4] == components else None
        elif not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
            return None  # progressive, arithmetic or another rare kind
        place += 2 + length
    return None


class _Other:
    """Tiles that tifffile decodes, always in full."""

    shrinks: tuple[int, ...] = ()

    def __init__(self, page: tifffile.TiffPage) -> None:
        self._decode = page.decode
        self._shape = page.tilelength, page.tilewidth
        self._samples = page.samplesperpixel
        self._is_jpeg2000 = int(page.compression) in _JPEG2000
        self._raw_bytes = page.tilelength * page.tilewidth * page.samplesperpixel if page.compression == 1 else 0

    def decode(self, data: memoryview, tile: int, shrink: int, out: U8) -> None:
        if len(data) < self._raw_bytes:
            raise ValueError(f"holds {len(data)} bytes, not {self._raw_bytes}")
        if self._is_jpeg2000 and _jpeg2000_shape(bytes(data)) != (*self._shape, self._samples):
            raise ValueError("is a JPEG 2000 picture of another size")
        pixels = self._decode(bytes(data), tile, _fullsize=True)[0]
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape[-3:-1] != self._shape:
            raise ValueError("decodes to another size")
        out[...] = pixels.reshape(*self._shape, -1)  # grey becomes three equal channels


def _jpeg2000_shape(data: bytes) -> tuple[int, int, int] | None:
    """Return the height, width and components that a JPEG 2000 image declares, to be checked before it is decoded.

    A codestream begins with SOC and SIZ (ISO/IEC 15444-1, A.5.1); in a JP2 file it is the first box "jp2c" (annex I).
    """
    at = 0
    if data[:4] != b"\xff\x4f\xff\x51":
        while data[at + 4 : at + 8] != b"jp2c":
            length = int.from_bytes(data[at : at + 4], "big")
            if length < 8 or at + length >= len(data):
                return None
            at += length
        at += 16 if data[at : at + 4] == b"\0\0\0\1" else 8
    if data[at : at + 4] != b"\xff\x4f\xff\x51" or len(data) < at + 42:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    return bottom - top, right - left, int.from_bytes(data[at + 40 : at + 42], "big")


def jpeg_head(tables: bytes | None, colours: str) -> bytes:
    """Return what precedes a tile's own data: start of image, Adobe's marker if it is RGB, and the shared tables."""
    adobe = _ADOBE_RGB if colours == "RGB" else b""
    return b"\xff\xd8" + adobe + (bytes(tables)[2:-2] if tables else b"")


def _level(path: str, page: tifffile.TiffPage, source: Source) -> _Level:
    size, tile_px = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
    offsets, counts = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
    columns = -(-size[0] // tile_px[0])
    n_tiles = columns * -(-size[1] // tile_px[1])
    if min(*size, *tile_px) < 1 or len(offsets) != n_tiles or len(counts) != n_tiles:
        raise SlideUnreadable(path, f"lists {len(offsets)} of {n_tiles} tiles of a level", _AGAIN)
    padded_px = n_tiles * tile_px[0] * tile_px[1]
    if padded_px > max(16 * size[0] * size[1], 1 << 26):  # one row of pixels in tall tiles would take minutes
        raise SlideUnreadable(path, f"stores {size[0]} x {size[1]} px in tiles of {padded_px} px in all", _ELSEWHERE)
    counts[offsets == 0] = 0
    if page.compression != _JPEG:
        return _Level(size, tile_px, offsets, counts, columns, _Other(page))
    colours = {_RGB: "RGB", _YCBCR: "YCbCr", _GREY: "Gray"}[int(page.photometric)]
    shrinks: tuple[int, ...] = ()
    there = np.flatnonzero(counts)
    if len(there):  # its first tile shows the chroma subsampling, and whether colours are as the tags say
        data = source.read(int(offsets[there[0]]), int(counts[there[0]]))
        try:
            stream = jpeg_head(page.jpegtables, colours) + data[2:]
            _, _, found, subsampling = simplejpeg.decode_jpeg_header(stream, strict=False)
        except ValueError as error:
            raise UnknownFormat(path, f"holds JPEG tiles of another kind ({error})", _ELSEWHERE) from error
        if found != colours:
            raise UnknownFormat(path, f"says {colours}, and its JPEG tiles are {found}", _ELSEWHERE)
        known = _SHRINKS.get("Gray" if found == "Gray" else subsampling, ())
        shrinks = tuple(n for n in known if tile_px[0] % n == tile_px[1] % n == 0)
    return _Level(size, tile_px, offsets, counts, columns, _Jpeg(page.jpegtables, colours, tile_px, shrinks))


def _vendor(tiff: tifffile.TiffFile) -> tuple[str, tuple[float, float] | None, str]:
    """Return the format's name, its microns per pixel, and where these stand."""
    first = tiff.pages.first
    text = first.description or ""
    if tiff.is_svs:
        found = re.search(r"\|\s*MPP\s*=\s*([0-9.,eE+-]+)", text)
        mpp = float(found[1].replace(",", ".")) if found else None  # a decimal comma, by the scanner's locale
        return "aperio", None if mpp is None else (mpp, mpp), "vendor:aperio"
    if tiff.is_philips:
        return "philips", _philips(text)[0], "vendor:philips"
    if tiff.is_ome:
        ome, axes = _ome_pixels(text), ("PhysicalSizeX", "PhysicalSizeY")
        size = [ome[axis] for axis in axes if axis in ome and ome.get(f"{axis}Unit", "um") in _MICRONS]
        return "ome-tiff", (float(size[0]), float(size[1])) if len(size) == 2 else None, "vendor:ome-tiff"
    return "generic-tiff", _tag_mpp(first), "tiff-tags"


def _ome_pixels(text: str) -> dict[str, str]:
    """Return the OME-XML attributes of the image in the file's first page; the XML lists images in any order."""
    for pixels in defusedxml.ElementTree.fromstring(text.strip()).iter():
        if pixels.tag.rpartition("}")[2] == "Pixels":
            pages = [int(data.get("IFD", 0)) for data in pixels if data.tag.endswith("TiffData")]
            if 0 in pages or not pages:
                return dict(pixels.attrib)
    return {}


def _philips(text: str) -> tuple[tuple[float, float] | None, list[int]]:
    """Return microns per pixel, and each level's integer downsample, from the description of a Philips TIFF."""

    def spacing_mm(element: Any) -> tuple[float, float] | None:
        numbers = re.findall(r"[0-9.eE+-]+", element.text or "")
        return (float(numbers[1]), float(numbers[0])) if len(numbers) == 2 else None  # rows come first

    root = defusedxml.ElementTree.fromstring(text)
    spacing = "Attribute[@Name='DICOM_PIXEL_SPACING']"
    of_level = (
        "./Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject/"
        f"Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array/DataObject/{spacing}"
    )
    whole = [spacing_mm(element) for element in root.findall(f"./{spacing}")]
    levels = [spacing_mm(element) for element in root.findall(of_level)]
    mpp = (whole[0][0] * 1000, whole[0][1] * 1000) if whole and whole[0] else None
    if not levels or any(level is None for level in levels):
        return mpp, []
    first = levels[0] or (0.0, 0.0)
    return mpp, [round((level[0] / first[0] + level[1] / first[1]) / 2) for level in levels if level]


def _tag_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Return microns per pixel by the resolution tags (TIFF 6.0): per inch unless the unit is centimetre or none."""
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof("ResolutionUnit", 2)))
    values = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if unit is None or any(not isinstance(v, tuple) or len(v) != 2 or 0 in v for v in values):
        return None
    x, y = (unit * v[1] / v[0] for v in values)
    return x, y


def _level_pages(path: str, tiff: tifffile.TiffFile, vendor: str) -> list[tifffile.TiffPage] | None:
    """Return the pages that make up the pyramid, largest first; None if that is uncertain."""
    first = tiff.pages.first
    others: list[Any] = list(tiff.pages[1:])
    if {"ndpi", "bif", "scn", "qpi", "indica", "argos", "ventana"} & {flag.lower() for flag in tiff.flags}:
        return None
    if vendor == "ome-tiff":
        # Not by tifffile's series, which may open other files that the XML names.
        ome = _ome_pixels(first.description)
        if int(ome.get("SizeZ", 1)) > 1 or int(ome.get("SizeT", 1)) > 1:
            return None
        if int(ome.get("SizeC", 1)) > first.samplesperpixel:
            what = f"holds {ome['SizeC']} channels in pages of their own, not RGB pixels"
            raise NotRgb(path, what, "Export a brightfield RGB image")
        pages = [first, *((first.pages or []) if first.subifds else [])]
    elif vendor in ("generic-tiff", "philips"):
        own = itertools.takewhile(lambda page: not page.is_tiled or page.subfiletype, others)  # up to the next image
        pages = [first, *(page for page in own if page.is_tiled and page.subfiletype & 1)]
        if str(first.tags.valueof("Software", "")).startswith(("MedScan", "Huron")) or first.subifds:
            return None
    else:  # label and macro have subfile types of their own, and thumbnails are not tiled
        pages = [first, *(page for page in others if page.is_tiled and page.subfiletype not in (1, 9))]
    widths = [page.imagewidth for page in pages]
    same_shape = all(
        abs(page.imagewidth / first.imagewidth / (page.imagelength / first.imagelength) - 1) < 0.05
        or min(page.imagewidth, page.imagelength) < 256
        for page in pages
    )
    if vendor != "philips" and (widths != sorted(set(widths), reverse=True) or not same_shape):
        return None
    return pages if all(_is_plain(page) for page in pages) else None


def _is_plain(page: tifffile.TiffPage) -> bool:
    """Whether a page is tiled and 8-bit grey or RGB, in a compression that we support."""
    colours = {_JPEG: {_RGB, _YCBCR, _GREY}}.get(int(page.compression), {_RGB, _GREY})
    return (
        page.is_tiled
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and page.samplesperpixel == (1 if page.photometric == _GREY else 3)
        and page.planarconfig == 1
        and int(page.photometric) in colours
        and int(page.compression) in {_JPEG, *_LOSSLESS, *_JPEG2000}
        and not page.is_volumetric
    )
