"""Cases, labels and scores out of CSVs, joined by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import EvaluationError
from wsi.evaluate.inputs import read_rows, unique
from wsi.metrics.kappa import isup_grade
from wsi.scored import scored_slides

#: Columns that name a case, the first that is there counts.
ID_COLUMNS = ("slide_id", "image_id", "patch_id", "id", "slide", "patient")


@dataclass(frozen=True, eq=False)
class Cases:
    """Cases with a label and a score.

    Attributes
    ----------
    ids : tuple of str
    labels : bool (n,), or int (n,) for grades
    scores : float64 (n,), or int (n,) for grades
    patients : tuple of str
        Whose each case is: the unit that intervals are over.
    groups : mapping of str to tuple of str
        Further columns, each a way to divide the cases.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    patients: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TableConfig:
    """Which columns mean what, and what is asked.

    Attributes
    ----------
    label, score : str, optional
        Columns of the label and of the score; default: ``label``, and the only ``prob_...`` column or ``score``.
    positive : str
        The label that counts as positive; others are negative.
    patient : str, optional
        Column of the patient; default ``patient`` where it is there, else every case is its own.
    groups : tuple of str
        Columns to divide the cases by.
    specificity : float
        Where sensitivity is reported.
    threshold : float, optional
        Probability from which a case is positive, chosen elsewhere.
    grades : int
        Number of ordered grades; 0 for two classes and a score.
    gleason : bool
        Labels are Gleason scores, and become ISUP grades.
    n_bootstrap, seed : int
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


def read_cases(predictions: Path, labels: Path, config: TableConfig) -> tuple[Cases, list[str]]:
    """Join predictions and labels by the name of the case.

    Parameters
    ----------
    predictions : Path
        A CSV, or a results folder of ``wsi score`` (each slide's positive probability).
    labels : Path
        A CSV. May be the same file as `predictions`.
    config : TableConfig

    Returns
    -------
    cases : Cases
        In the order of the labels.
    warnings : list of str

    Raises
    ------
    EvaluationError
        A case without a prediction, a name that stands twice, a score that is no finite number, a column that is not
        there.

    Examples
    --------
    >>> cases, warnings = read_cases(Path("mine.csv"), Path("labels.csv"), TableConfig())         # doctest: +SKIP
    """
    rows = read_rows(labels)
    key = _id_column(rows[0], labels)
    truth = unique(rows, key, labels)
    _need(rows[0], labels, config.label, *config.groups, *([config.patient] if config.patient else []))
    if predictions.is_dir():
        found = {
            slide_id: str(slide.numbers.get("positive_probability"))
            for slide_id, slide in scored_slides(predictions).items()
        }
    else:
        table = read_rows(predictions)
        column = config.score or _score_column(table[0], predictions, grades=bool(config.grades))
        _need(table[0], predictions, column)
        own = _id_column(table[0], predictions)
        found = {name: row[column] for name, row in unique(table, own, predictions).items()}
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
    values = [row[config.label] for row in truth.values()]
    patient = config.patient or ("patient" if "patient" in rows[0] else None)
    if patient is None:
        warnings.append("no column says whose each case is: intervals take every case for a patient of its own")
    if config.grades:
        grades = [_grade(value, name, labels, config) for value, name in zip(values, truth, strict=True)]
        if (scores != np.round(scores)).any() or scores.min() < 0 or scores.max() >= config.grades:
            raise EvaluationError(predictions, f"grades are whole numbers from 0 to {config.grades - 1}", "Round them")
        classes, scores = np.array(grades, np.intp), scores.astype(np.intp)
    else:
        known = sorted(set(values))
        if len(known) > 2 or (config.positive not in known and not set(known) <= {"0", "1"}):
            raise EvaluationError(
                labels, f"{config.label} is {', '.join(map(repr, known[:6]))}", "Say which one is --positive"
            )
        classes = np.array([value == config.positive for value in values])
    cases = Cases(
        tuple(truth),
        classes,
        scores,
        tuple(row[patient] if patient else name for name, row in truth.items()),
        {group: tuple(row[group] for row in truth.values()) for group in config.groups},
    )
    return cases, warnings


def _id_column(row: Mapping[str, str], path: Path) -> str:
    for name in ID_COLUMNS:
        if name in row:
            return name
    raise EvaluationError(path, f"has the columns {', '.join(row)}", f"One must name the case: {', '.join(ID_COLUMNS)}")


def _score_column(row: Mapping[str, str], path: Path, *, grades: bool) -> str:
    names = [name for name in (("grade", "isup_grade") if grades else ("score", "probability")) if name in row]
    names = names or [name for name in row if name.startswith("prob_")]
    if len(names) != 1:
        raise EvaluationError(path, f"has the columns {', '.join(row)}", "Say which one is the --score")
    return names[0]


def _need(row: Mapping[str, str], path: Path, *names: str) -> None:
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


def _grade(cell: str, name: str, path: Path, config: TableConfig) -> int:
    try:
        grade = isup_grade(cell) if config.gleason else int(cell)
    except ValueError as error:
        raise EvaluationError(path, f"the grade of {name!r} is {cell!r} ({error})", "") from None
    if not 0 <= grade < config.grades:
        raise EvaluationError(path, f"the grade of {name!r} is {grade}", f"Grades go from 0 to {config.grades - 1}")
    return grade
