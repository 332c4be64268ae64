"""Slides read through tiffslide: TIFF families, also from fsspec URLs such as ``s3://`` and ``https://``."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile
import tiffslide

import wsi.slide.lzw  # noqa: F401  LZW is checked before tifffile decodes it
from wsi.errors import SlideError, SlideNotFound, SlideUnreadable, brief
from wsi.slide.base import U8, GivenMpp, Slide, compose_on_white, extent, numbers_in, refuse_turned, resolve_mpp
from wsi.slide.tiff import MAX_SCANS, jpeg_head
from wsi.slide.tiffcheck import MAX_TILE_BYTES
from wsi.units import Box

#: TIFF 6.0, tags 262 and 259; Aperio's JPEG 2000 of YCbCr, which tifffile gives unconverted.
_BLACK_IS_ZERO, _RGB, _YCBCR = 1, 2, 6
_JPEG, _YCBCR_JPEG2000 = 7, 33003


class TiffSlideReader(Slide):
    """A slide opened with tiffslide. On a damaged file it and its decoders may raise almost any kind of exception."""

    reader = "tiffslide"

    def __init__(self, path: str, given: GivenMpp | None = None) -> None:
        self.path = path
        self._given = given
        self._lock = threading.Lock()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tiffslide warns of every tag it does not know
            try:
                self._slide = tiffslide.TiffSlide(path)
            except ImportError as error:  # fsspec without the package for this kind of URL
                what, remedy = f"needs a further package ({error})", "pip install 'wsi[remote]'"
                raise SlideUnreadable(path, what, remedy) from error
            except FileNotFoundError as error:
                raise SlideNotFound(path, "there is no such file", "Check the path") from error
            except Exception as error:
                raise _unreadable(path, error) from error
            try:
                self._describe()
            except SlideError:
                self._slide.close()
                raise
            except Exception as error:
                self._slide.close()
                raise _unreadable(path, error) from error

    def _describe(self) -> None:
        properties = dict(self._slide.properties)
        self.vendor = str(properties.get("tiffslide.vendor") or "generic-tiff")
        self.level_sizes = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        baseline = self._slide.ts_tifffile.series[0].levels
        self._pages = [level.keyframe for level in baseline[: len(self.level_sizes)]]
        page, shape = self._pages[0], baseline[0].shape
        if page.dtype != np.uint8 or shape[:2] != self.size[::-1] or shape[2:] not in ((), (1,), (3,), (4,)):
            what = f"holds {page.dtype} {shape}, not 8-bit grey or RGB pixels"
            raise SlideUnreadable(self.path, what, "Export a brightfield RGB image")
        refuse_turned(self.path, page)
        for page in self._pages:
            self._check_pixels(page)
        page = self._pages[0]
        source = "tiff-tags" if self.vendor == "generic-tiff" else f"vendor:{self.vendor}"
        found = numbers_in(properties, "tiffslide.mpp-x", "tiffslide.mpp-y")
        self.mpp, self.mpp_source, self.overridden = resolve_mpp(self.path, self._given, found, source)
        self._holes = [_missing_tiles(page) for page in self._pages]
        self.bounds = Box(0, 0, *self.size)
        if (holes := self._holes[0]) is not None:
            self.bounds = extent(~holes, (page.tilewidth, page.tilelength), self.size)

    def _check_pixels(self, page: tifffile.TiffPage) -> None:
        """Refuse pages whose colours tiffslide would get wrong, or whose decoding could take unlimited memory."""
        colours, compression = int(page.photometric), int(page.compression)
        shown = colours in (_BLACK_IS_ZERO, _RGB) or (colours == _YCBCR and compression == _JPEG)
        if not shown or compression == _YCBCR_JPEG2000 or (page.samplesperpixel == 4 and page.extrasamples != (2,)):
            what = f"{tifffile.PHOTOMETRIC(colours).name} of {page.samplesperpixel} samples (compression {compression})"
            raise SlideUnreadable(self.path, f"stores its colours as {what}", "Export it as RGB without alpha")
        chunk_bytes = math.prod(page.chunks)
        if chunk_bytes > MAX_TILE_BYTES:
            what = f"is stored in parts of {chunk_bytes} bytes when decoded, more than {MAX_TILE_BYTES}"
            raise SlideUnreadable(self.path, what, "Convert it to a tiled pyramidal TIFF")
        if compression == _JPEG:
            page.decode = _whole(page.decode)

    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> U8:
        # tiffslide takes level-0 coordinates and floors them to the level's pixels.
        downsample = self._slide.level_downsamples[level]
        x0, y0 = int(np.ceil(x * downsample)), int(np.ceil(y * downsample))
        try:
            with self._lock:  # one file position a handle
                region: U8 = np.asarray(self._slide.read_region((x0, y0), level, (w, h), as_array=True), np.uint8)
        except Exception as error:
            what = f"is damaged at level {level}, x {x}-{x + w}, y {y}-{y + h} ({_named(error)})"
            raise SlideUnreadable(self.path, what, "Copy it from the source again") from error
        if region.ndim == 2 or region.shape[2] == 1:  # grey
            rgb: U8 = np.repeat(region.reshape(h, w, 1), 3, axis=2)
        elif region.shape[2] == 4:
            rgb = compose_on_white(region)
        else:
            rgb = np.array(region)
        self._whiten_holes(level, x, y, rgb)
        return rgb

    def _whiten_holes(self, level: int, x: int, y: int, rgb: U8) -> None:
        """Paint tiles that the file leaves out white: tiffslide returns them black."""
        holes, page = self._holes[level], self._pages[level]
        if holes is None:
            return
        rows = (y + np.arange(rgb.shape[0])) // page.tilelength
        columns = (x + np.arange(rgb.shape[1])) // page.tilewidth
        rgb[holes[rows[:, None], columns[None, :]]] = 255

    def close(self) -> None:
        self._slide.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.path, self._given)


def _whole(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse JPEG data that is cut short: imagecodecs, by which tifffile decodes, would fill the rest with grey."""

    def decode_whole(data: bytes | None, *args: Any, jpegtables: bytes | None = None, **options: Any) -> Any:
        if data is not None and options.get("jpegheader") is None:  # NDPI's strips have neither header nor end
            stream = jpeg_head(jpegtables, "") + bytes(data)[2:]
            height, width = simplejpeg.decode_jpeg_header(stream)[:2]
            if height * width * 3 > MAX_TILE_BYTES or stream.count(b"\xff\xda") > MAX_SCANS:
                raise ValueError(f"is a JPEG of {width} x {height} px, or of more than {MAX_SCANS} scans")
            simplejpeg.decode_jpeg(stream)
        return decode(data, *args, jpegtables=jpegtables, **options)

    return decode_whole


def _missing_tiles(page: tifffile.TiffPage) -> npt.NDArray[np.bool_] | None:
    """Return which tiles of a page have no bytes, bool (rows, columns); None if all have some."""
    if not page.is_tiled:
        return None
    missing: npt.NDArray[np.bool_] = np.asarray(page.databytecounts) == 0
    if not missing.any():
        return None
    rows, columns = -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    return np.asarray(missing[: rows * columns].reshape(rows, columns))


def _unreadable(path: str, error: BaseException) -> SlideUnreadable:
    return SlideUnreadable(path, f"is not a slide that can be read ({_named(error)})", "Convert it to a pyramidal TIFF")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {brief(error)}"  # a KeyError's message alone is just the key
