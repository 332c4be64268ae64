"""Features and scores of tiles in the layouts of CLAM, TRIDENT, STAMP, torchmil, WSInfer and scverse.

::

    clam      patches/<s>.h5, h5_files/<s>.h5, pt_files/<s>.pt
    trident   <mag>x_<px>px_<overlap>px_overlap/patches/<s>_patches.h5 and features_<encoder>/<s>.h5
    stamp     <encoder>/<s>.h5: coordinates in microns
    torchmil  features/<s>.npy, coords/<s>.npy: positions on the lattice, so that neighbours are 1 apart
    anndata   <s>.h5ad: X features, obs scores, obsm["spatial"] centres in level-0 pixels (extra `anndata`)
    wsinfer   model-outputs-csv/<s>.csv, model-outputs-geojson/<s>.geojson, patches/<s>.h5

Corners are whole level-0 pixels, as these programs have them: a tile of ours may lie half a pixel beside. Features
are written in blocks of about 1,024 rows; TRIDENT's own blocks of one row take many times as long to read. Tiles that
the slide could not be read at are left out. ``wsi.train.bags`` reads the first four back.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from wsi import __version__
from wsi.errors import ResultsError
from wsi.export.project import measurements, path_classes
from wsi.export.pseudonym import pseudonym
from wsi.export.qupath import write_tiles
from wsi.files import replacing
from wsi.result import called
from wsi.scored import ScoredSlide, ScoredTiles, scored_slides
from wsi.train.bags import write_pt
from wsi.units import Mpp

_BLOCK_ROWS = 1024

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Bag:
    """A slide's tiles, as a layout needs them; `name` is what the slide is called outside."""

    name: str
    slide: ScoredSlide
    tiles: ScoredTiles
    mpp: Mpp
    features: npt.NDArray[Any] | None
    encoder: str

    @property
    def corners(self) -> npt.NDArray[np.int64]:
        return np.rint(self.tiles.grid.boxes()[:, :2]).astype(np.int64)

    @property
    def side(self) -> int:
        """A tile's side in whole level-0 pixels."""
        return round(self.tiles.grid.tile[0])

    @property
    def overlap_px(self) -> int:
        grid = self.tiles.grid
        return max(0, round(grid.tile_px * (1 - grid.stride[0] / grid.tile[0])))


def export_bags(results: Path, out: Path, layout: str, *, key: bytes | None = None) -> list[Json]:
    """Write the tiles of all slides of a results folder in another program's layout.

    Parameters
    ----------
    results : Path
        What ``wsi score`` wrote.
    out : Path
        Made where it is not there; files of the same slides are replaced.
    layout : {"clam", "trident", "stamp", "torchmil", "anndata", "wsinfer"}
    key : bytes, optional
        Slide ids are replaced by their pseudonyms.

    Returns
    -------
    list of dict
        A row a slide: ``slide_id``, ``tiles``, ``warnings``.

    Raises
    ------
    ResultsError
        No results there, or without the features that a layout is made of; or anndata is not installed.
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
        model = str(slide.numbers.get("provenance", {}).get("model", "wsi"))
        encoder = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-") or "wsi"
        LAYOUTS[layout](out, _Bag(name, slide, tiles, slide.pixel_size(store), features, encoder))
        rows.append({"slide_id": name, "tiles": len(tiles.rows), "warnings": []})
    return rows


def _clam(out: Path, bag: _Bag) -> None:
    _coordinates(out / "patches" / f"{bag.name}.h5", bag)
    assert bag.features is not None
    features = bag.features.astype(np.float32)
    _h5(out / "h5_files" / f"{bag.name}.h5", {"features": (features, {}), "coords": (bag.corners, {})})
    (out / "pt_files").mkdir(parents=True, exist_ok=True)
    write_pt(out / "pt_files" / f"{bag.name}.pt", features)


def _coordinates(path: Path, bag: _Bag, more: Mapping[str, Any] | None = None) -> None:
    """CLAM's file of coordinates: patches are cut at level 0 and made smaller, which TRIDENT calls legacy."""
    width, height = bag.slide.size
    attributes = {
        "patch_size": bag.side,
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": (width, height),
        "level_dim": (width, height),
        "name": bag.name,
        "save_path": ".",
        **(more or {}),
    }
    _h5(path, {"coords": (bag.corners, attributes)})


def _trident(out: Path, bag: _Bag) -> None:
    grid, (width, height) = bag.tiles.grid, bag.slide.size
    magnification = float(f"{10 / grid.mpp:.4g}")
    job = out / f"{magnification:g}x_{grid.tile_px}px_{bag.overlap_px}px_overlap"
    attributes = {
        "patch_size": grid.tile_px,
        "patch_size_level0": bag.side,
        "level0_magnification": float(f"{10 / bag.mpp.x:.4g}"),
        "target_magnification": magnification,
        "overlap": bag.overlap_px,
        "name": bag.name,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }
    _h5(job / "patches" / f"{bag.name}_patches.h5", {"coords": (bag.corners, attributes)})
    about = {"name": bag.name, "savetodir": ".", "encoder": bag.encoder}
    path = job / f"features_{bag.encoder}" / f"{bag.name}.h5"
    assert bag.features is not None
    _h5(path, {"features": (bag.features.astype(np.float32), about), "coords": (bag.corners, attributes)})


