"""One number a tile, shown on the slide: a raster, regions, a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import imagecodecs
import numpy as np
import numpy.typing as npt
import shapely

from wsi.files import replacing
from wsi.grid import TileGrid
from wsi.slide.base import U8, Slide
from wsi.tissue import mask_polygons
from wsi.units import Box, Mpp

#: Opacity of the lowest and of the highest value.
_ALPHA = (0.25, 0.65)
#: Red, green, blue and opacity of tiles without values.
_TINT = (0.0, 0.35, 0.9, 0.25)
#: Least length of a figure's longer side; smaller pictures are enlarged. And the default maximum.
_MIN_LONG_SIDE_PX, _LONG_SIDE_PX = 800, 1600
_DPI = 100


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Values on a grid of tiles.

    Attributes
    ----------
    grid : TileGrid
    values : float32 (n,)
        One finite number for each tile of `grid`.

    Raises
    ------
    ValueError
        Not one finite number a tile.

    Examples
    --------
    >>> grid = TileGrid.cover((400, 200), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=200)
    >>> heatmap = Heatmap(grid, np.array([0.2, 0.9], np.float32))
    >>> heatmap.raster()
    array([[0.2, 0.9]], dtype=float32)
    >>> [region.bounds for region in heatmap.regions(0.5, Box(0, 0, 400, 200))]
    [(200.0, 0.0, 400.0, 200.0)]
    """

    grid: TileGrid
    values: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float32)
        if values.shape != (len(self.grid),):
            raise ValueError(f"a heatmap of {len(self.grid)} tiles needs that many values, got {values.shape}")
        if not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise ValueError(f"a heatmap needs finite values, got {bad} that are not")
        object.__setattr__(self, "values", values)

    @classmethod
    def of(cls, grid: TileGrid, probabilities: npt.NDArray[Any], positive: npt.NDArray[np.bool_] | list[int]) -> Self:
        """Make a heatmap of the summed probability (n, k) of some classes, given as indices or as bool (k,)."""
        return cls(grid, probabilities[:, positive].sum(axis=1).clip(0, 1))

    def raster(self) -> npt.NDArray[np.float32]:
        """Return the values as an image.

        A cell is one stride step; cell (r, c) begins at ``(c * stride_x, r * stride_y)`` level-0 pixels. Overlapping
        tiles share cells: a cell is the mean of the tiles on it, weighted by how much of the cell each covers.

        Returns
        -------
        float32 (rows, columns)
            NaN where there is no tile.
        """
        reach = [tile / stride for tile, stride in zip(self.grid.tile, self.grid.stride, strict=True)]
        # Rounded first: a tile of 3.0000000001 strides covers three cells.
        steps_x, steps_y = (math.ceil(round(r, 6)) for r in reach)
        rows, columns = self.grid.rows, self.grid.columns
        shape = (int(rows.max(initial=-steps_y)) + steps_y, int(columns.max(initial=-steps_x)) + steps_x)
        total, weight = np.zeros(shape), np.zeros(shape)
        for j, i in product(range(steps_y), range(steps_x)):
            covered = min(reach[0] - i, 1.0) * min(reach[1] - j, 1.0)
            np.add.at(total, (rows + j, columns + i), covered * self.values)
            np.add.at(weight, (rows + j, columns + i), covered)
        mean = np.full(shape, np.nan, np.float32)
        np.divide(total, weight, out=mean, where=weight > 0, casting="same_kind")
        return mean

    def regions(self, threshold: float, within: Box) -> list[shapely.Polygon]:
        """Return the areas where the raster is at least `threshold`; where there are gaps between tiles, the tiles.

        Parameters
        ----------
        threshold : float
        within : Box
            Regions are clipped to it. Usually ``slide.bounds``, since the last tiles may extend beyond the slide.

        Returns
        -------
        list of shapely.Polygon
            Level-0 pixels; valid, with holes. Cells that share an edge are one region, cells that share only a corner
            are not. Sorted by falling area, then x and y.
        """
        limit = shapely.box(within.x, within.y, within.x + within.w, within.y + within.h)
        if any(t < s * (1 - 1e-9) for t, s in zip(self.grid.tile, self.grid.stride, strict=True)):  # gaps between tiles
            shapes = list(self.grid.keep(self.values >= threshold).polygons())
        else:
            stride = np.array(self.grid.stride)
            with np.errstate(invalid="ignore"):
                cells = mask_polygons(self.raster() >= threshold)
            shapes = [shapely.transform(cell, lambda xy: xy * stride) for cell in cells]
        clipped = shapely.intersection(shapes, limit)
        # Clipping may split a region, and leaves a line where one only touches the limit.
        parts = [part for part in shapely.get_parts(clipped) if part.geom_type == "Polygon" and part.area > 0]
        return sorted(parts, key=lambda p: (-p.area, *p.bounds))


