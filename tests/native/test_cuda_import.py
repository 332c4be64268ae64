"""The CUDA module where it was built: imports with no GPU, and says how many there are."""

from __future__ import annotations

import numpy as np
import pytest

from wsi import native


def test_devices_are_counted_without_a_driver_too():
    assert native.cuda_devices() >= 0


@pytest.mark.skipif(native.cuda is None, reason="installed without a CUDA compiler")
def test_every_stain_kernel_has_its_twin_on_the_gpu():
    maps = {f"{name}{kind}" for name in ("od_map", "sparse_map", "lab_map") for kind in ("", "_tensor")}
    assert maps <= set(dir(native.cuda)) and maps <= set(native.__all__)


@pytest.mark.skipif(native.cuda is None, reason="installed without a CUDA compiler")
def test_arrays_of_the_cpu_are_refused():
    rgb = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(TypeError):
        native.cuda.od_map(rgb, np.zeros((3, 256, 4), np.float32), 0.0, rgb.copy(), 0)
