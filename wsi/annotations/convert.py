"""Anybody's outlines to GeoJSON that QuPath reads, and that we read back; or to a mask that says where to look."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import shapely
from PIL import Image

from wsi.annotations.areas import rasterize
from wsi.annotations.base import Annotation
from wsi.export.qupath import PathClass, Region, write_regions
from wsi.files import collector_paused, replacing
from wsi.slide import Slide
from wsi.tissue import find_tissue
from wsi.units import Box

#: QuPath's own classes keep its colours; others get one of these by the order in which they come.
_KNOWN_RGB = {"tumor": (200, 0, 0), "stroma": (150, 200, 150), "necrosis": (50, 50, 50), "other": (255, 200, 0)}
_RGB = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))
#: Groups that say where not to look, as QuPath, ASAP and CAMELYON call them; any other says where to.
EXCLUDED = ("exclusion", "exclude", "ignore", "ignore*", "_2")
_MAX_MASK_PX = 50_000_000


def write_annotations(
    path: str | os.PathLike[str],
    annotations: Sequence[Annotation],
    *,
    bounds: Box | None = None,
    slide_id: str,
    classes: Mapping[str, str] | None = None,
) -> int:
    """Write annotations as QuPath's GeoJSON; ``read_annotations`` gives them back.

    Parameters
    ----------
    path : path
        Gzipped when the name ends in ``.gz``.
    annotations : sequence of Annotation
        Level-0 pixels.
    bounds : Box, optional
        The slide's ``bounds``, from whose corner coordinates then count. Nothing is clipped to it.
    slide_id : str
        Identifiers are made of it and the annotation's position.
    classes : mapping of str to str, optional
        What groups are called instead.

    Returns
    -------
    int
        How many were written: what is smaller than a pixel is nothing to QuPath.

    Raises
    ------
    ValueError
        A group that can be no class of QuPath: a line break in it.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> write_annotations("a.geojson", read_annotations("a.xml"), slide_id="a")                    # doctest: +SKIP
    """
    names = [(classes or {}).get(each.group, each.group).strip() for each in annotations]
    kinds = {}
    for i, name in enumerate(dict.fromkeys(filter(None, names))):
        kinds[name] = PathClass(name, _KNOWN_RGB.get(name.lower(), _RGB[i % len(_RGB)]))
    regions = (Region(a.geometry, kinds.get(name), a.name) for a, name in zip(annotations, names, strict=True))
    with collector_paused():
        return write_regions(path, regions, bounds=bounds or Box(0, 0, 0, 0), slide_id=slide_id, clip=False)


def write_mask(path: str | os.PathLike[str], annotations: Sequence[Annotation], slide: Slide) -> float:
    """Write where to look on a slide, for the column ``mask`` of a manifest.

    That is tissue, within outlines if there are any, and in none whose group is one of ``EXCLUDED`` (upper or lower
    case). Points and lines say nothing.

    Parameters
    ----------
    path : path
        A PNG of the whole level-0 plane, white where to look, as fine as tissue is looked for.
    annotations : sequence of Annotation
        Level-0 pixels.
    slide : Slide

    Returns
    -------
    float
        What is left of the tissue, in square millimetres.

    Raises
    ------
    SlideError
        The slide cannot be read.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> write_mask("a.png", read_annotations("a.geojson"), slide)                                  # doctest: +SKIP
    12.7
    """
    areas = [(each.group.lower() in EXCLUDED, each.geometry) for each in annotations if each.geometry.area > 0]
    tissue = find_tissue(slide)
    left = shapely.union_all([shapely.make_valid(outline) for outline in tissue.outlines()])
    where = [geometry for excluded, geometry in areas if not excluded]
    if where:
        left = shapely.intersection(left, shapely.union_all(where))
    left = shapely.difference(left, shapely.union_all([geometry for excluded, geometry in areas if excluded]))
    width, height = slide.size
    w = round(width / max(tissue.box.w / tissue.mask.shape[1], (width * height / _MAX_MASK_PX) ** 0.5))
    shown = rasterize(left, (w, max(1, round(height * w / width))), width / w, at=0.5)
    with replacing(path) as file:
        Image.fromarray(shown).save(file, format="png")
    return slide.mpp.area_um2(left.area) / 1e6
