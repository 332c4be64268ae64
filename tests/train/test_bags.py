"""Bags from every layout, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.train.make import WIDTH, write_bags
from wsi.errors import TrainError
from wsi.store import PatchStore
from wsi.train import mil
from wsi.train.bags import find_bags, read_bag
from wsi.train.mil import Bags

LABELS = {"a": 0, "b": 1, "c": 0}


@pytest.mark.parametrize("layout", ["h5", "pt", "trident", "store"])
def test_all_layouts_hold_the_same_bags(tmp_path: Path, layout: str) -> None:
    plain = find_bags([write_bags(tmp_path / "plain", LABELS)])
    found = find_bags([write_bags(tmp_path / layout, LABELS, layout=layout)])
    assert sorted(found) == sorted(LABELS)
    for slide_id, path in found.items():
        bag = read_bag(path)
        np.testing.assert_array_equal(bag.features, read_bag(plain[slide_id]).features)
        assert (bag.boxes is None) == (layout == "pt")
        if bag.boxes is not None:
            side = 100 if layout == "store" else 256
            assert bag.boxes.shape == (len(bag.features), 4) and (bag.boxes[:, 2:] == side).all()
        assert bag.encoder == {"trident": "uni_v1", "store": "a" * 64}.get(layout)


def test_single_files_and_single_results(tmp_path: Path) -> None:
    h5, store = write_bags(tmp_path / "h", {"a": 0}), write_bags(tmp_path / "s", {"b": 0}, layout="store")
    assert set(find_bags([h5 / "h5_files" / "a.h5", store / "b"])) == {"a", "b"}
    assert set(find_bags([store / "b" / "store.zarr"])) == {"b"}


def test_torch_half_precision_and_dictionaries(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    torch.save({"features": x.bfloat16()}, tmp_path / "a.pt")
    np.testing.assert_allclose(read_bag(tmp_path / "a.pt").features, x.numpy(), rtol=0.01, atol=0.01)


def test_a_leading_axis_of_one_and_atlas_coordinates(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.zeros((1, 4, 3), np.float32)
        file["coords"] = np.array([[0, 0, 9, 9, 0], [300, 0, 9, 9, 0], [0, 300, 9, 9, 0], [300, 300, 9, 9, 0]])
        file["coords"].attrs["patch_size_level0"] = "None"
    bag = read_bag(tmp_path / "a.h5")
    assert bag.features.shape == (4, 3) and bag.boxes is not None and bag.boxes[1].tolist() == [300, 0, 300, 300]


@pytest.mark.parametrize("side", [None, 256.0])
def test_stamps_own_files_count_in_microns(tmp_path: Path, side: float | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"], file["coords"] = np.ones((2, 3), np.float16), np.array([[0, 0], [256.0, 512.0]])
        file.attrs.update({"extractor": "uni", **({} if side is None else {"tile_size_um": side})})
    bag = read_bag(tmp_path / "a.h5")
    assert bag.encoder == "uni" and bag.info.unit == "um"
    assert bag.boxes is None if side is None else bag.boxes.tolist()[1] == [256, 512, side, side]


class TestOfSeveralEncoders:
    """A store with the scoring model's features, and those of two encoders."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = write_bags(tmp_path, {"a": 0}, layout="store") / "a" / "store.zarr"
        store = PatchStore.open(path)
        for name, letter in (("uni", "b"), ("virchow", "c")):
            store.add(f"features-{letter}", (3,), "float16", {"encoder": name, "encoder_sha256": letter * 64})
            store.put(f"features-{letter}", np.full((len(store), 3), ord(letter), np.float16))
        return path

    def test_one_is_named_by_name_or_hash(self, path: Path) -> None:
        for asked, letter in (("uni", "b"), ("ccc", "c"), ("aa", "a")):
            bag = read_bag(path, asked)
            assert bag.encoder == letter * 64
            assert letter == "a" or (bag.features == ord(letter)).all()

    @pytest.mark.parametrize("asked", [None, "phikon"])
    def test_otherwise_it_is_asked(self, path: Path, asked: str | None) -> None:
        with pytest.raises(TrainError, match=r"uni \(b+\), virchow \(c+\), the scoring model \(a+\).*--encoder"):
            read_bag(path, asked)

    def test_unreadable_tiles_are_left_out(self, path: Path) -> None:
        store = PatchStore.open(path)
        bad = np.arange(len(store)) == 2
        store.write(0, {"unreadable": bad, "features-b": np.where(bad[:, None], np.nan, np.ones((len(store), 3)))})
        bag = read_bag(path, "uni")
        assert len(bag.features) == len(store) - 1 and bag.boxes is not None
        np.testing.assert_array_equal(bag.boxes, store.grid.boxes()[~bad])


