"""Phantoms: synthetic H&E slides of any size with exactly known tumour outlines.

Smooth fields define where glass, stroma, fat and tumour lie, and periodic textures their appearance. Both give
concentrations of haematoxylin and eosin, from which the colours follow by the Beer-Lambert law:
``RGB = glass * exp(-concentrations @ stains)``. Tiles are drawn independently, so that memory does not grow with
their number. Phantoms test the engine, and are no evidence for performance on patients' slides.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

import shapely

from wsi.errors import OutputError
from wsi.files import replacing
from wsi.phantom.scene import PhantomConfig, Scene, Truth
from wsi.phantom.svs import write_svs

__all__ = ["PhantomConfig", "Truth", "write_phantom"]

_CLASSES = {"tissue": ("Tissue", (150, 200, 150)), "tumours": ("Tumor", (200, 0, 0)), "pen": ("Pen", (90, 90, 90))}


def write_phantom(path: str | Path, config: PhantomConfig | None = None) -> Truth:
    """Write a phantom slide, and its outlines as ``<stem>.truth.geojson`` beside it.

    The slide is an Aperio-like tiled pyramid: JPEG 4:2:0 with shared tables, levels 1, 4, 16, and 64 beyond
    32,768 px, each the area average of the one before. The same configuration gives the same bytes. Memory grows
    by about 300 bytes a pixel of width, and not with height.

    Parameters
    ----------
    path : path
        Such as ``phantom.svs``; an existing file is replaced.
    config : PhantomConfig, optional
        Default: 8,192 x 8,192 px at 0.5 mpp with three tumours.

    Returns
    -------
    Truth
        Outlines in level-0 pixels, as in the GeoJSON.

    Raises
    ------
    ValueError
        There is no room for the tumours.
    OutputError
        `path` cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     truth = write_phantom(f"{folder}/phantom.svs", PhantomConfig(size=(2048, 1024), tumours=2))
    >>> len(truth.tumours.geoms), truth.tissue.contains(truth.tumours.buffer(-1))
    (2, True)
    """
    path, config = Path(path), config or PhantomConfig()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            scene = Scene(config)
            with Path(scratch, "spool").open("w+b") as spool:
                write_svs(Path(scratch, "slide"), spool, scene, config)
            Path(scratch, "slide").replace(path)
        with replacing(path.with_name(f"{path.stem}.truth.geojson")) as file:
            file.write(json.dumps(_geojson(scene.truth, config), separators=(",", ":")).encode())
    except OSError as error:
        # Name the requested path: the error's own may be a temporary one.
        raise OutputError.of(OSError(error.errno, error.strerror), path) from error
    return scene.truth


def _geojson(truth: Truth, config: PhantomConfig) -> dict[str, Any]:
    """Return the outlines as QuPath imports them: one feature each, in level-0 pixels."""
    features = []
    for part, (name, color) in _CLASSES.items():
        for number, outline in enumerate(getattr(truth, part).geoms):
            rings = [shapely.get_coordinates(ring).round(2).tolist() for ring in (outline.exterior, *outline.interiors)]
            identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{config}/{name}/{number}"))
            geometry = {"type": "Polygon", "coordinates": rings}
            properties = {"objectType": "annotation", "classification": {"name": name, "color": list(color)}}
            features.append({"type": "Feature", "id": identity, "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}
