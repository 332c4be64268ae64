"""CAMELYON16 by centre, scanner or resolution: FROC and AUROC of subgroups of slides, beside those of all slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.evaluate.camelyon16_slides import Camelyon16Config
from wsi.evaluate.cases import Cohort
from wsi.evaluate.subgroups import Rows, subgroup_rows
from wsi.metrics.estimate import F64, Estimate
from wsi.metrics.froc import SlideHits, froc_statistic
from wsi.metrics.roc import auroc

#: Columns of ``subgroup_rows``, and what follows froc or auroc in the name of the same column here.
_SUFFIXES = {
    "metric": "", "low": "_low", "high": "_high", "gap": "_gap", "gap_low": "_gap_low", "gap_high": "_gap_high",
}  # fmt: skip


def subgroups(
    for_froc: Mapping[str, SlideHits],
    names: Sequence[str],
    truth: npt.NDArray[np.bool_],
    scores: F64,
    cohort: Cohort,
    config: Camelyon16Config,
) -> tuple[list[dict[str, Any]], dict[str, Estimate]]:
    """Return a row for each value of each column of `cohort`, and the FROC scores by subgroup for a plot.

    `names`, `truth` (whether it holds a tumour) and `scores` describe all slides; `for_froc` holds those whose lesions
    are all annotated.
    """
    lesions = np.array([each.n_lesions for each in for_froc.values()])
    groups = {column: [of[name] for name in names] for column, of in cohort.groups.items()}
    draws: dict[str, Any] = {"n_draws": config.n_bootstrap, "seed": config.seed}

    def count_lesions(rows: Rows) -> tuple[int, str, dict[str, Any]]:
        return int(lesions[rows].sum()), "lesions", {"lesions": int(lesions[rows].sum())}

    def count_slides(rows: Rows) -> tuple[int, str, dict[str, Any]]:
        tumours = int(truth[rows].sum())
        return min(tumours, len(rows) - tumours), "slides of a class", {"tumour_slides": tumours}

    forest: dict[str, Estimate] = {}
    by_froc = subgroup_rows(
        groups, count_lesions, froc_statistic(list(for_froc.values()), fp=config.fp),
        [cohort.patients[name] for name in for_froc], forest, [names.index(name) for name in for_froc], **draws,
    )  # fmt: skip
    by_auroc = subgroup_rows(
        groups, count_slides, lambda rows: auroc(truth[rows], scores[rows]).value,
        [cohort.patients[name] for name in names], {}, strata=truth.astype(int).tolist(), **draws,
    )  # fmt: skip
    table = []
    for lesion, slide in zip(by_froc, by_auroc, strict=True):
        row = {"column": slide["column"], "value": slide["value"], "slides": slide["n"]}
        row |= {"tumour_slides": slide["tumour_slides"], "lesions": lesion["lesions"]}
        for name, of in (("froc", lesion), ("auroc", slide)):
            row |= {f"{name}{suffix}": of[key] for key, suffix in _SUFFIXES.items()}
        table.append(row | {"reason": "; ".join(of["reason"] for of in (lesion, slide) if of["reason"])})
    n_slides = [row["n"] for row in by_froc]
    return table, {name: replace(each, n=n) for (name, each), n in zip(forest.items(), n_slides, strict=True)}
