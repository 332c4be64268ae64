"""A tiled JPEG TIFF with the two calls that give its own tiles, for tests and benchmarks; decoded by Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from wsi.errors import SlideUnreadable
from wsi.slide.base import Slide
from wsi.units import Box, Mpp

U8 = npt.NDArray[np.uint8]

#: Says that the three components are RGB and not YCbCr (APP14, transform 0).
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


class JpegTiffSlide(Slide):
    """Every page of the file is a level. A tile without bytes is white; one that is cut short is damage."""

    reader, vendor, mpp_source = "jpeg-tiff", "test", "user"

    def __init__(self, path: str | os.PathLike[str], mpp: float = 0.5) -> None:
        self.path = os.fspath(path)
        with tifffile.TiffFile(self.path) as tiff:
            self._pages = [page for page in tiff.pages if page.is_tiled]
            for page in self._pages:
                _ = page.dataoffsets, page.jpegtables
        self._file = os.open(self.path, os.O_RDONLY)
        self.level_sizes = tuple((page.imagewidth, page.imagelength) for page in self._pages)
        self.mpp = Mpp(mpp, mpp)
        self.bounds = Box(0, 0, *self.size)

    def tile_px(self, level: int) -> tuple[int, int] | None:
        page = self._pages[level]
        return (page.tilewidth, page.tilelength) if page.compression == tifffile.COMPRESSION.JPEG else None

    def jpeg_tiles(self, level: int, columns: Sequence[int], rows: Sequence[int]) -> list[bytes | None]:
        page = self._pages[level]
        across = -(-page.imagewidth // page.tilewidth)
        head = b"\xff\xd8" + (ADOBE_RGB if page.photometric == tifffile.PHOTOMETRIC.RGB else b"")
        head += (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
        streams: list[bytes | None] = []
        for column, row in zip(columns, rows, strict=True):
            i = row * across + column
            tile = os.pread(self._file, page.databytecounts[i], page.dataoffsets[i]) if page.databytecounts[i] else b""
            streams.append(head + tile[2:] if tile.endswith(b"\xff\xd9") else None)
        return streams

    def _read_level(self, level: int, x: int, y: int, w: int, h: int) -> U8:
        page, out = self._pages[level], np.full((h, w, 3), 255, np.uint8)
        side_x, side_y = page.tilewidth, page.tilelength
        across = -(-page.imagewidth // side_x)
        for row in range(y // side_y, -(-(y + h) // side_y)):
            for column in range(x // side_x, -(-(x + w) // side_x)):
                if page.databytecounts[row * across + column] == 0:
                    continue
                stream = self.jpeg_tiles(level, [column], [row])[0]
                if stream is None:
                    raise SlideUnreadable(self.path, f"tile {column}, {row} of level {level} is cut short")
                left, top = column * side_x - x, row * side_y - y
                tile = np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))
                part = tile[max(-top, 0) : h - top, max(-left, 0) : w - left]
                out[max(top, 0) : max(top, 0) + part.shape[0], max(left, 0) : max(left, 0) + part.shape[1]] = part
        return out

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.path, self.mpp.x)


def write_jpeg_pyramid(
    path: Path,
    levels: Sequence[U8],
    *,
    tile: int = 64,
    subsampling: tuple[int, int] = (2, 2),
    rgb: bool = False,
    quality: int = 80,
) -> Path:
    """Write a tiled JPEG pyramid; `rgb` keeps red, green and blue as they are, without an Adobe marker (as Aperio)."""
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            tiff.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": quality, "outcolorspace": "rgb"} if rgb else {"level": quality},
                subsampling=(1, 1) if rgb else subsampling,
                subfiletype=min(i, 1),
                metadata=None,
            )
    return path
