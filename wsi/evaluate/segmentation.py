"""Overlap of the positive regions with annotations, and tiles labelled by annotations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi.annotations import lesion_area, rasterize, read_annotations
from wsi.annotations.areas import Role
from wsi.errors import EvaluationError
from wsi.evaluate import plots
from wsi.evaluate.cases import Cases, Cohort, read_cohort
from wsi.evaluate.inputs import annotation_of, frame_of, lesion_mask, unfinished
from wsi.evaluate.report import Report, data_hash
from wsi.evaluate.subgroups import gap_of, subgroup_rows
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.estimate import Estimate
from wsi.metrics.overlap import dice, hausdorff, iou
from wsi.scored import ScoredSlide, scored_slides

#: Columns of a slide's row.
MEASURES = ("dice", "iou", "hausdorff_um", "hausdorff95_um")
_MAX_SIDE_PX = 4096
#: The number of slides in the plot of masks (those of lowest Dice), and their longer side there.
_SHOWN, _SHOWN_PX = 6, 512


@dataclass(frozen=True)
class SegmentationConfig:
    """How regions are compared.

    Attributes
    ----------
    threshold : float, optional
        Probability from which tiles belong to a region. Default: the one the slides were scored with.
    roles : mapping of group to "lesion", "hole" or "ignore"
    n_bootstrap, seed : int
    """

    threshold: float | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    n_bootstrap: int = 2000
    seed: int = 0


def evaluate_segmentation(
    results: Path,
    annotations: Path,
    *,
    config: SegmentationConfig | None = None,
    cohort: Cohort | None = None,
    other: Path | None = None,
) -> Report:
    """Compare positive regions with annotations, slide by slide.

    Both are rasterised at the finest power-of-two downsampling with at most 4,096 pixels along the longer side; a
    pixel belongs to an area if its centre does.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    annotations : Path
        A folder with an annotation file or mask for each slide; or one such file. A slide without one has no lesion.
    config : SegmentationConfig, optional
    cohort : Cohort, optional
        Patients of the slides, and columns that define subgroups. Default: each slide is its own patient.
    other : Path, optional
        Results of another run on the same slides, for comparison.

    Raises
    ------
    EvaluationError, AnnotationError, StoreError

    Examples
    --------
    >>> report = evaluate_segmentation(Path("results"), Path("annotations"))                      # doctest: +SKIP
    >>> print(report.results["mean_dice"])                                                        # doctest: +SKIP
    0.924 (0.901 to 0.944)
    """
    config, cohort = config or SegmentationConfig(), cohort or read_cohort(results)
    slides = scored_slides(results)
    rows, worst, warnings = _measured(slides, annotations, config)
    warnings += unfinished(results)
    patients = [cohort.patients[slide_id] for slide_id in slides]
    unit = "slides" if len(set(patients)) == len(patients) else "patients"
    draws: dict[str, Any] = {"n_draws": config.n_bootstrap, "seed": config.seed, "unit": unit}
    results_ = {f"mean_{name}": _mean([row[name] for row in rows], patients, draws) for name in MEASURES}
    both, either = (np.array([row[f"{name}_mm2"] for row in rows]) for name in ("common", "joint"))
    results_["pooled_iou"] = bootstrap(
        lambda draw: float(both[draw].sum() / either[draw].sum()) if either[draw].sum() else None, patients, **draws
    )
    dices = [row["dice"] for row in rows]
    if other is not None:
        others = scored_slides(other)
        if set(others) != set(slides):
            raise EvaluationError(other, "holds other slides", "Compare runs on the same slides")
        theirs = _measured({slide_id: others[slide_id] for slide_id in slides}, annotations, config)[0]
        for name in ("dice", "iou"):
            gaps = [gap_of(row[name], their[name]) for row, their in zip(rows, theirs, strict=True)]
            results_[f"mean_{name}_difference"] = _mean(gaps, patients, draws)
    tables: dict[str, list[dict[str, Any]]] = {"slides": rows}
    pictures = []
    if worst:
        known = {slide_id: d for slide_id, d in zip(slides, dices, strict=True) if d is not None}
        pictures += [plots.dice_plot(known, results_["mean_dice"]), plots.overlap_plot(worst)]
    if cohort.groups:
        forest = {"all": results_["mean_dice"]}
        groups = {column: [of[slide_id] for slide_id in slides] for column, of in cohort.groups.items()}
        tables["subgroups"] = _subgroups(dices, groups, patients, draws, forest)
        pictures.append(plots.forest_plot(forest, "mean Dice"))
    return Report(
        "segmentation",
        "Regions against outlines",
        {
            "threshold": config.threshold if config.threshold is not None else "as scored",
            "pixels": f"at most {_MAX_SIDE_PX} along a slide; inside where the centre is",
            "hausdorff": "between outlines; undefined where one side has no area",
            "bootstrap": f"{config.n_bootstrap} draws of {unit}, seed {config.seed}",
            **({"differences": "this run less the other, on slides where both are defined"} if other else {}),
        },
        {
            "slides": len(slides),
            "patients": len(set(patients)),
            "sha256": data_hash((row["slide"], row["reference_mm2"]) for row in rows),
        },
        results_,
        tables,
        pictures,
        warnings=tuple(warnings),
        reporting={
            "partition_unit": unit.removesuffix("s"),
            "reference_standard": "outlines",
            "subgroups": ", ".join(cohort.groups) or "none asked for",
        },
    )


def _measured(
    slides: Mapping[str, ScoredSlide], annotations: Path, config: SegmentationConfig
) -> tuple[list[dict[str, Any]], list[plots.Overlap], list[str]]:
    """A row for each slide; the slides of lowest Dice; warnings."""
    rows: list[dict[str, Any]] = []
    paths, warnings = _annotated(annotations, slides)
    worst: list[plots.Overlap] = []
    for slide_id, slide in slides.items():
        path = paths[slide_id]
        downsample = 2 ** max(math.ceil(math.log2(max(slide.size) / _MAX_SIDE_PX)), 0)
        shape = math.ceil(slide.size[0] / downsample), math.ceil(slide.size[1] / downsample)
        found = rasterize(shapely.MultiPolygon(slide.regions(config.threshold)), shape, downsample, at=0.5)
        truth = np.zeros_like(found)
        if path is not None:
            truth, notes = lesion_mask(path, frame=frame_of(slide), downsample=downsample, roles=config.roles, at=0.5)
            truth = _same_shape(truth, found)
            warnings += [f"{path.name}: {note}" for note in notes]
        pixel_um = downsample * slide.mpp
        pixel = (pixel_um, pixel_um)
        values = {
            "dice": dice(truth, found),
            "iou": iou(truth, found),
            "hausdorff_um": hausdorff(truth, found, pixel=pixel),
            "hausdorff95_um": hausdorff(truth, found, pixel=pixel, percentile=95),
        }
        areas = {"reference": truth, "found": found, "common": truth & found, "joint": truth | found}
        if values["dice"].value is not None:
            step = math.ceil(max(shape) / _SHOWN_PX)
            worst.append(plots.Overlap(slide_id, values["dice"].value, truth[::step, ::step], found[::step, ::step]))
            worst = sorted(worst, key=lambda each: each.dice)[:_SHOWN]
        rows.append(
            {"slide": slide_id, "pixel_um": pixel_um}
            | {f"{name}_mm2": area.sum() * pixel_um**2 / 1e6 for name, area in areas.items()}
            | {name: values[name].value for name in MEASURES}
            | {"reason": next((value.reason for value in values.values() if value.reason), "")}
        )
    return rows, worst, warnings


def _annotated(annotations: Path, slides: Mapping[str, ScoredSlide]) -> tuple[dict[str, Path | None], list[str]]:
    """Each slide's annotation file, and a warning about slides that have none."""
    if not annotations.exists() or (annotations.is_file() and len(slides) > 1):
        raise EvaluationError(annotations, f"is no folder of annotations for {len(slides)} slides", "Give the folder")
    paths = {slide_id: annotation_of(annotations, slide_id) for slide_id in slides}
    bare = [slide_id for slide_id, path in paths.items() if path is None]
    if not bare:
        return paths, []
    return paths, [f"{len(bare)} slides without an annotation file are taken to hold no lesion, {bare[0]} for one"]


