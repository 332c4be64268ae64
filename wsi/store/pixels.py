"""The array of patches: encoded, written a whole shard at a time, read in any order.

Files are the same as Zarr's, but are written and read without it: see ``shards``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from wsi.errors import StoreError
from wsi.store.codec import JpegCodec, decode_jpeg, encode_jpeg
from wsi.store.shards import ShardReader, write_shard

U8 = npt.NDArray[np.uint8]

#: How patches are kept: not at all; lossless; as JPEG; as the slide's own JPEG tiles.
KINDS = ("none", "zstd", "jpeg", "verbatim")
#: Approximate bytes per pixel of H&E tissue.
_BYTES_A_PIXEL = {"none": 0.0, "zstd": 2.4, "jpeg": 0.45, "verbatim": 0.45}

SHARD_TILES = 256
_WHITE = 255  # a patch whose chunk is absent reads as glass
_ZSTD_LEVEL = 1


def check_kind(kind: str) -> None:
    """Raise ``StoreError`` for an unknown way to keep patches."""
    if kind not in KINDS:
        raise StoreError(f"pixels={kind!r}", "there is no such choice", f"Known: {', '.join(KINDS)}")


def pixel_bytes(kind: str, n: int, tile_px: int) -> int:
    """Estimate how many bytes `n` patches of tissue take.

    Examples
    --------
    >>> pixel_bytes("zstd", 1000, 256)
    157286400
    """
    return int(_BYTES_A_PIXEL[kind] * n * tile_px**2)


class Pixels:
    """The kept patches of a store, of kind "zstd", "jpeg" or "verbatim"."""

    def __init__(self, folder: Path, n: int, side: int, kind: str, codec: JpegCodec) -> None:
        self._where = folder
        self._n, self._side = n, side
        self._shards = ShardReader(folder, 4, SHARD_TILES)
        self.is_whole = self._shards.is_whole
        self._encode: Callable[[U8], bytes]
        self._decode: Callable[[memoryview, U8], None]
        if kind == "zstd":
            self._encode, self._decode = _encode_zstd, _decode_zstd
        else:
            self._encode = partial(encode_jpeg, quality=codec.quality, subsampling=codec.subsampling)
            self._decode = decode_jpeg

    @staticmethod
    def create(group: zarr.Group, n: int, side: int, kind: str, codec: JpegCodec) -> None:
        """Make the empty array in a Zarr group."""
        encoding: dict[str, Any] = {"serializer": codec, "compressors": None}
        if kind == "zstd":
            encoding = {"compressors": ZstdCodec(level=_ZSTD_LEVEL)}
        patch = side, side, 3
        group.create_array(
            "pixels", shape=(n, *patch), chunks=(1, *patch), shards=(SHARD_TILES, *patch), dtype="uint8",
            fill_value=_WHITE, **encoding,
        )  # fmt: skip

    def encode(self, rgb: U8, threads: int = 1) -> list[bytes]:
        """Encode patches, uint8 (m, h, w, 3); the bytes do not depend on `threads`."""
        if rgb.shape[1:] != (self._side, self._side, 3) or rgb.dtype != np.uint8:
            what = f"takes uint8 (m, {self._side}, {self._side}, 3), not {rgb.dtype} {rgb.shape}"
            raise StoreError(self._where, what)
        patches = np.ascontiguousarray(rgb)
        if threads == 1:
            return [self._encode(patch) for patch in patches]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, patches))

    def put(self, shard: int, chunks: Sequence[bytes | None]) -> None:
        """Write a whole shard of encoded patches; None reads as white."""
        write_shard(self._shards.path(shard), chunks, SHARD_TILES)
        self._shards.forget()

    def read(
        self, rows: Sequence[int] | npt.NDArray[np.integer], out: U8 | None, is_unreadable: Callable[[int], bool]
    ) -> U8:
        """See ``PatchStore.read``; `is_unreadable` is called for patches that cannot be decoded."""
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise StoreError(self._where, f"rows are whole numbers in one dimension, not {wanted.dtype} {wanted.shape}")
        numbers: list[int] = wanted.tolist()
        if numbers and not (min(numbers) >= 0 and max(numbers) < self._n):
            bad = next(row for row in numbers if not 0 <= row < self._n)
            raise StoreError(self._where, f"there is no patch {bad}", f"They are numbered from 0 to {self._n - 1}")
        shape = (len(numbers), self._side, self._side, 3)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be uint8 {shape}, contiguous and writeable; it is {out.dtype} {out.shape}")
        for i, chunk in self._shards.chunks(numbers):
            if chunk is None:
                out[i] = _WHITE
                continue
            try:
                self._decode(chunk, out[i])
            except (ValueError, RuntimeError) as error:
                if is_unreadable(numbers[i]):
                    out[i] = _WHITE
                    continue
                remedy = "Delete the store and run again; if it stays, the slide is damaged there"
                raise StoreError(self._where, f"patch {numbers[i]} is damaged ({error})", remedy) from error
        return out


def _encode_zstd(patch: U8) -> bytes:
    return bytes(imagecodecs.zstd_encode(patch.tobytes(), _ZSTD_LEVEL))


def _decode_zstd(chunk: memoryview, out: U8) -> None:
    decoded = imagecodecs.zstd_decode(chunk, out=out.reshape(-1))  # type: ignore[arg-type]  # it takes any buffer
    if len(decoded) != out.size:
        raise ValueError(f"it holds {len(decoded)} bytes, not {out.size}")
