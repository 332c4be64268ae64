"""What a slide file tells of a patient, an operator or a place, beside its pixels.

Where such things are known to lie: label and macro images (the label is often in the macro too), barcodes, names of
files and scanners' users, dates, TIFF's own text fields, DICOM's patient and study. Names of properties only: values
are what must not be repeated. Text within the scanned pixels, and what was deleted but not overwritten, is not found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import openslide
import tifffile

from wsi.errors import SlideError
from wsi.slide.tiffcheck import check_tiff

#: Of a property's name, after its vendor.
_TELLING = re.compile(
    r"barcode|filename|title|imageid|reference|date|time|user|operator|created|updated|patient|study|accession|birth|"
    r"physician|institution|serial|dsr.?id|comment|description|hostcomputer|artist|copyright|documentname|uuid",
    re.IGNORECASE,
)
#: TIFF's own fields of text (TIFF 6.0, section 8).
_TAGS = {269: "DocumentName", 270: "ImageDescription", 305: "Software", 306: "DateTime", 315: "Artist"}
_TAGS |= {316: "HostComputer", 33432: "Copyright", 37510: "UserComment", 700: "XMP", 34665: "EXIF"}


def leaks(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return what the file holds beside pixels that may tell who or where, as (where, what).

    Parameters
    ----------
    path : path
        A slide. One that no library opens gives nothing but what its TIFF fields tell.

    Examples
    --------
    >>> leaks("slide.svs")                                                                # doctest: +SKIP
    [('associated image', 'label'), ('property', 'aperio.Date'), ('TIFF field', 'ImageDescription')]
    """
    path = Path(path)
    found = [("file name", path.name)] if telling_name(path.stem) else []
    try:
        with openslide.OpenSlide(path) as slide:
            found += [("associated image", name) for name in sorted(slide.associated_images)]
            found += [
                ("property", name)
                for name in sorted(slide.properties)
                if not name.startswith("openslide.") and _TELLING.search(name.split(".", 1)[-1])
            ]
    except openslide.OpenSlideError:
        pass  # not one of its formats; TIFF's own fields are looked for all the same
    try:
        with path.open("rb") as file:
            check_tiff(lambda at, n: os.pread(file.fileno(), n, at), path.stat().st_size, str(path))
            tiff = tifffile.TiffFile(file)
            tags = {tag.code for page in tiff.pages for tag in getattr(page, "tags", ())}
        found += [("TIFF field", name) for code, name in sorted(_TAGS.items()) if code in tags]
    except (tifffile.TiffFileError, SlideError, ValueError, KeyError, IndexError, TypeError):
        pass  # no TIFF
    return found


def telling_name(stem: str) -> bool:
    """Return whether a file's name may be that of a case or a person: a long number, or two words.

    Examples
    --------
    >>> telling_name("Doe_John"), telling_name("a12"), telling_name("s-61c241981bc8d22bd45d")
    (True, False, False)
    """
    named = re.sub(r"\bs-[0-9a-f]{20}\b", "", stem)  # a pseudonym of ours tells nothing
    return re.search(r"\d{4,}|[A-Za-z]{3,}[ _^-][A-Za-z]{3,}", named) is not None
