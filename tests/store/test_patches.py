"""The store: whole shards or nothing, and knowing what is missing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.array_slide import ArraySlide
from tests.slide.make import picture
from wsi.errors import ConfigMismatch, StoreError
from wsi.grid import TileGrid
from wsi.slide import Slide, open_slide
from wsi.store import KINDS, SHARD_TILES, PatchStore
from wsi.units import Mpp

ARRAYS = {"probabilities": ((2,), "float32"), "features": ((5,), "float16"), "attention": ((), "float32")}


@pytest.fixture
def grid() -> TileGrid:
    return TileGrid.cover((3000, 2400), slide_mpp=Mpp(0.5, 0.5), mpp=1.0, tile_px=50)  # 720 tiles: 3 shards


@pytest.fixture
def store(tmp_path: Path, grid: TileGrid) -> PatchStore:
    return PatchStore.create(tmp_path / "store.zarr", grid, ARRAYS, pixels="zstd", attributes={"slide": "a"})


def values(store: PatchStore, shard: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, shard))
    n = len(store.tiles(shard))
    return {
        "probabilities": rng.random((n, 2), np.float32),
        "features": rng.random((n, 5), np.float32).astype(np.float16),
        "attention": rng.random(n, np.float32),
        "pixels": rng.integers(0, 256, (n, 50, 50, 3), np.uint8),
    }


def test_what_is_written_is_read(store: PatchStore, grid: TileGrid) -> None:
    for shard in store.missing():
        store.write(shard, values(store, shard))
    again = PatchStore.open(store.path)
    assert again.missing() == [] and again.attributes["slide"] == "a"
    np.testing.assert_array_equal(again.grid.boxes(), grid.boxes())
    assert (again.grid.tile_px, again.grid.mpp) == (50, 1.0)
    for name in ("probabilities", "features", "attention", "pixels"):
        expected = np.concatenate([values(store, shard)[name] for shard in range(3)])
        np.testing.assert_array_equal(again.get(name), expected)
    np.testing.assert_array_equal(np.concatenate(list(again.batches(100))), again.get("pixels"))
    lazy = again.dask()
    assert lazy.shape == (720, 50, 50, 3) and lazy.dtype == np.uint8 and lazy.chunks[0] == (256, 256, 208)
    np.testing.assert_array_equal(lazy[250:260].compute(scheduler="sync"), again.get("pixels")[250:260])
    mean = lazy[:300].mean().compute(scheduler="processes", num_workers=1)
    assert mean == pytest.approx(again.get("pixels")[:300].mean(), abs=1e-9)


def test_any_zarr_v3_reader_opens_it(store: PatchStore) -> None:
    store.write(0, values(store, 0))
    group = zarr.open_group(str(store.path), mode="r", zarr_format=3)
    np.testing.assert_array_equal(group["pixels"][7], values(store, 0)["pixels"][7])  # type: ignore[index]


def test_missing_follows_the_files(store: PatchStore) -> None:
    assert store.missing() == [0, 1, 2]
    store.write(1, values(store, 1))
    assert store.missing() == [0, 2] and store.missing("features") == [0, 2]
    part = values(store, 2)
    store.write(2, {"features": part["features"]})
    assert store.missing("features") == [0] and store.missing() == [0, 2]
    with pytest.raises(StoreError, match=r"shards \[0\] are missing"):
        store.get("features")
    # a file of no length is what a power cut leaves
    (store.path / "features/c/1/0").write_bytes(b"")
    assert store.missing("features") == [0, 1]


def test_a_shard_of_zeros_counts_as_written(store: PatchStore) -> None:
    zeros = {name: np.zeros_like(value) for name, value in values(store, 0).items()}
    store.write(0, zeros)
    assert store.missing() == [1, 2]


def test_pixels_are_cut_from_the_slide_where_none_are_kept(tmp_path: Path) -> None:
    rgb = picture(900, 700)
    slide = ArraySlide(rgb, mpp=0.5)
    grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=1.0, tile_px=20)
    store = PatchStore.create(tmp_path / "s.zarr", grid, {"attention": ((), "float32")})
    lazy = store.dask(slide)
    assert lazy.shape == (len(grid), 20, 20, 3)
    for i in (0, SHARD_TILES - 1, SHARD_TILES, len(grid) - 1):
        np.testing.assert_array_equal(lazy[i].compute(scheduler="threads"), slide.read(grid.box(i), (20, 20)))
    with pytest.raises(StoreError, match="names no slide"):
        store.dask()


def test_put_needs_all_tiles(store: PatchStore) -> None:
    store.put("attention", np.arange(720, dtype=np.float32))
    assert store.missing("attention") == [] and store.get("attention")[700] == 700
    with pytest.raises(StoreError, match="720 tiles, not 3"):
        store.put("attention", np.zeros(3, np.float32))


@pytest.mark.parametrize("pixels", KINDS)
def test_an_empty_grid(tmp_path: Path, grid: TileGrid, pixels: str) -> None:
    nothing = grid.keep(np.zeros(len(grid), bool))
    store = PatchStore.create(tmp_path / "none.zarr", nothing, ARRAYS, pixels=pixels, attributes={"slide_path": "a"})
    assert PatchStore.open(store.path).missing() == [] and store.get("probabilities").shape == (0, 2)
    assert store.get("unreadable").shape == (0,) and list(store.batches(10)) == []
    assert store.dask(ArraySlide(picture(64, 64))).compute(scheduler="sync").shape == (0, 50, 50, 3)


class TestUnreadable:
    """NaN is null, where the store says why."""

    def test_none_at_first_and_no_file_is_asked_for(self, store: PatchStore) -> None:
        assert not store.get("unreadable").any() and store.get("unreadable").dtype == bool
        for shard in store.missing():
            store.write(shard, values(store, shard))
        assert store.missing() == [] and not (store.path / "unreadable/c").exists()

    def test_null_is_taken_there_and_only_there(self, store: PatchStore) -> None:
        part = values(store, 1)
        for name in ("features", "probabilities", "attention"):
            part[name][[3, 200]] = np.nan
        with pytest.raises(StoreError, match="not finite"):
            store.write(1, part)
        for wrong in ([3], [], [3, 201]):
            unreadable = np.zeros(256, bool)
            unreadable[wrong] = True
            copy = PatchStore.create(store.path.with_name(f"{wrong}.zarr"), store.grid, ARRAYS, pixels="zstd")
            with pytest.raises(StoreError, match="not finite"):
                copy.write(1, {**part, "unreadable": unreadable})
        unreadable = np.zeros(256, bool)
        unreadable[[3, 200]] = True
        store.write(1, {**part, "unreadable": unreadable})
        again = PatchStore.open(store.path)
        np.testing.assert_array_equal(np.flatnonzero(again.get("unreadable")), [256 + 3, 256 + 200])
        assert 1 not in again.missing()
        raw = zarr.open_group(str(store.path), mode="r")
        for name in ("features", "probabilities", "attention"):
            np.testing.assert_array_equal(np.asarray(raw[name][256:512]), part[name])  # type: ignore[index]
        expected = np.where(unreadable[:, None, None, None], 255, part["pixels"])
        np.testing.assert_array_equal(again.read(range(256, 512)), expected)
        np.testing.assert_array_equal(np.asarray(raw["pixels"][256:512]), expected)  # type: ignore[index]

    def test_it_stays_and_infinity_is_no_null(self, store: PatchStore) -> None:
        first, second = np.zeros(256, bool), np.zeros(256, bool)
        first[1] = second[2] = True
        store.write(0, {"unreadable": first})
        store.write(0, {"unreadable": second})
        np.testing.assert_array_equal(np.flatnonzero(store.get("unreadable")), [1, 2])
        attention = np.zeros(256, np.float32)
        attention[1] = np.nan
        store.write(0, {"attention": attention})
        attention[1] = np.inf
        with pytest.raises(StoreError, match="not finite"):
            store.write(0, {"attention": attention})
        with pytest.raises(StoreError, match="takes"):
            store.write(0, {"unreadable": np.zeros(3, bool)})

    def test_attention_of_all_tiles_at_once(self, store: PatchStore) -> None:
        unreadable = np.zeros(208, bool)
        unreadable[7] = True
        store.write(2, {"unreadable": unreadable})
        attention = np.zeros(720, np.float32)
        attention[512 + 7] = np.nan
        store.put("attention", attention)
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(store.get("attention"))), [512 + 7])


class TestResume:
    def again(self, store: PatchStore, **changes: object) -> PatchStore:
        arguments: dict = {"arrays": ARRAYS, "pixels": "zstd", "attributes": {"slide": "a"}, "grid": store.grid}
        return PatchStore.resume(store.path, **(arguments | changes))

    def test_the_same_is_opened_and_another_is_made(self, store: PatchStore) -> None:
        store.write(0, values(store, 0))
        assert self.again(store).missing() == [1, 2]
        made = PatchStore.resume(store.path.with_name("b.zarr"), store.grid, {}, attributes={})
        assert made.pixels == "none" and made.arrays == ["unreadable"]

    def test_another_is_refused_and_named(self, store: PatchStore) -> None:
        with pytest.raises(ConfigMismatch, match=r"pixels: zstd"):
            self.again(store, pixels="jpeg")
        with pytest.raises(ConfigMismatch, match="attention"):
            self.again(store, arrays={"features": ARRAYS["features"]})
        with pytest.raises(ConfigMismatch, match=r'slide \("a", now "b"\)'):
            self.again(store, attributes={"slide": "b"})
        with pytest.raises(StoreError, match="other tiles"):
            self.again(store, grid=store.grid.keep(np.arange(700)))
        finer = TileGrid.cover((3000, 2400), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=100)
        np.testing.assert_array_equal(finer.boxes(), store.grid.boxes())
        with pytest.raises(StoreError, match="other tiles"):
            self.again(store, grid=finer)


class TestRefuses:
    def test_wrong_values(self, store: PatchStore) -> None:
        good = values(store, 0)
        with pytest.raises(StoreError, match="takes"):
            store.write(0, {"features": good["features"][:5]})
        with pytest.raises(StoreError, match="holds no 'scores'"):
            store.write(0, {"scores": good["features"]})
        with pytest.raises(StoreError, match="not finite"):
            store.write(0, {"attention": np.full(256, np.nan, np.float32)})
        with pytest.raises(StoreError, match="not finite as float16"):
            store.write(0, {"features": np.full((256, 5), 1e6, np.float32)})
        assert store.missing() == [0, 1, 2]

    def test_what_is_no_store(self, store: PatchStore, tmp_path: Path, grid: TileGrid) -> None:
        with pytest.raises(StoreError, match="there is no patch store"):
            PatchStore.open(tmp_path / "nothing.zarr")
        assert not (tmp_path / "nothing.zarr").exists()
        with pytest.raises(StoreError, match="is there already"):
            PatchStore.create(store.path, grid, ARRAYS)
        with pytest.raises(StoreError, match="there is no such choice"):
            PatchStore.create(tmp_path / "b.zarr", grid, ARRAYS, pixels="gif")
        assert not (tmp_path / "b.zarr").exists()
        zarr.create_group(str(tmp_path / "other.zarr"))
        with pytest.raises(StoreError, match="damaged or no patch store"):
            PatchStore.open(tmp_path / "other.zarr")
        (store.path / "zarr.json").write_text("{")
        with pytest.raises(StoreError, match="damaged"):
            PatchStore.open(store.path)

    def test_another_layout(self, store: PatchStore) -> None:
        path = store.path / "zarr.json"
        path.write_text(path.read_text().replace('"layout": 2', '"layout": 1'))
        with pytest.raises(StoreError, match="has layout 1, this version reads 2"):
            PatchStore.open(store.path)

    def test_a_damaged_shard_counts_as_missing_and_gives_no_pixels(self, store: PatchStore) -> None:
        for shard in range(3):
            store.write(shard, values(store, shard))
        path = store.path / "pixels/c/1/0/0/0"
        raw = bytearray(path.read_bytes())
        raw[-200:] = bytes(200)  # the shard's index, which carries a checksum
        path.write_bytes(raw)
        again = PatchStore.open(store.path)
        assert again.missing() == [1]
        with pytest.raises(StoreError, match=r"shards \[1\] are missing"):
            again.get("pixels")
        with pytest.raises(StoreError, match="index does not fit"):
            again.read([300])
        again.write(1, values(store, 1))
        np.testing.assert_array_equal(again.read([300])[0], values(store, 1)["pixels"][300 - 256])


def test_creation_leaves_nothing_half_made(tmp_path: Path, grid: TileGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        PatchStore.create(tmp_path / "store.zarr", grid, ARRAYS)
    assert list(tmp_path.iterdir()) == []


_WRITER = """
import sys, numpy as np
from wsi.store import PatchStore
store = PatchStore.open(sys.argv[1])
print("ready", flush=True)
while True:
    for shard in range(3):
        n = len(store.tiles(shard))
        store.write(shard, {"features": np.full((n, 5), shard + 1, np.float16)})
        print(shard, flush=True)
