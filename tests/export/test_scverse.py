"""SpatialData stores against their specification, by pyarrow, zarr and anndata; SpatialData's own reader opens them in
``test_readers.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import zarr

from tests.conftest import Run
from tests.export.make import Marked, marked_results
from wsi.errors import OutputError
from wsi.export.bags import export_bags
from wsi.store import PatchStore
from wsi.units import Box

anndata = pytest.importorskip("anndata")


def attributes(group: Path) -> dict:
    found = json.loads((group / "zarr.json").read_text())
    assert found["zarr_format"] == 3 and found["node_type"] == "group" and set(found) <= {
        "zarr_format", "node_type", "attributes"
    }  # fmt: skip
    return dict(found["attributes"])


def scales(element: dict) -> dict[str, list[float]]:
    """What an element's own system is multiplied by, by the name of the other."""
    found = element["coordinateTransformations"]
    assert all(each["type"] == "scale" and each["output"]["axes"][-1]["name"] in "xy" for each in found)
    return {each["output"]["name"]: each["scale"] for each in found}


def outlines(store: Path, name: str) -> tuple[np.ndarray, dict]:
    table = pq.read_table(store / "shapes" / name / "shapes.parquet")
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["primary_column"] == "geometry" and geo["columns"]["geometry"]["encoding"] == "WKB"
    return shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False)), table.to_pandas().to_dict("list")


def exported(folder: Path, **options: object) -> tuple[Marked, Path]:
    made = marked_results(folder / "r", features=4, **options)  # type: ignore[arg-type]
    (row,) = export_bags(folder / "r", folder / "out", "spatialdata")
    assert row["warnings"] == [] and [each.name for each in (folder / "out").iterdir()] == ["a.zarr"]
    return made, folder / "out/a.zarr"


@pytest.mark.parametrize(("mpp", "stride"), [(0.25, None), (0.2431, None), (0.25, 32)])
@pytest.mark.parametrize("bounds", [None, Box(700, 300, 2000, 1600)])
def test_everything_lies_where_it_was_in_both_systems(tmp_path: Path, mpp, stride, bounds):
    made, store = exported(tmp_path, mpp=mpp, stride_px=stride, bounds=bounds)
    assert attributes(store)["spatialdata_attrs"]["version"] == "0.2"
    mark = np.array([made.mark.x, made.mark.y, made.mark.x + made.mark.w, made.mark.y + made.mark.h])
    table = anndata.read_zarr(store / "tables/table")
    tiles, _ = outlines(store, "tiles")
    top = int(np.argmax(table.obs["prob_tumour"]))
    assert np.abs(np.array(tiles[top].bounds) - mark).max() <= 0.5
    assert len(tiles) == len(made.grid) == table.n_obs
    assert np.allclose(shapely.get_coordinates(shapely.centroid(tiles)), table.obsm["spatial"], atol=1e-6)
    regions, about = outlines(store, "regions")
    assert about["class"] == ["Tissue", "tumour"][: len(regions)] and about["name"][0] == ""
    if stride is None:
        assert np.abs(np.array(regions[1].bounds) - mark).max() <= 0.5
        assert about["area_mm2"][1] == pytest.approx(regions[1].area * mpp**2 / 1e6, rel=1e-6)
    assert np.abs(np.array(regions[0].bounds[:2]) - (made.bounds.x, made.bounds.y)).max() <= 0.01
    for name in ("tiles", "regions"):
        shapes = attributes(store / "shapes" / name)
        assert shapes["spatialdata_attrs"] == {"version": "0.3"} and shapes["axes"] == ["x", "y"]
        assert scales(shapes) == {"global": [1, 1], "micrometers": [mpp, mpp]}
    ome = attributes(store / "images/heatmap")["ome"]
    assert ome["version"] == "0.5-dev-spatialdata"
    heatmap = zarr.open_array(store / "images/heatmap" / ome["multiscales"][0]["datasets"][0]["path"])[:]
    row, column = np.unravel_index(np.nanargmax(heatmap[0]), heatmap.shape[1:])
    found = scales(ome["multiscales"][0])
    (_, dy, dx), (_, dy_um, dx_um) = found["global"], found["micrometers"]
    assert (dx_um, dy_um) == pytest.approx((dx * mpp, dy * mpp))
    assert abs(column * dx - mark[0]) <= (0.5 if stride is None else dx) >= abs(row * dy - mark[1])


def test_the_table_knows_its_tiles(tmp_path: Path):
    """Numbers of tiles in the store, of which two could not be read."""
    made, store = exported(tmp_path, unreadable=(0, 5))
    link = {"region": "tiles", "region_key": "region", "instance_key": "instance_id"}
    about = attributes(store / "tables/table")
    assert about["encoding-type"] == "anndata" and about["spatialdata-encoding-type"] == "ngff:regions_table"
    assert {name: about[name] for name in link} == link and about["version"] == "0.2"
    table = anndata.read_zarr(store / "tables/table")
    assert dict(table.uns["spatialdata_attrs"]) == link and set(table.obs["region"]) == {"tiles"}
    rows = np.setdiff1d(np.arange(len(made.grid)), (0, 5))
    _, tiles = outlines(store, "tiles")
    index = pq.read_table(store / "shapes/tiles/shapes.parquet").to_pandas().index
    assert index.tolist() == table.obs["instance_id"].tolist() == rows.tolist() and set(tiles) == {"geometry"}
    known = PatchStore.open(tmp_path / "r/a/store.zarr")
    assert np.array_equal(table.X, known.get("features")[rows].astype(np.float32))
    assert np.array_equal(table.obs["prob_tumour"], known.get("probabilities")[rows, 1])


def test_a_store_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, store = exported(tmp_path)
    (store / "mine").write_text("")
    export_bags(tmp_path / "r", tmp_path / "out", "spatialdata")
    assert not (store / "mine").exists()
    before = sorted((path, path.read_bytes()) for path in store.rglob("*") if path.is_file())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wsi.export.scverse.write_multiscale", full)
        with pytest.raises(OSError):
            export_bags(tmp_path / "r", tmp_path / "out", "spatialdata")
    assert before == sorted((path, path.read_bytes()) for path in store.rglob("*") if path.is_file())
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["a.zarr"]
    (store / "zarr.json").write_text("{}")
    with pytest.raises(OutputError, match="no SpatialData"):
        export_bags(tmp_path / "r", tmp_path / "out", "spatialdata")


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next export brings the store back, also one that cannot go on."""
    _, store = exported(tmp_path)
    (store / "mine").write_text("")
    store.rename(tmp_path / "out/.a.zarr.old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsi.export.scverse.write_multiscale", full)
    with pytest.raises(OSError):
        export_bags(tmp_path / "r", tmp_path / "out", "spatialdata")
    assert (store / "mine").exists() and [each.name for each in (tmp_path / "out").iterdir()] == ["a.zarr"]


def test_the_command_and_its_pseudonyms(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r", "Doe_John", features=4)
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    code, _, err = wsi(
        "export", "spatialdata", tmp_path / "r", "-o", tmp_path / "o", "--pseudonymise", tmp_path / "key"
    )
    assert code == 0 and "1 of 1 slides" in err
    for path in (tmp_path / "o").rglob("*"):
        assert "Doe" not in str(path.relative_to(tmp_path / "o")) and "/slides/" not in str(path)
        assert path.is_dir() or b"Doe" not in path.read_bytes()
