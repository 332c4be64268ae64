"""Kept patches: every kind written and read here, and the same by Zarr; any order, any thread, any process."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from tests.slide.make import section
from wsi.errors import StoreError
from wsi.grid import TileGrid
from wsi.store import SHARD_TILES, PatchStore
from wsi.store.codec import JpegCodec
from wsi.units import Mpp

SIDE, N = 24, 600
U8 = np.ndarray


def patches() -> U8:
    """N patches of tissue and glass, no two alike, uint8 (N, SIDE, SIDE, 3)."""
    big = section(30 * SIDE, 20 * SIDE)
    cut = big.reshape(20, SIDE, 30, SIDE, 3).swapaxes(1, 2).reshape(N, SIDE, SIDE, 3).copy()
    cut[:, 0, 0] = np.arange(N * 3).reshape(N, 3) % 251
    return cut


@pytest.fixture(scope="module")
def grid() -> TileGrid:
    return TileGrid.cover((30 * SIDE, 20 * SIDE), slide_mpp=Mpp(1, 1), mpp=1.0, tile_px=SIDE)


@pytest.fixture(scope="module", params=["zstd", "jpeg"])
def store(request: pytest.FixtureRequest, grid: TileGrid, tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    made = PatchStore.create(tmp_path_factory.mktemp("s") / "s.zarr", grid, {}, pixels=request.param)
    for shard in made.missing():
        made.write(shard, {"pixels": patches()[made.tiles(shard).start : made.tiles(shard).stop]})
    return made


def with_zarr(store: PatchStore) -> U8:
    array = zarr.open_group(str(store.path), mode="r", zarr_format=3)["pixels"]
    return np.asarray(array[:])  # type: ignore[index]


def test_what_is_kept(store: PatchStore) -> None:
    read = store.get("pixels")
    if store.pixels == "zstd":
        np.testing.assert_array_equal(read, patches())
    else:
        assert 0 < np.abs(read.astype(int) - patches()).mean() < 8
    np.testing.assert_array_equal(read, with_zarr(store))
    np.testing.assert_array_equal(np.concatenate(list(store.batches(77))), read)
    np.testing.assert_array_equal(store.dask().compute(scheduler="threads"), read)


def test_shards_are_those_that_zarr_would_write(store: PatchStore, tmp_path: Path) -> None:
    """A full shard byte for byte; in the last one Zarr also encodes what lies beyond the array's end."""
    kind = (
        {"serializer": JpegCodec(), "compressors": None}
        if store.pixels == "jpeg"
        else {"compressors": ZstdCodec(level=1)}
    )
    array = zarr.create_array(
        tmp_path / "a", shape=(N, SIDE, SIDE, 3), dtype="uint8", chunks=(1, SIDE, SIDE, 3),
        shards=(SHARD_TILES, SIDE, SIDE, 3), fill_value=255, config={"write_empty_chunks": True}, **kind,
    )  # fmt: skip
    array[:] = patches()
    for shard in (0, 1):
        assert (store.path / f"pixels/c/{shard}/0/0/0").read_bytes() == (tmp_path / f"a/c/{shard}/0/0/0").read_bytes()
    shutil.copytree(store.path, tmp_path / "s.zarr")
    for shard in (0, 1, 2):
        shutil.copy(tmp_path / f"a/c/{shard}/0/0/0", tmp_path / f"s.zarr/pixels/c/{shard}/0/0/0")
    np.testing.assert_array_equal(PatchStore.open(tmp_path / "s.zarr").get("pixels"), store.get("pixels"))


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, N - 1), max_size=40))
def test_any_rows_in_any_order(store: PatchStore, rows: list[int]) -> None:
    np.testing.assert_array_equal(store.read(rows), store.get("pixels")[np.array(rows, int)])


def test_shuffled_one_by_one(store: PatchStore) -> None:
    everything, order = store.get("pixels"), list(range(N))
    random.Random(0).shuffle(order)
    out = np.empty((1, SIDE, SIDE, 3), np.uint8)
    for row in order:
        assert store.read([row], out) is out
        np.testing.assert_array_equal(out[0], everything[row])


@pytest.mark.parametrize("rows", [range(5, 90, 7), np.array([3, 2], np.int32), np.array([4], np.uint8), (1, 1), []])
def test_kinds_of_rows(store: PatchStore, rows: object) -> None:
    read = store.read(rows)  # type: ignore[arg-type]
    np.testing.assert_array_equal(read, store.get("pixels")[np.asarray(rows, int)])


def test_out_is_filled_in_place(store: PatchStore) -> None:
    big = np.zeros((5, SIDE, SIDE, 3), np.uint8)
    assert store.read([9, 400, 8], big[1:4]).base is big
    np.testing.assert_array_equal(big[1:4], store.get("pixels")[[9, 400, 8]])
    assert not big[[0, 4]].any()
    frozen = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    frozen.flags.writeable = False
    for wrong in (big, big[:2].astype(np.int16), np.zeros((2, SIDE, 2 * SIDE, 3), np.uint8)[:, :, ::2]):
        with pytest.raises(ValueError, match="out must be"):
            store.read([1, 2], wrong)
    with pytest.raises(ValueError, match="out must be"):
        store.read([1], frozen)


