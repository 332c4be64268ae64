"""The CUDA twins against the CPU, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.stain.make import two_stains
from wsi import native
from wsi.stain import METHODS, FitConfig, StainTransform, fit
from wsi.stain.device import DeviceStain, place

pytestmark = [
    pytest.mark.skipif(native.cuda is None, reason="installed without a CUDA compiler"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch sees"),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def upload(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.fixture(params=[*METHODS, "vahadane, published"])
def pair(request):
    method, *published = request.param.split(", ")
    transform = fit(method, two_stains(64, 64), config=FitConfig(published=bool(published)))
    return transform, DeviceStain(transform, upload, stream)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 47), (8, 256, 256)])
def test_pixels(pair, shape):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    source = upload(rgb)
    out = torch.empty_like(source)
    on_device.apply(source, out)
    np.testing.assert_array_equal(out.cpu().numpy(), transform.apply(rgb))


def test_arrays_that_do_not_begin_at_a_word(pair):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (1001, 3), np.uint8)
    source, out = upload(rgb), torch.zeros((1001, 3), dtype=torch.uint8, device="cuda")
    on_device.apply(source[1:], out[1:])
    np.testing.assert_array_equal(out.cpu().numpy()[1:], transform.apply(rgb[1:]))
    assert out[0].max() == 0


def test_every_colour(pair):
    transform, on_device = pair
    grey = np.arange(256, dtype=np.uint8)
    rgb = np.ascontiguousarray(np.stack(np.meshgrid(grey, grey, grey, indexing="ij"), axis=-1))
    source = upload(rgb)
    out = on_device.apply(source, torch.empty_like(source))
    np.testing.assert_array_equal(out.cpu().numpy(), transform.apply(rgb))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 47)])
def test_tensors(pair, shape, dtype, layout):
    transform, on_device = pair
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    n, h, w = shape
    out = torch.empty((n, 3, h, w), dtype=getattr(torch, dtype), device="cuda")
    out = out.to(memory_format=getattr(torch, layout))
    source, other = upload(rgb), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        on_device.tensor(source, MEAN, STD, out, dtype=dtype)
    other.synchronize()
    expected = torch.from_numpy(transform.tensor(rgb, MEAN, STD, dtype=dtype))
    assert torch.equal(out.cpu(), expected.view(torch.bfloat16) if dtype == "bfloat16" else expected)


def test_auto_takes_the_gpu():
    assert place(StainTransform("macenko"), upload=upload, stream=stream).device == "cuda"


def test_what_does_not_fit_is_refused(pair):
    _, on_device = pair
    source = upload(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(TypeError):
        on_device.apply(source.cpu(), torch.empty_like(source))
    with pytest.raises(ValueError, match="shape"):
        on_device.apply(source, torch.empty_like(source)[:2])
    with pytest.raises(ValueError, match="overlap"):
        on_device.apply(source, source)
    for out in (torch.empty((1, 3, 4, 8), device="cuda")[..., ::2], torch.empty((1, 3, 4, 4), device="cuda").half()):
        with pytest.raises(ValueError, match=r"out|levels"):
            on_device.tensor(source[None], MEAN, STD, out)
