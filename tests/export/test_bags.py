"""Layouts of other MIL programs: read back, read by the programs themselves, and where tiles come to lie."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import Run
from tests.export.make import marked_results
from tests.export.test_qupath import read_as_qupath
from wsi.annotations import read_annotations
from wsi.errors import ResultsError, TrainError
from wsi.export.bags import LAYOUTS, export_bags
from wsi.export.rasters import export_rasters
from wsi.store import PatchStore
from wsi.train.bags import find_bags, read_bag
from wsi.units import Box

BOUNDS = Box(700, 300, 2000, 1600)
GRIDS = [(0.25, 0.5, None), (0.2431, 0.5, None), (0.25, 1.0, 32)]


@pytest.mark.parametrize(("mpp", "tile_mpp", "stride"), GRIDS)
@pytest.mark.parametrize("layout", ["clam", "trident", "stamp", "torchmil", "anndata"])
def test_bags_come_back(tmp_path: Path, layout: str, mpp: float, tile_mpp: float, stride: int | None):
    made = marked_results(
        tmp_path / "r", mpp=mpp, tile_mpp=tile_mpp, stride_px=stride, features=8, unreadable=(3,), bounds=BOUNDS
    )
    export_bags(tmp_path / "r", tmp_path / "out", layout)
    place = tmp_path / "out"
    bags = find_bags([place])
    assert list(bags) == ["a"]
    bag = read_bag(bags["a"])
    store = PatchStore.open(tmp_path / "r/a/store.zarr")
    keep = np.arange(len(made.grid)) != 3
    assert (bag.features == store.get("features")[keep]).all()
    grid = made.grid.keep(keep)
    boxes = grid.boxes()
    if layout == "torchmil":
        assert (bag.boxes[:, :2] == np.stack([grid.columns, grid.rows], 1)).all()
    else:
        most = 1e-6 if layout in ("stamp", "anndata") else 0.5
        assert np.abs(bag.boxes[:, :2] - boxes[:, :2]).max() <= most
        assert np.abs(bag.boxes[:, 2:] - grid.tile).max() <= most
    if layout == "clam":
        tensor = read_bag(place / "pt_files/a.pt")
        assert (tensor.features == bag.features).all() and (tensor.boxes == bag.boxes).all()
        (place / "patches/a.h5").unlink()  # without it nothing says how large a tile is: the least step between tiles
        assert np.abs(read_bag(bags["a"]).boxes[:, 2:] - grid.stride).max() <= 1
        assert read_bag(place / "pt_files/a.pt").boxes is None
    assert bag.encoder == {"trident": "red", "stamp": "red", "anndata": "red"}.get(layout)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize(("mpp", "tile_mpp", "stride"), GRIDS)
def test_the_mark_is_hit_in_every_layout(tmp_path: Path, bounds, mpp, tile_mpp, stride):
    made = marked_results(tmp_path / "r", mpp=mpp, tile_mpp=tile_mpp, stride_px=stride, bounds=bounds, features=4)
    for layout in ("clam", "trident", "stamp", "wsinfer"):
        export_bags(tmp_path / "r", tmp_path / layout, layout)
    p = PatchStore.open(tmp_path / "r/a/store.zarr").get("probabilities")[:, 1]
    top, out = int(p.argmax()), tmp_path
    job = next((out / "trident").iterdir())
    corners = []
    for path in (
        out / "clam/patches/a.h5",
        out / "clam/h5_files/a.h5",
        job / "patches/a_patches.h5",
        job / "features_red/a.h5",
    ):
        with h5py.File(path) as file:
            corners.append(file["coords"][top])
    with h5py.File(out / "stamp/red/a.h5") as file:
        corners.append(file["coords"][top] / mpp)
    with (out / "wsinfer/model-outputs-csv/a.csv").open() as text:
        row = list(csv.DictReader(text))[top]
    assert float(row["prob_tumour"]) == pytest.approx(p[top], rel=1e-6)
    corners.append(np.array([float(row["minx"]), float(row["miny"])]))
    for corner in corners:
        assert np.abs(corner - (made.mark.x, made.mark.y)).max() <= 0.5
    objects = read_as_qupath(out / "wsinfer/model-outputs-geojson/a.geojson", (made.bounds.w, made.bounds.h))
    shape = max(objects, key=lambda each: each["measurements"]["prob_tumour"])["shape"]
    assert (
        np.abs(np.array(shape.bounds[:2]) - (made.mark.x - made.bounds.x, made.mark.y - made.bounds.y)).max() <= 0.505
    )
    tiles = read_annotations(out / "wsinfer/model-outputs-geojson/a.geojson", origin=made.bounds[:2])
    assert {each.group for each in tiles} == {"stroma", "tumour"}


def test_clam_and_trident_have_the_attributes_their_readers_ask_for(tmp_path: Path):
    made = marked_results(tmp_path / "r", features=4, stride_px=48)
    for layout in ("clam", "trident"):
        export_bags(tmp_path / "r", tmp_path / layout, layout)
    with h5py.File(tmp_path / "clam/patches/a.h5") as file:
        said = dict(file["coords"].attrs)
        assert said["patch_level"] == 0 and said["patch_size"] == 128 and tuple(said["level_dim"]) == made.size
        assert file["coords"].shape[1] == 2 and file["coords"].dtype == np.int64
    (job,) = (tmp_path / "trident").iterdir()
    assert job.name == "20x_64px_16px_overlap"
    with h5py.File(job / "patches/a_patches.h5") as file:
        said = dict(file["coords"].attrs)
        expected = {"patch_size": 64, "patch_size_level0": 128, "overlap": 16, "level0_magnification": 40.0}
        assert expected.items() <= said.items() and said["target_magnification"] == 20.0
    with h5py.File(job / "features_red/a.h5") as file:
        assert file["features"].chunks == (min(1024, len(made.grid)), 4)


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    marked_results(tmp_path / "r", features=4)
    for layout in sorted(set(LAYOUTS) - {"anndata", "spatialdata"}):  # another library's files
        for run in ("x", "y"):
            export_bags(tmp_path / "r", tmp_path / run / layout, layout)
    files = [path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes(), file


def test_without_features_or_results_it_says_so(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r")
    with pytest.raises(ResultsError, match="no features"):
        export_bags(tmp_path / "r", tmp_path / "out", "clam")
    with pytest.raises(ValueError, match="layout"):
        export_bags(tmp_path / "r", tmp_path / "out", "zip")
    code, out, _ = wsi("export", "wsinfer", tmp_path / "r", "-o", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)[0]["tiles"] > 0
    assert wsi("export", "clam", tmp_path / "none", "-o", tmp_path / "out")[0] == 2


def test_pseudonyms_leave_no_trace_of_the_name(tmp_path: Path):
    marked_results(tmp_path / "r", "Doe_John", features=4)
    for layout in sorted(set(LAYOUTS) - {"anndata"}):
        export_bags(tmp_path / "r", tmp_path / "out" / layout, layout, key=b"0" * 32)
    for kind in ("ome-tiff", "ome-zarr", "png"):
        export_rasters(tmp_path / "r", tmp_path / "out" / kind, kind, key=b"0" * 32)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 14
    for path in files:
        assert "Doe" not in str(path) and b"Doe" not in path.read_bytes()


def test_a_damaged_npy_is_one_line(tmp_path: Path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features/a.npy").write_bytes(b"nothing")
    with pytest.raises(TrainError, match="cannot be read"):
        read_bag(find_bags([tmp_path])["a"])


def test_torchmil_reads_both(tmp_path: Path):
    import wsi.nn.backbone  # noqa: F401  # mends a torchvision that does not fit torch, which torchmil imports

    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed", exc_type=ImportError)
    made = marked_results(tmp_path / "r", features=4)
    export_bags(tmp_path / "r", tmp_path / "npy", "torchmil")
    export_bags(tmp_path / "r", tmp_path / "trident", "trident")
    features = PatchStore.open(tmp_path / "r/a/store.zarr").get("features").astype(np.float32)
    plain = datasets.ProcessedMILDataset(
        features_path=str(tmp_path / "npy/features"),
        coords_path=str(tmp_path / "npy/coords"),
        bag_keys=["X", "coords", "adj"],
    )
    job = f"{next((tmp_path / 'trident').iterdir())}/"
    (tmp_path / "labels.csv").write_text("slide,label\na.tif,1\n")
    theirs = datasets.TridentWSIDataset(
        base_path=job, labels_path=str(tmp_path / "labels.csv"), feature_extractor="red", patch_size=128,
        bag_keys=["X", "Y", "coords", "adj"], wsi_name_col="slide", wsi_label_col="label",
    )  # fmt: skip
    for dataset in (plain, theirs):
        bag = dataset[0]
        assert np.array_equal(bag["X"].numpy(), features)
        neighbours = bag["adj"].to_dense().numpy() > 0
        inner = (made.grid.columns > 0) & (made.grid.columns < made.grid.columns.max())
        inner &= (made.grid.rows > 0) & (made.grid.rows < made.grid.rows.max())
        assert set(neighbours[inner].sum(axis=1)) <= {8, 9}, "each tile has its eight neighbours"


def test_anndata_reads_its_table(tmp_path: Path):
    anndata = pytest.importorskip("anndata", reason="anndata is not installed", exc_type=ImportError)
    made = marked_results(tmp_path / "r", features=4, unreadable=(2,))
    export_bags(tmp_path / "r", tmp_path / "out", "anndata")
    table = anndata.read_h5ad(tmp_path / "out/a.h5ad")
    top = int(np.argmax(table.obs["prob_tumour"]))
    assert table.shape == (len(made.grid) - 1, 4) and table.obs["class"].iloc[top] == "tumour"
    middle = made.mark.x + made.mark.w / 2, made.mark.y + made.mark.h / 2
    assert np.abs(table.obsm["spatial"][top] - middle).max() <= 0.5
    assert table.obs_names[2] == "a-3", "numbers of tiles are those of the store"


def test_without_anndata_the_command_says_what_to_install(
    tmp_path: Path,
    wsi: Run,
    monkeypatch: pytest.MonkeyPatch,
):
    marked_results(tmp_path / "r", features=4)
    monkeypatch.setitem(sys.modules, "anndata", None)
    code, _, err = wsi("export", "anndata", tmp_path / "r", "-o", tmp_path / "out")
    assert code == 2 and "wsi[anndata]" in err
