"""Features and scores of tiles in the layouts of CLAM, TRIDENT, STAMP, torchmil, WSInfer and scverse.

::

    clam      patches/<s>.h5, h5_files/<s>.h5, pt_files/<s>.pt
    trident   <mag>x_<px>px_<overlap>px_overlap/patches/<s>_patches.h5 and features_<encoder>/<s>.h5
    stamp     <encoder>/<s>.h5: coordinates in microns
    torchmil  features/<s>.npy, coords/<s>.npy: column and row, so that neighbours are 1 apart
    anndata   <s>.h5ad: X features, obs scores, obsm["spatial"] centres in level-0 pixels (extra `anndata`)
    spatialdata   <s>.zarr: that table, boxes of tiles, regions and heatmap (the same extra)
    wsinfer   model-outputs-csv/<s>.csv, model-outputs-geojson/<s>.geojson, patches/<s>.h5

Corners are whole level-0 pixels, as these programs expect; a tile of ours may be off by half a pixel. Features are
written in blocks of about 1,024 rows, since TRIDENT's own blocks of one row take many times as long to read. Unreadable
tiles are left out. ``wsi.train.bags`` reads all layouts but the last two; ``wsi.export.convert`` converts between them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from wsi import __version__
from wsi.errors import ResultsError
from wsi.export.objects import classes_of, measurements
from wsi.export.pseudonym import pseudonym
from wsi.export.qupath import write_tiles
from wsi.export.scverse import write_anndata, write_spatialdata
from wsi.export.table import TileTable
from wsi.files import replacing
from wsi.result import called
from wsi.scored import scored_slides
from wsi.train.bags import write_pt

_BLOCK_ROWS = 1024

Json = dict[str, Any]


def export_bags(results: Path, out: Path, layout: str, *, key: bytes | None = None) -> list[Json]:
    """Write the tiles of all slides of a results folder in another program's layout.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    out : Path
        Created if missing; files of the same slides are replaced.
    layout : {"clam", "trident", "stamp", "torchmil", "anndata", "spatialdata", "wsinfer"}
    key : bytes, optional
        Slide ids are replaced by their pseudonyms.

    Returns
    -------
    list of dict
        A row per slide: ``slide_id``, ``tiles``, ``warnings``.

    Raises
    ------
    ResultsError
        There are no results, they lack the features that the layout needs, or anndata is not installed.
    ValueError
        An unknown layout.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> export_bags(Path("results"), Path("for_clam"), "clam")                                   # doctest: +SKIP
    [{'slide_id': 'slide_1', 'tiles': 13816, 'warnings': []}]
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    rows = []
    for slide in scored_slides(results).values():
        name, store = pseudonym(slide.slide_id, key), slide.store()
        tiles = slide.tiles(store)
        if not len(tiles.rows):
            rows.append({"slide_id": name, "tiles": 0, "warnings": ["no tile was scored: it has no bag"]})
            continue
        features = store.get("features")[tiles.rows] if "features" in store.arrays else None
        if features is None and layout != "wsinfer":
            raise ResultsError(slide.folder, "holds no features", "Score it with a model that gives features")
        grid = tiles.grid
        table = TileTable(
            name, features, grid.boxes()[:, :2], np.stack([grid.columns, grid.rows], axis=1).astype(np.int64),
            grid.tile, grid.stride, grid.tile_px, grid.mpp, slide.pixel_size(store), slide.size,
            folder_name(str(slide.numbers.get("provenance", {}).get("model", "wsi"))), (slide, tiles),
        )  # fmt: skip
        LAYOUTS[layout](out, table)
        rows.append({"slide_id": name, "tiles": len(tiles.rows), "warnings": []})
    return rows


def folder_name(encoder: str) -> str:
    """Return an encoder's name as a folder name: letters, digits, dots, hyphens and underscores.

    Examples
    --------
    >>> folder_name("hf-hub:MahmoodLab/UNI")
    'hf-hub-MahmoodLab-UNI'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", encoder).strip("-") or "wsi"


def _clam(out: Path, bag: TileTable) -> None:
    _coordinates(out / "patches" / f"{bag.name}.h5", bag)
    if bag.features is None:
        return
    features = bag.features.astype(np.float32)
    _h5(out / "h5_files" / f"{bag.name}.h5", {"features": (features, {}), "coords": (bag.corners_px, {})})
    (out / "pt_files").mkdir(parents=True, exist_ok=True)
    write_pt(out / "pt_files" / f"{bag.name}.pt", features)


def _coordinates(path: Path, bag: TileTable, more: Mapping[str, Any] | None = None) -> None:
    """Write CLAM's file of coordinates: patches are cut at level 0 and downsampled, which TRIDENT calls legacy."""
    attributes = {
        "patch_size": bag.side,
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        **({} if bag.size is None else {"downsampled_level_dim": bag.size, "level_dim": bag.size}),
        "name": bag.name,
        "save_path": ".",
        **(more or {}),
    }
    _h5(path, {"coords": (bag.corners_px, attributes)})


