"""The compiled kernels, and the NumPy twin that specifies each of them.

Each function here is the compiled one where the package was built with a C++ compiler and the twin
otherwise; both give the same bytes. ``HAVE_CPU`` says which.

``cuda`` holds the same kernels for device arrays where the package was built with a CUDA compiler
(``HAVE_CUDA``), else None. It imports without a GPU or a driver; whether there is a device is asked by
``cuda_devices()`` and not at import, because a process that has asked can no longer be forked safely.
"""

from __future__ import annotations

from types import ModuleType

from wsi.native import twin
from wsi.native.tables import levels

try:
    from wsi.native import _cpu

    HAVE_CPU = True
    area_average = _cpu.area_average
    od_map = _cpu.od_map
    od_map_tensor = _cpu.od_map_tensor
    sparse_map = _cpu.sparse_map
    sparse_map_tensor = _cpu.sparse_map_tensor
    lab_map = _cpu.lab_map
    lab_map_tensor = _cpu.lab_map_tensor
except ImportError:  # installed without a compiler
    HAVE_CPU = False
    area_average = twin.area_average
    od_map = twin.od_map
    od_map_tensor = twin.od_map_tensor
    sparse_map = twin.sparse_map
    sparse_map_tensor = twin.sparse_map_tensor
    lab_map = twin.lab_map
    lab_map_tensor = twin.lab_map_tensor

cuda: ModuleType | None
try:
    from wsi.native import _cuda as cuda
except ImportError:  # installed without a CUDA compiler
    cuda = None
HAVE_CUDA = cuda is not None

FIXED_POINT_BITS = twin.FIXED_POINT_BITS
MAX_CELL_PX = twin.MAX_CELL_PX
LAB_CODES = twin.LAB_CODES

__all__ = [
    "FIXED_POINT_BITS",
    "HAVE_CPU",
    "HAVE_CUDA",
    "LAB_CODES",
    "MAX_CELL_PX",
    "area_average",
    "cuda",
    "cuda_devices",
    "lab_map",
    "lab_map_tensor",
    "levels",
    "od_map",
    "od_map_tensor",
    "sparse_map",
    "sparse_map_tensor",
]


def cuda_devices() -> int:
    """Return how many GPUs the CUDA kernels can run on; 0 where they were not built or no driver is there.

    Examples
    --------
    >>> cuda_devices() >= 0
    True
    """
    return int(cuda.device_count()) if cuda is not None else 0
