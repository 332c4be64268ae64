"""CAMELYON16: lesion FROC by the official rules, and slide AUROC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.annotations import Frame
from wsi.errors import EvaluationError
from wsi.evaluate import plots
from wsi.evaluate.camelyon16_groups import subgroups
from wsi.evaluate.camelyon16_slides import Camelyon16Config, Case, exclusions_of, read_slides
from wsi.evaluate.cases import Cohort
from wsi.evaluate.detect import write_detections
from wsi.evaluate.inputs import frame_of, is_image, lesion_mask
from wsi.evaluate.report import Report, data_hash, leaderboard
from wsi.evaluate.slide_features import Forest, slide_features
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.compare import auroc_difference
from wsi.metrics.estimate import F64, Estimate
from wsi.metrics.froc import OFFICIAL_DOWNSAMPLE, OFFICIAL_MPP, PER_SLIDE, Froc, SlideHits, find_lesions, froc, match
from wsi.metrics.roc import auprc, auroc

#: Relative deviation from the official resolution without a warning: CAMELYON16's slides have 0.243 and 0.226.
_MPP_TOLERANCE = 0.15


def evaluate_camelyon16(
    results: Path,
    annotations: Path,
    *,
    out: Path,
    reference: Path | None = None,
    forest: Forest | None = None,
    config: Camelyon16Config | None = None,
    cohort: Cohort | None = None,
) -> Report:
    """Compare detections and slide scores with annotations.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``, or a folder of official detection files (``<slide>.csv``: confidence,x,y).
    annotations : Path
        A folder with an annotation file or mask for each tumour slide, named as the slide; or one such file.
    out : Path
        Detections made from heatmaps are written to its folder ``detections``.
    reference : Path, optional
        The official ``reference.csv``: slide, Tumor or Normal, type, Macro or Micro or None; no header. Then each of
        its slides must have results, and each tumour slide an annotation. Without `reference`, a slide without an
        annotation file is normal.
    forest : Forest, optional
        A slide-feature model, as a further slide score.
    config : Camelyon16Config, optional
    cohort : Cohort, optional
        Columns that define subgroups.

    Raises
    ------
    EvaluationError
        A slide has no results, a tumour slide no annotation, or a normal slide has one.
    AnnotationError, StoreError
        A file cannot be used.

    Examples
    --------
    >>> report = evaluate_camelyon16(Path("results"), Path("annotations"), out=Path("out"))       # doctest: +SKIP
    >>> print(report.results["froc"])                                                             # doctest: +SKIP
    0.807 (0.732 to 0.889)
    """
    config = config or Camelyon16Config()
    cases, warnings = read_slides(results, annotations, reference, config)
    excluded, exclusions = exclusions_of(cases, config)
    hits: dict[str, SlideHits] = {}
    lesions: list[dict[str, Any]] = []
    for case in cases:
        if excluded.get(case.slide_id) in (None, "lesion"):
            hits[case.slide_id] = _match(case, config, lesions, warnings, partly=case.slide_id in excluded)
    kept = [case for case in cases if case.slide_id in hits]
    for_froc = {case.slide_id: hits[case.slide_id] for case in kept if case.slide_id not in excluded}
    curves = {
        fp: froc(list(for_froc.values()), fp=fp, n_bootstrap=config.n_bootstrap, seed=config.seed)
        for fp in ("all", "normal")
    }
    head = curves[config.fp]
    other = "normal" if config.fp == "all" else "all"
    estimates: dict[str, Estimate] = {"froc": head.score, f"froc_fp_{other}": curves[other].score}
    for point, value in zip(PER_SLIDE, head.at, strict=False):
        estimates[f"sensitivity_at_{point:g}_fp"] = Estimate(value, n=head.n_lesions)

    truth = np.array([hits[c.slide_id].has_lesions if c.tumour is None else c.tumour for c in kept], bool)
    scores = _slide_scores(kept, forest)
    usable = {n: np.array(v, np.float64) for n, v in scores.items() if not any(each is None for each in v)}
    by_size = _by_size(kept, truth, usable["max_probability"])
    estimates |= _slide_results(kept, truth, scores, usable, config) | by_size
    warnings += _rule_warnings(cases, hits, list(for_froc.values()), head, config)
    rows = _rows(kept, hits, truth, scores, excluded)
    # Fixed beforehand, not the score that does best on these slides.
    headline = next((name for name in ("random_forest", "mil", "max_probability") if name in usable), "max_probability")
    pictures = []
    if head.score.value is not None:
        pictures.append(plots.froc_plot({f"FP of {fp} slides": curve for fp, curve in curves.items() if curve.at}))
    if usable and 0 < truth.sum() < len(truth):
        pictures.append(plots.roc_plot({f"{n} {estimates[f'auroc_{n}']}": (truth, v) for n, v in usable.items()}))
    if by_size:
        named = {f"{name.rpartition('_')[2]} lesions": each for name, each in by_size.items()}
        areas = {"all": estimates["auroc_max_probability"], **named}
        pictures.append(plots.forest_plot(areas, "AUROC of the highest probability"))
    tables: dict[str, list[dict[str, Any]]] = {
        "slide_scores": [{"slide_score": name, **estimates[f"auroc_{name}"].json()} for name in scores]
    }
    if cohort is not None and cohort.groups:
        names = [case.slide_id for case in kept]
        tables["subgroups"], of_groups = subgroups(for_froc, names, truth, usable[headline], cohort, config)
        pictures.append(plots.forest_plot({"all": head.score, **of_groups}, "FROC", "froc_subgroups"))
    for case in cases:  # last, since it replaces files of an earlier evaluation
        if case.scored:
            write_detections(out / "detections" / f"{case.slide_id}.csv", case.detections)
    protocol = _protocol(config, reference) | {"slide_score_on_the_leaderboard": headline}
    best = {"froc": head.score, "auroc": estimates[f"auroc_{headline}"]}
    counted = f"{len(for_froc)} slides, {head.n_lesions} lesions; {protocol['false_positives']}"
    return Report(
        "camelyon16",
        "Lesion detection and slide classification by the rules of CAMELYON16",
        protocol,
        {
            "slides": len(kept),
            "tumour_slides": int(truth.sum()),
            "slides_for_froc": len(for_froc),
            "lesions_that_count": head.n_lesions,
            "isolated_tumour_cells": sum(row["isolated_tumour_cells"] for row in lesions),
            "sha256": data_hash((row["slide"], row["label"], row["lesions"]) for row in rows),
        },
        estimates,
        {**tables, "froc_curve": _curve(curves), "lesions": lesions, "slides": rows},
        pictures,
        exclusions,
        leaderboard("camelyon16", "froc", best, counted),
        tuple(warnings),
        {
            "reference_standard": "lesion outlines" + (" and the official reference.csv" if reference else ""),
            "partition_unit": "slide",
            "subgroups": ", ".join(cohort.groups if cohort else ()) or "none asked for",
            "metrics": "FROC as the organisers' script computes it; AUROC with DeLong's interval",
            "threshold_selection": f"detections above {config.detect.threshold:g}, not chosen on these slides",
        },
    )


def _rule_warnings(
    cases: list[Case], hits: Mapping[str, SlideHits], for_froc: list[SlideHits], head: Froc, config: Camelyon16Config
) -> list[str]:
    """Warnings about slides and results for which the official rules are misleading."""
    warnings = []
    far = [c.slide_id for c in cases if c.scored and abs(c.scored.mpp / OFFICIAL_MPP - 1) > _MPP_TOLERANCE]
    if far and not config.true_mpp:
        warnings.append(
            f"{len(far)} slides are far from {OFFICIAL_MPP} um per pixel, {far[0]} for one; the official rules take "
            "every slide for that, and merge or leave out lesions at wrong lengths: --true-mpp takes each slide's own"
        )
    if len(head.per_slide) == 1 and any((each.hits > 0).any() for each in for_froc):
        warnings.append("all detections have one confidence, which the official rule takes for no threshold: FROC is 0")
    elif head.n_lesions and all((each.hits > 0).all() for each in for_froc):
        warnings.append("no lesion was missed, so the official curve leaves out its last point: the lowest confidence")
    n_outside = sum(each.outside for each in hits.values())
    if n_outside:
        warnings.append(f"{n_outside} detections lie outside their slide; they count as false positives")
    return warnings


def _rows(
    cases: list[Case],
    hits: Mapping[str, SlideHits],
    truth: npt.NDArray[np.bool_],
    scores: Mapping[str, list[float | None]],
    excluded: Mapping[str, str],
) -> list[dict[str, Any]]:
    return [
        {
            "slide": case.slide_id,
            "label": "tumour" if truth[i] else "normal",
            "lesions": hits[case.slide_id].n_lesions,
            "found": int(np.count_nonzero(hits[case.slide_id].hits)),
            "false_positives": len(hits[case.slide_id].false_positives),
            "on_isolated_cells": hits[case.slide_id].ignored,
            "outside": hits[case.slide_id].outside,
            **{name: values[i] for name, values in scores.items()},
            "excluded": excluded.get(case.slide_id, ""),
        }
        for i, case in enumerate(cases)
    ]


def _match(
    case: Case, config: Camelyon16Config, lesions: list[dict[str, Any]], warnings: list[str], *, partly: bool
) -> SlideHits:
    """Match a slide's detections with its lesions; `partly`: not all lesions are annotated."""
    size = case.scored.size if case.scored else None
    mpp, downsample = OFFICIAL_MPP, OFFICIAL_DOWNSAMPLE
    if config.true_mpp:
        if case.scored is None:
            raise EvaluationError("--true-mpp", "detection files do not say a slide's mpp", "Give a results folder")
        mpp = case.scored.mpp
        downsample = 2 ** max(round(math.log2(OFFICIAL_MPP * OFFICIAL_DOWNSAMPLE / mpp)), 0)
    p, x, y = case.detections.T
    found = None
    if case.annotation is not None:
        mask, notes = lesion_mask(
            case.annotation,
            frame=frame_of(case.scored) if case.scored else Frame(),
            downsample=downsample,
            roles=config.roles,
        )
        warnings += [f"{case.annotation.name}: {note}" for note in notes]
        found = find_lesions(mask, mpp=mpp, downsample=downsample) if mask.any() else None
        if size is None and is_image(case.annotation):
            size = mask.shape[1] * downsample, mask.shape[0] * downsample
        if found is None and case.tumour is None:
            warnings.append(f"{case.annotation.name} holds no lesion: the slide is taken for normal")
    if case.tumour is True and found is None and not partly:
        what = "no annotation" if case.annotation is None else f"{case.annotation.name} holds no lesion"
        raise EvaluationError(case.slide_id, f"is a tumour slide in the reference, and {what}", "Add its annotation")
    if case.tumour is False and found is not None:
        raise EvaluationError(case.slide_id, "is normal in the reference and holds annotated lesions", "Check both")
    hits = match(found, p, x, y, size=size)
    if found is not None:
        lesions += [
            {
                "slide": case.slide_id,
                "lesion": i + 1,
                "major_axis_um": round(float(axis), 2),
                "isolated_tumour_cells": bool(itc),
                "confidence": float(hits.hits[i]) or None,
            }
            for i, (axis, itc) in enumerate(zip(found.major_axis_um, found.itc, strict=True))
        ]
    return hits