def major_axis_um(polygon: shapely.Polygon | shapely.MultiPolygon, mpp: Mpp) -> float:
    """Return the longest Feret diameter in microns: the largest distance between two points of the outline.

    `polygon` is in level-0 pixels; the diameter of an empty one is 0.

    Examples
    --------
    >>> major_axis_um(shapely.box(0, 0, 30, 40), Mpp(0.5, 0.5))
    25.0
    """
    # The farthest points are corners of the convex hull, which are few even for large regions.
    hull = shapely.get_coordinates(shapely.convex_hull(polygon)) * np.array(mpp)
    return max((float(np.hypot(*(hull - point).T).max()) for point in hull), default=0.0)


def save_overlay(
    path: str | os.PathLike[str],
    slide: Slide,
    heatmap: Heatmap | None,
    *,
    regions: Sequence[shapely.Polygon] = (),
    tissue_outlines: Sequence[shapely.Polygon] = (),
    tiles: TileGrid | None = None,
    label: str = "score",
    threshold: float | None = None,
    long_side_px: int = _LONG_SIDE_PX,
) -> None:
    """Write a PNG of the slide with its heatmap, outlines, a scale bar and a colour bar.

    Shows only ``slide.bounds``, and never the label or macro image. The same input gives the same bytes.

    Parameters
    ----------
    path : path
        Written to a temporary file and renamed, so that it is complete or absent.
    slide : Slide
    heatmap : Heatmap, optional
    regions, tissue_outlines : sequence of shapely.Polygon
        Level-0 pixels; drawn with a heavy and a thin line.
    tiles : TileGrid, optional
        Tinted where there is no heatmap.
    label : str
        Meaning of the colours, which range from 0 to 1.
    threshold : float, optional
        Marked on the colour bar.
    long_side_px : int
        Pixels along the longer side of the slide; fewer where the slide has fewer.

    Raises
    ------
    SlideUnreadable
        The slide is damaged.
    OSError
        The picture cannot be written.

    Examples
    --------
    >>> save_overlay("overlay.png", slide, heatmap, regions=heatmap.regions(0.5, slide.bounds),   # doctest: +SKIP
    ...              label="tumour probability")
    """
    # The object interface has no global state and keeps no figure alive; matplotlib is loaded only when needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    bounds = slide.bounds
    shrink = min(1.0, long_side_px / max(bounds.w, bounds.h))
    size = max(1, round(bounds.w * shrink)), max(1, round(bounds.h * shrink))
    picture = slide.read(bounds, size, damage=[])
    colours = _colours()
    if heatmap is not None:
        picture = _blend(picture, heatmap, bounds, colours)
    elif tiles is not None:
        picture = _blend(picture, Heatmap(tiles, np.zeros(len(tiles), np.float32)), bounds, np.array([_TINT]))

    # Laid out in pixels, so that a pixel of the picture is one of the figure.
    zoom = max(1, math.ceil(_MIN_LONG_SIDE_PX / max(size)))
    w, h = size[0] * zoom, size[1] * zoom
    margin, bar_w, caption_h = 24, 150 if heatmap is not None else 24, 64
    full_w, full_h = max(margin + w + bar_w, 560), max(margin + h + caption_h, 320)
    figure = Figure(figsize=(full_w / _DPI, full_h / _DPI), dpi=_DPI, facecolor="none")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((margin / full_w, (full_h - margin - h) / full_h, w / full_w, h / full_h))
    axes.set(xlim=(bounds.x, bounds.x + bounds.w), ylim=(bounds.y + bounds.h, bounds.y))
    axes.set(xticks=[], yticks=[], facecolor="none")
    for spine in axes.spines.values():
        spine.set(color="0.6", linewidth=0.8)

    _draw_outlines(axes, tissue_outlines, (("#1a1a1a", 0.9),), "tissue")
    _draw_outlines(axes, regions, (("white", 3.6), ("#c2003d", 1.8)), "positive region")
    if heatmap is None and tiles is not None:
        axes.add_line(Line2D([], [], color=_TINT[:3], alpha=_TINT[3], linewidth=9, label="tiles"))
    _draw_scale_bar(axes, bounds, slide.mpp, px_per_level0=w / bounds.w)
    if heatmap is not None:
        bar_h = min(h, 360)
        place = ((margin + w + 22) / full_w, (full_h - margin - bar_h) / full_h, 18 / full_w, bar_h / full_h)
        _draw_colour_bar(figure.add_axes(place), colours, label, threshold)
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        figure.legend(
            handles=handles, loc="center left", bbox_to_anchor=(margin / full_w, 30 / full_h), ncols=2,
            borderaxespad=0, borderpad=0, frameon=False, fontsize=12,
        )  # fmt: skip
    corner = (full_w - margin) / full_w, 30 / full_h
    figure.text(*corner, "Research use only", ha="right", va="center", fontsize=12, color="0.35")

    sheet = np.full((full_h, full_w, 3), 255, np.uint8)
    sheet[margin : margin + h, margin : margin + w] = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    canvas.draw()
    _paste(np.asarray(canvas.buffer_rgba()), sheet)
    with replacing(path) as file:
        # PNG's filter "average" (PNG, 9.2) gives a smaller file than Pillow's in half the time.
        file.write(imagecodecs.png_encode(sheet, level=1, filter=imagecodecs.PNG.FILTER.AVG))