def _stamp(out: Path, bag: _Bag) -> None:
    grid = bag.tiles.grid
    assert bag.features is not None
    microns = grid.boxes()[:, :2] * np.array(bag.mpp)
    attributes = {
        "stamp_version": "2.0.0",
        "extractor": bag.encoder,
        "unit": "um",
        "tile_size_um": float(grid.tile_px * grid.mpp),
        "tile_size_px": grid.tile_px,
        "code_hash": f"wsi-{__version__}",
        "feat_type": "tile",
        "wsi_slide_mpp": list(bag.mpp),  # ours: without it nobody can go back to pixels
    }
    arrays: dict[str, tuple[npt.NDArray[Any], Json]] = {
        "coords": (microns, {}),
        "feats": (bag.features.astype(np.float16), {}),
    }
    _h5(out / bag.encoder / f"{bag.name}.h5", arrays, attributes)


def _torchmil(out: Path, bag: _Bag) -> None:
    grid = bag.tiles.grid
    assert bag.features is not None
    for folder, values in (
        ("features", bag.features.astype(np.float32)),
        ("coords", np.stack([grid.columns, grid.rows], axis=1).astype(np.int64)),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        with replacing(out / folder / f"{bag.name}.npy") as file:
            np.save(file, values, allow_pickle=False)


def _wsinfer(out: Path, bag: _Bag) -> None:
    """The CSV in level-0 pixels of the whole plane, as WSInfer writes it; the GeoJSON as QuPath shows the slide."""
    grid = bag.tiles.grid
    columns = ["minx", "miny", "width", "height", *(f"prob_{name}" for name in bag.slide.class_names)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for (x, y), values in zip(bag.corners.tolist(), bag.tiles.probabilities.tolist(), strict=True):
        writer.writerow([x, y, bag.side, bag.side, *(f"{value:.7g}" for value in values)])
    for folder in ("model-outputs-csv", "model-outputs-geojson"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with replacing(out / "model-outputs-csv" / f"{bag.name}.csv") as file:
        file.write(text.getvalue().encode())
    write_tiles(
        out / "model-outputs-geojson" / f"{bag.name}.geojson",
        grid.boxes(),
        path_classes(bag.slide),
        called(bag.tiles.probabilities, bag.slide.positive, float(bag.slide.numbers["threshold"])),
        measurements(bag.slide, bag.tiles),
        bounds=bag.slide.bounds,
        slide_id=bag.name,
    )
    _coordinates(out / "patches" / f"{bag.name}.h5", bag, {"patch_spacing_um_px": grid.mpp})


def _anndata(out: Path, bag: _Bag) -> None:
    try:
        import anndata
        import pandas as pd
    except ImportError as error:
        what = f"needs anndata ({error})"
        raise ResultsError("wsi export anndata", what, "Install it: pip install 'wsi[anndata]'") from None
    boxes = bag.tiles.grid.boxes()
    names = [f"{bag.name}-{row}" for row in bag.tiles.rows.tolist()]
    obs = pd.DataFrame(measurements(bag.slide, bag.tiles), index=pd.Index(names, name="tile"))
    threshold = float(bag.slide.numbers["threshold"])
    classes = called(bag.tiles.probabilities, bag.slide.positive, threshold)
    obs["class"] = pd.Categorical.from_codes(classes, list(bag.slide.class_names))
    assert bag.features is not None
    table = anndata.AnnData(
        X=bag.features.astype(np.float32),
        obs=obs,
        obsm={"spatial": boxes[:, :2] + boxes[:, 2:] / 2},
        uns={
            "slide_id": bag.name,
            "slide_mpp": list(bag.mpp),
            "tile_level0_px": list(bag.tiles.grid.tile),
            "encoder": bag.encoder,
            "use": "research only",
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{bag.name}.h5ad"
    draft = path.with_name(f".{path.name}.draft")
    try:
        table.write_h5ad(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


#: Who writes what.
LAYOUTS: dict[str, Callable[[Path, _Bag], None]] = {
    "clam": _clam,
    "trident": _trident,
    "stamp": _stamp,
    "torchmil": _torchmil,
    "anndata": _anndata,
    "wsinfer": _wsinfer,
}


def _h5(
    path: Path,
    arrays: Mapping[str, tuple[npt.NDArray[Any], Mapping[str, Any]]],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write arrays with their attributes in blocks of rows; the same arrays give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _h5_file(path) as file:
        file.attrs.update(attributes or {})
        for name, (values, about) in arrays.items():
            chunks = (min(len(values), _BLOCK_ROWS), *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, track_times=False).attrs.update(about)


@contextmanager
def _h5_file(path: Path) -> Any:
    with replacing(path) as raw, h5py.File(raw, "w") as file:
        yield file
