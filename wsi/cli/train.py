"""``wsi train``: models from your own slides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi.cli.display import say, watching
from wsi.errors import ModelError

train = typer.Typer(
    name="train",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train models from your own slides. Research use only.",
)


@train.callback()
def _train() -> None:
    """Train models from your own slides. Research use only."""


@train.command()
def mil(
    bags: Annotated[list[Path], typer.Argument(help="Results of wsi score, or CLAM or TRIDENT feature folders.")],
    labels: Annotated[Path, typer.Option(help="CSV: slide, patient, label; of survival slide, patient, time, event.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The model's folder; the same command again resumes.")],
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
        list[str] | None, typer.Option("--set", help="Argument of the architecture, as hidden=128 (repeatable).")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="softmax (default), binary, ordinal, hazard (default of survival) or cox.")
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    classes: Annotated[str | None, typer.Option(help="Classes in their order, with commas between.")] = None,
    positive: Annotated[list[str] | None, typer.Option(help="Positive class (repeatable).")] = None,
    time_bins: Annotated[str | None, typer.Option(help="Survival: ends of the intervals, as 12,36,60.")] = None,
    folds: Annotated[int, typer.Option(min=3, help="Folds, divided by patient and stratified.")] = 5,
    splits: Annotated[
        Path | None, typer.Option(help="CLAM's splits_<k>.csv, or their folder, in place of folds.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Members of the ensemble for each fold.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs at most.")] = 100,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a lower validation loss to stop after.")] = 15,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    weight_decay: Annotated[float, typer.Option(min=0)] = 1e-3,
    batch: Annotated[int | None, typer.Option(min=1, help="Bags a step. Default: 1; Cox: 32.")] = None,
    balance: Annotated[bool, typer.Option(help="Draw all classes equally often.")] = False,
    coverage: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the prediction sets.")] = 0.9,
    encoder: Annotated[
        str | None,
        typer.Option(help="Which features of the stores, where they hold several: name or hash of wsi embed."),
    ] = None,
    subset: Annotated[bool, typer.Option(help="Leave out slides without a label, and labels without a slide.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; another number may change the last bits.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Train a slide grader from slide labels alone: multiple-instance learning.

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

    device = prepare(device, threads)
    found = find_bags(bags)
    names = [name.strip() for name in classes.split(",")] if classes else []
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
    divided = read_splits(splits) if splits else k_fold(cohort, folds, seed)
    table = Bags({slide_id: found[slide_id] for slide_id in cohort.cases}, encoder=encoder)
    with watching(len(divided) * seeds, quiet=quiet) as tell:
        figures = train_mil(
            cohort, table, divided, out, config, seeds=seeds, coverage=coverage, positive=positive or (), device=device,
            progress=lambda member, epoch, of: tell(Event("stage", "epochs", f"member {member}", epoch, of)),
        )  # fmt: skip
    if as_json:
        print(json.dumps(figures, indent=2))
    for part in ("validation", "test"):
        if figures[part] is not None:
            shown = ", ".join(
                f"{k} {'undefined' if v is None else f'{v:.3f}'}" for k, v in figures[part]["pooled"].items()
            )
            say(f"{part:10} {shown} ({figures[part]['slides']} slides)", quiet=quiet)
    say(f"the model: {out}", quiet=quiet)


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ModelError(f"time bins {text!r}", "are not numbers", "Give them as 12,36,60") from error


def _arguments(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value``; values are JSON where they can be, else words."""
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
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability from which tiles make a region.")] = 0.5,
    trees: Annotated[int, typer.Option(min=1, max=5000)] = 500,
    depth: Annotated[int, typer.Option(min=1, max=100)] = 10,
    folds: Annotated[int, typer.Option(min=2, max=100, help="Of the cross-validation that is printed.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a random forest on the shape of heatmaps: one score a slide (Wang et al. 2016).

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
