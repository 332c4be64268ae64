"""Find what in a slide file, besides the tissue, may identify a patient, an operator or a place.

Searched are the known places: label and macro images (the macro often shows the label), barcodes, names of files and
scanner users, dates, TIFF's text fields, and DICOM's patient and study. Only names of properties are returned, since
the values must not be repeated. Text within the scanned pixels and data deleted but not overwritten are not found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import openslide
import tifffile

from wsi.errors import SlideError
from wsi.slide.tiffcheck import check_tiff

#: Matches property names, without the vendor's prefix.
_TELLING = re.compile(
    r"barcode|filename|title|imageid|reference|date|time|user|operator|created|updated|patient|study|accession|birth|"
    r"physician|institution|serial|dsr.?id|comment|description|hostcomputer|artist|copyright|documentname|uuid",
    re.IGNORECASE,
)
#: TIFF's text fields (TIFF 6.0, section 8).
_TAGS = {269: "DocumentName", 270: "ImageDescription", 305: "Software", 306: "DateTime", 315: "Artist"}
_TAGS |= {316: "HostComputer", 33432: "Copyright", 37510: "UserComment", 700: "XMP", 34665: "EXIF"}


def leaks(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return what in a slide file may identify somebody, as pairs (kind of place, name).

    Of a file that OpenSlide cannot open, only its name and TIFF fields are examined.

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
        pass  # not one of its formats; TIFF fields are searched nevertheless
    try:
        with path.open("rb") as file:
            check_tiff(lambda at, n: os.pread(file.fileno(), n, at), path.stat().st_size, str(path))
            tiff = tifffile.TiffFile(file)
            tags = {tag.code for page in tiff.pages for tag in getattr(page, "tags", ())}
        found += [("TIFF field", name) for code, name in sorted(_TAGS.items()) if code in tags]
    except (tifffile.TiffFileError, SlideError, ValueError, KeyError, IndexError, TypeError):
        pass  # not a TIFF
    return found


def telling_name(stem: str) -> bool:
    """Whether a file name may identify a case or a person: it has a long number or two words.

    Examples
    --------
    >>> telling_name("Doe_John"), telling_name("a12"), telling_name("s-61c241981bc8d22bd45d")
    (True, False, False)
    """
    named = re.sub(r"\bs-[0-9a-f]{20}\b", "", stem)  # our own pseudonyms identify nobody
    return re.search(r"\d{4,}|[A-Za-z]{3,}[ _^-][A-Za-z]{3,}", named) is not None
