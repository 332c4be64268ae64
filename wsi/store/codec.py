"""``wsi.jpeg``: the Zarr v3 codec whose chunks are JPEG streams, one RGB picture each.

Zarr finds it by its entry point, so any Zarr v3 program reads these arrays where this package is installed.
A stream need not be one that this codec wrote: grey, 4:2:0, 4:2:2, 4:4:4, and RGB with an Adobe marker
all decode to RGB. A damaged stream is an error, never a grey area.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import simplejpeg
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import JSON, parse_named_configuration

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

U8 = npt.NDArray[np.uint8]

#: Chroma subsampling by the names of the trade, and by those of the library.
SUBSAMPLINGS = {"4:4:4": "444", "4:2:2": "422", "4:2:0": "420"}


def decode_jpeg(stream: bytes | memoryview, out: U8) -> None:
    """Decode a JPEG stream to RGB; bit-identical to libjpeg-turbo's accurate decoding.

    Parameters
    ----------
    stream : bytes-like
        From start to end of image; its tables inside.
    out : uint8 (h, w, 3), contiguous
        Written in place; the picture must be of this size. After an error its content is undefined.

    Raises
    ------
    ValueError
        The stream is cut short or damaged (as far as JPEG, which has no checksum, can tell), or of another size.

    Examples
    --------
    >>> white, out = np.full((8, 8, 3), 255, np.uint8), np.empty((8, 8, 3), np.uint8)
    >>> decode_jpeg(encode_jpeg(white), out)
    >>> bool((out == white).all())
    True
    """
    decoded = simplejpeg.decode_jpeg(stream, buffer=out, strict=True)
    if decoded.shape != out.shape:
        raise ValueError(f"the JPEG holds {decoded.shape}, not {out.shape}")


def encode_jpeg(rgb: U8, quality: int = 90, subsampling: str = "4:2:0") -> bytes:
    """Encode uint8 (h, w, 3), contiguous, to a JPEG stream; the same pixels give the same bytes."""
    encoded: bytes = simplejpeg.encode_jpeg(rgb, quality, "RGB", SUBSAMPLINGS[subsampling])
    return encoded


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """One JPEG stream a chunk; chunks are uint8 (1, h, w, 3).

    Attributes
    ----------
    quality : int
        1 to 100, of chunks that this codec encodes; any stream is decoded.
    subsampling : {"4:2:0", "4:2:2", "4:4:4"}
        Likewise.
    """

    quality: int = 90
    subsampling: str = "4:2:0"

    is_fixed_size = False

    def __post_init__(self) -> None:
        if not (isinstance(self.quality, int) and 1 <= self.quality <= 100):
            raise ValueError(f"JPEG quality is {self.quality!r}, not a whole number from 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"JPEG subsampling is {self.subsampling!r}, not one of {', '.join(SUBSAMPLINGS)}")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Make the codec that an array's metadata ask for."""
        _, configuration = parse_named_configuration(data, "wsi.jpeg", require_configuration=False)
        return cls(**(configuration or {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        """Return what is written into an array's metadata."""
        return {"name": "wsi.jpeg", "configuration": {"quality": self.quality, "subsampling": self.subsampling}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse arrays of anything but 8-bit RGB pictures."""
        if dtype.to_native_dtype() != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"wsi.jpeg holds uint8 (n, h, w, 3), not {dtype} {shape}")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Sizes are known only once encoded."""
        raise NotImplementedError

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(chunk_spec.shape, np.uint8)
        decode_jpeg(chunk_data.to_bytes(), _one_picture(out))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        rgb = np.ascontiguousarray(_one_picture(chunk_data.as_numpy_array()))
        return chunk_spec.prototype.buffer.from_bytes(encode_jpeg(rgb, self.quality, self.subsampling))


def _one_picture(chunk: U8) -> U8:
    if chunk.ndim != 4 or chunk.shape[0] != 1 or chunk.shape[3] != 3:
        raise ValueError(f"wsi.jpeg takes chunks of (1, h, w, 3), not {chunk.shape}")
    picture: U8 = chunk[0]
    return picture
