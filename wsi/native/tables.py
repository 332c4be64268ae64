"""From bytes to a network's input: the table that the ``..._tensor`` kernels end with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import StainError

_BF16_ROUND = np.uint32(0x7FFF)


@lru_cache(maxsize=64)
def levels(mean: tuple[float, ...], std: tuple[float, ...], dtype: str = "float32") -> npt.NDArray[Any]:
    """Make the table from bytes to a network's input, (3, 256): ``(value / 255 - mean) / std``.

    Computed in float64 and rounded (to bfloat16 by way of float32). bfloat16, which NumPy has not, comes as the bits in
    uint16. Read-only.

    Raises
    ------
    StainError
        Not three finite numbers each, a deviation that is not positive, or another dtype.

    Examples
    --------
    >>> levels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[0, [0, 255]].tolist()
    [-1.0, 1.0]
    """
    m, s = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if m.shape != (3,) or s.shape != (3,) or not (np.isfinite(m).all() and np.isfinite(s).all() and (s > 0).all()):
        raise StainError("mean and std", "must be three finite numbers each, std positive")
    table = (np.arange(256) / 255 - m[:, None]) / s[:, None]
    if dtype == "bfloat16":
        bits = table.astype(np.float32).view(np.uint32)
        table = ((bits + _BF16_ROUND + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    elif dtype in ("float32", "float16"):
        table = table.astype(dtype)
    else:
        raise StainError(f"dtype={dtype}", "is not float32, float16 or bfloat16")
    table.flags.writeable = False
    return table
