"""Check a TIFF's structure before any library reads it, so that false sizes cannot make it allocate much memory.

Reads only the header, the image file directories (IFDs), and the offsets and lengths of the tiles. A file that passes
may still hold damaged tiles: decoders detect these, and the size of their output is limited here.

Sources: TIFF 6.0 (1992), sections 2 and 15; the BigTIFF design note; Adobe TIFF Technical Note 1 (SubIFDs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from wsi.errors import SlideUnreadable, UnknownFormat
from wsi.slide.omecheck import check_ome

MAX_IFDS = 1024
MAX_TAGS = 4096  #: of one IFD
MAX_VALUE_BYTES = 1 << 26  #: of one tag
MAX_DESCRIPTION_BYTES = 1 << 24
MAX_TILE_PX = 16384  #: a side
MAX_TILE_BYTES = 1 << 26  #: of a tile or strip, decoded; twice that as stored
#: Of a file. 1 << 23 numbers are the offsets and lengths of 4 million tiles: 524,288 px square in tiles of 256.
MAX_IN_ALL = {"tags": 1 << 16, "bytes of tags": 1 << 28, "numbers in tags": 1 << 23, "pixels": 1 << 40}

_BLOCK = 1 << 16  # bytes per read: an IFD's values mostly lie near it, and a remote read is slow
_TYPE_BYTES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 2, 8, 8, 8, 8, 0])  # by type; 0: unknown
_WHOLE = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}  # by type

_WIDTH, _HEIGHT, _DEPTH, _BITS, _SAMPLES, _PLANAR, _DESCRIPTION = 256, 257, 32997, 258, 277, 284, 270
_TILE_WIDTH, _TILE_HEIGHT, _TILE_DEPTH, _ROWS_PER_STRIP, _SUB_IFDS, _NDPI = 322, 323, 32998, 278, 330, 65420
_OFFSETS, _LENGTHS = (324, 273), (325, 279)  # of tiles, of strips; readers accept either for both
_ONCE = {_WIDTH, _HEIGHT, _DEPTH, _BITS, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_DEPTH,
         _SUB_IFDS, *_OFFSETS, *_LENGTHS}  # fmt: skip

_AGAIN = "Copy it from the source again: it is damaged or was cut short"
_CONVERT = "Convert it to a tiled pyramidal TIFF"


def check_tiff(read_at: Callable[[int, int], bytes], size: int, where: str) -> None:
    """Refuse a TIFF of `size` bytes whose structure is damaged or declares more than a slide can need.

    ``read_at(offset, length)`` reads from the file, and returns fewer bytes where it ends.

    Raises UnknownFormat if it is not a TIFF, or longer than a TIFF's offsets reach (NDPI extends them in its own way);
    and SlideUnreadable if IFDs form a loop, if IFDs, values or tiles lie outside the file, if an image has too few
    tiles, or if a ``MAX_...`` of this module is exceeded. Images in strips after the first are thumbnails and may be of
    any size.

    Examples
    --------
    >>> import io, tifffile, numpy as np
    >>> file = io.BytesIO()
    >>> tifffile.imwrite(file, np.zeros((64, 64, 3), np.uint8), tile=(32, 32), photometric="rgb")
    >>> data = file.getvalue()
    >>> check_tiff(lambda offset, length: data[offset : offset + length], len(data), "a.tif")
    >>> check_tiff(lambda offset, length: data[offset : offset + length], 9999, "a.tif")
    Traceback (most recent call last):
    wsi.errors.SlideUnreadable: a.tif: IFD 0 has tiles outside the file's 9999 bytes. Copy it from the source again: it
    is damaged or was cut short
    """
    file = _File(read_at, size, where)
    seen: set[int] = set()
    chained, subs, chain_px, description = file.first, list[int](), list[int](), b""
    while chained or subs:
        is_sub = bool(subs)
        offset = subs.pop() if is_sub else chained
        if offset in seen:
            raise file.refuse(f"has a loop: IFD {len(seen)} at byte {offset} was met before")
        if len(seen) == MAX_IFDS:
            raise file.refuse(f"has more than {MAX_IFDS} IFDs", _CONVERT)
        ifd = _Ifd(file, offset, f"IFD {len(seen)}")
        seen.add(offset)
        px = _check_image(ifd, is_level=is_sub or len(seen) == 1)
        if not is_sub:  # SubIFDs are listed, not chained: their `next` is meaningless
            chained = ifd.next
            chain_px.append(px)
        if len(seen) == 1:
            description = ifd.raw(_DESCRIPTION)
        if _SUB_IFDS in ifd.tags:
            subs += ifd.numbers(_SUB_IFDS)[MAX_IFDS::-1].tolist()
    if len(description) > MAX_DESCRIPTION_BYTES:
        what = f"has a description of {len(description)} bytes, more than {MAX_DESCRIPTION_BYTES}"
        raise file.refuse(what, "Write it again with fewer annotations in it")
    if b"OME>" in description:
        check_ome(description, chain_px, where)


class _File:
    """The file's bytes, read in blocks, and the running totals of what it declares."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, where: str) -> None:
        self.read_at, self.size, self.where = read_at, size, where
        self.used = dict.fromkeys(MAX_IN_ALL, 0)
        self.block = lru_cache(8)(lambda i: read_at(i * _BLOCK, min(_BLOCK, size - i * _BLOCK)))
        header = self.read(0, 8, "the header")
        if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise UnknownFormat(where, f"is not a TIFF: it begins with the bytes {header[:4].hex(' ')}", _CONVERT)
        self.order, self.big = "<" if header[:2] == b"II" else ">", b"+" in header[:4]
        if size >> 32 and not self.big:
            raise UnknownFormat(where, "is no BigTIFF and beyond 4 GiB, as an NDPI can be", "Read it through OpenSlide")
        if self.big and header[4:] not in (b"\x08\0\0\0", b"\0\x08\0\0"):
            raise self.refuse("has a BigTIFF header that does not say 8-byte offsets")
        self.first = self.whole(self.read(8, 8, "the header") if self.big else header[4:])
        if not self.first:
            raise self.refuse("has no image")

    def refuse(self, what: str, remedy: str = _AGAIN) -> SlideUnreadable:
        return SlideUnreadable(self.where, what, remedy)

    def use(self, what: str, n: int) -> None:
        """Add to a total of ``MAX_IN_ALL``; raise if it exceeds its limit."""
        self.used[what] += n
        if self.used[what] > MAX_IN_ALL[what]:
            raise self.refuse(f"declares {self.used[what]} {what}, more than {MAX_IN_ALL[what]}", _CONVERT)

    def whole(self, raw: bytes) -> int:
        return int.from_bytes(raw, "little" if self.order == "<" else "big")

    def read(self, offset: int, length: int, what: str) -> bytes:
        first, last = offset // _BLOCK, (offset + length - 1) // _BLOCK
        if offset + length > self.size:
            data = b""
        elif last > first + 1:
            data = self.read_at(offset, length)
        else:
            data = b"".join(map(self.block, range(first, last + 1)))[offset - first * _BLOCK :][:length]
        if len(data) < length:
            raise self.refuse(f"ends at byte {self.size}, and {what} at byte {offset + length}")
        return data


