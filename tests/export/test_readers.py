"""Other programs' own code opens what we wrote; `make test-readers` has them installed, elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import shapely

import wsi.nn.backbone  # noqa: F401  # first: it mends a torchvision that does not fit torch, which these import
from tests.conftest import REPOSITORY
from tests.export.make import marked_results
from wsi.export.bags import export_bags
from wsi.export.convert import Given, convert_bags
from wsi.export.geojson import read_geojson
from wsi.export.project import export_qupath
from wsi.export.qupath import PathClass, write_tiles
from wsi.export.rasters import Raster, export_rasters, write_ome_tiff
from wsi.store import PatchStore
from wsi.units import Box, Mpp


def imported(name: str) -> Any:
    package = name.split(".")[0]
    return pytest.importorskip(
        name, reason=f"{package} is not installed here: `make test-readers` has it", exc_type=ImportError
    )


def part_of(package: str, name: str) -> ModuleType:
    """A module of a package that does not import as a whole (wsinfer's first line asks for Zarr 2)."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed here: `make test-readers` has it")
    path = Path(found.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{package}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(about: str) -> str:
    """The Python of docs/qupath.md that holds `about`."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/qupath.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if about in block]
    return str(found)


def test_torchmil_reads_what_was_converted(tmp_path: Path):
    datasets = imported("torchmil.datasets")
    marked_results(tmp_path / "r", features=4)
    export_bags(tmp_path / "r", tmp_path / "clam", "clam")
    convert_bags([tmp_path / "clam"], tmp_path / "npy", "torchmil")
    convert_bags([tmp_path / "clam"], tmp_path / "job", "trident", Given("red", mpp=0.25, tile_px=64))
    (tmp_path / "labels.csv").write_text("slide,label\na.tif,1\n")
    plain = datasets.ProcessedMILDataset(
        features_path=str(tmp_path / "npy/features"),
        coords_path=str(tmp_path / "npy/coords"),
        bag_keys=["X", "coords", "adj"],
    )
    theirs = datasets.TridentWSIDataset(
        base_path=f"{next((tmp_path / 'job').iterdir())}/", labels_path=str(tmp_path / "labels.csv"),
        feature_extractor="red", patch_size=128, bag_keys=["X", "Y", "coords", "adj"], wsi_name_col="slide",
        wsi_label_col="label",
    )  # fmt: skip
    features = PatchStore.open(tmp_path / "r/a/store.zarr").get("features").astype(np.float32)
    for dataset in (plain, theirs):
        bag = dataset[0]
        assert np.array_equal(bag["X"].numpy(), features)
        assert set((bag["adj"].to_dense().numpy() > 0).sum(axis=1)) <= {3, 4, 5, 6, 8, 9}, "neighbours are 1 apart"


def test_torchmil_finds_neighbours_where_positions_are_not_whole(tmp_path: Path):
    datasets = imported("torchmil.datasets")
    (tmp_path / "features").mkdir()
    (tmp_path / "coords").mkdir()
    np.save(tmp_path / "features/a.npy", np.ones((4, 2), np.float32))
    np.save(tmp_path / "coords/a.npy", np.array([[0.5, 0.25], [1.5, 0.25], [0.5, 1.25], [9.0, 9.0]]))
    (bag,) = datasets.ProcessedMILDataset(
        features_path=str(tmp_path / "features"), coords_path=str(tmp_path / "coords"), bag_keys=["X", "coords", "adj"]
    )
    assert ((bag["adj"].to_dense().numpy() > 0)[0, 1:]).tolist() == [True, True, False]


def test_wsinfers_own_converter_makes_of_our_table_what_we_do(tmp_path: Path):
    imported("tqdm")
    theirs = part_of("wsinfer", "write_geojson")
    marked_results(tmp_path / "r", mpp=0.2431)
    export_bags(tmp_path / "r", tmp_path / "w", "wsinfer")
    ours = read_geojson(tmp_path / "w/model-outputs-geojson/a.geojson")
    (tmp_path / "again/model-outputs-geojson").mkdir(parents=True)
    theirs.make_geojson(tmp_path / "w/model-outputs-csv/a.csv", tmp_path / "again")
    found = read_geojson(tmp_path / "again/model-outputs-geojson/a.geojson")
    assert len(found) == len(ours)
    for one, other in zip(found, ours, strict=True):
        a, b = (np.array(shapely.geometry.shape(each["geometry"]).bounds) for each in (one, other))
        assert np.abs(a - b)[:2].max() <= 0.51, "whole pixels there"
        for name, value in one["properties"]["measurements"].items():
            assert value == pytest.approx(other["properties"]["measurements"][name], abs=1e-6)


def test_tiatoolbox_reads_our_geojson(tmp_path: Path):
    storage = imported("tiatoolbox.annotation.storage")
    made = marked_results(tmp_path / "r")
    export_bags(tmp_path / "r", tmp_path / "w", "wsinfer")
    store = storage.DictionaryStore.from_geojson(tmp_path / "w/model-outputs-geojson/a.geojson")
    assert len(store) == len(made.grid)
    top = max(store.values(), key=lambda each: each.properties["measurements"]["prob_tumour"])
    assert top.properties["classification"]["name"] == "tumour"
    mark = made.mark
    assert np.abs(np.array(top.geometry.bounds) - (mark.x, mark.y, mark.x + mark.w, mark.y + mark.h)).max() <= 0.5


def test_tiatoolbox_reads_our_ome_tiff(tmp_path: Path):
    readers = imported("tiatoolbox.wsicore.wsireader")
    made = marked_results(tmp_path / "r")
    export_rasters(tmp_path / "r", tmp_path, "ome-tiff")
    heatmap = readers.WSIReader.open(tmp_path / "a.ome.tiff")
    assert np.allclose(heatmap.info.mpp, 32) and tuple(heatmap.info.slide_dimensions) == (24, 16)
    pixels = heatmap.slide_thumbnail(resolution=0, units="level")
    row, column = np.unravel_index(np.nanargmax(pixels[..., 0]), pixels.shape[:2])
    assert (column * 128, row * 128) == (made.mark.x, made.mark.y)
    raster = Raster(np.random.default_rng(0).random((3, 700, 900), np.float32), ("a", "b", "c"), (128, 128), Mpp(1, 1))
    write_ome_tiff(tmp_path / "b.ome.tiff", raster)
    info = readers.WSIReader.open(tmp_path / "b.ome.tiff").info
    assert [tuple(each) for each in info.level_dimensions] == [(900, 700), (450, 350), (225, 175)]


def test_the_recipe_for_geopandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    geopandas = imported("geopandas")
    made = marked_results(tmp_path / "results")
    export_qupath(tmp_path / "results", tmp_path / "results/qupath")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(recipe("vsigzip"), found)
    assert len(found["tiles"]) == len(made.grid)
    n = 9000  # several pieces of gzip
    boxes = np.column_stack([np.arange(n) * 256.0, np.zeros(n), np.full((n, 2), 256.0)])
    write_tiles(
        tmp_path / "long.geojson.gz", boxes, [PathClass("T", (1, 2, 3))], np.zeros(n, int), {"p": np.linspace(0, 1, n)},
        bounds=Box(0, 0, 1e7, 1e7), slide_id="s",
    )  # fmt: skip
    assert len(geopandas.read_file(f"/vsigzip/{tmp_path}/long.geojson.gz")) == n


@pytest.mark.parametrize("bounds", [None, Box(700, 300, 2000, 1600)])
def test_spatialdata_reads_our_store(tmp_path: Path, bounds: Box | None):
    spatialdata = imported("spatialdata")
    from spatialdata.transformations import get_transformation

    made = marked_results(tmp_path / "r", features=4, mpp=0.2431, bounds=bounds, unreadable=(3,))
    export_bags(tmp_path / "r", tmp_path, "spatialdata")
    read = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert set(read.coordinate_systems) == {"global", "micrometers"} and read.attrs["slide_id"] == "a"
    matched, table = spatialdata.match_element_to_table(read, "tiles", "table")
    assert table.X.shape == (len(made.grid) - 1, 4) == (len(matched["tiles"]), 4), "each row of the table has its tile"
    top = int(np.argmax(table.obs["prob_tumour"]))
    mark = np.array([made.mark.x, made.mark.y, made.mark.x + made.mark.w, made.mark.y + made.mark.h])
    for system, unit in (("global", 1), ("micrometers", 0.2431)):
        for name in ("tiles", "regions"):
            shapes = spatialdata.transform(read.shapes[name], to_coordinate_system=system)
            shape = shapes.geometry.iloc[top if name == "tiles" else 1]
            assert np.abs(np.array(shape.bounds) - mark * unit).max() <= 0.505 * unit
        heatmap = read.images["heatmap"].sel(c="tumour").fillna(-1)  # its system counts middles of pixels from 0.5
        row, column = np.unravel_index(int(heatmap.values.argmax()), heatmap.shape)
        at = np.array([[heatmap.x.values[column], heatmap.y.values[row], 1]])
        matrix = get_transformation(read.images["heatmap"], system).to_affine_matrix(("x", "y"), ("x", "y"))
        assert np.abs((at @ matrix.T)[0, :2] - (mark[:2] + mark[2:]) / 2 * unit).max() <= 0.505 * unit
    assert table.obs["prob_tumour"].iloc[top] > 0.97 and read.shapes["regions"]["class"].tolist()[1] == "tumour"
    read.write(tmp_path / "again.zarr")  # as its own writer has it
    again = spatialdata.read_zarr(tmp_path / "again.zarr")
    assert spatialdata.get_extent(again) == spatialdata.get_extent(read)


def test_the_recipe_for_spatialdata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    imported("spatialdata")
    made = marked_results(tmp_path / "results", features=4)
    export_bags(tmp_path / "results", tmp_path / "spatial", "spatialdata")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(recipe("spatialdata"), found)
    assert len(found["table"]) == len(made.grid)
    assert found["regions"].area.iloc[1] == pytest.approx(made.mark.w * made.mark.h * 0.25**2)


def test_spatialdata_reads_a_pyramid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spatialdata = imported("spatialdata")
    monkeypatch.setattr("wsi.export.rasters._LAST_LEVEL_PX", 8)
    marked_results(tmp_path / "r", features=4)
    export_bags(tmp_path / "r", tmp_path, "spatialdata")
    heatmap = spatialdata.read_zarr(tmp_path / "a.zarr").images["heatmap"]
    assert list(heatmap) == ["scale0", "scale1", "scale2"]
    extent = spatialdata.get_extent(heatmap)
    assert (extent["x"], extent["y"]) == ((0, 24 * 128), (0, 16 * 128))
