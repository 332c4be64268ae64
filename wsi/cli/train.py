"""``wsi train``: train models on your own slides."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi.cli.archive import Device, Precision, Quiet
from wsi.cli.display import say, watching
from wsi.errors import ModelError, TrainError

if TYPE_CHECKING:
    from wsi.train.images import Labelled

train = typer.Typer(
    name="train",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train models on your own slides. Research use only.",
)

Out = Annotated[Path, typer.Option("-o", "--out", help="The model's folder; the same command again resumes.")]
Label = Annotated[str, typer.Option(help="Column of the labels.")]
Classes = Annotated[str | None, typer.Option(help="Classes in order, separated by commas.")]
Positive = Annotated[list[str] | None, typer.Option(help="Positive class (repeatable).")]
Epochs = Annotated[int, typer.Option(min=1, help="Maximum number of epochs.")]
Patience = Annotated[int, typer.Option(min=1, help="Stop after so many epochs without a lower validation loss.")]
Balance = Annotated[bool, typer.Option(help="Sample all classes equally often.")]
Seed = Annotated[int, typer.Option(min=0)]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads; the number may affect the last bits.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")]


@train.command()
def mil(
    bags: Annotated[list[Path], typer.Argument(help="Results of wsi score, or CLAM or TRIDENT feature folders.")],
    labels: Annotated[Path, typer.Option(help="CSV: slide, patient, label; for survival slide, patient, time, event.")],
    out: Out,
    architecture: Annotated[
        str,
        typer.Option(
            "--architecture",
            "-a",
            help="mean, max, top-k, noisy-or, attention, gated-attention, additive, "
            "clam-sb, clam-mb, dsmil, transmil, dtfd.",
        ),
    ] = "gated-attention",
    argument: Annotated[
        list[str] | None, typer.Option("--set", help="Argument of the architecture, such as hidden=128 (repeatable).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="softmax (default), binary, ordinal; survival: hazard, cox.")] = None,
    label: Label = "label",
    classes: Classes = None,
    positive: Positive = None,
    time_bins: Annotated[str | None, typer.Option(help="Survival: ends of the intervals, such as 12,36,60.")] = None,
    folds: Annotated[int, typer.Option(min=3, help="Number of folds, split by patient and stratified.")] = 5,
    splits: Annotated[Path | None, typer.Option(help="CLAM's splits_<k>.csv or their folder, not folds.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Ensemble members per fold.")] = 1,
    epochs: Epochs = 100,
    patience: Patience = 15,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    weight_decay: Annotated[float, typer.Option(min=0)] = 1e-3,
    batch: Annotated[int | None, typer.Option(min=1, help="Bags per step. Default: 1; Cox: 32.")] = None,
    balance: Balance = False,
    coverage: Annotated[float, typer.Option(min=0.5, max=0.999, help="Coverage of the prediction sets.")] = 0.9,
    encoder: Annotated[
        str | None,
        typer.Option(help="Name or hash of the encoder (wsi embed), if the stores hold features of several."),
    ] = None,
    subset: Annotated[bool, typer.Option(help="Leave out slides without a label, and labels without a slide.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a slide grader from slide labels by multiple-instance learning.

    Examples:
      wsi train mil results/ --labels labels.csv -o grader

      wsi train mil trident/20x_256px_0px_overlap/features_uni_v1 --labels isup.csv --head ordinal -a dsmil -o isup

      wsi score slide.svs --model idc-breast --mil grader -o results
    """  # fmt: skip
    from wsi.archive import Event
    from wsi.train.bags import find_bags
    from wsi.train.cohort import k_fold, match, read_labels, read_splits
    from wsi.train.ensemble import train_mil
    from wsi.train.mil import Bags, MilConfig, prepare
    from wsi.train.table import NUMBER

    device = prepare(device, threads)
    found = find_bags(bags)
    names = _names(classes)
    cohort = read_labels(labels, label=label, classes=names, time_bins=_numbers(time_bins))
    cohort = match(cohort, found, subset=subset)
    if all(case.patient == case.slide_id for case in cohort.cases.values()):
        say("wsi: no column 'patient': each slide is taken for a patient of its own", quiet=quiet)
    kind: Any = head or ("hazard" if time_bins else "softmax")
    config = MilConfig(
        architecture=architecture, arguments=_arguments(argument or []), head=kind, epochs=epochs, patience=patience,
        lr=lr, weight_decay=weight_decay, batch=batch or (32 if kind == "cox" else 1), balance=balance, seed=seed,
    )  # fmt: skip
    config.check()
    if kind == "ordinal" and not names and not all(map(NUMBER.fullmatch, cohort.class_names)):
        what = f"the grades {', '.join(cohort.class_names)} are words, which do not say their order"
        raise TrainError(labels, what, "Say it with --classes, the least first")
    divided = read_splits(splits, cohort.cases) if splits else k_fold(cohort, folds, seed)
    unused = set(cohort.cases).difference(*chain(*divided))
    if unused:
        say(f"wsi: {len(unused)} slides are in no split, {min(unused)} for one: they are not used", quiet=quiet)
    table = Bags({slide_id: found[slide_id] for slide_id in cohort.cases}, encoder=encoder)
    with watching(len(divided) * seeds, quiet=quiet) as tell:
        figures = train_mil(
            cohort, table, divided, out, config, seeds=seeds, coverage=coverage, positive=positive or (), device=device,
            progress=lambda member, epoch, of: tell(Event("stage", "epochs", f"member {member}", epoch, of)),
        )  # fmt: skip
    _report(figures, "slides", as_json=as_json, quiet=quiet)
    say(f"the model: {out}", quiet=quiet)


