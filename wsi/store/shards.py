"""Zarr shards as files: written whole, read chunk by chunk.

A ``sharding_indexed`` shard is its chunks, an index and the index's CRC-32C. The index is the offset and length of each
chunk, uint64 little-endian; both are 2**64 - 1 for an absent chunk. Source: Zarr v3 specification, codec
``sharding_indexed`` version 1.0, index at the end.

Zarr itself reads the index again for every patch. Here it is read once, and then each patch, or a group of neighbours,
takes one ``pread``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from wsi.errors import StoreError
from wsi.files import coalesce, replacing

MISSING_REMEDY = "Run the same command again; where the slide is done already, with --force"

_ABSENT = 2**64 - 1
_CRC_BYTES = 4

#: Chunks closer than this many bytes are read together, up to so many bytes per read.
_GAP_BYTES, _RUN_BYTES = 1 << 14, 1 << 23

#: Files open at once, of all stores together; a process is often limited to 1024.
_OPEN_FILES = 256


def write_shard(path: str | os.PathLike[str], chunks: Sequence[bytes | None], n_chunks: int) -> None:
    """Write a whole shard of `n_chunks` encoded chunks. None, and chunks beyond the end, read as the fill value.

    If it cannot be written (OSError), an earlier shard stays as it was.
    """
    index = np.full((n_chunks, 2), _ABSENT, "<u8")
    there = [i for i, chunk in enumerate(chunks) if chunk is not None]
    present = [chunk for chunk in chunks if chunk is not None]
    lengths = np.fromiter(map(len, present), np.uint64, len(present))
    index[there, 0] = np.cumsum(lengths) - lengths
    index[there, 1] = lengths
    raw = index.tobytes()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as file:  # a power cut may shorten it, which the index shows
        file.write(b"".join([*present, raw, google_crc32c.value(raw).to_bytes(_CRC_BYTES, "little")]))


class ShardFile:
    """An open shard. Raises StoreError if it is missing, or its index is cut short or damaged.

    The file is closed with the last reference, so that no thread can close a file that another is reading.
    """

    def __init__(self, path: str, n_chunks: int) -> None:
        self._path = path
        self._close = os.close  # `os` may be gone at interpreter exit
        try:
            self._file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreError(path, "this shard is missing", MISSING_REMEDY) from error
        tail = n_chunks * 16 + _CRC_BYTES
        start = os.fstat(self._file).st_size - tail
        raw = os.pread(self._file, tail, start) if start >= 0 else b""
        if len(raw) < tail or google_crc32c.value(raw[:-_CRC_BYTES]) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
            raise self._damaged("its index does not fit its checksum")
        self.index: npt.NDArray[np.uint64] = np.frombuffer(raw[:-_CRC_BYTES], "<u8").reshape(n_chunks, 2)
        there = self.index[self.index[:, 0] != _ABSENT]
        if (there > start).any() or (there.sum(axis=1) > start).any():
            raise self._damaged("its index points outside")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._close(self._file)

    def _damaged(self, how: str) -> StoreError:
        return StoreError(self._path, f"is damaged: {how}", "Run the same command again: damaged shards are made anew")

    def chunks(self, positions: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview | None]]:
        """For each (position in the shard, mark) yield (mark, bytes), in the file's order; None if absent."""
        spans = []
        for position, mark in positions:
            offset, length = self.index[position].tolist()
            if offset == _ABSENT:
                yield mark, None
            else:
                spans.append((offset, length, mark))
        spans.sort()
        for run in coalesce(spans, _GAP_BYTES, _RUN_BYTES):
            start = run[0][0]
            stop = max(offset + length for offset, length, _ in run)
            data = memoryview(os.pread(self._file, stop - start, start))
            if len(data) < stop - start:
                raise self._damaged("it is cut short")
            for offset, length, mark in run:
                yield mark, data[offset - start : offset - start + length]


class ShardReader:
    """Reads chunks, in any order, of an array in `folder` that is sharded along the first of `ndim` axes.

    It may be used from many threads and after a fork. `n_chunks` is the number of chunks in a shard.
    """

    def __init__(self, folder: str | os.PathLike[str], ndim: int, n_chunks: int) -> None:
        self.n_chunks = n_chunks
        self._before, self._after = f"{os.fspath(folder)}/c/", "/0" * (ndim - 1)
        self._generation = 0

    def path(self, shard: int) -> str:
        """Return a shard's path: Zarr's default chunk keys."""
        return f"{self._before}{shard}{self._after}"

    def forget(self) -> None:
        """Reopen files at the next read; to be called after writing."""
        self._generation += 1

    def is_whole(self, shard: int) -> bool:
        """Whether a shard exists, with a valid index."""
        try:
            ShardFile(self.path(shard), self.n_chunks)
        except StoreError:
            return False
        return True

    def chunks(self, rows: Sequence[int]) -> Iterator[tuple[int, memoryview | None]]:
        """Yield (i, bytes of chunk ``rows[i]``) for each i, in the order that reads fastest; None if absent."""
        order = range(len(rows)) if len(rows) == 1 else sorted(range(len(rows)), key=rows.__getitem__)
        for shard, marks in groupby(order, key=lambda i: rows[i] // self.n_chunks):
            file = _open(self, self._generation, shard)
            yield from file.chunks((rows[i] % self.n_chunks, i) for i in marks)


@lru_cache(maxsize=_OPEN_FILES)
def _open(reader: ShardReader, generation: int, shard: int) -> ShardFile:
    return ShardFile(reader.path(shard), reader.n_chunks)
