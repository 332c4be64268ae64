"""Heatmaps as images: OME-TIFF, OME-Zarr, PNG.

A pixel is a grid step; pixel (column, row) begins exactly at ``(column * stride_x, row * stride_y)`` level-0 pixels of
the whole plane. Channels: the probability of the heatmap, then each class; NaN where there is no tile. The pyramid's
levels are means of the pixels that are not NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from wsi.errors import ResultsError
from wsi.export.pseudonym import pseudonym
from wsi.files import replacing
from wsi.heatmap import Heatmap
from wsi.scored import ScoredSlide, scored_slides
from wsi.store.multiscale import write_multiscale
from wsi.units import Mpp

F32 = npt.NDArray[np.float32]

_TILE_PX = 256
#: Levels are added until the longer side is at most this.
_LAST_LEVEL_PX = 256


@dataclass(frozen=True, eq=False)
class Raster:
    """A slide's heatmap as an image.

    Attributes
    ----------
    values : float32 (channels, rows, columns)
        NaN where there is no tile.
    channels : tuple of str
    step : (float, float)
        Width and height of a pixel in level-0 pixels.
    mpp : Mpp
        Microns per level-0 pixel.
    """

    values: F32
    channels: tuple[str, ...]
    step: tuple[float, float]
    mpp: Mpp

    @property
    def pixel_um(self) -> tuple[float, float]:
        """Width and height of a pixel in microns."""
        return self.step[0] * self.mpp.x, self.step[1] * self.mpp.y

    def levels(self) -> list[F32]:
        """Return the pyramid, finest level first; each pixel is the mean of up to four that are not NaN.

        Examples
        --------
        >>> values = np.full((1, 300, 2), np.nan, np.float32)
        >>> values[0, :3] = [[1, 2], [3, np.nan], [5, 5]]
        >>> fine, coarse = Raster(values, ("p",), (1.0, 1.0), Mpp(1, 1)).levels()
        >>> coarse.shape, coarse[0, :2, 0].tolist()
        ((1, 150, 1), [2.0, 5.0])
        """
        found = [self.values]
        while max(found[-1].shape[1:]) > _LAST_LEVEL_PX:
            c, h, w = found[-1].shape
            even = np.pad(found[-1], ((0, 0), (0, h % 2), (0, w % 2)), constant_values=np.nan)
            fours = even.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2)
            there = np.isfinite(fours)
            count = there.sum(axis=(2, 4))
            total = np.where(there, fours, 0).sum(axis=(2, 4))
            mean = np.full(count.shape, np.nan, np.float32)
            np.divide(total, count, out=mean, where=count > 0, casting="same_kind")
            found.append(mean)
        return found


def slide_raster(slide: ScoredSlide) -> Raster:
    """Draw a slide's probabilities as an image.

    Raises
    ------
    ResultsError
        No tile was scored.

    Examples
    --------
    >>> slide_raster(scored_slides(Path("results"))["slide_1"]).pixel_um                  # doctest: +SKIP
    (128.0, 128.0)
    """
    store = slide.store()
    tiles = slide.tiles(store)
    if not len(tiles.rows):
        raise ResultsError(slide.folder, "has no tile with a score", "Look at the warnings of its result.json")
    classes = zip(slide.class_names, tiles.probabilities.T, strict=True)
    maps = [(f"prob_{name}", Heatmap(tiles.grid, probability)) for name, probability in classes]
    if slide.positive.any():
        shown = Heatmap.of(tiles.grid, tiles.probabilities, slide.positive)
        maps.insert(0, (" or ".join(slide.numbers["positive_classes"]), shown))
    values = np.stack([heatmap.raster() for _, heatmap in maps])
    return Raster(values, tuple(name for name, _ in maps), tiles.grid.stride, slide.pixel_size(store))


def write_ome_tiff(path: Path, raster: Raster) -> None:
    """Write a tiled, pyramidal OME-TIFF with coarser levels in SubIFDs and pixel sizes in microns.

    QuPath (Bio-Formats) opens it as a separate image, napari with the right scale.

    Examples
    --------
    >>> write_ome_tiff(Path("heatmap.ome.tiff"), slide_raster(slide))                     # doctest: +SKIP
    """
    levels = raster.levels()
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "tile": (_TILE_PX, _TILE_PX),
        "compression": "zlib",
        "resolutionunit": "CENTIMETER",
        "software": "wsi",
        "metadata": None,
    }
    per_cm = 1e4 / raster.pixel_um[0], 1e4 / raster.pixel_um[1]
    with replacing(path) as file, tifffile.TiffWriter(file, byteorder="<") as tiff:
        for c in range(len(raster.channels)):
            about = _ome_xml(raster) if c == 0 else None
            tiff.write(levels[0][c], subifds=len(levels) - 1, description=about, resolution=per_cm, **options)
            for k, level in enumerate(levels[1:], 1):
                tiff.write(level[c], subfiletype=1, resolution=(per_cm[0] / 2**k, per_cm[1] / 2**k), **options)


def _ome_xml(raster: Raster) -> bytes:
    """OME-XML of 2016-06; not tifffile's, which has a new UUID in each file."""
    channels, height, width = raster.values.shape
    space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    root = ElementTree.Element("OME", {"xmlns": space})
    image = ElementTree.SubElement(root, "Image", {"ID": "Image:0", "Name": "heatmap"})
    size = {"SizeX": width, "SizeY": height, "SizeC": channels, "SizeZ": 1, "SizeT": 1}
    um = {"PhysicalSizeX": repr(raster.pixel_um[0]), "PhysicalSizeY": repr(raster.pixel_um[1])}
    units = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    kind = {"ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": "float", "BigEndian": "false"}
    pixels = ElementTree.SubElement(image, "Pixels", kind | {k: str(v) for k, v in size.items()} | um | units)
    for c, name in enumerate(raster.channels):
        about = {"ID": f"Channel:0:{c}", "Name": name, "SamplesPerPixel": "1"}
        ElementTree.SubElement(pixels, "Channel", about)
    for c in range(channels):
        place = {"IFD": str(c), "FirstC": str(c), "FirstZ": "0", "FirstT": "0", "PlaneCount": "1"}
        ElementTree.SubElement(pixels, "TiffData", place)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def write_png(path: Path, raster: Raster) -> None:
    """Write the first channel as viridis from 0 to 1, one pixel per grid step, transparent where there is no tile.

    Examples
    --------
    >>> write_png(Path("heatmap.png"), slide_raster(slide))                               # doctest: +SKIP
    """
    from matplotlib import colormaps

    values = raster.values[0]
    there = np.isfinite(values)
    colour = colormaps["viridis"](np.where(there, values, 0).clip(0, 1), bytes=True)
    colour[..., 3] = np.where(there, 255, 0)
    with replacing(path) as file:
        Image.fromarray(colour).save(file, format="png")


