"""Transforms on a GPU: device arrays of any library that speaks DLPack, queued on its stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.errors import StainError
from wsi.stain.statistics import LabStatistics
from wsi.stain.transform import StainTransform, levels


class DeviceStain:
    """A transform whose tables lie on a GPU.

    Parameters
    ----------
    transform : StainTransform
    upload : callable
        Puts a NumPy array on the current device, such as ``lambda a: torch.from_numpy(a).cuda()`` or ``cupy.asarray``.

    Raises
    ------
    StainError
        The package was built without a CUDA compiler.

    Notes
    -----
    Results are those of ``StainTransform`` bit for bit. Nothing waits for the device: arrays must stay alive until
    the stream has come to them.

    Examples
    --------
    >>> stain = DeviceStain(transform, lambda a: torch.from_numpy(a).cuda())           # doctest: +SKIP
    >>> stain.apply(tiles, out, stream=torch.cuda.current_stream().cuda_stream)        # doctest: +SKIP
    """

    def __init__(self, transform: StainTransform, upload: Callable[[npt.NDArray[Any]], Any]) -> None:
        if native.cuda is None:
            raise StainError("GPU", "wsi was built without a CUDA compiler", "Install again with nvcc on the PATH")
        is_lab = isinstance(transform.source, LabStatistics)
        self._map = native.cuda.lab_map if is_lab else native.cuda.od_map
        self._map_planes = native.cuda.lab_map_planes if is_lab else native.cuda.od_map_planes
        self._arguments = [upload(a) if isinstance(a, np.ndarray) else a for a in transform.arguments]
        self._upload = upload
        self._levels: dict[Any, Any] = {}

    def apply(self, rgb: Any, out: Any, *, stream: int) -> None:
        """Queue ``StainTransform.apply``: uint8 (..., 3) device arrays, C-contiguous, not overlapping."""
        self._map(rgb, *self._arguments, out, stream)

    def planes(
        self, rgb: Any, mean: tuple[float, ...], std: tuple[float, ...], out: Any, *, dtype: str, stream: int
    ) -> None:
        """Queue ``StainTransform.planes``: uint8 (n, h, w, 3) to (n, 3, h, w) of `dtype`."""
        key = (tuple(mean), tuple(std), dtype)
        if key not in self._levels:
            self._levels[key] = self._upload(levels(mean, std, dtype))
        self._map_planes(rgb, *self._arguments, self._levels[key], out, stream)
