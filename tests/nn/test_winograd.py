"""Convolutions with fewer multiplications against torch's own."""

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from tests.nn.test_fold import lively  # noqa: E402
from wsi import native  # noqa: E402
from wsi.nn.backbone import TimmNet  # noqa: E402
from wsi.nn.fold import fold_norms  # noqa: E402
from wsi.nn.winograd import WinogradConv2d, use_winograd  # noqa: E402

needs_kernel = pytest.mark.skipif(not native.winograd_instructions(), reason="no compiler, or a processor without AVX2")


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("side", [1, 7, 8, 14, 57])
def test_a_convolution_is_that_of_torch_in_float64(side, layout, bias):
    torch.manual_seed(side)
    conv = nn.Conv2d(48, 64, 3, padding=1, bias=bias)
    x = torch.randn(3, 48, side, side + 2).contiguous(memory_format=layout)
    with torch.inference_mode():
        expected = conv.double()(x.double())
        out, direct = WinogradConv2d(conv.float())(x), conv(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5 * float(expected.std()))
    if side >= 14:  # errors enough for a mean
        assert (out - expected).square().mean() ** 0.5 < 5 * (direct - expected).square().mean() ** 0.5


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.Conv2d(16, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(16, 32, (3, 1), padding=(1, 0)),
        nn.ConvTranspose2d(16, 32, 3, padding=1),
    ],
    ids=str,
)
def test_others_stay(conv):
    assert not WinogradConv2d.takes(conv)


@needs_kernel
@pytest.mark.parametrize(("name", "replaced"), [("resnet18", 13), ("vgg11", 7), ("test_vit", 0)])
def test_a_network_gives_the_same_logits(name, replaced):
    torch.manual_seed(0)
    net = lively(TimmNet(name, num_classes=3))
    side = 160 if name == "test_vit" else 64
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = net.double().embed(x.double())
        net.float()
        fold_norms(net)
        assert use_winograd(net) == replaced
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net.embed(x).double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@needs_kernel
def test_gradients_are_refused_and_not_lost():
    conv, x = WinogradConv2d(nn.Conv2d(16, 32, 3, padding=1)), torch.ones(1, 16, 4, 4)
    conv(x)  # nobody asks for one
    with pytest.raises(RuntimeError, match="fold=False"):
        conv(torch.ones(1, 16, 4, 4, requires_grad=True))
    conv.requires_grad_()  # as who goes on training the last layers would
    with pytest.raises(RuntimeError, match="fold=False"):
        conv(x)
    with torch.no_grad():
        conv(x)


def test_without_the_kernel_a_network_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(native, "winograd_instructions", lambda: [])
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    assert use_winograd(net) == 0
    assert type(net[0]) is nn.Conv2d