@pytest.mark.parametrize("rows", [[0, N], [-1], [[1, 2]], [0.0], [float("nan")], ["a"], [True], 7])
def test_rows_that_are_not_there(store: PatchStore, rows: object) -> None:
    with pytest.raises(StoreError, match=r"there is no patch|whole numbers"):
        store.read(rows)  # type: ignore[arg-type]


def test_many_threads_read_the_same(store: PatchStore) -> None:
    everything, wrong = store.get("pixels"), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            rows = rng.integers(0, N, 11)
            if not np.array_equal(store.read(rows), everything[rows]):
                wrong.append(seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert not wrong


def _sum(store: PatchStore, rows: list[int]) -> int:
    return int(store.read(rows).sum())


def test_other_processes_read_the_same(store: PatchStore) -> None:
    """As a spawned worker of a training program gets it: pickled."""
    rows = [599, 0, 300]
    assert pickle.loads(pickle.dumps(store)).path == store.path
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum, (store, rows)) == _sum(store, rows)


def test_what_is_written_is_read_at_once(grid: TileGrid, tmp_path: Path) -> None:
    """Files that are open must not hide what was written after."""
    store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
    with pytest.raises(StoreError, match="this shard is missing"):
        store.read([3])
    for grey in (10, 20):
        store.write(0, {"pixels": np.full((256, SIDE, SIDE, 3), grey, np.uint8)})
        assert (store.read([3]) == grey).all()
    shutil.rmtree(store.path)
    other = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
    with pytest.raises(StoreError, match="this shard is missing"):
        other.read([3])


def test_encoding_does_not_depend_on_threads(store: PatchStore) -> None:
    assert store.encode(patches(), threads=4) == store.encode(patches())
    assert store.encode(patches()[::2, ::-1][:3]) == [
        store.encode(patch[None])[0] for patch in patches()[::2, ::-1][:3]
    ]


def test_chunks_that_zarr_left_out_are_white(grid: TileGrid, tmp_path: Path) -> None:
    store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="jpeg")
    store.keep(2, [None] * 50 + store.encode(patches()[:38]))
    assert (store.read(range(512, 562)) == 255).all() and not (store.read([562]) == 255).all()
    np.testing.assert_array_equal(store.read(range(512, 600)), with_zarr(store)[512:])


class TestRefuses:
    def test_what_it_cannot_keep(self, store: PatchStore, grid: TileGrid, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="takes uint8"):
            store.write(0, {"pixels": np.zeros((256, SIDE, SIDE, 3), np.float32)})
        with pytest.raises(StoreError, match="takes uint8"):
            store.encode(np.zeros((2, SIDE, SIDE, 4), np.uint8))
        with pytest.raises(StoreError, match="takes"):
            store.write(0, {"pixels": patches()[:255]})
        with pytest.raises(StoreError, match="takes 256 patches, not 1"):
            store.keep(0, [b""])
        bare = PatchStore.create(tmp_path / "s.zarr", grid, {})
        for call in (lambda: bare.read([0]), lambda: bare.keep(0, []), lambda: bare.encode(patches())):
            with pytest.raises(StoreError, match=r"keeps no pixels|holds no 'pixels'"):
                call()
        with pytest.raises(StoreError, match="keeps no pixels"):
            next(bare.batches(5))

    def test_damaged_patches(self, store: PatchStore, tmp_path: Path) -> None:
        """Cut short, exchanged for junk, of another size: an error that names the patch, and never grey."""
        shutil.copytree(store.path, tmp_path / "s.zarr")
        spoilt = PatchStore.open(tmp_path / "s.zarr")
        chunks: list[bytes | None] = list(store.encode(patches()[:256]))
        small = store.encode(patches()[:1])[0]
        for i, bad in ((5, chunks[5][:-20]), (6, b"junk"), (7, b"")):  # type: ignore[index]
            chunks[i] = bad
        if store.pixels == "zstd":
            import imagecodecs

            chunks[8] = imagecodecs.zstd_encode(bytes(100), 1)
            chunks[9] = imagecodecs.zstd_encode(bytes(SIDE * SIDE * 3 + 1), 1)
        else:
            chunks[8] = small.replace(SIDE.to_bytes(2, "big") * 2, (16).to_bytes(2, "big") * 2)
            chunks[9] = small.replace(SIDE.to_bytes(2, "big") * 2, (32).to_bytes(2, "big") * 2)
        spoilt.keep(0, chunks)
        for row in (5, 6, 7, 8, 9):
            with pytest.raises(StoreError, match=f"patch {row} is damaged"):
                spoilt.read([10, row])
        np.testing.assert_array_equal(spoilt.read([4, 10]), store.read([4, 10]))
