"""Cases with labels: two classes and a score, or ordered grades; with subgroups and comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import EvaluationError
from wsi.evaluate import plots
from wsi.evaluate.cases import Cases, TableConfig
from wsi.evaluate.report import Plot, Report, data_hash
from wsi.evaluate.subgroups import Statistic, gap_of, subgroup_rows
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.calibration import brier, expected_calibration_error, net_benefit, recalibration, reliability
from wsi.metrics.compare import auroc_difference, mcnemar
from wsi.metrics.estimate import Estimate
from wsi.metrics.kappa import confusion, quadratic_kappa
from wsi.metrics.roc import auprc, auroc, operating_point, proportion, threshold_at

#: Methods whose intervals assume independent cases.
_FOR_INDEPENDENT = ("DeLong, logit", "paired DeLong", "Wilson", "Wald")


def evaluate_table(
    task: str,
    cases: Cases,
    *,
    config: TableConfig | None = None,
    validation: Cases | None = None,
    other: Cases | None = None,
    warnings: Sequence[str] = (),
) -> Report:
    """Measure scores against labels.

    Parameters
    ----------
    task : str
        "slides" or "patches".
    cases : Cases
    config : TableConfig, optional
    validation : Cases, optional
        Other cases, on which the threshold for the wanted specificity is chosen.
    other : Cases, optional
        The same cases scored by another run, for comparison.
    warnings : sequence of str

    Raises
    ------
    EvaluationError
        `other` has other cases.

    Examples
    --------
    >>> names = tuple("abcdef")
    >>> cases = Cases(names, np.array([0, 0, 0, 1, 1, 1], bool), np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.9]), names)
    >>> report = evaluate_table("slides", cases, config=TableConfig(n_bootstrap=100))
    >>> round(report.results["auroc"].value, 3)
    0.889
    """
    config = config or TableConfig()
    notes = list(warnings)
    if other is not None and (other.ids != cases.ids or (other.labels != cases.labels).any()):
        raise EvaluationError("the other run", "has other cases", "Compare runs on the same labels")
    measure = _grades if config.grades else _two_classes
    results, tables, pictures, protocol = measure(cases, config, validation, other, notes)
    results = {name: _checked(estimate, cases) for name, estimate in results.items()}
    name = "quadratic_kappa" if config.grades else "auroc"
    forest = {"all": results[name]}
    if cases.groups:
        tables["subgroups"] = _subgroups(cases, config, forest)
        pictures.append(plots.forest_plot(forest, name))
    tables["cases"] = [
        {"id": i, "patient": p, "label": label, "score": score}
        for i, p, label, score in zip(
            cases.ids, cases.patients, cases.labels.astype(int).tolist(), cases.scores.tolist(), strict=True
        )
    ]
    return Report(
        task,
        f"{task.capitalize()} against their labels",
        protocol | {"bootstrap": f"{config.n_bootstrap} draws of patients, seed {config.seed}"},
        {
            "cases": len(cases.ids),
            "patients": len(set(cases.patients)),
            "sha256": data_hash(zip(cases.ids, cases.labels.astype(int).tolist(), strict=True)),
        },
        results,
        tables,
        pictures,
        warnings=tuple(notes),
        reporting={"partition_unit": "patient", "subgroups": ", ".join(cases.groups) or "none asked for"},
    )


_Table = Sequence[Mapping[str, Any]]
#: Results, tables, plots and protocol.
_Parts = tuple[dict[str, Estimate], dict[str, _Table], list[Plot], dict[str, Any]]


def _interval(cases: Cases, config: TableConfig, statistic: Statistic, *, stratify: bool = True) -> Estimate:
    strata = cases.labels.astype(int).tolist() if stratify else None
    return bootstrap(statistic, cases.patients, strata=strata, n_draws=config.n_bootstrap, seed=config.seed)


def _two_classes(
    cases: Cases, config: TableConfig, validation: Cases | None, other: Cases | None, notes: list[str]
) -> _Parts:
    y, p = cases.labels, cases.scores
    results = {"auroc": auroc(y, p), "auprc": auprc(y, p), "prevalence": proportion(int(y.sum()), len(y))}
    for name, metric in (("auroc", auroc), ("auprc", auprc)):
        results[f"{name}_over_patients"] = _interval(cases, config, lambda rows, m=metric: m(y[rows], p[rows]).value)  # type: ignore[misc]
    chosen = {"apparent": threshold_at(y, p, config.specificity)}
    if validation is not None:
        chosen["validation"] = threshold_at(validation.labels, validation.scores, config.specificity)
    else:
        notes.append(
            "no validation cases: sensitivity at fixed specificity uses a threshold chosen on these very cases"
        )
    thresholds = {f"{where}_{config.specificity:g}": t for where, t in chosen.items()}
    if config.threshold is not None:
        thresholds["given"] = config.threshold
    tables: dict[str, _Table] = {"operating_points": _operating_points(cases, config, thresholds, results)}
    curves = {f"AUROC {_checked(results['auroc'], cases)}": (y, p)}
    pictures: list[Plot] = []
    if len(p) and p.min() >= 0 and p.max() <= 1:
        pictures = _calibration(cases, config, results, tables)
    else:
        notes.append("scores are no probabilities: nothing is said of calibration")
    if other is not None:
        threshold = thresholds.get("given", thresholds.get(f"validation_{config.specificity:g}"))
        tables["comparison"] = _comparison(cases, other.scores, config, threshold, results)
        curves = {
            f"{name} {_checked(area, cases)}": (y, scores)
            for name, area, scores in (("this", results["auroc"], p), ("other", auroc(y, other.scores), other.scores))
        }
    if 0 < y.sum() < len(y):
        pictures.insert(0, plots.roc_plot(curves))
    protocol = {
        "positive": config.positive,
        "intervals": "AUROC by DeLong, proportions by Wilson, for independent cases; over patients by bootstrap",
    }
    return results, tables, pictures, protocol


def _operating_points(
    cases: Cases, config: TableConfig, thresholds: Mapping[str, float | None], results: dict[str, Estimate]
) -> _Table:
    """A row for each threshold; sensitivity and specificity are added to `results`."""
    y, p = cases.labels, cases.scores
    table = []
    for where, threshold in thresholds.items():
        if threshold is None:
            results[f"sensitivity_{where}"] = Estimate.undefined("no threshold: one class only", len(y))
            continue
        found = operating_point(y, p, threshold)
        table.append(
            {"threshold_from": where, "threshold": threshold if math.isfinite(threshold) else None}
            | {m: getattr(found, m).value for m in ("sensitivity", "specificity", "ppv", "npv")}
        )
        results[f"sensitivity_{where}"] = found.sensitivity
        results[f"specificity_{where}"] = found.specificity
        right = (p >= threshold) == y
        for measure, of in (("sensitivity", y), ("specificity", ~y)):
            results[f"{measure}_{where}_over_patients"] = _interval(
                cases,
                config,
                lambda rows, of=of, right=right: _mean(right[rows[of[rows]]]),  # type: ignore[misc]
            )
    return table


def _calibration(
    cases: Cases, config: TableConfig, results: dict[str, Estimate], tables: dict[str, _Table]
) -> list[Plot]:
    """Calibration and net benefit of probabilities, added to `results` and `tables`; their plots."""
    y, p = cases.labels, cases.scores
    results["brier"] = _interval(cases, config, lambda rows: brier(y[rows], p[rows]).value)
    results["ece"] = expected_calibration_error(y, p)
    results["ece_equal_mass"] = expected_calibration_error(y, p, equal_mass=True)
    fit = recalibration(y, p)
    results |= {"calibration_intercept": fit.intercept, "calibration_slope": fit.slope}
    bins, at = reliability(y, p), np.arange(1, 20) / 20
    tables["reliability"] = [each._asdict() for each in bins]
    tables["net_benefit"] = [
        {"threshold": t, "model": m, "everyone": y.mean() - (1 - y.mean()) * t / (1 - t), "nobody": 0.0}
        for t, m in zip(at.tolist(), net_benefit(y, p, at).tolist(), strict=True)
    ]
    return [plots.reliability_plot(bins), plots.net_benefit_plot(y, p)]


def _comparison(
    cases: Cases, other: npt.NDArray[Any], config: TableConfig, threshold: float | None, results: dict[str, Estimate]
) -> _Table:
    """Tests against the scores of another run; differences are added to `results`."""
    y, p = cases.labels, cases.scores
    difference = auroc_difference(y, p, other)
    results["auroc_difference"] = difference.estimate
    results["auroc_difference_over_patients"] = _interval(
        cases, config, lambda rows: gap_of(auroc(y[rows], p[rows]).value, auroc(y[rows], other[rows]).value)
    )
    tests = {"DeLong, AUROC": difference.p_value}
    if threshold is not None:
        accuracy = mcnemar((p >= threshold) == y, (other >= threshold) == y)
        results["accuracy_difference"] = accuracy.estimate
        tests[f"McNemar, accuracy at {threshold:g}"] = accuracy.p_value
    return _tests(tests, cases)


def _mean(right: npt.NDArray[np.bool_]) -> float | None:
    return float(right.mean()) if len(right) else None


def _independent(cases: Cases) -> bool:
    """Whether every case is of a different patient, and so independent of the others."""
    return len(set(cases.patients)) == len(cases.patients)


def _checked(estimate: Estimate, cases: Cases) -> Estimate:
    """Remove an interval that assumes independent cases if these are not."""
    if _independent(cases) or estimate.method not in _FOR_INDEPENDENT:
        return estimate
    why = f"no interval: {estimate.method} takes cases for independent, and patients have several"
    return Estimate(estimate.value, n=estimate.n, reason=why)


def _tests(p_values: Mapping[str, float | None], cases: Cases) -> list[dict[str, Any]]:
    """Rows of p-values; without the values if cases are not independent."""
    if _independent(cases):
        return [{"test": test, "p_value": p} for test, p in p_values.items()]
    why = "takes cases for independent, and patients have several: see the interval over patients"
    return [{"test": test, "p_value": None, "reason": why} for test in p_values]


def _grades(
    cases: Cases, config: TableConfig, validation: Cases | None, other: Cases | None, notes: list[str]
) -> _Parts:
    y, g, k = cases.labels, cases.scores, config.grades

    def kappa(rows: npt.NDArray[np.intp], found: npt.NDArray[Any] = g) -> float | None:
        return quadratic_kappa(y[rows], found[rows], k).value

    overall = quadratic_kappa(y, g, k)
    results = {
        "quadratic_kappa": overall if overall.value is None else _interval(cases, config, kappa, stratify=False),
        "accuracy": proportion(int((y == g).sum()), len(y)),
    }
    if not _independent(cases):
        results["accuracy_over_patients"] = _interval(cases, config, lambda rows: _mean((y == g)[rows]), stratify=False)
    tables: dict[str, _Table] = {}
    if other is not None:
        results["kappa_difference"] = _interval(
            cases, config, lambda rows: gap_of(kappa(rows), kappa(rows, other.scores)), stratify=False
        )
        test = mcnemar(g == y, other.scores == y)
        results["accuracy_difference"] = test.estimate
        tables["comparison"] = _tests({"McNemar, accuracy": test.p_value}, cases)
    counts = confusion(y, g, k)
    names = [str(grade) for grade in range(k)]
    tables["confusion"] = [
        {"reference": name, **dict(zip(names, row, strict=True))}
        for name, row in zip(names, counts.tolist(), strict=True)
    ]
    return results, tables, [plots.confusion_plot(counts, names)], {"grades": f"0 to {k - 1}, quadratic weights"}


def _subgroups(cases: Cases, config: TableConfig, forest: dict[str, Estimate]) -> list[dict[str, Any]]:
    y, s = cases.labels, cases.scores

    def count(rows: npt.NDArray[np.intp]) -> tuple[int, str, dict[str, Any]]:
        if config.grades:
            return len(rows), "cases", {"positive": None}
        return int(min(y[rows].sum(), (~y[rows]).sum())), "cases of a class", {"positive": int(y[rows].sum())}

    def metric(rows: npt.NDArray[np.intp]) -> float | None:
        if config.grades:
            return quadratic_kappa(y[rows], s[rows], config.grades).value
        return auroc(y[rows], s[rows]).value

    strata = None if config.grades else y.astype(int).tolist()
    return subgroup_rows(
        cases.groups, count, metric, cases.patients, forest,
        strata=strata, n_draws=config.n_bootstrap, seed=config.seed,
    )  # fmt: skip
