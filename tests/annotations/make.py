"""Annotation files to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shapely
import tifffile


def asap_xml(path: Path, shapes: list[tuple[shapely.Polygon, str]], *, kind: str = "Polygon") -> Path:
    """Write outlines as ASAP does; coordinates in reverse, so that a reader must heed their order."""
    parts = ["<?xml version='1.0'?><ASAP_Annotations><Annotations>"]
    for i, (shape, group) in enumerate(shapes):
        points = list(enumerate(shape.exterior.coords[:-1]))[::-1]
        coordinates = "".join(f'<Coordinate Order="{n}" X="{x!r}" Y="{y!r}"/>' for n, (x, y) in points)
        parts.append(
            f'<Annotation Name="Annotation {i}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{coordinates}</Coordinates></Annotation>"
        )
    groups = "".join(f'<Group Name="{g}" PartOfGroup="None" Color="#000"/>' for g in {g for _, g in shapes})
    parts.append(f"</Annotations><AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>")
    path.write_text("".join(parts))
    return path


def mask_tiff(path: Path, mask: np.ndarray, *, levels: int = 1) -> Path:
    """Write a pyramid by nearest neighbour, a page a level."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            part = mask[:: 2**level, :: 2**level]
            tiff.write(part, tile=(64, 64), compression="zlib", subfiletype=1 if level else 0, metadata=None)
    return path