class _Ifd:
    """One IFD: its tags as (type, count, offset of the value), and the offset of the next IFD (0: none)."""

    def __init__(self, file: _File, offset: int, name: str) -> None:
        self.file, self.name = file, name
        head, wide = (8, 8) if file.big else (2, 4)
        n = file.whole(file.read(offset, head, name))
        if n > MAX_TAGS:
            raise self.refuse(f"has {n} tags, more than {MAX_TAGS}", _CONVERT)
        file.use("tags", n)
        o, number = file.order, f"{file.order}u{wide}"
        layout = np.dtype([("code", o + "u2"), ("type", o + "u2"), ("count", number), ("value", number)])
        raw = file.read(offset + head, n * layout.itemsize + wide, name)
        self.next = file.whole(raw[n * layout.itemsize :])
        entries = np.frombuffer(raw, layout, n)
        sizes = _TYPE_BYTES[np.minimum(entries["type"], 19)]
        lengths = entries["count"].astype(float) * sizes
        self.tags: dict[int, tuple[int, int, int]] = {}
        for i, ((code, kind, count, value), length) in enumerate(zip(entries.tolist(), lengths, strict=True)):
            if code in self.tags and code in _ONCE:
                raise self.refuse(f"has tag {code} twice")
            if length > MAX_VALUE_BYTES:
                raise self.refuse(f"has {length:.0f} bytes in tag {code}, more than {MAX_VALUE_BYTES}", _CONVERT)
            if length > wide and not 8 <= value <= file.size - length:
                raise self.refuse(f"has tag {code} outside the file's {file.size} bytes")
            here = offset + head + (i + 1) * layout.itemsize - wide
            if kind < len(_TYPE_BYTES) and _TYPE_BYTES[kind]:
                self.tags.setdefault(code, (kind, count, value if length > wide else here))
            elif code in _ONCE:
                raise self.refuse(f"has tag {code} of the unknown type {kind}")
        file.use("bytes of tags", int(lengths.sum()))
        file.use("numbers in tags", int(entries["count"][sizes > 1].sum(dtype=float)))

    def refuse(self, what: str, remedy: str = _AGAIN) -> SlideUnreadable:
        return self.file.refuse(f"{self.name} {what}", remedy)

    def numbers(self, code: int) -> npt.NDArray[np.integer]:
        """Return the integers of a tag, at least one."""
        kind, count, _ = self.tags.get(code, (0, 0, 0))
        if kind not in _WHOLE or not count:
            raise self.refuse(f"has no whole numbers in tag {code} (type {kind}, {count} values)")
        if _TYPE_BYTES[kind] == 1:  # wider types have been counted already
            self.file.use("numbers in tags", count)
        return np.frombuffer(self.raw(code), self.file.order + _WHOLE[kind])

    def raw(self, code: int) -> bytes:
        """Return the bytes of a tag, empty if there is no such tag."""
        kind, count, place = self.tags.get(code, (0, 0, 0))
        return self.file.read(place, count * int(_TYPE_BYTES[kind]), f"tag {code}") if count else b""

    def number(self, code: int, default: int | None = None) -> int:
        """Return the single integer of a tag, which must be positive."""
        if code not in self.tags and default is not None:
            return default
        values = self.numbers(code)
        if len(values) != 1 or values[0] < 1:
            raise self.refuse(f"has {values[:3].tolist()} in tag {code}, not one positive number")
        return int(values[0])


