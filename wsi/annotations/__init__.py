"""What people drew on slides: outlines in level-0 pixels, whatever program wrote them.

::

    base       Annotation
    asap       ASAP's XML (CAMELYON)
    geojson    QuPath's GeoJSON
    mask       mask images: TIFF pyramids, PNG
    areas      which outlines are lesions, which are holes in them; and their raster

A further format is one more file with a ``read``, and its line in ``READERS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from wsi.annotations import asap, geojson, mask
from wsi.annotations.areas import LesionArea, lesion_area, rasterize
from wsi.annotations.base import Annotation
from wsi.annotations.mask import read_mask
from wsi.errors import AnnotationError

__all__ = ["READERS", "Annotation", "LesionArea", "lesion_area", "rasterize", "read_annotations", "read_mask"]

Reader = Callable[[Path, tuple[float, float]], list[Annotation]]

#: Who reads what, by the end of the name.
READERS: dict[str, Reader] = {
    ".xml": asap.read,
    ".geojson": geojson.read,
    ".geojson.gz": geojson.read,
    ".json": geojson.read,
    ".tif": mask.read,
    ".tiff": mask.read,
    ".png": mask.read,
}


def read_annotations(path: str | os.PathLike[str], *, origin: tuple[float, float] = (0.0, 0.0)) -> list[Annotation]:
    """Read the annotations of one slide.

    Parameters
    ----------
    path : path
        ASAP XML, QuPath GeoJSON (also gzipped), or a mask image whose first level is as large as the slide.
    origin : (float, float)
        Added to GeoJSON's coordinates: the corner of the slide's ``bounds``, from which QuPath counts. The other
        formats count from the corner of the whole slide.

    Returns
    -------
    list of Annotation
        In the file's order, level-0 pixels; polygons are valid. Empty where the file holds none.

    Raises
    ------
    AnnotationError
        Unknown format, damaged, hostile (entities in XML), or coordinates that are no numbers.
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
            return read(path, origin)
    raise AnnotationError(path, "is of no format that is known", f"Known: {' '.join(READERS)}")
