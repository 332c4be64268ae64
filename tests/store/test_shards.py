"""Shard files: byte for byte Zarr's, whole or not there, and read in any order."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec

from wsi.errors import StoreError
from wsi.store import shards
from wsi.store.shards import ShardFile, ShardReader, write_shard


def raw_array(folder: Path, n: int, per_shard: int) -> zarr.Array:
    """An array of n chunks of 7 uncompressed bytes, sharded along the first axis."""
    made: zarr.Array = zarr.create_array(
        folder, shape=(n, 7), dtype="uint8", chunks=(1, 7), shards=(per_shard, 7), serializer=BytesCodec(),
        compressors=None, fill_value=255,
    )  # fmt: skip
    return made


def test_a_full_shard_is_byte_for_byte_what_zarr_writes(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (16, 7), np.uint8)
    raw_array(tmp_path / "zarr", 16, 16)[:] = rows
    write_shard(tmp_path / "ours", [row.tobytes() for row in rows], 16)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "zarr/c/0/0").read_bytes()


@given(
    occupied=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_any_occupancy_reads_as_zarr_reads_it(occupied: list[list[bool]], order: object) -> None:
    """Chunks that are not there are the fill value, in Zarr and (as None) here, in any order of rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a"
        n = 8 * len(occupied)
        array = raw_array(folder, n, 8)
        rows = np.arange(n * 7, dtype=np.uint8).reshape(n, 7)
        there = np.array(occupied).reshape(-1)
        for shard, flags in enumerate(occupied):
            chunks = [rows[shard * 8 + i].tobytes() if flag else None for i, flag in enumerate(flags)]
            write_shard(folder / f"c/{shard}/0", chunks, 8)
        expected = np.where(there[:, None], rows, 255)
        np.testing.assert_array_equal(array[:], expected)
        asked = [*range(n), *range(0, n, 3)]
        order.shuffle(asked)  # type: ignore[attr-defined]
        read = dict(ShardReader(folder, 2, 8).chunks(asked))
        assert sorted(read) == list(range(len(asked)))
        for i, row in enumerate(asked):
            assert (None if read[i] is None else bytes(read[i])) == (rows[row].tobytes() if there[row] else None)


def test_shards_written_by_zarr_are_read(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, 255, (21, 7), np.uint8)
    rows[[3, 9, 20]] = 255  # of fill values: Zarr leaves them out
    raw_array(tmp_path / "a", 21, 8)[:] = rows
    read = dict(ShardReader(tmp_path / "a", 2, 8).chunks(list(range(21))))
    assert read[3] is None
    for i in set(range(21)) - {3, 9, 20}:
        assert bytes(read[i]) == rows[i].tobytes()  # type: ignore[arg-type]


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [bytes([i]) * 5000 for i in range(64)]
    write_shard(tmp_path / "c/0/0", chunks, 64)
    reader, pread, lengths = ShardReader(tmp_path, 2, 64), os.pread, []

    def counting(file: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", counting)
    index_bytes = 64 * 16 + 4
    for rows, reads in (
        ([7], [index_bytes, 5000]),
        ([7], [5000]),  # the index is known
        (list(range(63, -1, -1)), [64 * 5000]),
        ([0, 2, 4], [5 * 5000]),  # what lies between costs less than another read
        ([0, 63, 1], [2 * 5000, 5000]),
        ([5, 5], [5000]),
    ):
        lengths.clear()
        read = dict(reader.chunks(rows))
        assert lengths == reads
        assert [bytes(read[i]) for i in range(len(rows))] == [chunks[row] for row in rows]  # type: ignore[arg-type]
    monkeypatch.setattr(shards, "_RUN_BYTES", 20_000)
    lengths.clear()
    assert len(dict(reader.chunks(range(64)))) == 64
    assert max(lengths) == 20_000 and len(lengths) == 16


def test_nothing_lies_under_the_name_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c/0/0"
    write_shard(path, [b"old"], 4)

    def full(source: Path, target: object) -> None:
        assert Path(target) == path and ShardFile(str(source), 4).index[0, 1] == 8  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, [b"newer..."], 4)
    assert bytes(next(ShardFile(str(path), 4).chunks([(0, 0)]))[1] or b"") == b"old"
    assert [child.name for child in path.parent.iterdir()] == ["0"]


class TestDamage:
    @pytest.fixture
    def shard(self, tmp_path: Path) -> Path:
        write_shard(tmp_path / "c/0/0", [b"abc", None, b"defgh"], 4)
        return tmp_path / "c/0/0"

    def test_every_cut_is_found(self, shard: Path) -> None:
        raw, reader = shard.read_bytes(), ShardReader(shard.parents[2], 2, 4)
        assert reader.is_whole(0) and not reader.is_whole(1)
        for length in range(len(raw)):
            shard.write_bytes(raw[:length])
            assert not reader.is_whole(0), length

    def test_every_bit_of_the_index_counts(self, shard: Path) -> None:
        raw, reader = shard.read_bytes(), ShardReader(shard.parents[2], 2, 4)
        for bit in range(8 * 8, 8 * len(raw)):
            spoilt = bytearray(raw)
            spoilt[bit // 8] ^= 1 << bit % 8
            shard.write_bytes(spoilt)
            assert not reader.is_whole(0), bit

    def test_an_index_that_points_outside(self, shard: Path) -> None:
        import google_crc32c

        for offset, length in ((0, 10**6), (10**6, 1), (2**63, 2**63), (8, 1)):
            index = np.full((4, 2), 2**64 - 1, "<u8")
            index[2] = offset, length
            raw = index.tobytes()
            shard.write_bytes(b"abcdefgh" + raw + google_crc32c.value(raw).to_bytes(4, "little"))
            with pytest.raises(StoreError, match="points outside"):
                ShardFile(str(shard), 4)

    def test_a_shard_that_shrinks_under_the_reader(self, shard: Path) -> None:
        file = ShardFile(str(shard), 4)
        os.truncate(shard, 4)
        with pytest.raises(StoreError, match="cut short"):
            list(file.chunks([(2, 0)]))

    def test_a_missing_shard_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"c/3/0/0: this shard is missing.*--force"):
            list(ShardReader(tmp_path, 3, 4).chunks([13]))


def test_files_are_few_and_no_thread_loses_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards than may be open, from four threads at once: every chunk is its own, and files close."""
    n_shards, per_shard = 300, 4
    for shard in range(n_shards):
        write_shard(tmp_path / f"c/{shard}", [b"%d %d" % (shard, i) for i in range(per_shard)], per_shard)
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(file := real_open(*a, **k)) or file)
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or real_close(file))
    reader, wrong = ShardReader(tmp_path, 1, per_shard), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            rows = rng.integers(0, n_shards * per_shard, 9).tolist()
            wrong.extend(
                row
                for i, chunk in reader.chunks(rows)
                if bytes(chunk or b"") != b"%d %d" % divmod(row := rows[i], per_shard)
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    gc.collect()
    assert not wrong and len(opened) > 256 and len(opened) - len(closed) <= 256
    shards._open.cache_clear()
    gc.collect()
    assert len(opened) == len(closed)