def _slide_scores(cases: list[Case], forest: Forest | None) -> dict[str, list[float | None]]:
    """All available slide scores by name; None for a slide that lacks one."""
    scores: dict[str, list[float | None]] = {"max_probability": []}
    for case in cases:
        if case.scored is None:
            scores["max_probability"].append(float(case.detections[:, 0].max(initial=0)))
            continue
        heatmap = case.scored.heatmap()
        scores["max_probability"].append(float(heatmap.values.max(initial=0)))
        scores.setdefault("mil", []).append(case.scored.numbers.get("positive_probability"))
        if forest is not None:
            rows = slide_features(heatmap, case.scored.tissue_px, threshold=forest.threshold)[None]
            scores.setdefault("random_forest", []).append(float(forest(rows)[0]))
    if all(value is None for value in scores.get("mil", ())):
        scores.pop("mil", None)
    return scores


def _slide_results(
    cases: list[Case],
    truth: npt.NDArray[np.bool_],
    scores: Mapping[str, list[float | None]],
    usable: Mapping[str, F64],
    config: Camelyon16Config,
) -> dict[str, Estimate]:
    """AUROC and AUPRC of each slide score, and its AUROC's difference from that of the highest probability."""
    out: dict[str, Estimate] = {}
    for name, values in scores.items():
        if name in usable:
            out |= {f"auroc_{name}": auroc(truth, usable[name]), f"auprc_{name}": auprc(truth, usable[name])}
        else:
            bare = [case.slide_id for case, value in zip(cases, values, strict=True) if value is None]
            what = f"{len(bare)} slides have no such score, {bare[0]} for one"
            out[f"auroc_{name}"] = Estimate.undefined(what, len(cases))
    highest = usable["max_probability"]
    out["auroc_max_probability_bootstrap"] = bootstrap(
        lambda rows: auroc(truth[rows], highest[rows]).value,
        range(len(truth)),
        strata=truth.tolist(),
        n_draws=config.n_bootstrap,
        seed=config.seed,
        unit="slides",
    )
    for name in usable:
        if name != "max_probability":
            out[f"auroc_{name}_less_max_probability"] = auroc_difference(truth, usable[name], highest).estimate
    return out


