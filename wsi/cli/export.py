"""``wsi export``: results as other programs read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi.cli.display import say
from wsi.errors import OutputError, ResultsError, WsiError

export = typer.Typer(
    name="export",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Write results for other programs: QuPath, CLAM, TRIDENT, STAMP, WSInfer, torchmil, AnnData, SpatialData, "
    "DICOM; heatmaps as images.",
)

Results = Annotated[Path, typer.Argument(help="Results of wsi score, of many slides or of one.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder; files of the same slides are replaced.")]
Key = Annotated[
    Path | None,
    typer.Option("--pseudonymise", help="Replace slide ids by a keyed hash (HMAC) with the key in this file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a row a slide as JSON.")]


@export.command()
def qupath(
    results: Results,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder. Default: RESULTS/qupath.")] = None,
    detections: Annotated[
        bool,
        typer.Option("--detections/--annotations", help="What tiles become; annotations can be edited, and are slow."),
    ] = True,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Probability from which tiles are positive. Default: as scored.")
    ] = None,
    simplify: Annotated[float, typer.Option(min=0, help="Microns that outlines may move to have fewer points.")] = 0.0,
    crop: Annotated[
        bool, typer.Option(help="Coordinates of the slide as QuPath shows it; --no-crop: of the whole plane.")
    ] = True,
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write a QuPath project with regions, tiles and measurements of every slide, and a script that imports them.

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
    with _writing(out):
        rows = export_qupath(results, out, config)
    _tell(rows, as_json)
    where = out / ("project.qpproj" if config.key is None else "scripts")
    say(f"{len(rows)} slides: {where}; in QuPath: Automate > Project scripts > import_wsi > Run")


@export.command()
def clam(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write CLAM's folders: patches, h5_files, pt_files.

    Example:
      wsi export clam results -o for_clam
    """
    _bags("clam", results, out, pseudonymise, as_json)


@export.command()
def trident(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write a TRIDENT job: patches and features_<encoder>; torchmil's TridentWSIDataset reads it too.

    Example:
      wsi export trident results -o job
    """
    _bags("trident", results, out, pseudonymise, as_json)


@export.command()
def stamp(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write STAMP's features, with coordinates in microns.

    Example:
      wsi export stamp results -o features
    """
    _bags("stamp", results, out, pseudonymise, as_json)


@export.command()
def torchmil(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write .npy files for torchmil's ProcessedMILDataset: features and positions on the lattice.

    Example:
      wsi export torchmil results -o bags
    """
    _bags("torchmil", results, out, pseudonymise, as_json)


@export.command()
def wsinfer(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write WSInfer's results: model-outputs-csv, model-outputs-geojson, patches.

    Example:
      wsi export wsinfer results -o for_wsinfer
    """
    _bags("wsinfer", results, out, pseudonymise, as_json)


@export.command("ome-tiff")
def ome_tiff(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write heatmaps as pyramidal OME-TIFF: a channel for what the heatmap shows and one for each class.

    Example:
      wsi export ome-tiff results -o heatmaps
    """
    _rasters("ome-tiff", results, out, pseudonymise, as_json)


@export.command("ome-zarr")
def ome_zarr(
    results: Results,
    out: Out,
    version: Annotated[str, typer.Option(help="0.4 (Zarr v2) or 0.5 (Zarr v3).")] = "0.5",
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write heatmaps as OME-Zarr, in microns of the slide.

    Example:
      wsi export ome-zarr results -o heatmaps --version 0.4
    """
    if version not in ("0.4", "0.5"):
        raise ResultsError(f"--version {version}", "is no version that is written", "Known: 0.4, 0.5")
    _rasters("ome-zarr", results, out, pseudonymise, as_json, version)


@export.command()
def png(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write heatmaps as PNG, a pixel a step of the grid, transparent where there is no tile.

    Example:
      wsi export png results -o heatmaps
    """
    _rasters("png", results, out, pseudonymise, as_json)


def _rasters(kind: str, results: Path, out: Path, key: Path | None, as_json: bool, version: str = "0.5") -> None:
    from wsi.export.rasters import export_rasters

    with _writing(out):
        rows = export_rasters(results, out, kind, version=version, key=read_key(key))
    _tell(rows, as_json)
    _counted(sum(row["size_px"] is not None for row in rows), len(rows), out)


@export.command()
def anndata(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write AnnData tables for scanpy and squidpy: features, scores, centres of tiles. Needs wsi's extra anndata.

    Example:
      wsi export anndata results -o tables
    """
    _bags("anndata", results, out, pseudonymise, as_json)


@export.command()
def spatialdata(results: Results, out: Out, pseudonymise: Key = None, as_json: AsJson = False) -> None:
    """Write SpatialData stores: features, scores, boxes of tiles, regions and heatmap. Needs wsi's extra anndata.

    Example:
      wsi export spatialdata results -o spatial
    """
    _bags("spatialdata", results, out, pseudonymise, as_json)


def _bags(layout: str, results: Path, out: Path, key: Path | None, as_json: bool) -> None:
    from wsi.export.bags import export_bags

    with _writing(out):
        rows = export_bags(results, out, layout, key=read_key(key))
    _tell(rows, as_json)
    _counted(sum(row["tiles"] > 0 for row in rows), len(rows), out)


@export.command()
def dicom(results: Results, out: Out, as_json: AsJson = False) -> None:
    """Write, of DICOM slides, tiles as Bulk Simple Annotations and heatmaps as Parametric Maps.

    Needs wsi's extra dicom. As confidential as the slides: patient and study are copied from them.

    Example:
      wsi export dicom results -o dicom
    """
    from wsi.export.dicom import export_dicom

    with _writing(out):
        rows = export_dicom(results, out)
    _tell(rows, as_json)
    _counted(sum(row["tiles"] > 0 for row in rows), len(rows), out)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn what a disk says into a line that names `out`."""
    try:
        yield
    except WsiError:
        raise
    except OSError as error:
        raise OutputError.of(error, out) from error


def read_key(path: Path | None) -> bytes | None:
    """Return the key in the file that --pseudonymise names."""
    from wsi.export import pseudonym

    return None if path is None else pseudonym.read_key(path)


def _tell(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    for row in rows:
        for warning in row.get("warnings", ()):
            say(f"wsi: {row['slide_id']}: {warning}")


def _counted(done: int, of: int, out: Path) -> None:
    say(f"{done} of {of} slides: {out}")
    if not done:
        raise typer.Exit(2)
