"""The CUDA twins against the CPU, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.stain.make import two_stains
from wsi import native
from wsi.stain import METHODS, fit
from wsi.stain.device import DeviceStain

pytestmark = [
    pytest.mark.skipif(not native.HAVE_CUDA, reason="installed without a CUDA compiler"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch sees"),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def upload(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


@pytest.fixture(params=METHODS)
def pair(request):
    transform = fit(request.param, two_stains(64, 64))
    return transform, DeviceStain(transform, upload)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 47), (8, 256, 256)])
def test_pixels(pair, shape):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    source = upload(rgb)
    out = torch.empty_like(source)
    on_device.apply(source, out, stream=torch.cuda.current_stream().cuda_stream)
    np.testing.assert_array_equal(out.cpu().numpy(), transform.apply(rgb))


def test_arrays_that_do_not_begin_at_a_word(pair):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (1001, 3), np.uint8)
    source, out = upload(rgb), torch.zeros((1001, 3), dtype=torch.uint8, device="cuda")
    on_device.apply(source[1:], out[1:], stream=torch.cuda.current_stream().cuda_stream)
    np.testing.assert_array_equal(out.cpu().numpy()[1:], transform.apply(rgb[1:]))
    assert out[0].max() == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_planes(pair, dtype):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), np.uint8)
    out = torch.empty((3, 3, 33, 47), dtype=getattr(torch, dtype), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    on_device.planes(upload(rgb), MEAN, STD, out, dtype=dtype, stream=stream.cuda_stream)
    stream.synchronize()
    expected = torch.from_numpy(transform.planes(rgb, MEAN, STD, dtype=dtype))
    assert torch.equal(out.cpu(), expected.view(torch.bfloat16) if dtype == "bfloat16" else expected)


def test_what_does_not_fit_is_refused(pair):
    _, on_device = pair
    source = upload(np.zeros((4, 4, 3), np.uint8))
    stream = torch.cuda.current_stream().cuda_stream
    with pytest.raises(TypeError):
        on_device.apply(source.cpu(), torch.empty_like(source), stream=stream)
    with pytest.raises(ValueError, match="shape"):
        on_device.apply(source, torch.empty_like(source)[:2], stream=stream)
    with pytest.raises(ValueError, match="overlap"):
        on_device.apply(source, source, stream=stream)