def _by_size(cases: list[Case], truth: Any, values: F64) -> dict[str, Estimate]:
    """AUROC of tumour slides of each lesion size against all normal slides."""
    sizes = np.array([case.size_class for case in cases])
    out = {}
    for name in sorted(set(sizes[truth]) - {"", "none"}):
        rows = ~truth | (sizes == name)
        out[f"auroc_max_probability_{name}"] = auroc(truth[rows], values[rows])
    return out


def _curve(curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"false_positives_of": fp, "per_slide": float(x), "sensitivity": float(y)}
        for fp, curve in curves.items()
        for x, y in zip(curve.per_slide, curve.sensitivity, strict=True)
    ]


def _protocol(config: Camelyon16Config, reference: Path | None) -> dict[str, Any]:
    return {
        "lesions": "grown by 37.5 um, holes filled, 8 neighbours; major axis below 275 um: isolated cells, ignored",
        "resolution": "each slide's own"
        if config.true_mpp
        else f"{OFFICIAL_MPP} um per pixel for all slides, masks at level 5",
        "false_positives": f"of {config.fp} slides, per slide",
        "score": "mean sensitivity at 1/4, 1/2, 1, 2, 4, 8 false positives",
        "detections": asdict(config.detect),
        "reference": "reference.csv" if reference else "annotation files; slides without one are normal",
        "bootstrap": f"{config.n_bootstrap} draws of slides with their lesions, seed {config.seed}",
        "exclusions": "none" if not config.exclude else str(config.exclusions or "as shipped"),
    }