def export_rasters(
    results: Path, out: Path, kind: str, *, version: str = "0.5", key: bytes | None = None
) -> list[dict[str, Any]]:
    """Write the heatmaps of all slides of a results folder as images.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    out : Path
        Created if missing.
    kind : {"ome-tiff", "ome-zarr", "png"}
    version : {"0.4", "0.5"}
        The version of OME-Zarr.
    key : bytes, optional
        Slide ids are replaced by their pseudonyms.

    Returns
    -------
    list of dict
        A row per slide: ``slide_id``, ``size_px``, ``pixel_um``, ``warnings``.

    Raises
    ------
    ResultsError
        There are no results.
    ValueError
        An unknown kind or version.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> export_rasters(Path("results"), Path("heatmaps"), "ome-tiff")                     # doctest: +SKIP
    """
    if kind not in ("ome-tiff", "ome-zarr", "png"):
        raise ValueError(f"kind must be ome-tiff, ome-zarr or png, got {kind!r}")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for slide in scored_slides(results).values():
        name = pseudonym(slide.slide_id, key)
        try:
            raster = slide_raster(slide)
        except ResultsError as error:
            rows.append({"slide_id": name, "size_px": None, "pixel_um": None, "warnings": [error.what]})
            continue
        if kind == "ome-tiff":
            write_ome_tiff(out / f"{name}.ome.tiff", raster)
        elif kind == "png":
            write_png(out / f"{name}.png", raster)
        else:
            path = out / f"{name}.ome.zarr"
            write_multiscale(path, raster.levels(), raster.channels, step=raster.step, mpp=raster.mpp, version=version)
        h, w = raster.values.shape[1:]
        um = [float(f"{side:.7g}") for side in raster.pixel_um]
        rows.append({"slide_id": name, "size_px": [w, h], "pixel_um": um, "warnings": []})
    return rows
