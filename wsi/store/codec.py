"""``wsi.jpeg``: a Zarr v3 codec whose chunks are JPEG streams of one RGB image each.

Zarr finds it by its entry point, so any Zarr v3 program can read these arrays where this package is installed. It also
decodes streams of other encoders: grey, 4:2:0, 4:2:2, 4:4:4, and RGB with an Adobe marker all become RGB. A damaged
stream is an error, never a grey area.
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

#: Chroma subsampling: the usual name, and simplejpeg's.
SUBSAMPLINGS = {"4:4:4": "444", "4:2:2": "422", "4:2:0": "420"}


def decode_jpeg(stream: bytes | memoryview, out: U8) -> None:
    """Decode a complete JPEG stream into `out`, uint8 (h, w, 3), contiguous; bit-identical to libjpeg-turbo.

    Raises ValueError if the stream is cut short, of another size, or visibly damaged (JPEG has no checksum). Then the
    content of `out` is undefined.

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
    return bytes(simplejpeg.encode_jpeg(rgb, quality, "RGB", SUBSAMPLINGS[subsampling]))


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """One JPEG stream per chunk of uint8 (1, h, w, 3).

    Attributes
    ----------
    quality : int
        1 to 100; for encoding only, like `subsampling`.
    subsampling : {"4:2:0", "4:2:2", "4:4:4"}
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
        """Make the codec from an array's metadata."""
        _, configuration = parse_named_configuration(data, "wsi.jpeg", require_configuration=False)
        return cls(**(configuration or {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        """Return the codec's part of an array's metadata."""
        return {"name": "wsi.jpeg", "configuration": {"quality": self.quality, "subsampling": self.subsampling}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raise ``ValueError`` for arrays of anything but 8-bit RGB images."""
        if dtype.to_native_dtype() != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"wsi.jpeg holds uint8 (n, h, w, 3), not {dtype} {shape}")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Encoded sizes are not known in advance."""
        raise NotImplementedError

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(chunk_spec.shape, np.uint8)
        decode_jpeg(chunk_data.to_bytes(), _image_of(out))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        rgb = np.ascontiguousarray(_image_of(chunk_data.as_numpy_array()))
        return chunk_spec.prototype.buffer.from_bytes(encode_jpeg(rgb, self.quality, self.subsampling))


def _image_of(chunk: U8) -> U8:
    if chunk.ndim != 4 or chunk.shape[0] != 1 or chunk.shape[3] != 3:
        raise ValueError(f"wsi.jpeg takes chunks of (1, h, w, 3), not {chunk.shape}")
    image: U8 = chunk[0]
    return image
