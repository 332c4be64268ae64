"""Reading slides: one call, any box at any size.

Examples
--------
>>> from wsi.slide import open_slide
>>> with open_slide("tests/data/tiny.tif") as slide:           # doctest: +SKIP
...     rgb = slide.read(Box(0, 0, 2000, 2000), (512, 512))    # (512, 512, 3) uint8, outside is white
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from wsi.errors import SlideError, SlideNotFound, SlideUnreadable, UnknownFormat, WsiError
from wsi.result import rounded
from wsi.slide.base import DECODES, GivenMpp, Slide

__all__ = [
    "Slide", "absolute", "check_reading", "facts_of", "file_bytes", "fingerprint", "identity_of", "is_url",
    "open_slide", "resolution_warnings",
]  # fmt: skip

#: Names accepted as `reader`. "auto" tries our own TIFF reader, then OpenSlide, then tiffslide.
READERS = ("auto", "tiff", "openslide", "tiffslide")

#: Bytes from a file's start, and from its end, that its fingerprint covers.
_ENDS = 1 << 16


def open_slide(
    path: str | os.PathLike[str],
    reader: str = "auto",
    *,
    mpp: float | None = None,
    mpp_source: str = "user",
    decode: str = "auto",
    local: str | None = None,
) -> Slide:
    """Open a slide.

    Parameters
    ----------
    path : path or URL
        A file, or an fsspec URL (``s3://``, ``https://``), which the readers "tiff" and "tiffslide" support.
    reader : {"auto", "tiff", "openslide", "tiffslide"}
    mpp : float, optional
        Microns per level-0 pixel; overrides what the file says.
    mpp_source : str
        Who gave `mpp`; becomes the slide's ``mpp_source`` if `mpp` is given.
    decode : {"auto", "full", "fast"}
        How the reader "tiff" reads JPEG at 1/2, 1/4 or 1/8 resolution. "full": decode all pixels, then average. "fast":
        let the decoder reduce them (PSNR against the average on H&E: 27 to 43 dB where pixels do not coincide). "auto":
        as "fast" where every output pixel is made of whole reduced pixels (over 45 dB), else as "full". Other readers
        always decode in full.
    local : str, optional
        A copy on faster storage, which is read in place of `path`; the slide is still known as `path`.

    Raises
    ------
    SlideNotFound, SlideUnreadable, MppError
    """
    if local is not None:
        try:
            slide = open_slide(local, reader, mpp=mpp, mpp_source=mpp_source, decode=decode)
        except WsiError as error:
            raise type(error)(path, error.what.replace(local, os.fspath(path)), error.remedy) from error
        slide.path = os.fspath(path)
        return slide
    name = os.fspath(path)
    given = None if mpp is None else GivenMpp(mpp, mpp_source)
    check_reading(reader, decode)
    if name.lower().endswith(".vsi"):  # itself a TIFF of the overview alone
        what = "is Olympus' VSI, whose pixels lie in .ets files that no reader here knows"
        raise SlideUnreadable(name, what, "Export it as OME-TIFF or pyramidal TIFF")
    if not is_url(name):
        if not Path(name).exists():
            raise SlideNotFound(name, "there is no such file", "Check the path")
        if Path(name).is_dir():
            raise SlideUnreadable(name, "is a folder, not a slide", "Name the slide file inside it")
        if not Path(name).is_file():  # opening a pipe would wait for a writer
            raise SlideUnreadable(name, "is a pipe or a device, not a file", "Copy the slide to a disk")
        if not os.access(name, os.R_OK):
            raise SlideUnreadable(name, "may not be read by this user", "Check the file's permissions")
    if reader != "auto":
        return _open_with(reader, name, given, decode)
    # The next reader is tried only for an unknown format: it must not read a file that this one found damaged.
    for other in ("tiff",) if is_url(name) else ("tiff", "openslide"):
        with suppress(UnknownFormat):
            return _open_with(other, name, given, decode)
    return _open_with("tiffslide", name, given, decode)


def check_reading(reader: str, decode: str) -> None:
    """Raise ``SlideError`` for an unknown `reader` or `decode`."""
    if reader not in READERS:
        raise SlideError(f"reader={reader!r}", "no such reader", f"Known readers: {', '.join(READERS)}")
    if decode not in DECODES:
        raise SlideError(f"decode={decode!r}", "no such way to decode", f"Known: {', '.join(DECODES)}")


def absolute(path: str) -> str:
    """Make a path absolute; a URL is returned as it is."""
    return path if is_url(path) else str(Path(path).resolve())


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL rather than a local file."""
    return "://" in path


def identity_of(slide: Slide) -> dict[str, Any]:
    """Return what a patch store is bound to: JSON-able, and equal only for the same slide read in the same way."""
    read = {"size": list(slide.size), "mpp": list(slide.mpp), "reader": slide.reader, "decode": slide.decode}
    return {"slide_path": absolute(slide.path), "slide": read, "file_fingerprint": fingerprint(slide.path)}


def file_bytes(path: str) -> int | None:
    """Return the size of a slide's file; None for a URL or if it cannot be determined."""
    with suppress(OSError):
        return None if is_url(path) else Path(path).stat().st_size
    return None


def fingerprint(path: str) -> str | None:
    """Return 12 digits of a SHA-256 over the size and the first and last 64 KiB of a slide's file.

    Of several files (MIRAX, DICOM), only the named one counts. None for a URL, which would take three requests, and for
    a file that cannot be read. Cached until the file changes.
    """
    with suppress(OSError):
        if not is_url(path):
            found = Path(path).stat()
            return _fingerprint(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return None


@lru_cache(maxsize=1 << 17)
def _fingerprint(path: str, size: int, *_unchanged: int) -> str:
    with Path(path).open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return hashlib.sha256(b"%d\n" % size + first + file.read(_ENDS)).hexdigest()[:12]


def facts_of(slide: Slide, coordinate_frame: str) -> dict[str, Any]:
    """Return the facts about a slide that every result.json holds."""
    return {
        "mpp": rounded((slide.mpp.x * slide.mpp.y) ** 0.5),
        "mpp_source": slide.mpp_source,
        "size_px": list(slide.size),
        "bounds_px": list(slide.bounds),
        "coordinate_frame": coordinate_frame,
        "vendor": slide.vendor,
        "reader": slide.reader,
        "file_fingerprint": fingerprint(slide.path),
    }


def resolution_warnings(slide: Slide, mpp: float, wanted: str) -> dict[str, str]:
    """Return warnings, by flag, on a slide's resolution and on patches of `mpp`, which are `wanted`."""
    warnings = {}
    if max(slide.mpp) > mpp * 1.1:
        has = f"the slide has {max(slide.mpp):.4g} microns per pixel"
        warnings["upsampled"] = f"{has}, {wanted}: patches are enlarged"
    if slide.overridden is not None:
        own, given = slide.overridden, f"{slide.mpp.x:g} ({slide.mpp_source})"
        what = f"the file says {own.x:.4g} x {own.y:.4g} microns per pixel, but {given} was given and is used"
        warnings["mpp-overridden"] = f"{what}: if that is not intended, leave it out and add --force"
    return warnings


def _open_with(reader: str, name: str, given: GivenMpp | None, decode: str) -> Slide:
    """Open with one reader; its libraries are imported only now."""
    if reader == "tiff":
        from wsi.slide.tiff import TiffReader

        return TiffReader(name, given, decode)
    if reader == "openslide":
        from wsi.slide.openslide import OpenSlideReader

        return OpenSlideReader(name, given)
    from wsi.slide.tiffslide import TiffSlideReader

    return TiffSlideReader(name, given)
