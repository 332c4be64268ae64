"""The compiled kernels, and the NumPy twin that specifies each of them.

Each function here is the compiled one where the package was built with a C++ compiler and the twin
otherwise; both give the same bytes (``winograd``: the same but for rounding). ``HAVE_CPU`` says which.

``cuda`` holds the same kernels for device arrays where the package was built with a CUDA compiler, else None.
It imports without a GPU or a driver; whether there is a device is asked by ``cuda_devices()`` and not at
import, because a process that has asked can no longer be forked safely.
"""

from __future__ import annotations

from types import ModuleType

from wsi.native.tables import levels
from wsi.native.twin import FIXED_POINT_BITS, LAB_CODES, MAX_CELL_PX

try:
    from wsi.native._cpu import (
        area_average,
        lab_map,
        lab_map_tensor,
        od_map,
        od_map_tensor,
        sparse_map,
        sparse_map_tensor,
        winograd,
        winograd_instructions,
    )

    HAVE_CPU = True
except ImportError:  # installed without a compiler
    from wsi.native.twin import (
        area_average,
        lab_map,
        lab_map_tensor,
        od_map,
        od_map_tensor,
        sparse_map,
        sparse_map_tensor,
        winograd,
        winograd_instructions,
    )

    HAVE_CPU = False

cuda: ModuleType | None
try:
    from wsi.native import _cuda as cuda
except ImportError:  # installed without a CUDA compiler
    cuda = None

__all__ = [
    "FIXED_POINT_BITS", "HAVE_CPU", "LAB_CODES", "MAX_CELL_PX", "area_average", "cuda", "cuda_devices",
    "lab_map", "lab_map_tensor", "levels", "od_map", "od_map_tensor", "sparse_map", "sparse_map_tensor",
    "winograd", "winograd_instructions",
]  # fmt: skip


def cuda_devices() -> int:
    """Return how many GPUs the CUDA kernels can run on; 0 where they were not built or no driver is there.

    Examples
    --------
    >>> cuda_devices() >= 0
    True
    """
    return int(cuda.device_count()) if cuda is not None else 0
