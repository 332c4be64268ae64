"""Phantoms: synthetic H&E slides of any size, whose tumours are known to the pixel.

Smooth fields say what lies where (glass, stroma, fat, tumour) and periodic textures how it looks there; both
give concentrations of haematoxylin and eosin, and light is absorbed as Beer and Lambert say:
``RGB = glass * exp(-concentrations @ stains)``. Every tile is drawn by itself, so memory does not grow with
the number of tiles. Nothing here resembles a patient: phantoms try and test the engine, and prove no more.
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
    """Write a phantom slide, and its truth as ``<stem>.truth.geojson`` beside it.

    The slide is an Aperio-like tiled pyramid: JPEG 4:2:0 with shared tables, levels 1, 4, 16, and 64 beyond
    32,768 px, each the area average of the one before. The same configuration gives the same bytes. Memory grows
    by about 300 bytes a pixel of width and not with height.

    Parameters
    ----------
    path : path
        Such as ``phantom.svs``; replaced, whole, if it is there.
    config : PhantomConfig, optional
        Default: 8,192 x 8,192 px at 0.5 mpp with three tumours.

    Returns
    -------
    Truth
        Outlines in level-0 pixels; the GeoJSON holds the same.

    Raises
    ------
    ValueError
        The tumours asked for find no room.
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
        # Named by the path asked for: the error's own may be a temporary one.
        raise OutputError.of(OSError(error.errno, error.strerror), path) from error
    return scene.truth


def _geojson(truth: Truth, config: PhantomConfig) -> dict[str, Any]:
    """Describe the truth as QuPath imports it: a feature an outline, in level-0 pixels."""
    features = []
    for part, (name, color) in _CLASSES.items():
        for number, outline in enumerate(getattr(truth, part).geoms):
            rings = [shapely.get_coordinates(ring).round(2).tolist() for ring in (outline.exterior, *outline.interiors)]
            features.append(
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{config}/{name}/{number}")),
                    "geometry": {"type": "Polygon", "coordinates": rings},
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": name, "color": list(color)},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}
