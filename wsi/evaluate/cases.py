"""Cases with labels and scores, read from CSVs and results folders and joined by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import EvaluationError
from wsi.evaluate.inputs import read_rows, unique
from wsi.metrics.kappa import isup_grade
from wsi.scored import ScoredSlide, scored_slides

#: Columns that can name a case; the first one present is used.
ID_COLUMNS = ("slide_id", "image_id", "patch_id", "id", "slide", "patient")
#: Entries of result.json that can define subgroups without a column in the labels.
RESULT_COLUMNS = ("mpp", "mpp_source", "vendor", "reader")
#: A numeric column with more distinct values than this is divided into terciles.
_MOST_NUMBERS = 6


@dataclass(frozen=True, eq=False)
class Cases:
    """Cases with a label and a score.

    Attributes
    ----------
    ids : tuple of str
    labels : bool (n,), or int (n,) for grades
    scores : float64 (n,), or int (n,) for grades
    patients : tuple of str
        The patient of each case: the unit that the bootstrap draws.
    groups : mapping of str to tuple of str
        Columns that define subgroups, with the value of each case.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    patients: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TableConfig:
    """The columns of a table of cases, and what is measured.

    Attributes
    ----------
    label, score : str, optional
        Columns of the label and of the score. Defaults: ``label``; and the first present of ``score``,
        ``prob_<positive>``, ``positive_probability`` and a single ``prob_...``.
    positive : str
        The label that counts as positive; all others are negative.
    patient : str, optional
        Column of the patient. Default: ``patient`` if present, else each case is its own patient.
    groups : tuple of str
        Columns that define subgroups (see ``divided``); for a results folder also ``RESULT_COLUMNS``.
    specificity : float
        The specificity at which sensitivity is reported.
    threshold : float, optional
        Probability from which a case is positive, chosen on other cases.
    grades : int
        Number of ordered grades; 0 for two classes and a score.
    gleason : bool
        Labels are Gleason scores, to be converted to ISUP grades.
    n_bootstrap, seed : int

    Raises
    ------
    EvaluationError
        The specificity is outside 0 to 1, or the threshold is not finite.
    """

    label: str = "label"
    score: str | None = None
    positive: str = "1"
    patient: str | None = None
    groups: tuple[str, ...] = ()
    specificity: float = 0.95
    threshold: float | None = None
    grades: int = 0
    gleason: bool = False
    n_bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.specificity <= 1:
            raise EvaluationError(f"specificity={self.specificity:g}", "is not from 0 to 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise EvaluationError(f"threshold={self.threshold:g}", "is no finite number")


def read_cases(predictions: Path, labels: Path, config: TableConfig) -> tuple[Cases, list[str]]:
    """Join predictions and labels by the name of the case.

    Parameters
    ----------
    predictions : Path
        A CSV, or a results folder of ``wsi score`` (each slide's positive probability). If its slides have no
        probability, its ``grades.csv``, as written by ``wsi embed --mil``.
    labels : Path
        A CSV; may be the same file as `predictions`.
    config : TableConfig

    Returns
    -------
    cases : Cases
        In the order of the labels.
    warnings : list of str

    Raises
    ------
    EvaluationError
        A case has no prediction, a name occurs twice, a score is not a finite number, or a column is missing.

    Examples
    --------
    >>> cases, warnings = read_cases(Path("mine.csv"), Path("labels.csv"), TableConfig())         # doctest: +SKIP
    """
    rows = read_rows(labels)
    key = _id_column(rows[0], labels)
    truth = unique(rows, key, labels)
    slides = scored_slides(predictions) if predictions.is_dir() else {}
    groups = [group for group in config.groups if group in rows[0] or not slides or group not in RESULT_COLUMNS]
    _require(rows[0], labels, config.label, *groups, *([config.patient] if config.patient else []))
    table_at = _table_of(predictions, slides, config)
    if table_at is None:
        found = {name: str(slide.numbers.get("positive_probability")) for name, slide in slides.items()}
    else:
        table = read_rows(table_at)
        column = config.score or _score_column(table[0], table_at, config)
        _require(table[0], table_at, column)
        own = _id_column(table[0], table_at)
        found = {name: row[column] for name, row in unique(table, own, table_at).items()}
    missing = [name for name in truth if name not in found]
    if missing:
        raise EvaluationError(
            predictions, f"holds nothing of {len(missing)} labelled cases, {missing[0]!r} for one", "Predict them too"
        )
    warnings = []
    extra = [name for name in found if name not in truth]
    if extra:
        warnings.append(f"{len(extra)} predictions have no label and are left out, {extra[0]!r} for one")
    scores = np.array([_number(found[name], name, predictions) for name in truth])
    patient = config.patient or ("patient" if "patient" in rows[0] else None)
    if patient is None:
        warnings.append("no column says whose each case is: intervals take every case for a patient of its own")
    values = {name: row[config.label] for name, row in truth.items()}
    if config.grades:
        classes = np.array([_grade(value, name, labels, config) for name, value in values.items()], np.intp)
        if (scores != np.round(scores)).any() or scores.min() < 0 or scores.max() >= config.grades:
            raise EvaluationError(predictions, f"grades are whole numbers from 0 to {config.grades - 1}", "Round them")
        scores = scores.astype(np.intp)
    else:
        classes = _positive(values, labels, config)
    patients = tuple(row[patient] if patient else name for name, row in truth.items())
    columns = {
        group: [row[group] if group in groups else str(slides[name].numbers.get(group)) for name, row in truth.items()]
        for group in config.groups
    }
    by_group = {group: divided(column) for group, column in columns.items()}
    return Cases(tuple(truth), classes, scores, patients, by_group), warnings


@dataclass(frozen=True)
class Cohort:
    """The patients of scored slides, and columns that define subgroups.

    Attributes
    ----------
    patients : mapping of slide id to patient
    groups : mapping of column to mapping of slide id to value
        Values are those of ``divided``.
    """

    patients: Mapping[str, str]
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_cohort(
    results: Path, labels: Path | None = None, *, patient: str | None = None, groups: Sequence[str] = ()
) -> Cohort:
    """Read the patients and subgroups of scored slides.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    labels : Path, optional
        A CSV with one row per slide. Without it each slide is its own patient.
    patient : str, optional
        Column of the patient; default ``patient`` if present.
    groups : sequence of str
        Columns of `labels`, or ``RESULT_COLUMNS``, that define subgroups.

    Raises
    ------
    EvaluationError
        A slide has no row, or a column is missing.

    Examples
    --------
    >>> read_cohort(Path("results"), Path("slides.csv"), groups=("centre",))                      # doctest: +SKIP
    """
    slides = scored_slides(results)
    rows: dict[str, dict[str, str]] = {name: {} for name in slides}
    columns: dict[str, str] = {}
    if labels is not None:
        table = read_rows(labels)
        found, columns = unique(table, _id_column(table[0], labels), labels), table[0]
        missing = [name for name in slides if name not in found]
        if missing:
            raise EvaluationError(labels, f"says nothing of {len(missing)} slides, {missing[0]!r} for one", "Add them")
        rows = {name: found[name] for name in slides}
    wanted = [*([patient] if patient else []), *(group for group in groups if group not in RESULT_COLUMNS)]
    if wanted and labels is None:
        what = f"does not know {wanted[0]!r} of its slides"
        raise EvaluationError(results, what, "Give --labels, a CSV with that column")
    _require(columns, labels or results, *wanted)
    patient = patient or ("patient" if "patient" in columns else None)
    by_group = {
        group: [rows[name].get(group, str(slide.numbers.get(group))) for name, slide in slides.items()]
        for group in groups
    }
    return Cohort(
        {name: rows[name][patient] if patient else name for name in slides},
        {group: dict(zip(slides, divided(column), strict=True)) for group, column in by_group.items()},
    )


def divided(values: Sequence[str]) -> tuple[str, ...]:
    """Return the subgroup of each value of a column: the value, or its tercile if the column has many numbers.

    Examples
    --------
    >>> divided(["a", "b", "a"])
    ('a', 'b', 'a')
    >>> divided([str(n) for n in range(9)])[2:5]
    ('0 to 2', '3 to 5', '3 to 5')
    """
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return tuple(values)
    if len(np.unique(numbers)) <= _MOST_NUMBERS or not np.isfinite(numbers).all():
        return tuple(values)
    third = np.searchsorted(np.quantile(numbers, [1 / 3, 2 / 3]), numbers)
    ranges = {i: numbers[third == i] for i in np.unique(third).tolist()}  # ties can leave fewer than three
    return tuple(f"{ranges[i].min():.10g} to {ranges[i].max():.10g}" for i in third.tolist())


def _id_column(row: Mapping[str, str], path: Path) -> str:
    for name in ID_COLUMNS:
        if name in row:
            return name
    raise EvaluationError(path, f"has the columns {', '.join(row)}", f"One must name the case: {', '.join(ID_COLUMNS)}")


def _table_of(predictions: Path, slides: Mapping[str, ScoredSlide], config: TableConfig) -> Path | None:
    """Return the CSV with the scores; None if they are in the slides' result.json."""
    if not slides:
        return predictions
    own = any(slide.numbers.get("positive_probability") is not None for slide in slides.values())
    if (predictions / "grades.csv").is_file() and (config.score or not own):
        return predictions / "grades.csv"
    if own:
        return None
    remedy = "Grade them: wsi score, or wsi embed, with --mil"
    raise EvaluationError(predictions, "holds no probability of a slide", remedy)


def _score_column(row: Mapping[str, str], path: Path, config: TableConfig) -> str:
    usual = ("grade", "isup_grade") if config.grades else ("score", "probability")
    names = [name for name in usual if name in row]
    if not names and not config.grades:
        names = [name for name in (f"prob_{config.positive}", "positive_probability") if name in row][:1]
    names = names or [name for name in row if name.startswith("prob_")]
    if len(names) != 1:
        raise EvaluationError(path, f"has the columns {', '.join(row)}", "Say which one is the --score")
    return names[0]


def _require(row: Mapping[str, str], path: Path, *names: str) -> None:
    for name in names:
        if name not in row:
            raise EvaluationError(path, f"has no column {name!r}", f"It has {', '.join(row)}")


def _number(cell: str, name: str, path: Path) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EvaluationError(path, f"the score of {name!r} is {cell!r}", "Scores are finite numbers")
    return value


def _positive(values: Mapping[str, str], path: Path, config: TableConfig) -> npt.NDArray[Any]:
    """Whether each case has the positive label; there must be two labels at most."""
    bare = [name for name, value in values.items() if not value]
    if bare:
        raise EvaluationError(path, f"{bare[0]!r} has no {config.label}", "Leave such cases out, or label them")
    known = sorted(set(values.values()))
    if len(known) > 2 or (config.positive not in known and not set(known) <= {"0", "1"}):
        raise EvaluationError(path, f"{config.label} is {', '.join(map(repr, known[:6]))}", "Say which is --positive")
    return np.array([value == config.positive for value in values.values()])


def _grade(cell: str, name: str, path: Path, config: TableConfig) -> int:
    try:
        grade = isup_grade(cell) if config.gleason else int(cell)
    except ValueError as error:
        raise EvaluationError(path, f"the grade of {name!r} is {cell!r} ({error})", "") from None
    if not 0 <= grade < config.grades:
        raise EvaluationError(path, f"the grade of {name!r} is {grade}", f"Grades go from 0 to {config.grades - 1}")
    return grade