class TestRefused:
    @pytest.mark.parametrize(
        ("features", "says"),
        [
            (np.zeros((0, WIDTH), np.float32), "holds no tiles"),
            (np.array([[0.0, np.nan]]), "1 of 1 tiles have features that are not finite"),
            (np.zeros((3, 2), np.int32), "not floats"),
            (np.zeros(4, np.float32), "not floats"),
        ],
    )
    def test_features_that_are_none(self, tmp_path: Path, features: np.ndarray, says: str) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["features"] = features
        with pytest.raises(TrainError, match=says) as caught:
            read_bag(tmp_path / "a.h5")
        assert "a.h5" in str(caught.value)

    @pytest.mark.parametrize("name", ["a.h5", "a.pt", "a.npy"])
    @pytest.mark.parametrize("content", [b"", b"no bag at all", b"PK\3\4 and no archive"])
    def test_damaged_files(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TrainError, match="cannot be read"):
            read_bag(tmp_path / name)

    def test_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "run",)

        torch.save(Evil(), tmp_path / "a.pt")
        with pytest.raises(TrainError, match="cannot be read"):
            read_bag(tmp_path / "a.pt")
        assert not (tmp_path / "run").exists()

    def test_other_things(self, tmp_path: Path) -> None:
        with pytest.raises(TrainError, match=r"is no file of features.*\.h5, \.pt"):
            find_bags([Path(__file__)])
        with pytest.raises(TrainError, match="no such file"):
            find_bags([tmp_path / "nowhere"])
        (tmp_path / "empty").mkdir()
        with pytest.raises(TrainError, match="holds no bags"):
            find_bags([tmp_path / "empty"])
        folder = write_bags(tmp_path / "t", LABELS, layout="trident")
        with pytest.raises(TrainError, match="is also in"):
            find_bags([folder, write_bags(tmp_path / "h", {"a": 0})])
        other = folder / "20x_256px_0px_overlap" / "features_virchow"
        other.mkdir()
        (other / "a.h5").write_bytes(b"")
        with pytest.raises(TrainError, match="do not mix"):
            find_bags([folder])
        with h5py.File(tmp_path / "short.h5", "w") as file:
            file["features"], file["coords"] = np.zeros((3, 2), np.float32), np.zeros((2, 2))
        with pytest.raises(TrainError, match="3 features and 2 coordinates"):
            read_bag(tmp_path / "short.h5")
        with h5py.File(tmp_path / "nan.h5", "w") as file:
            file["features"], file["coords"] = np.zeros((3, 2), np.float32), np.array([[0, 0], [1, 0], [0, np.nan]])
        with pytest.raises(TrainError, match="coordinates that are not finite"):
            read_bag(tmp_path / "nan.h5")

    def test_bags_of_two_widths_or_encoders(self, tmp_path: Path) -> None:
        paths = find_bags([write_bags(tmp_path / "uni", {"a": 0}, layout="trident")])
        other = find_bags([write_bags(tmp_path / "h", {"b": 0})])
        with pytest.raises(TrainError, match="an unnamed encoder; those of a 5, of uni_v1"):
            Bags(paths | other)
        with h5py.File(tmp_path / "wide.h5", "w") as file:
            file["features"] = np.zeros((3, WIDTH + 1), np.float32)
        with pytest.raises(TrainError, match="6 wide"):
            Bags(other | {"c": tmp_path / "wide.h5"})


def test_sums_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float16)
    monkeypatch.setattr(mil, "BLOCK", 7)
    found = mil.stats_of(x)
    np.testing.assert_allclose(found.sum, x.astype(np.float64).sum(0))
    np.testing.assert_allclose(found.square, (x.astype(np.float64) ** 2).sum(0))
    assert found.tiles == 23


def test_bags_are_the_same_kept_or_read_again(tmp_path: Path) -> None:
    paths = find_bags([write_bags(tmp_path, LABELS)])
    kept, read = Bags(paths), Bags(paths, keep_bytes=0)
    for slide_id in LABELS:
        torch.testing.assert_close(kept[slide_id].features, read[slide_id].features)
        assert kept.stats[slide_id].tiles == len(kept[slide_id].features)
        np.testing.assert_allclose(kept.stats[slide_id].sum, kept[slide_id].features.double().sum(0))
