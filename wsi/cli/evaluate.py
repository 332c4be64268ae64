"""``wsi evaluate``: compare results with a reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi.cli.display import say
from wsi.errors import EvaluationError

if TYPE_CHECKING:
    from wsi.annotations.areas import Role
    from wsi.evaluate.cases import Cases, TableConfig
    from wsi.evaluate.report import Report

evaluate = typer.Typer(
    name="evaluate",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Compare results with a reference: CAMELYON16, CAMELYON17, labels in a CSV, annotations. Writes report.json, "
    "CSVs, plots and index.html.",
)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")]
Annotations = Annotated[
    Path | None, typer.Option(help="Folder of ASAP XML, QuPath GeoJSON or masks, named as the slides; or one file.")
]
Masks = Annotated[Path | None, typer.Option(help="Another name of --annotations.")]
Groups = Annotated[
    list[str] | None, typer.Option("--group", help="NAME=lesion, hole or ignore: role of a group (repeatable).")
]
SlideLabels = Annotated[Path | None, typer.Option(help="CSV with a row per slide: patient, columns for --subgroup.")]
Subgroup = Annotated[
    list[str] | None,
    typer.Option(help="Column that defines subgroups; for results also mpp, mpp_source, vendor, reader (repeatable)."),
]
TileThreshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Probability from which tiles are positive. Default: as scored.")
]
Draws = Annotated[int, typer.Option("--bootstrap", min=0, help="Bootstrap draws for each interval.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap.")]
About = Annotated[Path | None, typer.Option(help="JSON object with answers to the items of TRIPOD+AI and CLAIM.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print report.json on stdout.")]


@evaluate.command()
def camelyon16(
    results: Annotated[Path, typer.Argument(help="Results of wsi score, or a folder of detection files <slide>.csv.")],
    out: Out,
    annotations: Annotations = None,
    masks: Masks = None,
    reference: Annotated[
        Path | None, typer.Option(help="Official reference.csv. Without it a slide without an annotation is normal.")
    ] = None,
    fp: Annotated[str, typer.Option(help="Slides whose false positives count: all (official), normal (JAMA).")] = "all",
    detect: Annotated[str, typer.Option(help="Detection method: nms (non-maximum suppression) or components.")] = "nms",
    detect_threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability threshold of detections.")] = 0.5,
    nms_radius_um: Annotated[float, typer.Option(min=0, help="Radius of suppression in microns.")] = 187.0,
    true_mpp: Annotated[bool, typer.Option(help="Use each slide's own mpp, not the official 0.243.")] = False,
    slide_model: Annotated[Path | None, typer.Option(help="Model of wsi train slide-features: a third score.")] = None,
    exclusions: Annotated[
        str | None, typer.Option(help="CSV slide,task,issue,source, or 'none'. Default: the known exclusions.")
    ] = None,
    labels: SlideLabels = None,
    subgroup: Subgroup = None,
    group: Groups = None,
    bootstrap: Draws = 2000,
    seed: Seed = 0,
    about: About = None,
    as_json: AsJson = False,
) -> None:
    """Lesion FROC by the official rules of CAMELYON16, and slide AUROC.

    Examples:
      wsi evaluate camelyon16 results --annotations lesion_annotations --reference reference.csv -o evaluation

      wsi evaluate camelyon16 detections --masks evaluation_masks -o evaluation
    """
    from wsi.evaluate.camelyon16 import evaluate_camelyon16
    from wsi.evaluate.camelyon16_slides import Camelyon16Config
    from wsi.evaluate.cases import read_cohort
    from wsi.evaluate.detect import DetectConfig
    from wsi.evaluate.report import refuse_foreign
    from wsi.evaluate.slide_features import load_forest

    if fp not in ("all", "normal"):
        raise EvaluationError(f"--fp {fp}", "no such definition", "all or normal")
    _unused(labels and not subgroup, "--labels", "names columns to divide the slides by", "Name one with --subgroup")
    heatmaps = (results / "run.json").exists()
    _unused(slide_model and not heatmaps, "--slide-model", "is for heatmaps", "Give a results folder, or leave it out")
    if heatmaps:
        refuse_foreign(out, "detections")
    config = Camelyon16Config(
        DetectConfig(detect, detect_threshold, nms_radius_um),
        fp,
        true_mpp,
        Path(exclusions) if exclusions not in (None, "none") else None,
        exclusions != "none",
        _roles(group),
        bootstrap,
        seed,
    )
    report = evaluate_camelyon16(
        results,
        _one_of(annotations, masks),
        out=out,
        reference=reference,
        forest=load_forest(slide_model) if slide_model else None,
        config=config,
        cohort=read_cohort(results, labels, groups=subgroup) if subgroup else None,
    )
    _finish(report, out, about, as_json)


@evaluate.command()
def camelyon17(
    results: Annotated[Path, typer.Argument(help="Results of wsi score, or a submission CSV (patient,stage).")],
    reference: Annotated[Path, typer.Option(help="Stages: patient_000.zip,pN0 and patient_000_node_0.tif,negative.")],
    out: Out,
    threshold: TileThreshold = None,
    bootstrap: Draws = 2000,
    seed: Seed = 0,
    about: About = None,
    as_json: AsJson = False,
) -> None:
    """Patient stages and quadratic weighted kappa by the official rules of CAMELYON17.

    Example:
      wsi evaluate camelyon17 results --reference stage_labels.csv -o evaluation
    """
    from wsi.evaluate.camelyon17 import evaluate_camelyon17
    from wsi.evaluate.report import refuse_foreign

    if results.is_dir():
        refuse_foreign(out, "submission.csv")
    stages = results.is_file()
    _unused(threshold is not None and stages, "--threshold", "is for heatmaps, not for stages", "Leave it out")
    report = evaluate_camelyon17(results, reference, out=out, threshold=threshold, n_bootstrap=bootstrap, seed=seed)
    _finish(report, out, about, as_json)


Labels = Annotated[Path | None, typer.Option(help="CSV: case (slide_id, image_id, id, ...), label, further columns.")]
Label = Annotated[str, typer.Option(help="Column of the label.")]
Score = Annotated[
    str | None, typer.Option(help="Column of the score. Default: score, prob_<positive>, or the only prob_... one.")
]
Positive = Annotated[str, typer.Option(help="The label that counts as positive.")]
Patient = Annotated[str | None, typer.Option(help="Column of the patient. Default: patient, if present.")]
Validation = Annotated[Path | None, typer.Option(help="CSV of other cases (label, score) to choose the threshold on.")]
Specificity = Annotated[float, typer.Option(min=0, max=1, help="Specificity at which sensitivity is reported.")]
Threshold = Annotated[float | None, typer.Option(help="A threshold chosen on other cases.")]
Compare = Annotated[Path | None, typer.Option(help="Predictions of another run on the same cases.")]


@evaluate.command()
def slides(
    predictions: Annotated[
        Path,
        typer.Argument(help="Results of wsi score, stores with grades.csv (wsi embed), or a CSV of scores."),
    ],
    out: Out,
    labels: Labels = None,
    label: Label = "label",
    score: Score = None,
    positive: Positive = "1",
    patient: Patient = None,
    subgroup: Subgroup = None,
    validation: Validation = None,
    specificity: Specificity = 0.95,
    threshold: Threshold = None,
    compare: Compare = None,
    grades: Annotated[int, typer.Option(min=0, help="Number of ordered grades, for quadratic kappa.")] = 0,
    isup: Annotated[bool, typer.Option(help="PANDA: grades 0 to 5; labels may be Gleason scores (3+4).")] = False,
    bootstrap: Draws = 2000,
    seed: Seed = 0,
    about: About = None,
    as_json: AsJson = False,
) -> None:
    """Slide scores or grades against labels: discrimination, calibration, subgroups, comparison.

    Examples:
      wsi evaluate slides results --labels labels.csv --positive tumour --subgroup centre -o evaluation

      wsi evaluate slides predictions.csv --labels train.csv --isup --label gleason_score -o evaluation
    """
    from wsi.evaluate.cases import TableConfig, read_cases
    from wsi.evaluate.tables import evaluate_table

    cut = validation or threshold is not None
    _unused(cut and (grades or isup), "--validation or --threshold", "is for scores, not for grades", "Leave it out")
    config = TableConfig(
        label, score, positive, patient, tuple(subgroup or ()), specificity, threshold,
        6 if isup else grades, isup and label == "gleason_score", bootstrap, seed,
    )  # fmt: skip
    places = [place for place in (predictions, compare, validation) if place]
    in_csv = [place for place in places if not place.is_dir() or (place / "grades.csv").is_file()]
    _unused(score and not in_csv, "--score", "is a column of a CSV", "Leave it out")
    cases, warnings = read_cases(predictions, labels or predictions, config)
    held = _held_out(validation, config)
    other = read_cases(compare, labels or compare, config)[0] if compare else None
    report = evaluate_table("slides", cases, config=config, validation=held, other=other, warnings=warnings)
    _finish(report, out, about, as_json)


@evaluate.command()
def patches(
    predictions: Annotated[Path, typer.Argument(help="A CSV with a score per patch; or results of wsi score.")],
    out: Out,
    labels: Labels = None,
    annotations: Annotations = None,
    label: Label = "label",
    score: Score = None,
    positive: Positive = "1",
    patient: Patient = None,
    subgroup: Subgroup = None,
    validation: Validation = None,
    specificity: Specificity = 0.95,
    threshold: Threshold = None,
    compare: Compare = None,
    group: Groups = None,
    bootstrap: Draws = 2000,
    seed: Seed = 0,
    about: About = None,
    as_json: AsJson = False,
) -> None:
    """Patch scores against labels, or the tiles of scored slides against annotations.

    Examples:
      wsi evaluate patches predictions.csv --labels labels.csv --patient patient -o evaluation

      wsi evaluate patches results --annotations outlines -o evaluation
    """
    from wsi.evaluate.cases import TableConfig, read_cases, read_cohort
    from wsi.evaluate.segmentation import tile_cases
    from wsi.evaluate.tables import evaluate_table

    config = TableConfig(
        label, score, positive, patient, tuple(subgroup or ()), specificity, threshold, 0, False, bootstrap, seed
    )
    roles = _roles(group)
    _unused(roles and annotations is None, "--group", "says what outlines mean", "Give them with --annotations")
    if annotations is not None:
        named = validation is None and (score or (label, positive) != ("label", "1"))
        _unused(named, "--label, --score or --positive", "is for a CSV, not for outlines", "Leave it out")
        cohort = read_cohort(predictions, labels, patient=patient, groups=config.groups)
        cases, warnings = tile_cases(predictions, annotations, roles, cohort)
        if len(set(cohort.patients.values())) == len(cohort.patients):
            warnings.append("every slide is taken for a patient of its own: --labels says whose they are")
        other = tile_cases(compare, annotations, roles, cohort)[0] if compare else None
    else:
        cases, warnings = read_cases(predictions, labels or predictions, config)
        other = read_cases(compare, labels or compare, config)[0] if compare else None
    held = _held_out(validation, config)
    report = evaluate_table("patches", cases, config=config, validation=held, other=other, warnings=warnings)
    _finish(report, out, about, as_json)


@evaluate.command()
def segmentation(
    results: Annotated[Path, typer.Argument(help="Results of wsi score.")],
    out: Out,
    annotations: Annotations = None,
    masks: Masks = None,
    threshold: TileThreshold = None,
    labels: SlideLabels = None,
    patient: Patient = None,
    subgroup: Subgroup = None,
    compare: Annotated[Path | None, typer.Option(help="Results of another run on the same slides.")] = None,
    group: Groups = None,
    bootstrap: Draws = 2000,
    seed: Seed = 0,
    about: About = None,
    as_json: AsJson = False,
) -> None:
    """Dice, IoU and Hausdorff distance of positive regions against annotations or masks.

    Examples:
      wsi evaluate segmentation results --annotations outlines -o evaluation

      wsi evaluate segmentation results --masks masks --labels slides.csv --subgroup centre -o evaluation
    """
    from wsi.evaluate.cases import read_cohort
    from wsi.evaluate.segmentation import SegmentationConfig, evaluate_segmentation

    config = SegmentationConfig(threshold, _roles(group), bootstrap, seed)
    cohort = read_cohort(results, labels, patient=patient, groups=tuple(subgroup or ()))
    truth = _one_of(annotations, masks)
    report = evaluate_segmentation(results, truth, config=config, cohort=cohort, other=compare)
    _finish(report, out, about, as_json)


def _held_out(validation: Path | None, config: TableConfig) -> Cases | None:
    """Cases used only to choose a threshold; they need neither patients nor subgroups."""
    from wsi.evaluate.cases import read_cases

    return read_cases(validation, validation, replace(config, patient=None, groups=()))[0] if validation else None


def _unused(is_given: object, option: str, what: str, remedy: str) -> None:
    """Refuse an option that would have no effect."""
    if is_given:
        raise EvaluationError(option, f"{what}: it would have no effect here", remedy)


def _one_of(annotations: Path | None, masks: Path | None) -> Path:
    if (annotations is None) == (masks is None):
        raise EvaluationError(
            "--annotations", "or --masks is required, and only one of them", "Give the folder of annotations or masks"
        )
    return annotations or masks or Path()


def _roles(groups: list[str] | None) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for text in groups or ():
        name, _, role = text.rpartition("=")
        if not name or role not in ("lesion", "hole", "ignore"):
            raise EvaluationError(f"--group {text}", "is not NAME=lesion, hole or ignore", "Such as DCIS=lesion")
        roles[name] = role  # type: ignore[assignment]
    return roles


def _finish(report: Report, out: Path, about: Path | None, as_json: bool) -> None:
    """Write the report and print the results."""
    from wsi.evaluate.report import read_about, write_report

    answers = read_about(about)
    write_report(out, report, answers)
    for warning in report.warnings:
        say(f"wsi: {warning}")
    if as_json:
        print(json.dumps(report.json(answers), indent=2, allow_nan=False))
        return
    for name, estimate in report.results.items():
        print(f"{name:40} {estimate}")
    say(f"report: {out / 'index.html'}")
