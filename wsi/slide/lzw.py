"""LZW whose every code is known before imagecodecs decodes it.

imagecodecs (2026.3.6) keeps the table of codes in memory that nobody cleared, and takes any code after a Clear: one
that stands for no byte is looked up in what an earlier tile left there. The pixels then differ from one reading to the
next, or the process dies. So tifffile, and tiffslide through it, decode by ``decode`` once this module is imported.
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
#: Codes that imagecodecs takes between one Clear and the next.
_MOST_CODES = 5120 - 258 + 1
#: Of the compressed stream for each Clear; a table is full after 5 KB. More of them cost time and nothing else.
_LEAST_BYTES_PER_CLEAR = 256


def check_lzw(data: bytes) -> None:
    """Refuse a stream in which a code that stands for no byte comes first after a Clear.

    All other codes are compared with the table by whoever decodes. Codes are as TIFF 6.0, section 13 has them, or in
    the order of bits of older writers (those begin with 0).

    Raises
    ------
    ValueError

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
    # The four bytes from each place on as a number: a code has at most 12 bits, and begins within the first.
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
        for n in (32, _MOST_CODES):  # hostile streams clear after each code
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
    """Where codes after a Clear begin, in bits from the first, and how wide they are: by what the table then holds."""
    known = np.maximum(257 + np.arange(_MOST_CODES), 258)
    widths = 9 + np.searchsorted(np.array([511, 1023, 2047]) + late, known, side="right")
    return np.cumsum(widths) - widths, widths


#: By order of bits; older writers make codes wider one code later.
_LAYOUTS = (_layout(0), _layout(1))


def decode(data: Any, *args: Any, **options: Any) -> Any:
    """Decode as ``imagecodecs.lzw_decode`` does what ``check_lzw`` has nothing against."""
    check_lzw(bytes(data))
    return imagecodecs.lzw_decode(data, *args, **options)


class _Decompressors(dict[int, Callable[..., Any]]):
    """Decoders that are not tifffile's own, and by their key its own."""

    others = tifffile.TIFF.DECOMPRESSORS

    def __missing__(self, compression: int) -> Callable[..., Any]:
        return self.others[compression]


tifffile.TIFF.DECOMPRESSORS = _Decompressors({5: decode})
