"""Slides read through OpenSlide: all formats it supports, DICOM included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openslide
import tifffile

from wsi.errors import SlideError, SlideUnreadable, UnknownFormat, brief
from wsi.slide.base import U8, GivenMpp, Slide, compose_on_white, numbers_in, refuse_turned, resolve_mpp
from wsi.units import Box

_GENERIC = "generic-tiff"
_AGAIN = "Copy it from the source again"


class OpenSlideReader(Slide):
    """A slide opened with openslide-python. Associated images (label, macro) are never read.

    OpenSlide takes integer level-0 coordinates. At a level with a fractional downsample (4.0003, say), most pixels
    start between two of these and OpenSlide interpolates, which may shift them by up to half a level-0 pixel. All other
    levels are read exactly as stored.
    """

    reader = "openslide"

    def __init__(self, path: str, given: GivenMpp | None = None) -> None:
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            remedy = "Convert it to a pyramidal TIFF"
            raise UnknownFormat(path, "is not a format that OpenSlide reads", remedy) from error
        except openslide.OpenSlideError as error:
            raise SlideUnreadable(path, f"is damaged or incomplete ({brief(error)})", _AGAIN) from error
        properties = self._slide.properties
        self.path = self._file = path
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.level_sizes = self._slide.level_dimensions
        self._given = given
        # Of generic TIFF, OpenSlide takes mpp from the resolution tags, which a converter may have left at 72 dpi.
        source = "tiff-tags" if self.vendor == _GENERIC else f"vendor:{self.vendor}"
        try:
            if any(min(size) < 1 for size in self.level_sizes):
                raise SlideUnreadable(path, f"is damaged: its levels measure {self.level_sizes} px", _AGAIN)
            if self.vendor == _GENERIC:
                try:
                    with tifffile.TiffFile(path) as tiff:
                        refuse_turned(path, tiff.pages.first)
                except SlideError:
                    raise
                except Exception as error:  # tifffile raises whatever it meets in a damaged file
                    raise SlideUnreadable(path, f"is damaged or incomplete ({brief(error)})", _AGAIN) from error
            mpp = numbers_in(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
            self.mpp, self.mpp_source, self.overridden = resolve_mpp(path, given, mpp, source)
            self.bounds = _bounds_of(properties, self.size)
            x, y = (f"hamamatsu.{axis}OffsetFromSlideCentre" for axis in "XY")
            self.centre_nm = numbers_in(properties, x, y)
        except BaseException:
            self._slide.close()
            raise

    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> U8:
        # Start a few pixels earlier, where the level-0 coordinate is (almost) an integer: see the class.
        downsample = self._slide.level_downsamples[level]
        x0, y0 = _whole_start(x, downsample), _whole_start(y, downsample)
        try:
            at, size = (round(x0 * downsample), round(y0 * downsample)), (w + x - x0, h + y - y0)
            rgba = self._slide.read_region(at, level, size)
        except openslide.OpenSlideError as error:
            # After an error an OpenSlide handle fails for ever: open another. Other threads may still be reading from
            # the old one, which closes with its last reference.
            self._slide = openslide.OpenSlide(self._file)
            what = f"is damaged at level {level}, x {x}-{x + w}, y {y}-{y + h} ({brief(error)})"
            raise SlideUnreadable(self.path, what, _AGAIN) from error
        return compose_on_white(np.asarray(rgba)[y - y0 :, x - x0 :])

    def close(self) -> None:
        self._slide.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.path, self._given)


def library_version() -> str:
    """Return the version of the OpenSlide C library."""
    return str(openslide.__library_version__)


def _whole_start(start: int, downsample: float) -> int:
    """Return the last pixel up to `start` whose level-0 coordinate is almost an integer, if there is one nearby."""
    if downsample.is_integer():
        return start
    candidates = range(max(0, start - 128), start + 1)
    return min(candidates, key=lambda px: (abs(round(px * downsample) / downsample - px) > 1 / 512, -px))


def _bounds_of(properties: Any, size: tuple[int, int]) -> Box:
    names = (f"openslide.bounds-{side}" for side in ("x", "y", "width", "height"))
    whole, found = Box(0, 0, *size), numbers_in(properties, *names)
    if found is None or not all(number.is_integer() for number in found):
        return whole
    bounds = Box(*map(int, found)).intersect(whole)
    return bounds if bounds.w > 0 and bounds.h > 0 else whole
