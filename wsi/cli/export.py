"""``wsi export``: write results in the formats of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi.cli.display import say, writing
from wsi.errors import ResultsError

export = typer.Typer(
    name="export",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Write results in other programs' formats: QuPath, CLAM, TRIDENT, STAMP, WSInfer, torchmil, AnnData, "
    "SpatialData, DICOM; heatmaps as images.",
)

Results = Annotated[Path, typer.Argument(help="Results of wsi score, of many slides or of one.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder; files of the same slides are replaced.")]
Key = Annotated[
    Path | None,
    typer.Option("--pseudonymise", help="Replace slide ids by a keyed hash (HMAC) with the key in this file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one row per slide as JSON.")]


@export.command()
def qupath(
    results: Results,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder. Default: RESULTS/qupath.")] = None,
    detections: Annotated[
        bool,
        typer.Option("--detections/--annotations", help="Object type of tiles; annotations are editable, but slow."),
    ] = True,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability from which tiles are positive. Default: as scored.")
    ] = None,
    simplify: Annotated[float, typer.Option(min=0, help="Tolerance for simplifying outlines, in microns.")] = 0.0,
    crop: Annotated[
        bool,
        typer.Option(help="Coordinates relative to the scanned area that QuPath shows; --no-crop: to the whole plane."),
    ] = True,
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write a QuPath project with regions, tiles and measurements of all slides, and a script that imports them.

    Examples:
      wsi export qupath results

      wsi export qupath results -o for_qupath --threshold 0.7 --simplify 5

      wsi export qupath results -o to_share --pseudonymise key
    """
    from wsi.export.project import QuPathConfig, export_qupath

    config = QuPathConfig(
        threshold=threshold,
        simplify_um=simplify,
        object_type="tile" if detections else "annotation",
        crop=crop,
        key=read_key(pseudonymise),
    )
    out = out or results / "qupath"
    with writing(out):
        rows = export_qupath(results, out, config)
    say_rows(rows, as_json)
    where = out / ("project.qpproj" if config.key is None else "scripts")
    say(f"{len(rows)} slides: {where}; in QuPath: Automate > Project scripts > import_wsi > Run")


#: Formats without options of their own: what is written, and the folder in the example.
_PLAIN = {
    "clam": ("CLAM's folders: patches, h5_files, pt_files.", "for_clam"),
    "trident": ("a TRIDENT job: patches and features_<encoder>; torchmil's TridentWSIDataset reads it too.", "job"),
    "stamp": ("STAMP's features, with coordinates in microns.", "features"),
    "torchmil": (".npy files for torchmil's ProcessedMILDataset: features and lattice positions.", "bags"),
    "wsinfer": ("WSInfer's results: model-outputs-csv, model-outputs-geojson, patches.", "for_wsinfer"),
    "anndata": (
        "AnnData tables for scanpy and squidpy: features, scores, centres of tiles. Needs wsi's extra anndata.",
        "tables",
    ),
    "spatialdata": (
        "SpatialData stores: features, scores, boxes of tiles, regions and heatmap. Needs wsi's extra anndata.",
        "spatial",
    ),
    "ome-tiff": (
        "heatmaps as pyramidal OME-TIFF: a channel for the positive probability and one for each class.",
        "heatmaps",
    ),
    "png": ("heatmaps as PNG, one pixel per grid step, transparent where there is no tile.", "heatmaps"),
}


def _add(kind: str, what: str, folder: str) -> None:
    @export.command(kind, help=f"Write {what}\n\nExample:\n  wsi export {kind} results -o {folder}")
    def verb(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
        _write(kind, results, out, as_json, key=read_key(pseudonymise))


for _kind, (_what, _folder) in _PLAIN.items():
    _add(_kind, _what, _folder)


@export.command("ome-zarr")
def ome_zarr(
    results: Results,
    out: Out,
    version: Annotated[str, typer.Option(help="0.4 (Zarr v2) or 0.5 (Zarr v3).")] = "0.5",
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write heatmaps as OME-Zarr, with pixel sizes in microns.

    Example:
      wsi export ome-zarr results -o heatmaps --version 0.4
    """
    if version not in ("0.4", "0.5"):
        raise ResultsError(f"--version {version}", "is no version that is written", "Known: 0.4, 0.5")
    _write("ome-zarr", results, out, as_json, key=read_key(pseudonymise), version=version)


@export.command()
def dicom(results: Results, out: Out, as_json: AsJson = False) -> None:
    """Write tiles as Bulk Simple Annotations and heatmaps as Parametric Maps, for slides that are DICOM.

    Needs wsi's extra dicom. The files are as confidential as the slides: patient and study are copied.

    Example:
      wsi export dicom results -o dicom
    """
    _write("dicom", results, out, as_json)


def _write(kind: str, results: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write one format, and print for how many slides there was something to write."""
    with writing(out):
        if kind == "dicom":
            from wsi.export.dicom import export_dicom

            rows = export_dicom(results, out)
        elif kind in ("ome-tiff", "ome-zarr", "png"):
            from wsi.export.rasters import export_rasters

            rows = export_rasters(results, out, kind, **options)
        else:
            from wsi.export.bags import export_bags

            rows = export_bags(results, out, kind, **options)
    say_rows(rows, as_json)
    done = sum(bool(row.get("tiles") or row.get("size_px")) for row in rows)
    say(f"{done} of {len(rows)} slides: {out}")
    if not done:
        raise typer.Exit(2)


def read_key(path: Path | None) -> bytes | None:
    """Return the key in the file that --pseudonymise names."""
    from wsi.export import pseudonym

    return None if path is None else pseudonym.read_key(path)


def say_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows as JSON if wanted, and the warnings."""
    if as_json:
        print(json.dumps(rows, indent=2))
    for row in rows:
        for warning in row.get("warnings", ()):
            say(f"wsi: {row['slide_id']}: {warning}")