def overlay_bytes(slide: Slide) -> int:
    """Estimate the size of ``save_overlay``'s file: two bytes a pixel, as for stained tissue."""
    shrink = min(1.0, _LONG_SIDE_PX / max(slide.bounds.w, slide.bounds.h))
    return round(2 * slide.bounds.w * shrink * slide.bounds.h * shrink)


def _colours() -> npt.NDArray[np.float64]:
    """Colour and opacity of 256 steps from 0 to 1, float64 (256, 4).

    Viridis is perceptually uniform, also for the colour-blind and in greyscale print.
    """
    from matplotlib import colormaps

    steps = np.linspace(0, 1, 256)
    colours = np.array(colormaps["viridis"](steps))
    colours[:, 3] = _ALPHA[0] + (_ALPHA[1] - _ALPHA[0]) * steps
    return colours


def _blend(picture: U8, heatmap: Heatmap, bounds: Box, colours: npt.NDArray[np.float64]) -> U8:
    """Blend the raster into the picture of `bounds`; a pixel takes the cell that contains its centre."""
    raster = heatmap.raster()
    cells = []
    for n, start, length, stride, tile, last in zip(
        picture.shape[:2],
        (bounds.y, bounds.x),
        (bounds.h, bounds.w),
        heatmap.grid.stride[::-1],
        heatmap.grid.tile[::-1],
        raster.shape,
        strict=True,
    ):
        position = (start + (np.arange(n) + 0.5) * (length / n)) / stride
        cell = np.floor(position).astype(np.intp)
        # Index `last` is an extra row or column without a tile: outside the grid, and in the gaps of a long stride.
        on_tile = (cell >= 0) & (cell < last) & (position - cell < tile / stride)
        cells.append(np.where(on_tile, cell, last))
    values = np.pad(raster, ((0, 1), (0, 1)), constant_values=np.nan)
    scored = ~np.isnan(values)
    bare = len(colours)  # step of cells without a score, which stay as they are
    steps = np.full(values.shape, bare, np.intp)
    steps[scored] = np.rint(np.clip(values[scored], 0, 1) * (bare - 1))
    # A table of all possible results, (steps, levels, channels), is several times faster than blending pixels.
    colours = np.vstack([colours, np.zeros(4)])[:, None]
    levels = np.arange(256.0)[:, None]
    table = np.rint(levels * (1 - colours[..., 3:]) + 255 * colours[..., :3] * colours[..., 3:]).astype(np.uint8)
    step = steps[np.ix_(*cells)] * 256
    return np.stack([table[..., c].ravel()[step + picture[..., c]] for c in range(3)], axis=2)


