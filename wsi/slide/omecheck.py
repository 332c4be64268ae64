"""Check OME-XML before tifffile reads it: tifffile allocates a list entry for every plane that it declares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import defusedxml.ElementTree

from wsi.errors import SlideUnreadable

MAX_PLANES = 1 << 16  #: of a file (sections x channels x time points), by each of the ways to count them


def check_ome(text: bytes, page_px: Sequence[int], where: str) -> None:
    """Refuse OME-XML with more than ``MAX_PLANES`` planes, axes other than OME's, or entities, which expand endlessly.

    `text` is the first page's description and `page_px` the number of pixels of each page. Raises SlideUnreadable. Text
    that is not XML passes, since no reader takes it for OME-XML.

    Examples
    --------
    >>> pixels = '<Pixels DimensionOrder="XYZCT" SizeX="9" SizeY="9" SizeC="3" SizeZ="%d" SizeT="1"/>'
    >>> check_ome(f"<OME><Image>{pixels % 1}</Image></OME>".encode(), [81], "a.tif")
    >>> check_ome(f"<OME><Image>{pixels % 10**9}</Image></OME>".encode(), [81], "a.tif")
    Traceback (most recent call last):
    wsi.errors.SlideUnreadable: a.tif: has an OME-XML of 3e+09 planes, more than 65536. Convert it to a tiled pyramidal
    TIFF
    """
    try:
        root = defusedxml.ElementTree.fromstring(text.rstrip(b"\0").decode("utf-8", "replace"))
    except defusedxml.ElementTree.ParseError:
        return
    except defusedxml.DefusedXmlException as error:
        raise _refuse(where, f"with {type(error).__name__}") from error
    planes = 0.0
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        if name.endswith("Pixels"):
            axes = element.get("DimensionOrder", "")
            if axes[:2] != "XY" or sorted(axes[2:]) != ["C", "T", "Z"]:
                raise _refuse(where, f"whose axes are {axes!r:.40}")
            planes += _planes(element, page_px)
        elif name[:-1].endswith("Along") and "Start" in element.attrib:
            start, end, step = _number(element, "Start"), _number(element, "End"), _number(element, "Step", 1)
            planes += abs((end - start) / step) if step else math.inf
        if not planes <= MAX_PLANES:
            raise _refuse(where, f"of {planes:.3g} planes, more than {MAX_PLANES}")


def _planes(pixels: Any, page_px: Sequence[int]) -> float:
    """Return how many planes a reader may count in a Pixels element: by sizes, TiffData, or the pages named there."""
    sizes = [max(1.0, abs(_number(pixels, f"Size{axis}"))) for axis in "XYZCT"]
    n, listed, used = len(page_px), 0.0, list[int]()
    for data in pixels:
        if data.tag.endswith("TiffData"):
            count = abs(_number(data, "PlaneCount", _number(data, "NumPlanes", "IFD" in data.attrib))) or n
            first = _number(data, "IFD")
            used += page_px[int(first) : int(first + min(count, n))] if 0 <= first < n else page_px
            listed += count
            if not listed <= MAX_PLANES:
                break
    return max(listed, math.prod(sizes[2:]), math.prod(sizes) / min(filter(None, used), default=math.inf))


def _number(element: Any, name: str, default: float = 0) -> float:
    try:
        return float(element.get(name, default))
    except ValueError:  # tifffile fails on it too
        return 0.0


def _refuse(where: str, what: str) -> SlideUnreadable:
    return SlideUnreadable(where, f"has an OME-XML {what}", "Convert it to a tiled pyramidal TIFF")
