"""``wsi train``: models from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.display import say

train = typer.Typer(name="train", no_args_is_help=True, rich_markup_mode="rich", help="Train models.")


@train.callback()
def _train() -> None:
    """Train models."""  # a callback keeps the verb's name on the command line


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
