"""Export for scverse: AnnData tables, and SpatialData stores of table, outlines and heatmap.

The spatialdata package brings some fifty others and requires an older Dask than ours. So its stores are written here
in the format of its version 0.7: a Zarr v3 group (container 0.2) with the table as AnnData writes it (0.2), shapes as
GeoParquet (0.3) and the heatmap as OME-NGFF (0.3).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from wsi import __version__
from wsi.errors import OutputError, ResultsError
from wsi.export.objects import measurements
from wsi.export.project import QuPathConfig, slide_regions
from wsi.export.rasters import slide_raster
from wsi.export.table import TileTable
from wsi.files import replacing_folder, write_json
from wsi.result import called
from wsi.store.multiscale import write_multiscale

Json = dict[str, Any]


def write_anndata(out: Path, bag: TileTable) -> None:
    """Write ``<slide>.h5ad``: X features, obs scores, obsm["spatial"] centres in level-0 pixels."""
    table = _table(bag)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{bag.name}.h5ad"
    draft = path.with_name(f".{path.name}.draft")
    try:
        table.write_h5ad(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_spatialdata(out: Path, bag: TileTable) -> None:
    """Write ``<slide>.zarr`` atomically; an existing one is replaced.

    ::

        tables/table       features and scores of tiles; obs["instance_id"] is the row of shapes/tiles
        shapes/tiles       the box of each tile
        shapes/regions     tissue and positive regions with their measurements
        images/heatmap     probabilities

    Coordinates are level-0 pixels of the whole plane (coordinate system ``global``); ``micrometers`` is the second
    system.
    """
    table = _table(bag)
    assert bag.scored is not None and bag.mpp is not None
    slide, tiles = bag.scored
    path = out / f"{bag.name}.zarr"
    if path.exists() and "spatialdata_attrs" not in _attributes(path):
        raise OutputError(path, "is there already, and no SpatialData store", "Choose another folder with -o")
    with replacing_folder(path) as draft:
        about = {"slide_id": bag.name, "made_by": f"wsi {__version__}", "use": "research only"}
        _group(draft, about | {"spatialdata_attrs": {"version": "0.2"}})
        for kind in ("tables", "shapes", "images"):
            _group(draft / kind, {})
        _write_table(draft / "tables" / "table", table, tiles.rows)
        _write_shapes(draft / "shapes" / "tiles", tiles.grid.polygons(), {}, tiles.rows, bag)
        regions = slide_regions(slide, tiles, bag.mpp, QuPathConfig())
        names = {name: None for region in regions for name in region.measurements}
        columns: dict[str, Sequence[Any]] = {
            "name": [region.name for region in regions],
            "class": [region.path_class.name if region.path_class else None for region in regions],
            **{name: [region.measurements.get(name) for region in regions] for name in names},
        }
        if regions:  # SpatialData refuses empty shapes
            outlines = [region.geometry for region in regions]
            _write_shapes(draft / "shapes" / "regions", outlines, columns, range(len(regions)), bag)
        raster = slide_raster(slide)
        heatmap = draft / "images" / "heatmap"
        write_multiscale(heatmap, raster.levels(), raster.channels, step=raster.step, mpp=raster.mpp)
        # SpatialData's image coordinates count from the corner of the first pixel, not from its centre: no shift.
        ome = _attributes(heatmap)["ome"] | {"version": "0.5-dev-spatialdata"}
        ome["multiscales"][0]["coordinateTransformations"] = _frames("cyx", bag, raster.step)
        _group(heatmap, {"ome": ome, "spatialdata_attrs": {"version": "0.3"}})


def _table(bag: TileTable) -> Any:
    try:
        import anndata
        import pandas as pd
    except ImportError as error:
        what = f"needs anndata ({error})"
        raise ResultsError("wsi export anndata", what, "Install it: pip install 'wsi[anndata]'") from None
    assert bag.features is not None
    numbers = range(len(bag.corners)) if bag.scored is None else bag.scored[1].rows.tolist()
    obs = pd.DataFrame(index=pd.Index([f"{bag.name}-{number}" for number in numbers], name="tile"))
    if bag.scored is not None:
        slide, tiles = bag.scored
        obs = obs.assign(**measurements(slide, tiles))
        classes = called(tiles.probabilities, slide.positive, float(slide.numbers["threshold"]))
        obs["class"] = pd.Categorical.from_codes(classes, list(slide.class_names))
    known = {
        "slide_mpp": bag.mpp,
        "slide_size_px": bag.size,
        "tile_level0_px": bag.tile,
        "stride_level0_px": bag.stride,
        "tile_px": bag.tile_px,
        "encoder": bag.encoder,
    }
    return anndata.AnnData(
        X=bag.features.astype(np.float32),
        obs=obs,
        obsm={"spatial": bag.corners + np.array(bag.tile) / 2},
        uns={
            "slide_id": bag.name,
            "use": "research only",
            **{name: list(v) if isinstance(v, tuple) else v for name, v in known.items() if v is not None},
        },
    )


def _write_table(path: Path, table: Any, rows: Any) -> None:
    import anndata
    import pandas as pd

    link = {"region": "tiles", "region_key": "region", "instance_key": "instance_id"}
    table.obs["region"] = pd.Categorical(["tiles"] * len(rows))
    table.obs["instance_id"] = np.asarray(rows, np.int64)
    table.uns["spatialdata_attrs"] = link
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3):
        # Warnings about shards, a feature of its next version, and about consolidated metadata, dropped below.
        warnings.simplefilter("ignore", UserWarning)
        table.write_zarr(path)
    _group(path, _attributes(path) | link | {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"})


def _write_shapes(path: Path, shapes: Any, columns: Mapping[str, Sequence[Any]], index: Any, bag: TileTable) -> None:
    """Write GeoParquet 1.0: polygons as WKB, described in the file's metadata; the index as pandas writes it."""
    import pandas as pd

    _group(
        path,
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": _frames("xy", bag, (1.0, 1.0)),
            "spatialdata_attrs": {"version": "0.3"},
        },
    )
    frame = pd.DataFrame({**columns, "geometry": shapely.to_wkb(shapes)}, index=pd.Index(index))
    table = pa.Table.from_pandas(frame)
    kinds = sorted({shape.geom_type for shape in shapes})
    geo = {
        "version": "1.0.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": kinds, "crs": None}},
    }
    metadata = {**(table.schema.metadata or {}), b"geo": json.dumps(geo).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path / "shapes.parquet")


def _frames(axes: str, bag: TileTable, step: tuple[float, float]) -> list[Json]:
    """Transformations to level-0 pixels and to microns, in SpatialData's form of the NGFF proposal."""
    assert bag.mpp is not None

    def system(name: str, unit: str) -> Json:
        spatial = [{"name": axis, "type": "space", "unit": unit} for axis in axes if axis != "c"]
        return {"name": name, "axes": [{"name": "c", "type": "channel"}] * ("c" in axes) + spatial}

    found = []
    for name, unit, scale in (("global", "unit", (1.0, 1.0)), ("micrometers", "micrometer", bag.mpp)):
        by_axis = {"c": 1.0, "x": step[0] * scale[0], "y": step[1] * scale[1]}
        found.append(
            {
                "type": "scale",
                "scale": [by_axis[axis] for axis in axes],
                "input": system(axes, "unit"),
                "output": system(name, unit),
            }
        )
    return found


def _group(path: Path, attributes: Json) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _attributes(path: Path) -> Json:
    try:
        return dict(json.loads((path / "zarr.json").read_text(encoding="utf-8")).get("attributes", {}))
    except (OSError, ValueError):
        return {}
