"""Annotations drawn on slides, read from many programs as outlines in level-0 pixels.

::

    base       Annotation, Frame
    xml        ASAP (CAMELYON), ImageScope, HALO, NDP.view
    geojson    QuPath's GeoJSON
    viewers    Darwin V7, Sectra, Cytomine, HistomicsTK
    mask       mask images: TIFF pyramids, PNG
    areas      lesions minus holes as one area, and its raster
    convert    to QuPath's GeoJSON, or to a mask for scoring

A new format is a function ``read(path, frame)`` and a line in ``READERS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from wsi.annotations import geojson, mask, viewers, xml
from wsi.annotations.areas import LesionArea, lesion_area, rasterize
from wsi.annotations.base import Annotation, Frame
from wsi.annotations.mask import read_mask
from wsi.errors import AnnotationError

__all__ = ["READERS", "Annotation", "Frame", "LesionArea", "lesion_area", "rasterize", "read_annotations", "read_mask"]

Reader = Callable[[Path, Frame], list[Annotation]]

#: Readers by the end of the file name.
READERS: dict[str, Reader] = {
    ".xml": xml.read,
    ".xml.gz": xml.read,
    ".annotations": xml.read,
    ".ndpa": xml.read,
    ".geojson": geojson.read,
    ".geojson.gz": geojson.read,
    ".json": viewers.read,
    ".json.gz": viewers.read,
    ".txt": viewers.read,
    ".zip": geojson.read_zip,
    ".tsv": viewers.read_table,
    ".tif": mask.read,
    ".tiff": mask.read,
    ".png": mask.read,
}


def read_annotations(
    path: str | os.PathLike[str], *, origin: tuple[float, float] = (0.0, 0.0), frame: Frame | None = None
) -> list[Annotation]:
    """Read the annotations of one slide.

    Parameters
    ----------
    path : path
        XML of ASAP, ImageScope, HALO or NDP.view; GeoJSON of QuPath and others, also gzipped or in a zip; JSON of
        Darwin V7, Sectra or Cytomine; contours of HistomicsTK; or a mask image whose first level is as large as the
        slide.
    origin : (float, float)
        Added to GeoJSON's coordinates: the corner of the slide's ``bounds``, from which QuPath counts. Other formats
        count from the corner of the whole plane.
    frame : Frame, optional
        Geometry of the slide, instead of `origin`; Sectra, Cytomine and NDP.view need it.

    Returns
    -------
    list of Annotation
        In the file's order, in level-0 pixels; polygons are valid. Empty if the file holds none.

    Raises
    ------
    AnnotationError
        The format is unknown, the file is damaged or hostile (entities in XML, more than 256 MiB unpacked), a
        coordinate is not a number, or the format's coordinates depend on the slide and `frame` lacks it.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> for annotation in read_annotations("tumor_001.xml"):                              # doctest: +SKIP
    ...     print(annotation.group, annotation.geometry.area)
    """
    path = Path(path)
    for suffix, read in READERS.items():
        if path.name.lower().endswith(suffix):
            return read(path, frame or Frame(origin))
    raise AnnotationError(path, "is of an unknown format", f"Known: {' '.join(READERS)}")
