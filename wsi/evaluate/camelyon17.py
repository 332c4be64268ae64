"""CAMELYON17: from the largest lesion to the slide label to the patient stage; quadratic weighted kappa."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from wsi.errors import EvaluationError
from wsi.evaluate import plots
from wsi.evaluate.inputs import read_rows, unfinished, unique
from wsi.evaluate.report import Report, data_hash, leaderboard
from wsi.files import write_csv
from wsi.heatmap import major_axis_um
from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.estimate import Estimate
from wsi.metrics.kappa import NODE_STAGES, PN_STAGES, confusion, node_stage, patient_stage, quadratic_kappa
from wsi.metrics.roc import proportion
from wsi.scored import ScoredSlide, scored_slides
from wsi.units import Mpp

_NODE = re.compile(r"(patient_\w+?)_node_(\w+)", re.IGNORECASE)


def evaluate_camelyon17(
    results: Path, reference: Path, *, out: Path, threshold: float | None = None, n_bootstrap: int = 2000, seed: int = 0
) -> Report:
    """Compare stages with the reference, as the official ``evaluate.py`` does.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score`` whose slides are named ``patient_017_node_2``; or a submission, a CSV with the
        columns patient and stage.
    reference : Path
        The same kind of CSV: ``patient_017.zip,pN1`` and, where known, ``patient_017_node_2.tif,macro``.
    out : Path
        ``submission.csv`` is written there if stages were derived from heatmaps.
    threshold : float, optional
        Probability from which tiles are lesion. Default: the one the slides were scored with.
    n_bootstrap, seed : int

    Raises
    ------
    EvaluationError
        A patient of the reference has no stage, a stage is unknown, or a row occurs twice.

    Examples
    --------
    >>> evaluate_camelyon17(Path("submission.csv"), Path("reference.csv"), out=Path("out"))       # doctest: +SKIP
    """
    truth = _read_stages(reference)
    warnings: list[str] = []
    sizes: dict[str, float] = {}
    if results.is_dir():
        warnings += unfinished(results)
        found, sizes = _stages_of(scored_slides(results), threshold, truth, warnings)
    else:
        found = _read_stages(results)
    patients = sorted(name for name in truth if name.endswith(".zip"))
    if not patients:
        raise EvaluationError(reference, "names no patients", "Rows such as patient_000.zip,pN0")
    missing = [name for name in patients if name not in found]
    if missing:
        raise EvaluationError(results, f"says nothing of {len(missing)} patients, {missing[0]} for one", "Add them")
    nodes = sorted(name for name in truth if not name.endswith(".zip") and name in found)
    bare = sorted(set(truth) - set(patients) - set(nodes))
    if bare:
        warnings.append(f"{len(bare)} slides of the reference have no stage, and are left out, {bare[0]} for one")

    def kappa(names: list[str], stages: tuple[str, ...]) -> tuple[Estimate, Any]:
        a, b = (np.array([stages.index(of[name]) for name in names], np.intp) for of in (truth, found))
        value = quadratic_kappa(a, b, len(stages))
        if value.value is not None:
            value = bootstrap(
                lambda rows: quadratic_kappa(a[rows], b[rows], len(stages)).value,
                [patient_of(name) for name in names], n_draws=n_bootstrap, seed=seed,
            )  # fmt: skip
        return value, confusion(a, b, len(stages))

    def share(right: list[bool], names: list[str], reason: str) -> Estimate:
        """The share of correct slides, with an interval over patients, who have five slides each."""
        values = np.array(right, np.float64)
        if not len(values):
            return Estimate.undefined(reason)
        return bootstrap(
            lambda rows: float(values[rows].mean()),
            [patient_of(name) for name in names], n_draws=n_bootstrap, seed=seed,
        )  # fmt: skip

    overall, counts = kappa(patients, PN_STAGES)
    right = sum(truth[name] == found[name] for name in patients)
    results_ = {"kappa": overall, "patient_accuracy": proportion(right, len(patients))}
    pictures = [plots.confusion_plot(counts, PN_STAGES, "patients")]
    if nodes:
        slide_kappa, slide_counts = kappa(nodes, NODE_STAGES)
        results_["slide_kappa"] = slide_kappa
        results_["slide_accuracy"] = share([truth[n] == found[n] for n in nodes], nodes, "no slide")
        for stage in NODE_STAGES[1:]:
            own = [name for name in nodes if truth[name] == stage]
            results_[f"sensitivity_{stage}"] = share([found[n] != "negative" for n in own], own, f"no {stage} slide")
        pictures.append(plots.confusion_plot(slide_counts, NODE_STAGES, "slides"))
    if results.is_dir():
        _write_submission(out, found)
    rows: list[dict[str, Any]] = [
        {"name": name, "reference": truth[name], "predicted": found[name], "major_axis_mm": sizes.get(name)}
        for name in (*patients, *nodes)
    ]
    protocol = {
        "slide_label": "largest region by major axis: above 0 mm itc, above 0.2 mm micro, above 2 mm macro"
        if sizes
        else "as submitted",
        "patient_stage": "from the slide labels by the challenge's rules" if sizes else "as submitted",
        "threshold": threshold if threshold is not None else "as scored" if sizes else None,
        "kappa": f"quadratic weights over {', '.join(PN_STAGES)}, as the official evaluate.py",
        "bootstrap": f"{n_bootstrap} draws of patients, seed {seed}",
    }
    return Report(
        "camelyon17",
        "Patient stages by the rules of CAMELYON17",
        protocol,
        {
            "patients": len(patients),
            "slides": len(nodes),
            "sha256": data_hash((name, truth[name]) for name in (*patients, *nodes)),
        },
        results_,
        {"stages": rows},
        pictures,
        leaderboard=leaderboard("camelyon17", "kappa", {"kappa": overall}, f"{len(patients)} patients"),
        warnings=tuple(warnings),
        reporting={"partition_unit": "patient", "reference_standard": "stages of the reference file"},
    )


def patient_of(name: str) -> str:
    """Return the patient of a row of the stage file.

    Examples
    --------
    >>> patient_of("patient_017_node_2.tif"), patient_of("patient_017.zip")
    ('patient_017', 'patient_017')
    """
    node = _NODE.match(name)
    return node.group(1).lower() if node else name.rsplit(".", 1)[0].lower()


def _read_stages(path: Path) -> dict[str, str]:
    """Stages by lower-case file name: patients end in .zip, nodes in .tif."""
    rows = read_rows(path)
    if not {"patient", "stage"} <= set(rows[0]):
        raise EvaluationError(path, f"has the columns {', '.join(rows[0])}", "Columns: patient,stage")
    stages = {}
    for name, row in unique(rows, "patient", path, str.lower).items():
        known = PN_STAGES if name.endswith(".zip") else NODE_STAGES
        if row["stage"] not in known:
            raise EvaluationError(path, f"{name} has the stage {row['stage']!r}", f"Known: {', '.join(known)}")
        stages[name] = row["stage"]
    return stages


def _stages_of(
    slides: dict[str, ScoredSlide], threshold: float | None, truth: dict[str, str], warnings: list[str]
) -> tuple[dict[str, str], dict[str, float]]:
    """Stages of slides and of their patients, and the lesion sizes in mm they are derived from."""
    stages, sizes = {}, {}
    nodes: dict[str, list[str]] = defaultdict(list)
    others = []
    for slide_id, slide in slides.items():
        if not _NODE.fullmatch(slide_id):
            others.append(slide_id)
            continue
        name = f"{slide_id.lower()}.tif"
        sizes[name] = _largest_mm(slide, threshold)
        stages[name] = node_stage(sizes[name])
        nodes[patient_of(name)].append(stages[name])
    if others:
        warnings.append(
            f"{len(others)} slides are not named patient_..._node_... and are left out, {others[0]} for one"
        )
    unscored = [n for n in truth if not n.endswith(".zip") and n not in stages and patient_of(n) in nodes]
    if unscored:
        raise EvaluationError(
            unscored[0], f"and {len(unscored) - 1} other nodes are in the reference and have no results", "Score them"
        )
    short = sorted(patient for patient, own in nodes.items() if len(own) != 5)
    if short:
        warnings.append(f"{len(short)} patients have another number of nodes than 5, {short[0]} for one")
    return stages | {f"{patient}.zip": patient_stage(own) for patient, own in nodes.items()}, sizes


def _largest_mm(slide: ScoredSlide, threshold: float | None) -> float:
    """Major axis of the largest positive region in mm; 0 if there is none."""
    numbers = slide.numbers
    if threshold is None:
        if numbers["positive_mm2"] is None and numbers["n_tiles"]:
            why = numbers["reasons"].get("positive_mm2", "has no regions")
            raise EvaluationError(slide.folder, why, "Score it again")
        return float(numbers["largest_region_um"] or 0) / 1000
    mpp = Mpp(slide.mpp, slide.mpp)
    return max((major_axis_um(region, mpp) for region in slide.regions(threshold)), default=0.0) / 1000


def _write_submission(out: Path, stages: dict[str, str]) -> None:
    """Write the official CSV: each patient, followed by its nodes."""
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(stages, key=lambda name: (patient_of(name), not name.endswith(".zip"), name))
    rows = [{"patient": name, "stage": stages[name]} for name in order]
    write_csv(out / "submission.csv", ("patient", "stage"), rows)
