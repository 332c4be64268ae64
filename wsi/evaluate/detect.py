"""Lesion detections from a heatmap: a point and a confidence each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsi.errors import EvaluationError
from wsi.files import replacing
from wsi.heatmap import Heatmap
from wsi.metrics.estimate import F64


@dataclass(frozen=True)
class DetectConfig:
    """How detections are made from a heatmap.

    Attributes
    ----------
    method : str
        "nms", non-maximum suppression: take the highest cell, suppress the cells around it, repeat (Liu et al. 2017;
        NCRF, MONAI). "components": one detection per connected region, at its centroid (Wang et al. 2016).
    threshold : float
        Cells count above this (nms), or from this on (components).
    radius_um : float
        Half the side of the square that nms suppresses. 12 cells of 64 px at 0.243 um are 187 um.

    Raises
    ------
    EvaluationError
        A value is out of range.
    """

    method: str = "nms"
    threshold: float = 0.5
    radius_um: float = 187.0

    def __post_init__(self) -> None:
        if self.method not in ("nms", "components"):
            raise EvaluationError(f"detect={self.method!r}", "no such method", "nms or components")
        if not 0 <= self.threshold <= 1 or not 0 <= self.radius_um < 1e6:
            raise EvaluationError("detections", "the threshold goes from 0 to 1, the radius from 0 um")


def detect(
    heatmap: Heatmap, mpp: float, config: DetectConfig | None = None, *, size: tuple[int, int] | None = None
) -> F64:
    """Return detections, float64 (n, 3): confidence and integer x, y in level-0 pixels, by decreasing confidence.

    A detection is the centre of the part of its cell that a tile covers and that lies on the slide.

    Parameters
    ----------
    heatmap : Heatmap
    mpp : float
        Microns per level-0 pixel.
    config : DetectConfig, optional
    size : (int, int), optional
        Width and height of the slide in level-0 pixels: the last tiles may extend beyond it, where nothing is found.

    Examples
    --------
    >>> from wsi.grid import TileGrid
    >>> from wsi.units import Mpp
    >>> grid = TileGrid.cover((400, 200), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=100)
    >>> heatmap = Heatmap(grid, np.array([0.75, 0.25, 0.25, 0.875, 0, 0, 0, 0], np.float32))
    >>> detect(heatmap, 0.5, DetectConfig(radius_um=50)).tolist()
    [[0.875, 350.0, 50.0], [0.75, 50.0, 50.0]]
    """
    config = config or DetectConfig()
    raster = np.nan_to_num(heatmap.raster(), nan=-1.0)
    if not raster.size:
        return np.zeros((0, 3))
    step = np.array(heatmap.grid.stride)
    begin = [np.arange(n) * side for n, side in zip(raster.shape[::-1], step, strict=True)]
    end = [
        np.minimum(at + min(side, tile), whole)
        for at, side, tile, whole in zip(begin, step, heatmap.grid.tile, size or (np.inf, np.inf), strict=True)
    ]
    raster[end[1] <= begin[1]] = raster[:, end[0] <= begin[0]] = -1.0
    if config.method == "nms":
        # A radius of 0 still suppresses the cell itself.
        radius = tuple(round(config.radius_um / mpp / side) for side in step)
        cells = _suppressed(raster, config.threshold, radius)
    else:
        cells = _components(raster, config.threshold)
    found = np.zeros((len(cells), 3))
    for i, (row, column) in enumerate(cells):
        x, y = ((at[n] + to[n]) / 2 for at, to, n in zip(begin, end, (column, row), strict=True))
        found[i] = raster[row, column], math.floor(x), math.floor(y)
    return found[np.argsort(-found[:, 0], kind="stable")]


def _suppressed(raster: npt.NDArray[np.float32], threshold: float, radius: tuple[int, ...]) -> list[tuple[int, int]]:
    """Non-maximum suppression: the highest remaining cells; each suppresses `radius` = (x, y) cells around it."""
    struck = raster <= threshold
    chosen = []
    for cell in np.argsort(-raster, axis=None, kind="stable"):
        row, column = divmod(int(cell), raster.shape[1])
        if raster[row, column] <= threshold:
            break
        if not struck[row, column]:
            chosen.append((row, column))
            top, left = max(row - radius[1], 0), max(column - radius[0], 0)
            struck[top : row + radius[1] + 1, left : column + radius[0] + 1] = True
    return chosen


def _components(raster: npt.NDArray[np.float32], threshold: float) -> list[tuple[int, int]]:
    """The cell of each region nearest to its centroid (of equals the highest), so that the value is the region's."""
    labels, _ = ndimage.label(raster >= max(threshold, 0.0), np.ones((3, 3), bool))
    chosen = []
    for i, part in enumerate(ndimage.find_objects(labels), 1):
        row, column = np.nonzero(labels[part] == i)
        far = np.hypot(row - row.mean(), column - column.mean())
        value = raster[part][row, column]
        best = np.lexsort((-value, far.round(6)))[0]
        chosen.append((int(row[best] + part[0].start), int(column[best] + part[1].start)))
    return chosen


def write_detections(path: Path, detections: F64) -> None:
    """Write an official detection file: rows of ``confidence,x,y`` without header; an empty file for no detections.

    The folder is created. Confidences are float32 values and are written exactly, so that ties stay ties.

    Examples
    --------
    >>> write_detections(Path("test_001.csv"), detect(heatmap, 0.243))                            # doctest: +SKIP
    """
    lines = (f"{float(p)!r},{int(x)},{int(y)}\n" for p, x, y in detections.tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write("".join(lines).encode())
