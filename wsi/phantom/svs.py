"""The file of a phantom: an Aperio-like pyramid, written by rows of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import imagecodecs
import numpy as np
import tifffile

from wsi import native
from wsi.phantom.scene import U8, PhantomConfig, Scene

_STEP = 4  # between two levels of the pyramid
_MAKER = "Aperio Image Library (wsi phantom)"  # readers recognise the first word


class _Encoder:
    """Encodes JPEG tiles without the tables, which they share."""

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
        """Encode a tile, uint8 (side, side, 3), or None for one of glass."""
        if tile is None:
            return self._glass
        jpeg = self._jpeg(tile)
        if not jpeg.startswith(self._head):
            raise RuntimeError("the JPEG encoder gave two tiles different tables")
        return self._frame + jpeg[len(self._head) :]

    def _jpeg(self, tile: U8) -> bytes:
        return bytes(imagecodecs.jpeg8_encode(tile, self._quality, subsampling=(2, 2)))


class _Level:
    """A level above the first. Its row of tiles is filled from below, encoded, spooled, and averaged upwards."""

    def __init__(self, sizes: list[tuple[int, int]], glass: U8, encoder: _Encoder, side: int, spool: IO[bytes]) -> None:
        self.size = sizes[0]
        self.above = _Level(sizes[1:], glass, encoder, side, spool) if len(sizes) > 1 else None
        self.rows: list[U8] = []  # pixels, for the coarsest level only
        self._glass, self._encoder, self._side, self._spool = glass, encoder, side, spool
        self._spans: list[tuple[int, int]] = []  # start and length of each tile in the spool
        self._row = np.tile(glass, (side, -(-self.size[0] // side) * side, 1))

    def put(self, column: int, row: int, tile: U8) -> None:
        """Store the average of a tile of the level below."""
        quarter = self._side // _STEP
        x, y = column * quarter, row % _STEP * quarter
        edges = np.arange(quarter + 1, dtype=np.int64) * (_STEP << native.FIXED_POINT_BITS)
        native.area_average(tile, edges, edges, self._row[y : y + quarter, x : x + quarter])

    def end_row(self, row: int, *, last: bool) -> None:
        """Finish this level's row once the level below has completed its tiles."""
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


def write_svs(path: Path, spool: IO[bytes], scene: Scene, config: PhantomConfig) -> None:
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
                if column == columns - 1:  # before the last yield, which may not be resumed
                    level.end_row(row, last=row == rows - 1)
                yield encoder.encode(tile)

    full = f"{config.size[0]}x{config.size[1]}"
    notes = f"({side}x{side}) JPEG/YCC Q={config.quality}|AppMag = {10 / config.mpp:g}|MPP = {config.mpp:g}"
    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "subsampling": (2, 2), "metadata": None}
    options |= {"software": False, "resolution": (1e4 / config.mpp,) * 2, "resolutionunit": "centimeter"}
    tiled = options | {"dtype": np.uint8, "tile": (side, side), "jpegtables": encoder.tables}
    # Up to 10^9 pixels the JPEG tiles stay far below the 4 GiB of a classic TIFF.
    with tifffile.TiffWriter(path, bigtiff=config.size[0] * config.size[1] > 1e9) as tiff:
        tiff.write(tiles(), shape=(*config.size[::-1], 3), description=f"{_MAKER}\r\n{full} {notes}", **tiled)
        levels = [level]
        while levels[-1].above:
            levels.append(levels[-1].above)
        # Aperio's second page is a thumbnail in strips, and readers expect it there.
        w, h = levels[-1].size
        every = -(-max(w, h) // 1024)
        thumbnail = np.concatenate(levels[-1].rows)[:h:every, :w:every]
        tiff.write(thumbnail, description=f"{_MAKER}\r\nthumbnail of {full}", rowsperstrip=16, **options)
        for each in levels:
            (w, h), shape = each.size, (*each.size[::-1], 3)
            tiff.write(each.tiles(), shape=shape, description=f"{_MAKER}\r\n{full} -> {w}x{h} {notes}", **tiled)
