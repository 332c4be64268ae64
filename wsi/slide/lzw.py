"""Check LZW data for undefined codes before imagecodecs decodes it.

imagecodecs (2026.3.6) does not initialise its code table and accepts any code after a Clear. It looks an undefined code
up in what an earlier tile left there: pixels then differ from one read to the next, or the process crashes. Importing
this module makes tifffile, and tiffslide through it, decode LZW by ``decode``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

Array = npt.NDArray[np.int64]

_CLEAR, _END = 256, 257
#: Codes that imagecodecs accepts between two Clears.
_MOST_CODES = 5120 - 258 + 1
#: A stream may have one Clear per this many bytes (a table is full after 5 KB); more only cost time.
_LEAST_BYTES_PER_CLEAR = 256


def check_lzw(data: bytes) -> None:
    """Refuse a stream in which the first code after a Clear is undefined; the decoder checks all other codes itself.

    Codes are as in TIFF 6.0, section 13, or in the bit order of older writers (such streams begin with 0). Raises
    ValueError.

    Examples
    --------
    >>> check_lzw(imagecodecs.lzw_encode(b"any bytes"))
    >>> check_lzw(bytes([0x80, 0x4B, 0x04]))                  # Clear, 300
    Traceback (most recent call last):
    ...
    ValueError: holds LZW data with a code that is not defined
    """
    if len(data) < 2:
        return
    oldest_first = data[0] == 0 and bool(data[1] & 1)  # the lowest bit of a byte comes first
    # The four bytes from each position as a number: a code has at most 12 bits and begins in the first byte.
    words = np.ndarray(len(data), "<u4" if oldest_first else ">u4", data + bytes(3), strides=(1,))
    starts, widths = _LAYOUTS[oldest_first]
    n_bits = 8 * len(data)
    most_clears = 64 + len(data) // _LEAST_BYTES_PER_CLEAR

    def codes(at: int, n: int) -> Array:
        inside = np.searchsorted(starts[:n] + widths[:n], n_bits - at, side="right")
        place, width = at + starts[:inside], widths[:inside]
        shift = place & 7 if oldest_first else 32 - (place & 7) - width
        return np.asarray((words[place >> 3] >> shift) & ((1 << width) - 1), np.int64)

    at, clears = 9, 1
    while True:
        for n in (32, _MOST_CODES):  # a hostile stream may clear after each code
            found = codes(at, n)
            ends = np.flatnonzero((found == _CLEAR) | (found == _END))
            if len(ends) or len(found) < n:
                break
        if len(found) and found[0] > _END:
            raise ValueError("holds LZW data with a code that is not defined")
        if not len(ends) or found[ends[0]] == _END:
            return
        at, clears = at + int(starts[ends[0]] + widths[ends[0]]), clears + 1
        if clears > most_clears:
            raise ValueError(f"holds LZW data of {len(data)} bytes that is cleared more than {most_clears} times")


def _layout(late: int) -> tuple[Array, Array]:
    """Return start (in bits from the first) and width of the codes after a Clear, which depend on the table's size."""
    known = np.maximum(257 + np.arange(_MOST_CODES), 258)
    widths = 9 + np.searchsorted(np.array([511, 1023, 2047]) + late, known, side="right")
    return np.cumsum(widths) - widths, widths


#: By bit order; older writers widen codes one code later.
_LAYOUTS = (_layout(0), _layout(1))


def decode(data: Any, *args: Any, **options: Any) -> Any:
    """Decode as ``imagecodecs.lzw_decode``, after ``check_lzw``."""
    check_lzw(bytes(data))
    return imagecodecs.lzw_decode(data, *args, **options)


class _Decompressors(dict[int, Callable[..., Any]]):
    """Our decoder for some keys, and tifffile's own for all others."""

    others = tifffile.TIFF.DECOMPRESSORS

    def __missing__(self, compression: int) -> Callable[..., Any]:
        return self.others[compression]


tifffile.TIFF.DECOMPRESSORS = _Decompressors({5: decode})