@train.command()
def patches(
    places: Annotated[
        list[Path],
        typer.Argument(help="A folder of class folders, a CSV (path, label, patient, split), or stores of wsi tile."),
    ],
    out: Out,
    mpp: Annotated[float | None, typer.Option(min=0.05, max=20, help="Microns per pixel; stores record it.")] = None,
    architecture: Annotated[str, typer.Option("--architecture", "-a", help="wsi-p4m or a timm name.")] = "wsi-p4m",
    argument: Annotated[
        list[str] | None, typer.Option("--set", help="Argument of the architecture, such as head=32 (repeatable).")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Start from the weights of a model or encoder: a name, a folder, or hf-hub:OWNER/NAME."),
    ] = None,
    frozen: Annotated[bool, typer.Option(help="With --start: train only the classifier (linear probe).")] = False,
    annotations: Annotated[
        Path | None, typer.Option(help="For stores: a folder of annotations, <slide>.geojson or another format.")
    ] = None,
    rest: Annotated[str | None, typer.Option(help="For stores: class of tiles less than half annotated.")] = None,
    patients: Annotated[Path | None, typer.Option(help="For stores: CSV slide, patient.")] = None,
    patient_in: Annotated[str | None, typer.Option(help="For a folder: regex for the patient in a path.")] = None,
    label: Label = "label",
    classes: Classes = None,
    positive: Positive = None,
    folds: Annotated[int, typer.Option(min=3, help="Folds, if no split is given: one test, one validation.")] = 5,
    epochs: Epochs = 30,
    patience: Patience = 5,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: 1e-3; for fine-tuning 1e-4.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.01,
    batch: Annotated[int, typer.Option(min=1, help="Patches per step.")] = 32,
    balance: Balance = False,
    stain: Annotated[float, typer.Option(min=0, max=1, help="Strength of stain augmentation; 0: none.")] = 0.1,
    turn: Annotated[bool, typer.Option(help="Rotate by multiples of 90 degrees and mirror at random.")] = True,
    jpeg: Annotated[float, typer.Option(min=0, max=1, help="Share of patches recompressed as JPEG at random.")] = 0.0,
    precision: Precision = "auto",
    subset: Annotated[bool, typer.Option(help="Leave out patches that are not of the most common size.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a patch classifier: from random weights, by fine-tuning, or a linear probe.

    Examples:
      wsi train patches patches/ --mpp 0.5 --patient-in '(TCGA-..-....)' -o model

      wsi train patches labels.csv --mpp 0.5 --start hf-hub:timm/resnet18.a1_in1k -o model

      wsi train patches stores/ --annotations outlines --rest normal --start uni --frozen -o model

      wsi score slide.svs --model model -o results
    """
    from wsi.archive import Event
    from wsi.memory import keep_freed_memory
    from wsi.train.classifier import PatchConfig
    from wsi.train.cohort import k_fold
    from wsi.train.images import Patches
    from wsi.train.mil import prepare
    from wsi.train.patches import train_patches

    keep_freed_memory()
    config = PatchConfig(
        architecture=architecture, arguments=_arguments(argument or []), start=start, frozen=frozen, epochs=epochs,
        patience=patience, lr=lr, weight_decay=weight_decay, batch=batch, balance=balance, stain=stain, turn=turn,
        jpeg=jpeg, precision=precision, seed=seed,
    )  # fmt: skip
    config.check()
    names = _names(classes)
    if annotations is not None:
        found = _of_stores(places, annotations, names, rest, patients, quiet=quiet)
    else:
        found = _of_images(places, names, label, patient_in)
    if mpp is None and found.mpp is None:
        raise TrainError("patches", "do not say how many microns a pixel measures", "Give --mpp")
    if None not in (mpp, found.mpp) and mpp != found.mpp:
        raise TrainError("patches", f"have {found.mpp:g} microns a pixel, and --mpp says {mpp:g}", "Leave --mpp out")
    device = prepare(device, threads)
    table = Patches(found.places, subset=subset)
    cohort, split = found.without(table.left_out)
    if table.left_out:
        say(f"wsi: {len(table.left_out)} patches are not of {table.tile_px} px and are left out", quiet=quiet)
    if split is None:
        if all(case.patient == case.slide_id for case in cohort.cases.values()):
            say("wsi: each patch is taken for a patient of its own: --patient-in, or a column, says whose", quiet=quiet)
        split = k_fold(cohort, folds, seed)[0]
    with watching(1, quiet=quiet) as tell:
        figures = train_patches(
            cohort, table, split, out, config, mpp=found.mpp or mpp or 0.0, positive=positive or (), device=device,
            progress=lambda epoch, of: tell(Event("stage", "epochs", "epochs", epoch, of)),
        )  # fmt: skip
    _report(figures, "patches", as_json=as_json, quiet=quiet)
    shown = json.loads((out / "config.json").read_text(encoding="utf-8"))["positive_classes"]
    say(f"the model: {out} (positive: {', '.join(shown) or 'none, name them with --positive'})", quiet=quiet)


def _of_images(places: list[Path], classes: list[str], label: str, patient_in: str | None) -> Labelled:
    from wsi.train.images import read_folder, read_table

    for place in places:
        if place.name == "store.zarr" or (place / "store.zarr").exists() or next(place.glob("*/store.zarr"), None):
            what = "holds patch stores, and nothing says what their tiles show"
            raise TrainError(place, what, "Give the folder of outlines with --annotations")
    if len(places) != 1:
        raise TrainError("patches", f"{len(places)} places are given", "Give one folder or CSV; stores: --annotations")
    if places[0].is_dir():
        return read_folder(places[0], classes=classes, patient_in=patient_in)
    return read_table(places[0], label=label, classes=classes)


def _of_stores(
    places: list[Path], annotations: Path, classes: list[str], rest: str | None, patients: Path | None, *, quiet: bool
) -> Labelled:
    from wsi.annotations import Frame, read_annotations
    from wsi.evaluate.inputs import annotation_of
    from wsi.train.bags import find_bags
    from wsi.train.cohort import read_patients
    from wsi.train.images import read_stores

    if not annotations.is_dir():
        raise TrainError(annotations, "there is no such folder", "Give the folder of outlines")
    stores = find_bags(places)
    outlines, without = {}, []
    for slide_id, path in stores.items():
        drawn = annotation_of(annotations, slide_id)
        if drawn is None:
            without.append(slide_id)
            continue
        try:
            numbers = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))
            (x, y, *_), (width, height) = numbers["bounds_px"], numbers["size_px"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(path.parent, f"has no whole result.json ({error})", "Run wsi tile again") from error
        found = read_annotations(drawn, frame=Frame((x, y), (width, height)))
        outlines[slide_id] = [(each.group.strip(), each.geometry) for each in found]
    if without:
        what = f"all their tiles are {rest!r}" if rest else "they are left out"
        say(f"wsi: {len(without)} slides have no outlines, {without[0]} for one: {what}", quiet=quiet)
    of = read_patients(patients) if patients else None
    return read_stores(stores, outlines, classes=classes, rest=rest, patients=of)


def _report(figures: dict[str, Any], unit: str, *, as_json: bool, quiet: bool) -> None:
    """Print the metrics of the validation and test parts; `unit` is what a part counts."""
    if as_json:
        print(json.dumps(figures, indent=2))
    for name in ("validation", "test"):
        if (part := figures[name]) is not None:
            metrics = part.get("pooled", {k: v for k, v in part.items() if k not in ("patches", "patients")})
            shown = ", ".join(f"{k} {'undefined' if v is None else f'{v:.3f}'}" for k, v in metrics.items())
            say(f"{name:10} {shown} ({part[unit]} {unit})", quiet=quiet)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ModelError(f"time bins {text!r}", "are not numbers", "Give them as 12,36,60") from error


def _arguments(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs; a value that is not JSON is a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ModelError(f"--set {pair}", "is not name=value", "As in --set hidden=128")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@train.command("slide-features")
def slide_features(
    results: Annotated[Path, typer.Argument(help="Results of wsi score on training slides.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model.")],
    reference: Annotated[
        Path,
        typer.Option(help="reference.csv (slide,Tumor or Normal,...; no header), or a CSV slide_id,label (1 or 0)."),
    ],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability from which tiles are positive.")] = 0.5,
    trees: Annotated[int, typer.Option(min=1, max=5000)] = 500,
    depth: Annotated[int, typer.Option(min=1, max=100)] = 10,
    folds: Annotated[int, typer.Option(min=2, max=100, help="Folds of the printed cross-validation.")] = 5,
    seed: Seed = 0,
) -> None:
    """Train a random forest on features of heatmaps, for one score per slide (Wang et al. 2016).

    Example:
      wsi train slide-features train_results --reference train_reference.csv -o slide-model
    """
    from wsi.evaluate.slide_features import train_slide_features

    report = train_slide_features(
        results, reference, out, threshold=threshold, n_trees=trees, max_depth=depth, folds=folds, seed=seed
    )
    print(f"{report['n_slides']} slides, {report['n_positive']} positive")
    print(f"cross-validated AUROC {report['auroc']}")
    say(f"model: {out}")
