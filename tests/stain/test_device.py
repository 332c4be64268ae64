"""The GPU's face without a GPU: what it hands to the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.stain.make import two_stains
from wsi import native
from wsi.errors import StainError
from wsi.native import twin
from wsi.stain import METHODS, FitConfig, fit
from wsi.stain.device import DeviceStain, place

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

    names = [f"{name}{kind}" for name in ("od_map", "sparse_map", "lab_map") for kind in ("", "_tensor")]
    cuda = SimpleNamespace(**{name: queued(getattr(twin, name)) for name in names}, device_count=lambda: 1)
    monkeypatch.setattr(native, "cuda", cuda)
    return seen


@pytest.mark.parametrize("method", [*METHODS, "vahadane, published"])
def test_kernels_get_tables_and_stream(streams, method):
    method, *published = method.split(", ")
    transform = fit(method, two_stains(64, 64), config=FitConfig(published=bool(published)))
    uploads, stream = [], iter(range(11, 20))
    on_device = place(transform, upload=lambda a: uploads.append(a.shape) or a.copy(), stream=lambda: next(stream))
    assert on_device.device == "cuda"
    tiles = two_stains(2 * 9, 7).reshape(2, 9, 7, 3)
    np.testing.assert_array_equal(on_device.apply(tiles, np.empty_like(tiles)), transform.apply(tiles))
    for layout in ((2, 3, 9, 7), (2, 9, 7, 3)):
        x = np.empty(layout, np.float16)
        x = x if layout[1] == 3 else x.transpose(0, 3, 1, 2)
        assert on_device.tensor(tiles, MEAN, STD, x, dtype="float16") is x
        np.testing.assert_array_equal(x, transform.tensor(tiles, MEAN, STD, dtype="float16"))
    assert streams == [11, 12, 13] and uploads.count((3, 256)) == 1


def test_auto_is_the_gpu_where_there_is_one_that_tables_can_be_brought_to(streams, monkeypatch):
    transform = fit("macenko", two_stains(64, 64))
    assert place(transform, upload=np.copy).device == "cuda"
    assert place(transform, "cuda", upload=np.copy).device == "cuda"
    assert place(transform) is transform
    assert place(transform, "cpu", upload=np.copy) is transform
    with pytest.raises(StainError, match="upload"):
        place(transform, "cuda")
    with pytest.raises(StainError, match="no such device"):
        place(transform, "tpu")
    for none in (SimpleNamespace(device_count=lambda: 0), None):
        monkeypatch.setattr(native, "cuda", none)
        assert place(transform, upload=np.copy) is transform
        with pytest.raises(StainError, match="GPU"):
            place(transform, "cuda", upload=np.copy)


def test_without_the_module_it_says_so(monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    with pytest.raises(StainError, match="CUDA compiler"):
        DeviceStain(fit("macenko", two_stains(64, 64)), np.copy)
