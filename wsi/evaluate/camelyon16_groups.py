"""CAMELYON16 by centre, scanner, resolution: FROC and AUROC of some slides, and how far they are from those of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wsi.evaluate.camelyon16_slides import Camelyon16Config
from wsi.evaluate.cases import Cohort
from wsi.evaluate.subgroups import beside_all
from wsi.metrics.estimate import Estimate
from wsi.metrics.froc import SlideHits, froc_statistic
from wsi.metrics.roc import auroc


def subgroups(
    hits: Mapping[str, SlideHits],
    for_froc: Sequence[str],
    truth: Mapping[str, bool],
    scores: Mapping[str, float],
    cohort: Cohort,
    config: Camelyon16Config,
) -> tuple[list[dict[str, Any]], dict[str, Estimate]]:
    """Return a row a value of each column, and the FROC scores by name for a plot.

    Parameters
    ----------
    hits : mapping of slide id to SlideHits
    for_froc : sequence of slide id
        Slides whose lesions are all annotated.
    truth, scores : mapping of slide id
        Of all slides: whether they hold a tumour, and their score.
    cohort : Cohort
        Every slide has a value in each of its groups.
    config : Camelyon16Config
    """
    lesions = np.array([hits[slide_id].n_lesions for slide_id in for_froc])
    score = froc_statistic([hits[slide_id] for slide_id in for_froc], fp=config.fp)
    ids = list(truth)
    y, p = np.array([truth[slide_id] for slide_id in ids], bool), np.array([scores[slide_id] for slide_id in ids])
    draws: dict[str, Any] = {"n_draws": config.n_bootstrap, "seed": config.seed}
    rows, forest = [], {}
    for column, values in cohort.groups.items():
        for value in sorted({values[slide_id] for slide_id in ids}):
            of_lesions = np.array([values[slide_id] == value for slide_id in for_froc], bool)
            of_slides = np.array([values[slide_id] == value for slide_id in ids], bool)
            n_lesions = int(lesions[of_lesions].sum())
            events = int(min(y[of_slides].sum(), (~y[of_slides]).sum()))
            found = beside_all(
                score, of_lesions, [cohort.patients[i] for i in for_froc], events=n_lesions, what="lesions", **draws
            )
            areas = beside_all(
                lambda r: auroc(y[r], p[r]).value, of_slides, [cohort.patients[i] for i in ids],
                events=events, what="slides of a class", strata=y.astype(int).tolist(), **draws,
            )  # fmt: skip
            forest[f"{column} {value}"] = replace(found[0], n=int(of_lesions.sum()))
            row: dict[str, Any] = {"column": column, "value": value, "slides": int(of_slides.sum())}
            row |= {"tumour_slides": int(y[of_slides].sum()), "lesions": n_lesions}
            for name, estimate in zip(("froc", "froc_gap", "auroc", "auroc_gap"), (*found, *areas), strict=True):
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            rows.append(row | {"reason": "; ".join(e.reason for e in (found[0], areas[0]) if e.reason)})
    return rows, forest
