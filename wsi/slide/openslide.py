"""Slides through OpenSlide: every vendor format it knows, and DICOM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openslide
import tifffile

from wsi.errors import SlideError, SlideUnreadable, UnknownFormat
from wsi.slide.base import U8, GivenMpp, Slide, compose_on_white, numbers_in, refuse_turned, resolve_mpp
from wsi.units import Box

#: OpenSlide takes mpp of these vendors from TIFF resolution tags, which any converter may have left at 72 dpi.
_TIFF_TAG_VENDORS = {"generic-tiff"}


_AGAIN = "Copy it from the source again"


class OpenSlideReader(Slide):
    """A slide opened with openslide-python. Associated images (label, macro) are never touched.

    Notes
    -----
    OpenSlide takes whole level-0 coordinates. At a level whose downsample is not whole (4.0003, say)
    most level pixels start between two of them, and OpenSlide interpolates: pixels there may be shifted
    by up to half a level-0 pixel. Level 0 and levels of whole downsample are exactly as stored.
    """

    reader = "openslide"

    def __init__(self, path: str, given: GivenMpp | None = None) -> None:
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise UnknownFormat(
                path, "is not a format that OpenSlide reads", "Convert it to a pyramidal TIFF"
            ) from error
        except openslide.OpenSlideError as error:
            raise SlideUnreadable(path, f"is damaged or incomplete ({_brief(error)})", _AGAIN) from error
        properties = self._slide.properties
        self.path = self._file = path
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.level_sizes = self._slide.level_dimensions
        self._given = given
        source = "tiff-tags" if self.vendor in _TIFF_TAG_VENDORS else f"vendor:{self.vendor}"
        try:
            if any(min(size) < 1 for size in self.level_sizes):
                raise SlideUnreadable(path, f"is damaged: its levels measure {self.level_sizes} px", _AGAIN)
            if self.vendor in _TIFF_TAG_VENDORS:
                try:
                    with tifffile.TiffFile(path) as tiff:
                        refuse_turned(path, tiff.pages.first)
                except SlideError:
                    raise
                except Exception as error:  # tifffile raises whatever it meets in a damaged file
                    raise SlideUnreadable(path, f"is damaged or incomplete ({_brief(error)})", _AGAIN) from error
            mpp = numbers_in(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
            self.mpp, self.mpp_source, self.overridden = resolve_mpp(path, given, mpp, source)
            self.bounds = _bounds_of(properties, self.size)
            x, y = (f"hamamatsu.{axis}OffsetFromSlideCentre" for axis in "XY")
            self.centre_nm = numbers_in(properties, x, y)
        except BaseException:
            self._slide.close()
            raise

    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> U8:
        # OpenSlide wants level-0 coordinates and interpolates where these fall between the level's
        # pixels. Start a few pixels earlier, where the level-0 coordinate is (all but) whole.
        downsample = self._slide.level_downsamples[level]
        x0, y0 = _whole_start(x, downsample), _whole_start(y, downsample)
        try:
            rgba = self._slide.read_region(
                (round(x0 * downsample), round(y0 * downsample)), level, (w + x - x0, h + y - y0)
            )
        except openslide.OpenSlideError as error:
            # An OpenSlide handle stays in error once it met one: open a fresh one for the reads to come.
            # The old one closes with its last reference; other threads may be reading from it.
            self._slide = openslide.OpenSlide(self._file)
            raise SlideUnreadable(
                self.path,
                f"is damaged at level {level}, x {x}-{x + w}, y {y}-{y + h} ({_brief(error)})",
                _AGAIN,
            ) from error
        return compose_on_white(np.asarray(rgba)[y - y0 :, x - x0 :])

    def close(self) -> None:
        self._slide.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.path, self._given)


def library_version() -> str:
    """Return the version of the OpenSlide library itself."""
    return str(openslide.__library_version__)


def _whole_start(start: int, downsample: float) -> int:
    """Return the level pixel at or shortly before `start` whose level-0 coordinate is nearest to whole."""
    if downsample.is_integer():
        return start
    return min(
        range(max(0, start - 128), start + 1),
        key=lambda px: (abs(round(px * downsample) / downsample - px) > 1 / 512, -px),
    )


def _bounds_of(properties: Any, size: tuple[int, int]) -> Box:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    whole, found = Box(0, 0, *size), numbers_in(properties, *names)
    if found is None or not all(number.is_integer() for number in found):
        return whole
    bounds = Box(*map(int, found)).intersect(whole)
    return bounds if bounds.w > 0 and bounds.h > 0 else whole


def _brief(error: BaseException) -> str:
    """Say it in one line: what LibTIFF says may have several."""
    return " ".join(str(error).split())[:200] or type(error).__name__
