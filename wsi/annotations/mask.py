"""Mask images as large as the slide, or a whole fraction of it, whose pixel values are classes."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import tifffile
from PIL import Image

import wsi.slide.lzw  # noqa: F401  LZW is checked before tifffile decodes it
from wsi.annotations.base import Annotation, Frame
from wsi.errors import AnnotationError
from wsi.files import opened_image
from wsi.tissue import mask_polygons

U8 = npt.NDArray[np.uint8]

#: Larger levels are not read: the mask of a whole slide should be a pyramid.
_MAX_PIXELS = 1 << 28
#: Errors of tifffile on invalid tags.
_DAMAGED = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError, struct.error)
#: An image with more values is a picture, each speck of which would become an outline.
_MOST_VALUES = 64
#: Some programs pad masks to whole tiles.
_PADDING_PX = 512


def read(path: Path, frame: Frame) -> list[Annotation]:
    """Read a mask as outlines, one annotation per connected component; its group is the pixel value.

    Outlines follow the pixels of the finest level of at most 16 Mpx. If the slide's size is known, a smaller mask is
    scaled to it. See ``read_annotations``.
    """
    levels = _levels(path)
    scale = _scale(path, levels[1], frame.size or levels[1])
    finest = next((d for d, (w, h) in levels.items() if w * h <= 16_000_000), max(levels))
    values = read_mask(path, downsample=finest)
    present = (np.flatnonzero(np.bincount(values.ravel(), minlength=256)[1:]) + 1).tolist()
    if len(present) > _MOST_VALUES:
        what = f"holds {len(present)} values, as pictures do"
        raise AnnotationError(path, what, "A mask has one value per class: save it without lossy compression")
    return [
        Annotation(shapely.transform(outline, lambda xy: xy * finest * scale), str(value))
        for value in present
        for outline in mask_polygons(values == value)
    ]


def _scale(path: Path, of_mask: tuple[int, int], of_slide: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Level-0 pixels per pixel of a mask's first level, in x and y."""
    exact = np.array(of_slide) / of_mask
    if _fits(of_mask, of_slide, 1):
        return np.ones(2)
    if abs(exact[0] / exact[1] - 1) > 0.05 or exact[0] < 1:
        what = f"is {of_mask[0]} x {of_mask[1]} px, the slide {of_slide[0]} x {of_slide[1]}"
        raise AnnotationError(path, what, "Give a mask of this slide, as large as it or smaller")
    whole = exact.round()
    beyond = whole * of_mask - np.array(of_slide)
    is_padded = ((beyond >= 0) & ((beyond < whole) | (np.array(of_mask) % 16 == 0))).all()
    return whole if is_padded else exact


def _fits(of_mask: tuple[int, int], of_slide: tuple[int, int], scale: int) -> bool:
    """Whether a mask at 1/`scale` has the slide's size, within 2 % or with padding to whole tiles."""
    beyond = [(a * scale - b, a, b) for a, b in zip(of_mask, of_slide, strict=True)]
    return all(
        abs(px) <= max(scale, min(_PADDING_PX, 0.02 * b)) or (a % 16 == 0 and 0 < px <= _PADDING_PX)
        for px, a, b in beyond
    )


