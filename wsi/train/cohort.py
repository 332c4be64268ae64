"""Labelled slides (or patches) with their patients, and their split into train, validation and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsi.errors import ModelError, TrainError
from wsi.files import write_csv
from wsi.train.table import NUMBER, Rows, key_of, refuse_alike, refuse_empty, rows_of

_PATIENT = ("patient", "case_id", "patient_id")
#: Names of the parts, and their index in a `Split`.
PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}


class Case(NamedTuple):
    """One labelled slide or patch.

    Attributes
    ----------
    slide_id, patient : str
    label : int
        Class, or the survival interval of `time`.
    time : float, optional
        Survival: time of the event or of the last visit, in the table's unit.
    event : bool, optional
        Survival: True where the event was observed, False where censored.
    """

    slide_id: str
    patient: str
    label: int
    time: float | None = None
    event: bool | None = None

    @property
    def stratum(self) -> int:
        """What splits and balancing are stratified by: the class, or whether the event was observed."""
        return self.label if self.event is None else int(self.event)


@dataclass(frozen=True)
class Cohort:
    """Cases by id, the class names that labels index, and for survival the ends of the time intervals."""

    cases: dict[str, Case]
    class_names: tuple[str, ...]
    time_bins: tuple[float, ...] = ()

    def positive(self, asked: Sequence[str]) -> tuple[str, ...]:
        """Return the positive classes: `asked`, or by default the second of two; ModelError for an unknown class."""
        if set(asked) - set(self.class_names):
            raise ModelError(f"positive={list(asked)}", "no such class", f"Classes: {', '.join(self.class_names)}")
        return tuple(asked) or (self.class_names[1:] if len(self.class_names) == 2 and not self.time_bins else ())


class Split(NamedTuple):
    """Slide ids of each part; no patient is in two parts."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read_labels(
    path: Path,
    *,
    label: str = "label",
    classes: Sequence[str] = (),
    time_bins: Sequence[float] = (),
    case: str = "slide",
) -> Cohort:
    """Read a CSV of labels, one row a slide.

    Parameters
    ----------
    path : Path
        Columns ``slide`` (or ``slide_id``), ``patient`` (or ``case_id``; without it each slide is its own patient), and
        `label`. With `time_bins` the columns ``time`` and ``event`` (1 observed, 0 censored) replace `label`.
    label : str
        Name of the label column.
    classes : sequence of str
        Order of the classes; default: numeric where all are numbers, else alphabetical.
    time_bins : sequence of float
        Ends of the survival intervals, rising; the last interval is open.
    case : str
        Column that names a row, and the word for it in messages: "path" for patches.

    Raises
    ------
    TrainError
        A column or a cell is missing ("NA" and "nan" count as missing, unless one of `classes`), a row is too long, or
        a slide occurs twice; also what ``make_cohort`` refuses.
    """
    rows = rows_of(path, f"{case}, patient and label")
    columns = list(rows[0][1]) if rows else []
    slide = next((name for name in (case, f"{case}_id") if name in columns), None)
    wanted = ("time", "event") if time_bins else (label,)
    if slide is None or not set(wanted) <= set(columns):
        what = f"has the columns {', '.join(columns) or '(none)'}"
        raise TrainError(path, what, f"Needed: {case}, {', '.join(wanted)}")
    patient = next((name for name in _PATIENT if name in columns), slide)
    refuse_empty(path, rows, (slide, patient, *wanted), classes)
    ids = [row[slide] for _, row in rows]
    twice = [slide_id for slide_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise TrainError(path, f"{case} {twice[0]} is there twice", f"One row a {case}")
    patients = [row[patient] for _, row in rows]
    if time_bins:
        return _survival(path, ids, patients, rows, time_bins)
    texts = [row[label] for _, row in rows]
    return make_cohort(path, zip(ids, patients, texts, strict=True), classes)


def make_cohort(where: Path, rows: Iterable[tuple[str, str, str]], classes: Sequence[str] = ()) -> Cohort:
    """Make a cohort from rows (slide or patch, patient, class name).

    Raises TrainError for a label outside `classes`, a class without cases, a single class, and for class or patient
    names that differ only in spelling: "P1" and "p1", "7" and "07" and "7.0".
    """
    rows = list(rows)
    texts = {text for _, _, text in rows}
    refuse_alike(where, "patients", {patient for i, patient, _ in rows if patient != i})
    refuse_alike(where, "labels", texts - set(classes))
    names = tuple(classes) or tuple(sorted(sorted(texts), key=key_of if all(map(NUMBER.fullmatch, texts)) else None))
    if len(set(names)) < len(names):
        raise TrainError(where, f"--classes {', '.join(names)} names a class twice", "Once each")
    unknown = sorted(texts - set(names))
    if unknown:
        raise TrainError(where, f"label {unknown[0]!r} is not one of {', '.join(names)}", "Name it with --classes")
    if len(texts) == 1:
        raise TrainError(where, f"all have the label {rows[0][2]!r}", "There is nothing to tell apart: add others")
    empty = [name for name in names if name not in texts]
    if empty:
        raise TrainError(where, f"nobody is of the class {empty[0]!r}", "Add some, or leave it out of --classes")
    return Cohort({i: Case(i, patient, names.index(text)) for i, patient, text in rows}, names)


def read_parts(path: Path, cohort: Cohort, *, case: str = "slide") -> Split | None:
    """Read the split from a CSV's column ``split``: train, val or test; None without it, TrainError for other words."""
    rows = rows_of(path, f"{case}, patient and label")
    if not rows or "split" not in rows[0][1]:
        return None
    parts: tuple[list[str], ...] = ([], [], [])
    for name, (i, row) in zip(cohort.cases, rows, strict=True):
        part = PARTS.get(row["split"].lower())
        if part is None:
            raise TrainError(path, f"line {i}: split {row['split']!r} is none of train, val, test", "Correct it")
        parts[part].append(name)
    return Split(*map(tuple, parts))


def read_patients(path: Path) -> dict[str, str]:
    """Read a CSV with the columns ``slide`` and ``patient``.

    Raises TrainError where a column or a cell is missing, or a slide has two patients.
    """
    rows = rows_of(path, "slide and patient")
    slide = next((name for name in ("slide", "slide_id") if rows and name in rows[0][1]), None)
    patient = next((name for name in _PATIENT if rows and name in rows[0][1]), None)
    if slide is None or patient is None:
        raise TrainError(path, "lacks one of the columns slide, patient", "A row a slide")
    refuse_empty(path, rows, (slide, patient))
    found: dict[str, str] = {}
    for i, row in rows:
        if found.setdefault(row[slide], row[patient]) != row[patient]:
            what = f"line {i}: slide {row[slide]} is of patient {row[patient]}, and of {found[row[slide]]}"
            raise TrainError(path, what, "Keep one")
    return found


def match(cohort: Cohort, bags: Collection[str], *, subset: bool = False) -> Cohort:
    """Join labels and bags by slide id, with or without the slide's file suffix.

    Raises TrainError for a label without a bag or a bag without a label; `subset` leaves these slides out instead.
    """
    named: dict[str, Case] = {}
    for i, case in cohort.cases.items():
        name = _named(i, bags)
        if name in named:
            raise TrainError("labels and bags", f"two rows mean the bag {name}", "One row a slide")
        named[name] = case
    no_bag, no_label = [i for i in named if i not in bags], [i for i in bags if i not in named]
    for missing, what in ((no_bag, "have a label and no bag"), (no_label, "have a bag and no label")):
        if missing and not subset:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise TrainError("labels and bags", f"{len(missing)} slides {what}: {shown}", "--subset leaves them out")
    cases = {i: case._replace(slide_id=i) for i, case in named.items() if i in bags}
    if not cases:
        raise TrainError("labels and bags", "no slide has both", "Compare the slide column with the names of the bags")
    return Cohort(cases, cohort.class_names, cohort.time_bins)


def k_fold(cohort: Cohort, folds: int, seed: int) -> list[Split]:
    """Split by patient, stratified: fold i is test, fold i + 1 validation, the rest train.

    Raises TrainError for fewer than 3 folds, or fewer patients than folds.
    """
    if folds < 3:
        raise TrainError(f"folds={folds}", "train, validation and test need at least 3", "Ask for 3 or more")
    strata: dict[str, int] = {}
    for case in cohort.cases.values():  # a patient's stratum is the highest of its slides
        strata[case.patient] = max(strata.get(case.patient, 0), case.stratum)
    if len(strata) < folds:
        raise TrainError(f"folds={folds}", f"there are {len(strata)} patients", "Ask for fewer folds")
    rng = np.random.default_rng(seed)
    part: dict[str, int] = {}
    for stratum in sorted(set(strata.values())):
        members = sorted(patient for patient, of in strata.items() if of == stratum)
        for j in rng.permutation(len(members)):
            part[members[j]] = len(part) % folds
    parts = [tuple(i for i, case in cohort.cases.items() if part[case.patient] == fold) for fold in range(folds)]
    splits = []
    for test in range(folds):
        validation = (test + 1) % folds
        train = tuple(i for j, ids in enumerate(parts) if j not in (test, validation) for i in ids)
        splits.append(Split(train, parts[validation], parts[test]))
    return splits


def read_splits(path: Path, known: Collection[str] = ()) -> list[Split]:
    """Read CLAM's split tables: a CSV with the columns train, val, test, or a folder of ``splits_<k>.csv``.

    Ids may carry a suffix that those in `known` lack: pandas writes the number 7 as 7.0 in a column with gaps. Raises
    TrainError where there is no table, or a column is missing.
    """
    files = [path] if path.is_file() else sorted(path.glob("splits_*.csv"), key=lambda file: (len(file.name), file))
    files = [file for file in files if not file.stem.endswith(("_bool", "_descriptor"))]
    if not files:
        raise TrainError(path, "holds no splits_<k>.csv", "Give CLAM's split tables, or --folds")
    splits = []
    for file in files:
        rows = rows_of(file, "train, val, test")
        if not rows or not {"train", "val", "test"} <= set(rows[0][1]):
            raise TrainError(file, "lacks one of the columns train, val, test", "See CLAM's splits_0.csv")
        parts = ([row[name] for _, row in rows if row[name]] for name in ("train", "val", "test"))
        splits.append(Split(*(tuple(_named(i, known) for i in part) for part in parts)))
    return splits


def write_splits(folder: Path, splits: Sequence[Split]) -> None:
    """Write CLAM's split tables, ``splits_<k>.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("", "train", "val", "test")
    for k, split in enumerate(splits):
        rows = [dict(zip(columns, (i, *part), strict=True)) for i, part in enumerate(zip_longest(*split))]
        write_csv(folder / f"splits_{k}.csv", columns, rows)


def check_split(cohort: Cohort, split: Split, name: str) -> None:
    """Refuse a split that leaks or that nothing can be learnt from.

    Raises TrainError for an unknown slide, a slide that occurs twice, a patient in two parts, an empty part, a class
    that train lacks, or a validation part of one class (for survival: without an event).
    """
    parts = dict(zip(("train", "validation", "test"), split, strict=True))
    unknown = [i for ids in split for i in ids if i not in cohort.cases]
    if unknown:
        raise TrainError(name, f"slide {unknown[0]} has no label or no bag", "Remove it from the splits")
    seen: dict[str, str] = {}
    for part, ids in parts.items():
        if len(set(ids)) < len(ids):
            raise TrainError(name, f"slide {Counter(ids).most_common(1)[0][0]} is twice in {part}", "Once each")
        for i in ids:
            patient = cohort.cases[i].patient
            if seen.setdefault(patient, part) != part:
                what = f"patient {patient} is in {seen[patient]} and in {part}"
                raise TrainError(name, what, "Divide by patient: figures would lie")
    for part in ("train", "validation"):
        if not parts[part]:
            raise TrainError(name, f"its {part} part is empty", "Early stopping looks at validation alone")
        cases = [cohort.cases[i] for i in parts[part]]
        if cases[0].event is not None:
            if not any(case.event for case in cases):
                raise TrainError(name, f"its {part} part holds no event", "Ask for fewer folds, or more slides")
            continue
        missing = [c for i, c in enumerate(cohort.class_names) if i not in {case.label for case in cases}]
        if missing and (part == "train" or len(missing) == len(cohort.class_names) - 1):
            raise TrainError(name, f"its {part} part holds no {missing[0]!r}", "Ask for fewer folds, or more slides")


def _named(i: str, known: Collection[str]) -> str:
    """Return the member of `known` that `i` names, with or without a suffix; else `i`."""
    return next((name for name in (i, Path(i).stem) if name in known), i)


def _survival(path: Path, ids: list[str], patients: list[str], rows: Rows, bins: Sequence[float]) -> Cohort:
    ends = np.asarray(bins, np.float64)
    refuse_alike(path, "patients", {patient for i, patient in zip(ids, patients, strict=True) if patient != i})
    if not (np.diff(ends) > 0).all() or not 0 < ends[0] <= ends[-1] < np.inf:
        what = f"{list(bins)} do not rise from above 0"
        raise TrainError("time bins", what, "Give the ends of the intervals in order")
    cases = {}
    for i, patient, (_, row) in zip(ids, patients, rows, strict=True):
        try:
            time, event = float(row["time"]), {"1": True, "0": False}[row["event"].removesuffix(".0")]
            if not 0 <= time < np.inf:
                raise ValueError(time)
        except (ValueError, KeyError) as error:
            what = f"slide {i}: time {row['time']!r}, event {row['event']!r}"
            raise TrainError(path, what, "Time >= 0, event 0 or 1") from error
        cases[i] = Case(i, patient, int(np.searchsorted(ends, time)), time, event)
    if not any(case.event and case.label < len(ends) for case in cases.values()):
        what = f"no slide has an event until {ends[-1]:g}, the last of the time bins"
        raise TrainError(path, what, "There is nothing to learn from: add patients with events")
    edges = [0.0, *ends.tolist()]
    names = tuple(f"{a:g} to {b:g}" for a, b in pairwise(edges))
    return Cohort(cases, (*names, f"after {edges[-1]:g}"), tuple(edges[1:]))