def _check_image(ifd: _Ifd, *, is_level: bool) -> int:
    """Check one image's sizes and tiles, and return its number of pixels."""
    tiled = not ifd.tags.keys().isdisjoint((_TILE_WIDTH, _TILE_HEIGHT, _OFFSETS[0], _LENGTHS[0]))
    if not (tiled or is_level) and ifd.tags.keys().isdisjoint((_WIDTH, _HEIGHT)):
        return 0  # not an image
    sides = ifd.number(_WIDTH), ifd.number(_HEIGHT), ifd.number(_DEPTH, 1)
    px = math.prod(sides)
    ifd.file.use("pixels", px)
    if not (tiled or is_level):
        return px
    if tiled:
        tile = ifd.number(_TILE_WIDTH), ifd.number(_TILE_HEIGHT), ifd.number(_TILE_DEPTH, 1)
        if max(tile) > MAX_TILE_PX:
            raise ifd.refuse(f"has tiles of {tile[0]} x {tile[1]} px, more than {MAX_TILE_PX} a side", _CONVERT)
    else:
        tile = sides[0], min(ifd.number(_ROWS_PER_STRIP, sides[1]), sides[1]), 1
    samples, planes = ifd.number(_SAMPLES, 1), 1
    if ifd.number(_PLANAR, 1) == 2:
        samples, planes = 1, samples
    bits = int(ifd.numbers(_BITS).max()) if _BITS in ifd.tags else 1
    n_bytes = math.prod(tile) * samples * max(bits, 1) // 8
    long_strip = not tiled and _NDPI in ifd.tags  # NDPI: one strip, cut by restart markers
    if n_bytes > MAX_TILE_BYTES and not long_strip:
        kind = "tiles" if tiled else "strips"
        raise ifd.refuse(f"has {kind} of {n_bytes} bytes when decoded, more than {MAX_TILE_BYTES}", _CONVERT)
    _check_tiles(ifd, planes * math.prod(-(-a // b) for a, b in zip(sides, tile, strict=True)), long_strip=long_strip)
    return px


def _check_tiles(ifd: _Ifd, needed: int, *, long_strip: bool) -> None:
    """Check that an image has at least the tiles it needs, all inside the file."""
    if any(len(ifd.tags.keys() & codes) != 1 for codes in (_OFFSETS, _LENGTHS)):
        raise ifd.refuse("does not say where its tiles are, or says it twice")
    arrays = [ifd.numbers((ifd.tags.keys() & codes).pop()).astype(np.uint64) for codes in (_OFFSETS, _LENGTHS)]
    offsets, lengths = arrays
    if len(offsets) != len(lengths) or len(offsets) < needed:
        raise ifd.refuse(f"has {len(offsets)} places and {len(lengths)} lengths for {needed} tiles")
    size = np.uint64(ifd.file.size)
    held = lengths > 0  # a length of 0: nothing was scanned there
    if (lengths > size).any() or (offsets[held] > size - lengths[held]).any():
        raise ifd.refuse(f"has tiles outside the file's {size} bytes")
    if lengths.max() > 2 * MAX_TILE_BYTES and not long_strip:
        raise ifd.refuse(f"has a tile of {lengths.max()} bytes as stored, more than {2 * MAX_TILE_BYTES}", _CONVERT)
    if lengths.sum() > size:  # tiles may share bytes (tifftools writes such files): each counts once
        total = int(lengths[np.unique(offsets, return_index=True)[1]].sum())
        if total > size:
            raise ifd.refuse(f"has tiles of {total} bytes in all, more than the file's {size}")
