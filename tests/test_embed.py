"""Features into stores: the same from kept patches and from the slide, resumed, and never mixed."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Run
from tests.e2e.conftest import rows
from tests.nn.make import write_model
from tests.nn.test_encoder import write_timm
from tests.slide.make import halved, section, write_pyramid
from tests.train.make import write_labels
from wsi.embed import embed_slide
from wsi.errors import ConfigMismatch, ModelError, StoreError, TrainError, WsiError
from wsi.nn.encoder import load_encoder
from wsi.nn.grade import load_mil_model
from wsi.nn.patch import PatchModel
from wsi.store import PatchStore
from wsi.tile import TileConfig, tile_slide
from wsi.train.bags import read_bag


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    full = section(700, 600)
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    write_pyramid(path, [full, halved(full)], 0.5, svs=True)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PatchModel:
    return load_encoder(str(write_model(tmp_path_factory.mktemp("m") / "encoder")), precision="float32")  # 32 px, 1 mpp


def tiled(slide: Path, folder: Path, **config: Any) -> Path:
    tile_slide(
        str(slide), folder, TileConfig(**{"mpp": 1.0, "tile_px": 32, "pixels": "none", "min_tissue": 0} | config)
    )
    return folder


@pytest.mark.parametrize("pixels", ["none", "zstd"])
def test_features_are_the_encoders_of_each_patch(slide: Path, encoder: PatchModel, tmp_path: Path, pixels: str) -> None:
    folder = tiled(slide, tmp_path / "a", pixels=pixels)
    numbers = embed_slide(folder, encoder, batch_size=16).numbers
    store = PatchStore.open(folder / "store.zarr")
    assert numbers["features"] == f"features-{encoder.sha256[:12]}" and numbers["n_tiles"] == len(store) > 60
    rgb = store.dask(None).compute()
    full = np.concatenate([rgb, np.zeros((-len(rgb) % 16, 32, 32, 3), np.uint8)])
    expected = np.concatenate([encoder(full[i : i + 16]).features for i in range(0, len(full), 16)])[: len(rgb)]
    got = store.get(numbers["features"])
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    bag = read_bag(folder / "store.zarr")
    assert bag.encoder == encoder.sha256 and len(bag.features) == len(store)


def test_larger_patches_are_resized(slide: Path, encoder: PatchModel, tmp_path: Path) -> None:
    folder = tiled(slide, tmp_path / "a", mpp=0.5, tile_px=64)  # the same view
    name = embed_slide(folder, encoder).numbers["features"]
    other = tiled(slide, tmp_path / "b")
    assert embed_slide(other, encoder).numbers["features"] == name
    fine, coarse = (PatchStore.open(f / "store.zarr").get(name).astype(float) for f in (folder, other))
    assert np.corrcoef(fine.ravel(), coarse.ravel())[0, 1] > 0.98


def test_it_goes_on_where_it_was_stopped(slide: Path, encoder: PatchModel, tmp_path: Path) -> None:
    folder = tiled(slide, tmp_path / "a", stride_px=16)
    whole = PatchStore.open(folder / "store.zarr")
    assert len(whole.shards) > 1
    name = embed_slide(folder, encoder).numbers["features"]
    expected = PatchStore.open(folder / "store.zarr").get(name)
    (folder / "store.zarr" / name / "c" / "1" / "0").unlink()
    kept = (folder / "store.zarr" / name / "c" / "0" / "0").stat().st_mtime_ns
    embed_slide(folder, encoder)
    np.testing.assert_array_equal(PatchStore.open(folder / "store.zarr").get(name), expected)
    assert (folder / "store.zarr" / name / "c" / "0" / "0").stat().st_mtime_ns == kept
    assert embed_slide(folder, encoder).numbers["n_tiles"] == len(whole)  # nothing is missing: nothing is read
    tiled(slide, folder, stride_px=16)  # and tiling again finds its own store


def test_a_patch_that_cannot_be_read_has_no_features(slide: Path, encoder: PatchModel, tmp_path: Path) -> None:
    folder = tiled(slide, tmp_path / "a", pixels="zstd")
    store = PatchStore.open(folder / "store.zarr")
    chunks = [None if i == 3 else chunk for i, chunk in enumerate(store.encode(store.read(store.tiles(0))))]
    store.write(0, {"unreadable": np.arange(len(store.tiles(0))) == 3})
    store.keep(0, chunks)
    result = embed_slide(folder, encoder)
    features = PatchStore.open(folder / "store.zarr").get(result.numbers["features"])
    assert result.numbers["n_unreadable"] == 1 and np.flatnonzero(np.isnan(features).any(1)).tolist() == [3]
    assert len(read_bag(folder / "store.zarr").features) == len(store) - 1


class TestRefused:
    def test_another_resolution_with_the_command_that_helps(
        self, slide: Path, encoder: PatchModel, tmp_path: Path
    ) -> None:
        with pytest.raises(ModelError, match=r"32 px at 0\.5") as caught:
            embed_slide(tiled(slide, tmp_path / "a", mpp=0.5), encoder)
        assert "wsi tile --mpp 1 --tile 32 --pixels none" in caught.value.remedy

    def test_features_made_otherwise_are_not_gone_on_with(
        self, slide: Path, encoder: PatchModel, tmp_path: Path
    ) -> None:
        folder = tiled(slide, tmp_path / "a")
        name = embed_slide(folder, encoder).numbers["features"]
        other = load_encoder(str(encoder.config.folder), precision="bfloat16")
        assert embed_slide(folder, other).numbers["precision"] == "float32"  # they are there: nothing to compute
        (folder / "store.zarr" / name / "c" / "0" / "0").unlink()
        with pytest.raises(ConfigMismatch, match='precision "float32", now "bfloat16"'):
            embed_slide(folder, other)
        shutil.rmtree(folder / "store.zarr" / name)  # as the remedy says
        embed_slide(folder, other)

    def test_the_same_weights_with_another_normalisation(
        self, slide: Path, encoder: PatchModel, tmp_path: Path
    ) -> None:
        """Else slides embedded before and after a change of config.json would be bags of one training."""
        folder = tiled(slide, tmp_path / "a")
        embed_slide(folder, encoder)
        other = copy.copy(encoder)
        other.config = replace(encoder.config, mean=(0.1, 0.2, 0.3))
        with pytest.raises(ConfigMismatch, match=r"mean .*now \[0.1, 0.2, 0.3\]"):
            embed_slide(folder, other)

    def test_a_slide_that_is_gone_or_another(self, slide: Path, encoder: PatchModel, tmp_path: Path) -> None:
        moved = Path(shutil.copy(slide, tmp_path / "moved.svs"))
        folder = tiled(moved, tmp_path / "a")
        new = moved.rename(tmp_path / "new.svs")
        with pytest.raises(WsiError, match=r"moved\.svs"):
            embed_slide(folder, encoder)
        assert embed_slide(folder, encoder, slide_path=str(new)).numbers["n_tiles"] > 0
        write_pyramid(tmp_path / "other.svs", [section(300, 300)], 0.5, svs=True)
        shutil.rmtree(folder / "store.zarr" / f"features-{encoder.sha256[:12]}")
        with pytest.raises(StoreError, match="is of a slide of"):
            embed_slide(folder, encoder, slide_path=str(tmp_path / "other.svs"))


def test_from_slides_to_a_grader_by_the_command_line(wsi: Run, tmp_path: Path) -> None:
    for i in range(6):
        full = section(300, 300, seed=i)
        (tmp_path / "slides").mkdir(exist_ok=True)
        write_pyramid(tmp_path / "slides" / f"{i}.svs", [full], 0.5, svs=True)
    stores, first = tmp_path / "stores", write_timm(tmp_path / "vit")
    assert wsi("tile", tmp_path / "slides", "--mpp", 1, "--tile", 40, "--pixels", "none", "-o", stores, "-q")[0] == 0
    with pytest.raises(TrainError, match=r"holds features of no encoder.*wsi embed .*stores --encoder uni"):
        read_bag(stores / "0" / "store.zarr")
    code, out, err = wsi("embed", stores, "--encoder", first, "--json", "-q")
    told = json.loads(out)
    assert code == 0 and err == "" and len(told["embedded"]) == 6 and told["embedded"][0]["width"] == 64
    second = write_model(tmp_path / "own", patch_size_pixels=40)
    assert wsi("embed", stores, "--encoder", second, "-q")[0] == 0
    labels = write_labels(tmp_path / "labels.csv", [{"slide": i, "label": "ab"[i % 2]} for i in range(6)])
    train = ("train", "mil", stores, "--labels", labels, "--folds", 3, "--epochs", 2, "-q", "-o")
    code, _, err = wsi(*train, tmp_path / "grader")
    assert code == 2 and "--encoder" in err
    code, _, err = wsi(*train, tmp_path / "grader", "--encoder", "uni")
    assert code == 2 and f"wsi embed {stores} --encoder uni" in err
    assert wsi(*train, tmp_path / "grader", "--encoder", first)[0] == 0
    config = json.loads((tmp_path / "grader" / "config.json").read_text())
    assert config["encoder_sha256"] == told["embedded"][0]["encoder_sha256"]
    tiles = [each["n_tiles"] - each["n_unreadable"] for each in told["embedded"]]
    assert config["bag_tiles"] == [min(tiles), max(tiles)]  # of three folds: every slide trains one

    code, out, err = wsi("embed", stores, "--encoder", first, "--mil", tmp_path / "grader", "--json")
    table = rows(stores / "grades.csv")
    assert code == 0 and "6 grades" in err and [row["slide_id"] for row in table] == [str(i) for i in range(6)]
    head, bag = load_mil_model(tmp_path / "grader"), read_bag(stores / "2" / "store.zarr", str(first))
    grade = head(bag.features, bag.boxes)
    assert float(table[2]["prob_b"]) == pytest.approx(grade.probabilities[1], abs=1e-6)
    assert table[2]["grade"] == head.grade(grade.probabilities) == json.loads(out)["graded"][2]["grade"]
    for positive, column in (("b", "prob_b"), ("a", "prob_a")):
        words = ("--labels", labels, "--positive", positive, "--bootstrap", 0, "-o", tmp_path / positive)
        assert wsi("evaluate", "slides", stores, *words)[0] == 0
        found = [float(row["score"]) for row in rows(tmp_path / positive / "cases.csv")]
        assert found == [float(row[column]) for row in table]
    assert table[2]["positive_probability"] == table[2]["prob_b"] and table[2]["grade_threshold"]
    shutil.move(stores / "grades.csv", tmp_path / "grades.csv")
    code, _, err = wsi("evaluate", "slides", stores, *words)
    assert code == 2 and "wsi embed, with --mil" in err
    code, _, err = wsi("embed", stores, "--encoder", second, "--mil", tmp_path / "grader")
    assert code == 2 and "trained on the features of another patch model" in err

    (tmp_path / "slides" / "3.svs").write_bytes(b"")  # one is lost: the rest go on
    shutil.rmtree(stores / "3" / "store.zarr" / told["embedded"][3]["features"])
    code, out, err = wsi("embed", stores, "--encoder", first, "--json")
    assert code == 3 and [row["slide_id"] for row in json.loads(out)["failed"]] == ["3"] and "wsi: 3:" in err
    assert wsi("embed", tmp_path / "slides", "--encoder", first)[0] == 2


def test_a_full_disk_ends_the_run_in_one_line(
    wsi: Run,
    slide: Path,
    encoder: PatchModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiled(slide, tmp_path / "s" / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PatchStore, "write", full)
    code, _, err = wsi("embed", tmp_path / "s", "--encoder", encoder.config.folder, "-q")
    assert code == 2 and "No space left" in err and "same command again" in err
