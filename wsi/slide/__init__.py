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
    "open_slide", "override_of",
]  # fmt: skip

#: Names accepted as `reader`. "auto" is our own TIFF reader for what it is sure of, then OpenSlide, then tiffslide for
#: what OpenSlide does not know.
READERS = ("auto", "tiff", "openslide", "tiffslide")

#: Bytes at a file's beginning, and at its end, that its fingerprint is made of.
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
        A file, or an fsspec URL (``s3://``, ``https://``), which our own reader and tiffslide read.
    reader : {"auto", "tiff", "openslide", "tiffslide"}
    mpp : float, optional
        Microns per level-0 pixel; overrides what the file says.
    mpp_source : str
        Who gave `mpp`; recorded as the slide's ``mpp_source`` where `mpp` is given.
    decode : {"auto", "full", "fast"}
        How JPEG is read at half, quarter or eighth resolution. "auto": reduced by the decoder where every pixel asked
        for is made of whole reduced ones (over 45 dB from the area average on H&E), else decoded in full and averaged.
        "full": always the latter. "fast": always reduced (27 to 43 dB where pixels do not coincide). Other readers
        decode in full.
    local : str, optional
        A copy of it, nearer by, that is read in its place; it is still known as `path`.

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
    if name.lower().endswith(".vsi"):  # a TIFF of the overview alone, which would be read as the slide
        what = "is Olympus' VSI, whose pixels lie in .ets files that no reader here knows"
        raise SlideUnreadable(name, what, "Export it as OME-TIFF or pyramidal TIFF")
    if not is_url(name):
        if not Path(name).exists():
            raise SlideNotFound(name, "there is no such file", "Check the path")
        if Path(name).is_dir():
            raise SlideUnreadable(name, "is a folder, not a slide", "Name the slide file inside it")
        if not Path(name).is_file():  # opening a pipe waits for whoever writes into it
            raise SlideUnreadable(name, "is a pipe or a device, not a file", "Copy the slide to a disk")
        if not os.access(name, os.R_OK):
            raise SlideUnreadable(name, "may not be read by this user", "Check the file's permissions")
    if reader != "auto":
        return _open_with(reader, name, given, decode)
    # Only what a reader does not know goes to the next: a file that it knows and finds damaged must not be read anyway.
    for other in ("tiff",) if is_url(name) else ("tiff", "openslide"):
        with suppress(UnknownFormat):
            return _open_with(other, name, given, decode)
    return _open_with("tiffslide", name, given, decode)


def check_reading(reader: str, decode: str) -> None:
    """Refuse a reader or a way to decode that there is not."""
    if reader not in READERS:
        raise SlideError(f"reader={reader!r}", "no such reader", f"Known readers: {', '.join(READERS)}")
    if decode not in DECODES:
        raise SlideError(f"decode={decode!r}", "no such way to decode", f"Known: {', '.join(DECODES)}")


def absolute(path: str) -> str:
    """Return a path that means the same from every working directory; URLs as they are."""
    return path if is_url(path) else str(Path(path).resolve())


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL rather than a local file."""
    return "://" in path


def identity_of(slide: Slide) -> dict[str, Any]:
    """What a store of patches is bound to: JSON-able, and the same only for the same slide read in the same way."""
    read = {"size": list(slide.size), "mpp": list(slide.mpp), "reader": slide.reader, "decode": slide.decode}
    return {"slide_path": absolute(slide.path), "slide": read, "file_fingerprint": fingerprint(slide.path)}


def file_bytes(path: str) -> int | None:
    """Return the size of a slide's file; None of a URL, or where it cannot be told."""
    with suppress(OSError):
        return None if is_url(path) else Path(path).stat().st_size
    return None


def fingerprint(path: str) -> str | None:
    """Return what tells a slide's file from others: SHA-256 (12 digits) over its size, first and last 64 KiB.

    Where a slide has several files (MIRAX, DICOM), of the one that is named. None of a URL, which would take three
    requests, and where it cannot be told. A file is read once by a process, as long as it does not change.
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
    """What result.json says of a slide, whatever was done with it, and in which frame that lies."""
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


def override_of(slide: Slide) -> str:
    """Say how the microns per pixel that were given contradict the file's own; empty where they do not."""
    if slide.overridden is None:
        return ""
    own, given = slide.overridden, f"{slide.mpp.x:g} ({slide.mpp_source})"
    said = f"the file says {own.x:.4g} x {own.y:.4g} microns per pixel, and {given} was given"
    return f"{said}, which all numbers are by: if it is not meant, leave it out, and use --force"


def _open_with(reader: str, name: str, given: GivenMpp | None, decode: str) -> Slide:
    """Open with one reader, whose libraries are loaded only now."""
    if reader == "tiff":
        from wsi.slide.tiff import TiffReader

        return TiffReader(name, given, decode)
    if reader == "openslide":
        from wsi.slide.openslide import OpenSlideReader

        return OpenSlideReader(name, given)
    from wsi.slide.tiffslide import TiffSlideReader

    return TiffSlideReader(name, given)