"""


def test_a_kill_leaves_whole_shards_only(store: PatchStore) -> None:
    """SIGKILL at no particular moment, five times: every file that is there is whole and right."""
    for kill_after in (0, 1, 2, 4, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(store.path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert process.stdout is not None
        for _ in range(1 + kill_after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        again = PatchStore.open(store.path)
        there = sorted({0, 1, 2} - set(again.missing("features")))
        assert there == list(range(min(3, len(there)))) and len(there) >= min(3, kill_after)
        raw = zarr.open_group(str(store.path), mode="r")["features"]
        for shard in there:
            tiles = again.tiles(shard)
            assert (np.asarray(raw[tiles.start : tiles.stop]) == shard + 1).all()  # type: ignore[index]


def test_dask_reads_through_in_other_processes(tmp_path: Path, data_dir: Path) -> None:
    with open_slide(data_dir / "wsi/aperio/CMU-1-Small-Region.svs") as slide:
        assert isinstance(slide, Slide)
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=1.0, tile_px=64)
        store = PatchStore.create(tmp_path / "s.zarr", grid, {"attention": ((), "float32")})
        mean = store.dask(slide).mean().compute(scheduler="processes", num_workers=1)
        expected = np.mean([slide.read(grid.box(i), (64, 64)).mean() for i in range(len(grid))])
        assert mean == pytest.approx(expected, abs=1e-6)
