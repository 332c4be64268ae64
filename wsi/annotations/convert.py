"""Write annotations as QuPath's GeoJSON, or as a mask of the region to score."""

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

#: Colours: those of QuPath for its own classes; for others the next one in this list.
_KNOWN_RGB = {"tumor": (200, 0, 0), "stroma": (150, 200, 150), "necrosis": (50, 50, 50), "other": (255, 200, 0)}
_RGB = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (90, 90, 90))
#: Groups of areas to exclude, as QuPath, ASAP and CAMELYON call them; all others are areas to include.
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
        Gzipped if the name ends in ``.gz``.
    annotations : sequence of Annotation
        Level-0 pixels.
    bounds : Box, optional
        The slide's ``bounds``; coordinates are relative to its corner, and not clipped to it.
    slide_id : str
        Object ids are derived from it and the annotation's number.
    classes : mapping of str to str, optional
        New names of groups.

    Returns
    -------
    int
        Annotations written: those smaller than a pixel are left out, since QuPath cannot show them.

    Raises
    ------
    ValueError
        A group's name cannot be a QuPath class, because it contains a line break.
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
    """Write the region to score as a mask image, for the column ``mask`` of a manifest.

    The region is the tissue, restricted to the annotated areas if there are any, minus the areas whose group is in
    ``EXCLUDED`` (ignoring case). Points and lines are ignored.

    Parameters
    ----------
    path : path
        A PNG of the whole level-0 plane, white in the region, at the resolution of tissue detection.
    annotations : sequence of Annotation
        Level-0 pixels.
    slide : Slide

    Returns
    -------
    float
        Area of the region in square millimetres.

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
