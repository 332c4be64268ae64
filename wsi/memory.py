"""Memory of a process that does one batch after another."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next (glibc; elsewhere nothing happens).

    The activations of a batch of images are larger than what glibc keeps: each layer takes its output from the system,
    which fills it with zeros page by page, and gives it back. Of efficientnet_b0's time on a CPU that was more than
    half. The price: the process stays as large as it was at its largest, and where pieces of many sizes come and go,
    as in TransMIL, that may be twice what it holds. To be called before there are threads: they get no heaps of their
    own, which could not grow beyond 64 MiB.

    Returns
    -------
    bool
        Whether the C library took it.

    References
    ----------
    mallopt(3): M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD.

    Examples
    --------
    >>> keep_freed_memory()                                                # doctest: +SKIP
    True
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return mallopt is not None and all(mallopt(which, value) for which, value in settings)