def _same_shape(mask: npt.NDArray[np.bool_], like: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Crop or pad a mask whose pyramid was rounded or padded by a few pixels."""
    out = np.zeros_like(like)
    part = mask[: like.shape[0], : like.shape[1]]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def _mean(values: Sequence[float | None], patients: Sequence[str], draws: Mapping[str, Any]) -> Estimate:
    """The mean of the defined values, with its interval over patients."""
    known = [i for i, value in enumerate(values) if value is not None]
    if not known:
        return Estimate.undefined("undefined on every slide", len(values))
    of = np.array([values[i] for i in known], np.float64)
    return bootstrap(lambda rows: float(of[rows].mean()), [patients[i] for i in known], **draws)


def _subgroups(
    dices: Sequence[float | None],
    groups: Mapping[str, Sequence[str]],
    patients: Sequence[str],
    draws: Mapping[str, Any],
    forest: dict[str, Estimate],
) -> list[dict[str, Any]]:
    known = [i for i, value in enumerate(dices) if value is not None]
    of = np.array([dices[i] for i in known], np.float64)
    return subgroup_rows(
        groups,
        lambda rows: (len(rows), "slides with an area", {}),
        lambda rows: float(of[rows].mean()) if len(rows) else None,
        [patients[i] for i in known],
        forest,
        known,
        **draws,
    )


def tile_cases(
    results: Path, annotations: Path, roles: Mapping[str, Role] | None = None, cohort: Cohort | None = None
) -> tuple[Cases, list[str]]:
    """Return the tiles of scored slides, labelled by annotations: positive if at least half the area is lesion.

    Patients and groups are those of `cohort`; without one each slide is its own patient. Also returns warnings.

    Raises
    ------
    EvaluationError, AnnotationError, StoreError

    Examples
    --------
    >>> cases, warnings = tile_cases(Path("results"), Path("annotations"))                        # doctest: +SKIP
    >>> evaluate_table("patches", cases, warnings=warnings)                                       # doctest: +SKIP
    """
    slides, cohort = scored_slides(results), cohort or read_cohort(results)
    paths, warnings = _annotated(annotations, slides)
    warnings += unfinished(results)
    ids: list[str] = []
    owners: list[str] = []
    labels, scores = [np.zeros(0, bool)], [np.zeros(0)]
    for slide_id, slide in slides.items():
        path = paths[slide_id]
        heatmap = slide.heatmap()
        share = np.zeros(len(heatmap.grid))
        if path is not None:
            found = lesion_area(read_annotations(path, frame=frame_of(slide)), roles=roles, where=path)
            warnings += [f"{path.name}: {note}" for note in found.warnings]
            share = heatmap.grid.covered(found.geometry)
        labels.append(share >= 0.5)
        scores.append(heatmap.values.astype(np.float64))
        ids += [f"{slide_id}/{left}_{top}" for left, top in heatmap.grid.boxes()[:, :2].round().astype(int).tolist()]
        owners += [slide_id] * len(share)
    cases = Cases(
        tuple(ids),
        np.concatenate(labels),
        np.concatenate(scores),
        tuple(cohort.patients[slide_id] for slide_id in owners),
        {column: tuple(of_slide[slide_id] for slide_id in owners) for column, of_slide in cohort.groups.items()},
    )
    return cases, warnings