def read_mask(path: Path, *, downsample: int = 32, size: tuple[int, int] | None = None, at: float = 0.0) -> U8:
    """Read a mask at 1/`downsample` of level 0, by nearest neighbour.

    Parameters
    ----------
    path : path
        PNG or TIFF (a pyramid if it is large); the first of several channels is read (CAMELYON16: red).
    downsample : int
        Level-0 pixels per pixel of the result.
    size : (int, int), optional
        Width and height of the slide. The mask must have that size or a whole fraction of it, up to one tile of
        padding. Default: the size of the mask.
    at : float
        Sampling point within a pixel, as in ``rasterize``.

    Returns
    -------
    uint8 (rows, columns)
        Pixel (r, c) is the value at level-0 pixel ``((c + at) * downsample, (r + at) * downsample)``, as precisely as
        the pyramid's levels allow.

    Raises
    ------
    AnnotationError
        The mask is damaged, not 8-bit, of another size than the slide, or too large and not a pyramid.

    Examples
    --------
    >>> read_mask(Path("tumor_001_mask.tif"), downsample=32).max()                       # doctest: +SKIP
    255
    """
    levels = _levels(path)
    width, height = levels[1]
    scale = 1
    if size is not None:
        scale = max(1, round(size[0] / width))
        if not _fits((width, height), size, scale):
            raise AnnotationError(
                path,
                f"is {width} x {height} px, the slide {size[0]} x {size[1]}",
                "Give a mask as large as the slide, or a whole fraction of it",
            )
    usable = [d for d in levels if downsample % (d * scale) == 0]
    if not usable:
        what = f"has one pixel per {scale} of the slide, and one per {downsample}, no multiple of that, is needed"
        raise AnnotationError(path, what, "Give a mask of the slide's full size")
    level = max(usable)
    w, h = levels[level]
    if w * h > _MAX_PIXELS:
        raise AnnotationError(path, f"has no level below {w} x {h} px to read", "Save it as a TIFF pyramid")
    values = _pixels(path, (w, h))
    step = downsample // (level * scale)
    first = int(at * step)
    return np.ascontiguousarray(values[first::step, first::step])


def _levels(path: Path) -> dict[int, tuple[int, int]]:
    """Width and height of each level by its downsampling relative to the first level."""
    if path.suffix.lower() == ".png":
        with _png(path) as image:
            return {1: image.size}
    try:
        with tifffile.TiffFile(path) as tiff:
            sizes = [(page.imagewidth, page.imagelength) for page in _pages(tiff)]
            if not all(isinstance(side, int) and side > 0 for size in sizes for side in size):
                raise ValueError("a side is no whole number of pixels")
    except _DAMAGED as error:
        raise AnnotationError(path, f"is no TIFF ({error})", "Give the mask as TIFF or PNG") from error
    if not sizes:
        raise AnnotationError(path, "is a TIFF without images", "Give the mask as TIFF or PNG")
    (width, height), levels = sizes[0], {1: sizes[0]}
    for w, h in sizes[1:]:
        ratio = round(width / max(w, 1))
        # Within a few pixels: programs round up or down, or pad to tiles.
        if ratio > 1 and all(abs(a - b / ratio) < max(4, 16 / math.sqrt(ratio)) for a, b in ((w, width), (h, height))):
            levels.setdefault(ratio, (w, h))
    return levels


def _pages(tiff: tifffile.TiffFile) -> list[Any]:
    """All pages with their SubIFDs."""
    return [each for page in tiff.pages for each in (page, *(getattr(page, "pages", None) or ()))]


def _pixels(path: Path, size: tuple[int, int]) -> U8:
    """Return the level of that size, uint8 (h, w)."""
    if path.suffix.lower() == ".png":
        with _png(path) as image:
            values = np.asarray(image)
    else:
        try:
            with tifffile.TiffFile(path) as tiff:
                page = next(page for page in _pages(tiff) if (page.imagewidth, page.imagelength) == size)
                if page.is_tiled and page.tilewidth * page.tilelength > _MAX_PIXELS:
                    raise ValueError(f"its tiles are {page.tilewidth} x {page.tilelength} px")
                values = page.asarray()
        except (*_DAMAGED, OSError) as error:
            raise AnnotationError(path, f"is damaged ({error})", "Get it again") from error
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise AnnotationError(path, f"holds {values.dtype} {values.shape}", "Save the mask with 8 bits a pixel")
    if values.ndim == 2:
        return values
    return np.ascontiguousarray(values[..., 0] if values.shape[:2] == size[::-1] else values[0])  # separate planes


@contextmanager
def _png(path: Path) -> Iterator[Image.Image]:
    try:
        with opened_image(path) as image:
            yield image
    except ValueError as error:
        raise AnnotationError(path, f"is no PNG that can be read ({error})", "Save it as a TIFF pyramid") from error
