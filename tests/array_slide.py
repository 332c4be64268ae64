"""A slide made of an array, for tests that need exact pixels and no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.slide.base import Slide
from wsi.units import Box, Mpp


class ArraySlide(Slide):
    """One level in memory: `rgb` uint8 (h, w, 3); `bounds` defaults to all of it."""

    def __init__(self, rgb: npt.NDArray[np.uint8], mpp: float = 0.5, bounds: Box | None = None) -> None:
        assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
        self.rgb = rgb
        self.path, self.reader, self.vendor = "array", "array", "array"
        self.level_sizes = ((rgb.shape[1], rgb.shape[0]),)
        self.mpp, self.mpp_source = Mpp(mpp, mpp), "user"
        self.bounds = bounds or Box(0, 0, *self.size)

    def _read_level(self, level: int, shrink: int, x: int, y: int, w: int, h: int) -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(self.rgb[y : y + h, x : x + w])

    def close(self) -> None:
        pass

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.rgb, self.mpp.x, self.bounds)