def _paste(drawn: U8, sheet: U8) -> None:
    """Blend a drawing, uint8 (rows, columns, 4), onto a sheet in place; matplotlib would resample the sheet."""
    ink = np.flatnonzero(drawn[..., 3])
    rgba, under = drawn.reshape(-1, 4)[ink].astype(np.uint32), sheet.reshape(-1, 3)
    under[ink] = (rgba[:, :3] * rgba[:, 3:] + under[ink] * (255 - rgba[:, 3:]) + 127) // 255


def _draw_colour_bar(axes: Any, colours: npt.NDArray[np.float64], label: str, threshold: float | None) -> None:
    """Draw the colours as they look over white glass, with the threshold marked."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    on_white = ListedColormap(colours[:, :3] * colours[:, 3:] + 1 - colours[:, 3:])
    bar = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), on_white), cax=axes)
    if threshold is not None:
        label += f"\nthreshold {threshold:.4g}"
        across = bar.ax.get_yaxis_transform()  # wider than the bar: visible on every colour
        bar.ax.plot([-0.3, 1.3], [threshold] * 2, transform=across, clip_on=False, color="black", linewidth=1.6)
    bar.set_label(label, fontsize=12)
    bar.ax.tick_params(labelsize=11, width=0.8)
    bar.outline.set(edgecolor="0.6", linewidth=0.8)


def _draw_outlines(
    axes: Any, polygons: Sequence[shapely.Polygon], strokes: Sequence[tuple[str, float]], label: str
) -> None:
    """Draw outlines with holes; several strokes make a cased line, which is visible on light and dark."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    rings = [shapely.get_coordinates(ring) for ring in shapely.get_rings(np.array(polygons, object))]
    if not rings:
        return
    for colour, width in strokes:
        axes.add_collection(LineCollection(rings, colors=colour, linewidths=width), autolim=False)
    axes.add_line(Line2D([], [], color=strokes[-1][0], linewidth=strokes[-1][1], label=label))


def _draw_scale_bar(axes: Any, bounds: Box, mpp: Mpp, px_per_level0: float) -> None:
    """Draw a bar of a round length, about a fifth of the width, in the lower left corner."""
    from matplotlib.patches import Rectangle

    length_um = _round_length(bounds.w * mpp.x / 5)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    px = 1 / px_per_level0
    length = length_um / mpp.x
    plate = max(length, 64 * px) + 24 * px
    left, bottom = bounds.x + 14 * px, bounds.y + bounds.h - 14 * px
    axes.add_patch(Rectangle((left, bottom), plate, -46 * px, facecolor="white", alpha=0.8, edgecolor="none"))
    start = left + (plate - length) / 2
    axes.add_patch(Rectangle((start, bottom - 10 * px), length, -5 * px, facecolor="black", edgecolor="none"))
    axes.text(left + plate / 2, bottom - 20 * px, text, ha="center", va="bottom", fontsize=12, color="black")


def _round_length(length: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, ... that is not longer."""
    power = 10.0 ** math.floor(math.log10(length))
    return max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9))
