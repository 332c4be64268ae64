"""The GPU's face without a GPU: what it hands to the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.stain.make import two_stains
from wsi import native
from wsi.errors import StainError
from wsi.native import twin
from wsi.stain import METHODS, fit
from wsi.stain.device import DeviceStain

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def streams(monkeypatch):
    """In place of the CUDA module the twins; the streams that came in."""
    seen: list[int] = []

    def queued(kernel):
        def run(*arguments):
            *arguments, stream = arguments
            seen.append(stream)
            kernel(*arguments)

        return run

    names = "od_map", "od_map_planes", "lab_map", "lab_map_planes"
    monkeypatch.setattr(native, "cuda", SimpleNamespace(**{name: queued(getattr(twin, name)) for name in names}))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_kernels_get_tables_and_stream(streams, method):
    transform = fit(method, two_stains(64, 64))
    uploads = []
    on_device = DeviceStain(transform, lambda a: uploads.append(a.shape) or a.copy())
    tiles = two_stains(2 * 9, 7).reshape(2, 9, 7, 3)
    out = np.empty_like(tiles)
    on_device.apply(tiles, out, stream=11)
    np.testing.assert_array_equal(out, transform.apply(tiles))
    planes = np.empty((2, 3, 9, 7), np.float16)
    for _ in range(2):
        on_device.planes(tiles, MEAN, STD, planes, dtype="float16", stream=12)
    np.testing.assert_array_equal(planes, transform.planes(tiles, MEAN, STD, dtype="float16"))
    assert streams == [11, 12, 12] and uploads.count((3, 256)) == 1


def test_without_the_module_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    with pytest.raises(StainError, match="CUDA compiler"):
        DeviceStain(fit("macenko", two_stains(64, 64)), np.copy)
