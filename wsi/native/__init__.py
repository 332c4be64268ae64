"""The compiled kernels, and the NumPy twin that specifies each of them.

``area_average`` is the compiled function where the package was built with a C++ compiler and the
twin otherwise; both give the same bytes. ``HAVE_CPU`` says which.
"""

from __future__ import annotations

from wsi.native import twin

try:
    from wsi.native import _cpu

    HAVE_CPU = True
    area_average = _cpu.area_average
except ImportError:  # installed without a compiler
    HAVE_CPU = False
    area_average = twin.area_average

FIXED_POINT_BITS = twin.FIXED_POINT_BITS
MAX_CELL_PX = twin.MAX_CELL_PX

__all__ = ["FIXED_POINT_BITS", "HAVE_CPU", "MAX_CELL_PX", "area_average"]