def _trident(out: Path, bag: TileTable) -> None:
    assert bag.tile_mpp and bag.mpp
    magnification = float(f"{10 / bag.tile_mpp:.4g}")
    job = out / f"{magnification:g}x_{bag.tile_px}px_{bag.overlap_px}px_overlap"
    attributes = {
        "patch_size": bag.tile_px,
        "patch_size_level0": bag.side,
        "level0_magnification": float(f"{10 / bag.mpp.x:.4g}"),
        "target_magnification": magnification,
        "overlap": bag.overlap_px,
        "name": bag.name,
        "savetodir": ".",
        # TRIDENT writes "None" for what it does not know.
        **dict(zip(("level0_width", "level0_height"), bag.size or ("None", "None"), strict=True)),
    }
    _h5(job / "patches" / f"{bag.name}_patches.h5", {"coords": (bag.corners_px, attributes)})
    if bag.features is None:
        return
    about = {"name": bag.name, "savetodir": ".", "encoder": bag.encoder}
    features = bag.features.astype(np.float32)
    path = job / f"features_{bag.encoder}" / f"{bag.name}.h5"
    _h5(path, {"features": (features, about), "coords": (bag.corners_px, attributes)})


def _stamp(out: Path, bag: TileTable) -> None:
    assert bag.features is not None and bag.mpp and bag.tile_px and bag.tile_mpp
    attributes = {
        "stamp_version": "2.0.0",
        "extractor": bag.encoder,
        "unit": "um",
        "tile_size_um": float(bag.tile_px * bag.tile_mpp),
        "tile_size_px": bag.tile_px,
        "code_hash": f"wsi-{__version__}",
        "feat_type": "tile",
        "wsi_slide_mpp": list(bag.mpp),  # our addition: needed to convert back to pixels
    }
    arrays: dict[str, tuple[npt.NDArray[Any], Json]] = {
        "coords": (bag.corners * np.array(bag.mpp), {}),
        "feats": (bag.features.astype(np.float16), {}),
    }
    _h5(out / str(bag.encoder) / f"{bag.name}.h5", arrays, attributes)


def _torchmil(out: Path, bag: TileTable) -> None:
    assert bag.features is not None
    for folder, values in (("features", bag.features.astype(np.float32)), ("coords", bag.positions)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        with replacing(out / folder / f"{bag.name}.npy") as file:
            np.save(file, values, allow_pickle=False)


def _wsinfer(out: Path, bag: TileTable) -> None:
    """Write the CSV in level-0 pixels of the whole plane, like WSInfer, and the GeoJSON in QuPath's coordinates."""
    assert bag.scored is not None
    slide, tiles = bag.scored
    columns = ["minx", "miny", "width", "height", *(f"prob_{name}" for name in slide.class_names)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for (x, y), values in zip(bag.corners_px.tolist(), tiles.probabilities.tolist(), strict=True):
        writer.writerow([x, y, bag.side, bag.side, *(f"{value:.7g}" for value in values)])
    for folder in ("model-outputs-csv", "model-outputs-geojson"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with replacing(out / "model-outputs-csv" / f"{bag.name}.csv") as file:
        file.write(text.getvalue().encode())
    write_tiles(
        out / "model-outputs-geojson" / f"{bag.name}.geojson",
        tiles.grid.boxes(),
        classes_of(slide),
        called(tiles.probabilities, slide.positive, float(slide.numbers["threshold"])),
        measurements(slide, tiles),
        bounds=slide.bounds,
        slide_id=bag.name,
    )
    _coordinates(out / "patches" / f"{bag.name}.h5", bag, {"patch_spacing_um_px": bag.tile_mpp})


#: The writer of each layout.
LAYOUTS: dict[str, Callable[[Path, TileTable], None]] = {
    "clam": _clam,
    "trident": _trident,
    "stamp": _stamp,
    "torchmil": _torchmil,
    "anndata": write_anndata,
    "spatialdata": write_spatialdata,
    "wsinfer": _wsinfer,
}


def _h5(
    path: Path,
    arrays: Mapping[str, tuple[npt.NDArray[Any], Mapping[str, Any]]],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write arrays with their attributes in blocks of rows, deterministically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as raw, h5py.File(raw, "w") as file:
        file.attrs.update(attributes or {})
        for name, (values, about) in arrays.items():
            chunks = (min(len(values), _BLOCK_ROWS), *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, track_times=False).attrs.update(about)
