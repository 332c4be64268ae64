"""Results as QuPath objects: classes with colours, measurements of tiles, positive regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi.export.qupath import PathClass, Region
from wsi.heatmap import Heatmap, major_axis_um
from wsi.scored import ScoredSlide, ScoredTiles
from wsi.units import Mpp

TISSUE = PathClass("Tissue", (150, 200, 150))
#: Colours of classes: positive ones like QuPath's built-in Tumor, the others clearly different.
_POSITIVE_RGB = ((200, 0, 0), (200, 0, 200), (220, 110, 0), (120, 0, 60))
_OTHER_RGB = ((120, 170, 220), (150, 200, 150), (160, 90, 160), (255, 200, 0), (50, 50, 50), (90, 140, 90))


def path_classes(names: Sequence[str], positive: Sequence[str]) -> list[PathClass]:
    """Return the classes of tiles, positive ones red.

    Examples
    --------
    >>> [each.color for each in path_classes(["stroma", "tumour"], ["tumour"])]
    [(120, 170, 220), (200, 0, 0)]
    """
    others = [name for name in names if name not in positive]
    colours = {name: _POSITIVE_RGB[i % len(_POSITIVE_RGB)] for i, name in enumerate(positive)}
    colours |= {name: _OTHER_RGB[i % len(_OTHER_RGB)] for i, name in enumerate(others)}
    return [PathClass(name, colours[name]) for name in names]


def tissue_regions(outlines: Sequence[shapely.Polygon], mpp: Mpp) -> list[Region]:
    """Return the pieces of tissue as annotations with their areas; `outlines` in level-0 pixels."""
    return [
        Region(outline, TISSUE, f"Tissue {i}", {"area_mm2": mpp.area_um2(outline.area) / 1e6})
        for i, outline in enumerate(outlines, 1)
    ]


def classes_of(slide: ScoredSlide) -> list[PathClass]:
    """Return the classes of a slide's tiles."""
    return path_classes(slide.class_names, slide.numbers.get("positive_classes") or ())


def percentile_rank(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the percentage of tiles with less attention; ties share the lowest rank.

    Attention sums to one over a slide, so that only its rank can be compared between slides.

    Examples
    --------
    >>> percentile_rank(np.array([0.1, 0.5, 0.2, 0.2])).tolist()
    [0.0, 75.0, 25.0, 25.0]
    """
    return np.asarray(np.searchsorted(np.sort(values), values) * (100 / max(len(values), 1)), np.float64)


def probabilities_alone(
    names: Sequence[str], positive: npt.NDArray[np.bool_], alone: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Return the positive classes' probabilities without context, from `alone` (n, k), as measurements."""
    return {f"prob_{names[i]}_alone": alone[:, i] for i in np.flatnonzero(positive).tolist()}


def measurements(slide: ScoredSlide, tiles: ScoredTiles) -> dict[str, npt.NDArray[Any]]:
    """Return the measurements of tiles: probabilities, their uncertainty, and the percentile of attention.

    With context (``wsi.context``), also the probabilities without it. The uncertainty is the entropy of the
    probabilities over that of the uniform distribution: 0 to 1.
    """
    p = tiles.probabilities
    found: dict[str, npt.NDArray[Any]] = {f"prob_{name}": p[:, i] for i, name in enumerate(slide.class_names)}
    if p.shape[1] > 1:
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1)
        found["uncertainty"] = (entropy / np.log(p.shape[1])).clip(0, 1) + 0.0  # no -0
    if tiles.alone is not None:
        found |= probabilities_alone(slide.class_names, slide.positive, tiles.alone)
    if tiles.attention is not None:
        found["attention_percentile"] = percentile_rank(tiles.attention)
    return found


def positive_regions(
    outlines: Sequence[shapely.Polygon], heatmap: Heatmap, *, positive: Sequence[str], path_class: PathClass, mpp: Mpp
) -> list[Region]:
    """Return positive regions with their size and the probabilities of the tiles whose centres they contain.

    Parameters
    ----------
    outlines : sequence of shapely.Polygon
        Level-0 pixels.
    heatmap : Heatmap
        The probability of the positive classes.
    positive : sequence of str
        Their names give the regions' names.
    """
    boxes = heatmap.grid.boxes()
    centres = shapely.points(boxes[:, :2] + boxes[:, 2:] / 2)
    region, tile = shapely.STRtree(centres).query(np.array(outlines, object), predicate="contains")
    order = np.lexsort((tile, region))
    inside = np.split(heatmap.values[tile[order]], np.cumsum(np.bincount(region, minlength=len(outlines)))[:-1])
    found = []
    for i, (outline, scores) in enumerate(zip(outlines, inside, strict=False), 1):
        numbers = {"area_mm2": mpp.area_um2(outline.area) / 1e6, "major_axis_um": major_axis_um(outline, mpp)}
        if len(scores):
            numbers |= {"mean_probability": float(scores.mean()), "max_probability": float(scores.max())}
        found.append(Region(outline, path_class, f"{' or '.join(positive)} {i}", numbers))
    return found


def simplify(outlines: list[shapely.Polygon], tolerance_um: float, mpp: Mpp) -> list[shapely.Polygon]:
    """Simplify outlines by at most `tolerance_um`, so that none crosses itself or another.

    All outlines are simplified together by the rule of Douglas and Peucker, preserving topology as JTS's
    ``TopologyPreservingSimplifier``; holes stay holes. If the tolerance cannot be kept, nothing is simplified.

    Examples
    --------
    >>> stairs = shapely.Polygon([(0, 0), (9, 0), (9, 9), (6, 9), (6, 8.9), (3, 8.9), (3, 9), (0, 9)])
    >>> [len(each.exterior.coords) for each in simplify([stairs], 0.1, Mpp(0.5, 0.5))]
    [5]
    """
    if not tolerance_um or not outlines:
        return outlines
    um = np.array(mpp)
    together = shapely.transform(shapely.MultiPolygon(outlines), lambda xy: xy * um)
    for share in (1.0, 0.7, 0.4):  # GEOS's tolerance is not a bound, so the result is measured
        simple = shapely.simplify(together, tolerance_um * share, preserve_topology=True)
        parts = shapely.get_parts(simple)
        as_many = simple.is_valid and len(parts) == len(outlines)
        if as_many and _within(shapely.get_parts(together), parts, tolerance_um):
            return list(shapely.transform(parts, lambda xy: xy / um))
    return outlines


def _within(before: npt.NDArray[np.object_], after: npt.NDArray[np.object_], distance: float) -> bool:
    """Whether each point of an outline is within `distance` of the same outline after simplification."""
    edges = shapely.boundary(after)
    shapely.prepare(edges)
    xy, of = shapely.get_coordinates(shapely.boundary(before), return_index=True)
    return bool(shapely.dwithin(edges[of], shapely.points(xy), distance).all())
