"""Overlap of the regions that were found with those that were drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi.annotations import lesion_area, rasterize, read_annotations
from wsi.annotations.areas import Role
from wsi.errors import EvaluationError
from wsi.evaluate.cases import Cases
from wsi.evaluate.inputs import annotation_of, lesion_mask
from wsi.evaluate.report import Report, data_hash
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.estimate import Estimate
from wsi.metrics.overlap import dice, hausdorff, iou
from wsi.scored import ScoredSlide, scored_slides
from wsi.units import Box

_MAX_SIDE_PX = 4096


@dataclass(frozen=True)
class SegmentationConfig:
    """How regions are compared.

    Attributes
    ----------
    threshold : float, optional
        Probability from which tiles are a region; default: what the slides were scored with.
    roles : mapping of group to "lesion", "hole" or "ignore"
    n_bootstrap, seed : int
    """

    threshold: float | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    n_bootstrap: int = 2000
    seed: int = 0


def evaluate_segmentation(results: Path, annotations: Path, *, config: SegmentationConfig | None = None) -> Report:
    """Compare positive regions with annotations, slide by slide.

    Both are drawn on pixels of a power of two of level-0 pixels, as fine as 4,096 of them along the longer side allow;
    a pixel belongs to an area where its centre does.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    annotations : Path
        A folder with an annotation file or mask a slide; or one such file. A slide without one has nothing to find.
    config : SegmentationConfig, optional

    Raises
    ------
    EvaluationError, AnnotationError, StoreError

    Examples
    --------
    >>> report = evaluate_segmentation(Path("results"), Path("annotations"))                      # doctest: +SKIP
    >>> print(report.results["mean_dice"])                                                        # doctest: +SKIP
    0.924 (0.901 to 0.944)
    """
    config = config or SegmentationConfig()
    slides = scored_slides(results)
    if not annotations.exists() or (annotations.is_file() and len(slides) > 1):
        raise EvaluationError(annotations, f"is no folder of annotations for {len(slides)} slides", "Give the folder")
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    measured: dict[str, list[float | None]] = {"dice": [], "iou": [], "hausdorff_um": [], "hausdorff95_um": []}
    both, either = np.zeros(len(slides)), np.zeros(len(slides))
    for i, (slide_id, slide) in enumerate(slides.items()):
        path = annotation_of(annotations, slide_id)
        downsample = 2 ** max(math.ceil(math.log2(max(slide.size) / _MAX_SIDE_PX)), 0)
        shape = tuple(math.ceil(side / downsample) for side in slide.size)
        found = _found(slide, config.threshold, (shape[0], shape[1]), downsample)
        truth = np.zeros_like(found)
        if path is None:
            warnings.append(f"{slide_id} has no annotation file: it is taken to hold no lesion")
        else:
            truth, notes = lesion_mask(
                path, size=slide.size, downsample=downsample, origin=slide.origin, roles=config.roles, at=0.5
            )
            truth = _same_shape(truth, found)
            warnings += [f"{path.name}: {note}" for note in notes]
        pixel = (downsample * slide.mpp,) * 2
        values = {
            "dice": dice(truth, found),
            "iou": iou(truth, found),
            "hausdorff_um": hausdorff(truth, found, pixel=pixel),
            "hausdorff95_um": hausdorff(truth, found, pixel=pixel, percentile=95),
        }
        both[i], either[i] = (truth & found).sum() * pixel[0] ** 2, (truth | found).sum() * pixel[0] ** 2
        for name, value in values.items():
            measured[name].append(value.value)
        rows.append(
            {"slide": slide_id, "pixel_um": pixel[0], "reference_mm2": truth.sum() * pixel[0] ** 2 / 1e6}
            | {"found_mm2": found.sum() * pixel[0] ** 2 / 1e6}
            | {name: value.value for name, value in values.items()}
            | {"reason": next((value.reason for value in values.values() if value.reason), "")}
        )
    results_ = {f"mean_{name}": _mean(values, config) for name, values in measured.items()}
    if either.sum():
        results_["pooled_iou"] = bootstrap(
            lambda draw: float(both[draw].sum() / either[draw].sum()) if either[draw].sum() else None,
            list(slides), n_draws=config.n_bootstrap, seed=config.seed, unit="slides",
        )  # fmt: skip
    return Report(
        "segmentation",
        "Regions against outlines",
        {
            "threshold": config.threshold if config.threshold is not None else "as scored",
            "pixels": f"at most {_MAX_SIDE_PX} along a slide; inside where the centre is",
            "hausdorff": "between outlines; undefined where one side has no area",
            "bootstrap": f"{config.n_bootstrap} draws of slides, seed {config.seed}",
        },
        {"slides": len(slides), "sha256": data_hash((row["slide"], row["reference_mm2"]) for row in rows)},
        results_,
        {"slides": rows},
        warnings=tuple(warnings),
        reporting={"partition_unit": "slide", "reference_standard": "outlines"},
    )


def _found(
    slide: ScoredSlide, threshold: float | None, shape: tuple[int, int], downsample: int
) -> npt.NDArray[np.bool_]:
    heatmap = slide.heatmap()
    if not len(heatmap.grid):
        return np.zeros(shape[::-1], bool)
    at_least = float(slide.numbers["threshold"]) if threshold is None else threshold
    regions = heatmap.regions(at_least, Box(*slide.numbers["bounds_px"]))
    return rasterize(shapely.MultiPolygon(regions), shape, downsample, at=0.5)


def _same_shape(mask: npt.NDArray[np.bool_], like: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Cut or pad a mask that a pyramid's rounding or padding made a few pixels larger or smaller."""
    out = np.zeros_like(like)
    part = mask[: like.shape[0], : like.shape[1]]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def _mean(values: list[float | None], config: SegmentationConfig) -> Estimate:
    known = np.array([value for value in values if value is not None], np.float64)
    if not len(known):
        return Estimate.undefined("undefined on every slide", len(values))
    return bootstrap(
        lambda rows: float(known[rows].mean()), range(len(known)), n_draws=config.n_bootstrap, seed=config.seed,
        unit="slides",
    )  # fmt: skip


def tile_cases(results: Path, annotations: Path, roles: Mapping[str, Role] | None = None) -> Cases:
    """Return the tiles of scored slides, labelled by annotations: positive where at least half the area is lesion.

    Raises
    ------
    EvaluationError, AnnotationError, StoreError

    Examples
    --------
    >>> evaluate_table("patches", tile_cases(Path("results"), Path("annotations")))               # doctest: +SKIP
    """
    slides = scored_slides(results)
    ids: list[str] = []
    owners: list[str] = []
    labels, scores = [np.zeros(0, bool)], [np.zeros(0)]
    for slide_id, slide in slides.items():
        path = annotation_of(annotations, slide_id)
        heatmap = slide.heatmap()
        x, y, w, h = heatmap.grid.boxes().T
        tiles = shapely.box(x, y, x + w, y + h)
        share = np.zeros(len(tiles))
        if path is not None:
            area = lesion_area(read_annotations(path, origin=slide.origin), roles=roles, where=path).geometry
            shapely.prepare(area)
            share = shapely.area(shapely.intersection(tiles, area)) / shapely.area(tiles)
        labels.append(share >= 0.5)
        scores.append(heatmap.values.astype(np.float64))
        ids += [f"{slide_id}/{i}" for i in range(len(tiles))]
        owners += [slide_id] * len(tiles)
    return Cases(tuple(ids), np.concatenate(labels), np.concatenate(scores), tuple(owners))
