"""From slides and outlines to a model that finds on a slide of its own what was outlined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.e2e.conftest import Run, digest
from tests.nn.make import write_model
from wsi.metrics.roc import auroc
from wsi.phantom import PhantomConfig, write_phantom
from wsi.store import PatchStore


@pytest.fixture(scope="session")
def outlined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantoms in slides/, the outlines of five in outlines/; the last is for testing."""
    folder = tmp_path_factory.mktemp("outlined")
    (folder / "slides").mkdir()
    (folder / "outlines").mkdir()
    for i in range(6):
        config = PhantomConfig((2048, 2048), seed=i, tumours=2, tumour_um=(400,))
        write_phantom(folder / f"s{i}.svs", config)
        (folder / f"s{i}.svs").rename(folder / ("slides" if i < 5 else ".") / f"s{i}.svs")
        (folder / f"s{i}.truth.geojson").rename(folder / ("outlines" if i < 5 else ".") / f"s{i}.geojson")
    return folder


@pytest.fixture(scope="session")
def unseen_truth(outlined: Path) -> shapely.Geometry:
    drawn = json.loads((outlined / "s5.geojson").read_text())["features"]
    return shapely.union_all([
        shapely.from_geojson(json.dumps(each["geometry"]))
        for each in drawn
        if each["properties"]["classification"]["name"] == "Tumor"
    ])  # fmt: skip


def test_trained_on_outlines_it_finds_tumours_on_an_unseen_slide(
    wsi: Run, outlined: Path, unseen_truth: shapely.Geometry, tmp_path: Path
) -> None:
    stores, model = tmp_path / "stores", tmp_path / "model"
    assert wsi("tile", outlined / "slides", "--mpp", 1, "--tile", 32, "--pixels", "zstd", "-o", stores, "-q")[0] == 0
    words = ("--annotations", outlined / "outlines", "--classes", "Tumor", "--rest", "normal")
    code, _, err = wsi("train", "patches", stores, *words, "--mpp", 2, "-o", tmp_path / "no", "-q")
    assert code == 2 and "have 1 microns a pixel, and --mpp says 2" in err
    code, stdout, stderr = wsi(
        "train", "patches", stores, *words, "-a", "test_resnet", "--epochs", 6, "--lr", 3e-3, "--balance", "-o", model,
        "--json", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, stderr
    figures = json.loads(stdout)
    assert json.loads((model / "config.json").read_text())["positive_classes"] == ["Tumor"]
    assert figures["test"]["auroc"] > 0.8 and figures["test"]["patients"] == 1
    wsi("score", outlined / "s5.svs", "--model", model, "-o", tmp_path / "r", "-q", "--device", "cpu")
    store = PatchStore.open(tmp_path / "r" / "s5" / "store.zarr")
    x, y, w, h = store.grid.boxes().T
    inside = shapely.contains_xy(unseen_truth, x + w / 2, y + h / 2)
    assert inside.sum() > 10
    found = auroc(inside, store.get("probabilities")[:, 1]).value  # the rest, then Tumor
    assert found is not None and found > 0.85
    assert store.grid.mpp == 1.0 and store.grid.tile_px == 32


def test_explaining_changes_a_picture_and_no_number(wsi: Run, outlined: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", mpp=1.0)
    words = ("score", outlined / "s5.svs", "--model", model, "--stain", "macenko", "-q", "--device", "cpu")
    assert wsi(*words, "-o", tmp_path / "plain")[0] == 0
    assert wsi(*words, "-o", tmp_path / "explained", "--explain")[0] == 0
    plain, explained = digest(tmp_path / "plain"), digest(tmp_path / "explained")
    assert set(explained) - set(plain) == {"s5/explained.png"}
    assert {name: sha for name, sha in explained.items() if name in plain} == plain
    with Image.open(tmp_path / "explained/s5/explained.png") as sheet:
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000


def test_what_is_not_convolutional_is_refused_before_a_slide_is_scored(
    wsi: Run, outlined: Path, tmp_path: Path
) -> None:
    from tests.train.make import write_patches

    write_patches(tmp_path / "patches", 24, side=160)
    words = ("--mpp", 1, "--patient-in", r"p\d+", "-a", "test_vit", "--epochs", 1, "-q", "--device", "cpu")
    assert wsi("train", "patches", tmp_path / "patches", *words, "-o", tmp_path / "vit")[0] == 0
    code, _, stderr = wsi("score", outlined / "s5.svs", "--model", tmp_path / "vit", "--explain", "-o", tmp_path / "r")
    assert code == 2 and "is not convolutional" in stderr and not (tmp_path / "r" / "s5").exists()
