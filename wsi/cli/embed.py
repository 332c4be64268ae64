"""``wsi embed``: compute features of patch stores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi.cli.archive import Device, Precision, Quiet
from wsi.cli.display import say, watching
from wsi.errors import OutputError, StoreError, WsiError


def embed(
    stores: Annotated[
        list[Path],
        typer.Argument(help="Results folders of wsi tile or wsi score, or folders of single slides in them."),
    ],
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            "-e",
            help="uni, uni2-h, virchow, virchow2, phikon, phikon-v2, h-optimus-0, gigapath; NAME=FOLDER if its files "
            "are in a folder; hf-hub:OWNER/NAME; a timm name; one of our patch models; a folder.",
        ),
    ],
    mil: Annotated[
        str | None,
        typer.Option(help="Also grade the slides with this MIL model, trained on these features: writes grades.csv."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Patches per forward pass.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Reader threads.")] = 4,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Compute an encoder's features of the patches in stores; the same command again resumes.

    Examples:
      wsi tile slides/ --mpp 0.5 --tile 224 --pixels none -o stores

      wsi embed stores --encoder uni

      wsi train mil stores --encoder uni --labels labels.csv -o grader

      wsi embed new_stores --encoder uni --mil grader
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in workers; torch reads it when it is loaded
    from wsi.archive import Event
    from wsi.embed import embed_slide, grade_slide
    from wsi.files import write_csv
    from wsi.memory import keep_freed_memory
    from wsi.nn.encoder import load_encoder
    from wsi.nn.grade import load_mil_model

    keep_freed_memory()
    folders = [folder for place in stores for folder in _slides_in(place)]
    model = load_encoder(encoder, device=device, precision=precision)
    head = load_mil_model(mil, model) if mil else None
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    grades: list[dict[str, Any]] = []
    with watching(len(folders), quiet=quiet) as tell:
        for folder in folders:
            tell(Event("begin", folder.name))
            try:
                result = embed_slide(
                    folder, model, batch_size=batch_size, threads=threads,
                    progress=lambda *how, name=folder.name: tell(Event("stage", name, *how)),
                )  # fmt: skip
                done.append(result.numbers)
                if head is not None:
                    grades.append(grade_slide(folder, head))
            except WsiError as error:
                failure = {"slide_id": folder.name, "error": f"{error.where}: {error.what}", "remedy": error.remedy}
                failed.append(failure)
                say(f"wsi: {folder.name}: {error}")
            except OSError as error:  # a full disk: the other slides would fail too
                raise OutputError.of(error, folder) from error
            tell(Event("failed" if failed and failed[-1]["slide_id"] == folder.name else "done", folder.name))
    if as_json:
        print(json.dumps({"embedded": done, "graded": grades, "failed": failed}, indent=2))
    name = done[0]["features"] if done else "no features"
    say(f"{len(done)} of {len(folders)} slides: {name} of {model.num_features} in their store.zarr", quiet=quiet)
    if grades:
        table = folders[0].parent / "grades.csv"
        write_csv(table, list(dict.fromkeys(column for row in grades for column in row)), grades)
        say(f"{len(grades)} grades: {table}", quiet=quiet)
    if failed:
        raise typer.Exit(3 if done else 2)


def _slides_in(place: Path) -> list[Path]:
    """Return the folders of slides that contain a store."""
    found = [place] if (place / "store.zarr").is_dir() else sorted(s.parent for s in place.glob("*/store.zarr"))
    if not found:
        raise StoreError(place, "holds no patch stores", "Make them with wsi tile, or score the slides")
    return found
