"""CAMELYON16's inputs: results, annotations, reference and exclusions, joined by slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsi.annotations.areas import Role
from wsi.errors import EvaluationError
from wsi.evaluate.detect import DetectConfig, detect
from wsi.evaluate.inputs import annotation_of, read_detections, read_rows, slide_name, unfinished, unique
from wsi.evaluate.report import packaged_rows
from wsi.metrics.estimate import F64
from wsi.scored import ScoredSlide, scored_slides


@dataclass(frozen=True)
class Camelyon16Config:
    """How CAMELYON16 is evaluated.

    Attributes
    ----------
    detect : DetectConfig
    fp : str
        Which false positives the main FROC counts: those of "all" slides (the organisers' script) or of "normal" ones
        (JAMA 2017). Both are reported.
    true_mpp : bool
        Use each slide's own microns per pixel instead of the official 0.243, and masks of about 7.8 um per pixel.
    exclusions : Path, optional
        A CSV with the columns slide, task (all, lesion or note), issue, source. Default: the one in the package.
    exclude : bool
        False: no slide is excluded.
    roles : mapping of group to "lesion", "hole" or "ignore"
    n_bootstrap, seed : int
    """

    detect: DetectConfig = field(default_factory=DetectConfig)
    fp: str = "all"
    true_mpp: bool = False
    exclusions: Path | None = None
    exclude: bool = True
    roles: Mapping[str, Role] = field(default_factory=dict)
    n_bootstrap: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A slide: its detections and its reference."""

    slide_id: str
    detections: F64
    scored: ScoredSlide | None
    annotation: Path | None
    tumour: bool | None
    """According to the reference; None without one."""
    size_class: str


def read_slides(
    results: Path, annotations: Path, reference: Path | None, config: Camelyon16Config
) -> tuple[list[Case], list[str]]:
    """Join results, annotations and reference by slide.

    Returns
    -------
    cases : list of Case
    warnings : list of str

    Raises
    ------
    EvaluationError
        A slide of the reference has no results, a name occurs twice, or there is nothing to evaluate.

    Examples
    --------
    >>> read_slides(Path("results"), Path("annotations"), None, Camelyon16Config())               # doctest: +SKIP
    """
    warnings: list[str] = []
    scored: dict[str, ScoredSlide] = {}
    files: dict[str, Path] = {}
    if not annotations.exists():
        raise EvaluationError(annotations, "there is no such file or folder", "Give the folder of annotations or masks")
    if not results.is_dir():
        raise EvaluationError(results, "is no folder", "Give a results folder, or a folder of detection files")
    if (results / "run.json").exists():
        scored = scored_slides(results)
        warnings += unfinished(results)
    else:
        files = {path.stem: path for path in sorted(results.glob("*.csv"))}
    names = {name.lower(): name for name in (*scored, *files)}
    if len(names) < len(scored) + len(files):
        alike = next(name for name in (*scored, *files) if names[name.lower()] != name)
        raise EvaluationError(results, f"holds {alike} and {names[alike.lower()]}", "Keep one: references ignore case")
    labels: dict[str, dict[str, str]] = {}
    if reference is not None:
        labels = _read_reference(reference)
        out_of_all = {slide_name(row["slide"]) for row in _exclusion_rows(config) if row["task"] == "all"}
        missing = sorted(set(labels) - set(names) - out_of_all)
        if missing:
            raise EvaluationError(
                results,
                f"holds no results of {len(missing)} slides of the reference, {missing[0]} for one",
                "Score them; a slide without detections needs an empty file, or it is missing in the denominator",
            )
        extra = sorted(set(names) - set(labels))
        if extra:
            warnings.append(f"{len(extra)} slides are not in the reference and are left out, {extra[0]} for one")
            names = {low: name for low, name in names.items() if low in labels}
    if annotations.is_file() and len(names) > 1:
        raise EvaluationError(annotations, f"is one file, and there are {len(names)} slides", "Give the folder")
    if not names:
        raise EvaluationError(results, "holds no detection files", "One <slide>.csv a slide, empty ones too")
    cases = []
    for low, name in names.items():
        slide = scored.get(name)
        if slide is not None:
            found = detect(slide.heatmap(), slide.mpp, config.detect, size=slide.size)
        else:
            found = read_detections(files[name])
            if len(found) > len(np.unique(found, axis=0)):
                warnings.append(f"{name}: some detections stand there twice, and count twice")
        label = labels.get(low)
        tumour = None if label is None else label["label"] == "Tumor"
        size_class = "" if label is None else label["size"].lower()
        cases.append(Case(name, found, slide, annotation_of(annotations, name), tumour, size_class))
    bare = [case.slide_id for case in cases if case.annotation is None and case.tumour is None]
    if bare:
        warnings.append(f"{len(bare)} slides without an annotation file are taken for normal, {bare[0]} for one")
    return cases, warnings


def _read_reference(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the official reference.csv by ``slide_name``."""
    labels = unique(read_rows(path, header=("slide", "label", "type", "size")), "slide", path, slide_name)
    wrong = sorted({row["label"] for row in labels.values()} - {"Tumor", "Normal"})
    if wrong:
        raise EvaluationError(path, f"says {wrong[0]!r} of a slide", "Columns: slide, Tumor or Normal, type, size")
    return labels


def _exclusion_rows(config: Camelyon16Config) -> list[dict[str, str]]:
    if not config.exclude:
        return []
    rows = read_rows(config.exclusions) if config.exclusions else packaged_rows("camelyon16_exclusions")
    wrong = [row for row in rows if row.get("task") not in ("all", "lesion", "note") or not row.get("slide")]
    if wrong:
        remedy = "A row needs a slide, and a task: all, lesion or note"
        raise EvaluationError(config.exclusions or "", f"holds an invalid row: {wrong[0]}", remedy)
    return rows


def exclusions_of(cases: list[Case], config: Camelyon16Config) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the excluded slides, each with the task it is excluded from ("all" or "lesion"), and the rows of reasons.

    Examples
    --------
    >>> case = Case("Test_114", np.zeros((0, 3)), None, None, True, "macro")
    >>> exclusions_of([case], Camelyon16Config())[0]
    {'Test_114': 'lesion'}
    """
    names = {case.slide_id.lower(): case.slide_id for case in cases}
    rows = [row for row in _exclusion_rows(config) if slide_name(row["slide"]) in names]
    # In reverse order "all" comes last, and so wins where a slide has both.
    tasks = sorted(((row["task"], slide_name(row["slide"])) for row in rows if row["task"] != "note"), reverse=True)
    return {names[name]: task for task, name in tasks}, rows
