"""Folded networks against the same networks as they were."""

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from wsi.errors import ModelError  # noqa: E402
from wsi.nn.backbone import TimmEncoder, TimmNet  # noqa: E402
from wsi.nn.fold import fold_norms  # noqa: E402


def lively(net):
    """Give norms statistics and weights as after training, so that they are not the identity."""
    rng = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                value.copy_(torch.rand(value.shape, generator=rng) * (high - low) + low)
    return net.eval()


def n_norms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    ("name", "all_of_them"),
    [
        ("test_resnet", True),
        ("mobilenetv3_small_050", True),
        ("test_efficientnet", True),
        ("regnetx_002", True),
        ("tf_efficientnet_b0", True),  # pads by the size of its input
        ("densenet121", False),  # norms before convolutions stay
        ("test_convnext", True),  # has none
        ("test_vit", True),
    ],
)
def test_logits_and_features_are_those_of_the_network_before(name, all_of_them):
    torch.manual_seed(0)
    net = lively(TimmNet(name, num_classes=3))
    side = 160 if name == "test_vit" else 64
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = net.embed(x)
        logits = net.classify(features)
    before = n_norms(net)
    folded = fold_norms(net)
    assert n_norms(net) == before - folded
    assert n_norms(net) == 0 or not all_of_them
    with torch.inference_mode():
        torch.testing.assert_close(net.embed(x), features, rtol=1e-4, atol=1e-4 * float(features.abs().max()))
        torch.testing.assert_close(net.classify(net.embed(x)), logits, rtol=1e-4, atol=1e-4)


def test_a_fold_is_the_scale_and_offset_written_out():
    net = lively(nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)))
    weight, norm = net[0].weight.detach().clone(), net[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert fold_norms(net) == 1
    torch.testing.assert_close(net[0].weight, weight * scale.view(-1, 1, 1, 1))
    torch.testing.assert_close(net[0].bias, norm.bias - norm.running_mean * scale)


class Shared(nn.Module):
    """A convolution whose result goes two ways, one that is used twice, and one that standardises its weight."""

    def __init__(self):
        super().__init__()
        from timm.layers import StdConv2d

        self.two_ways, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.twice, self.norm2, self.norm3 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.standardised, self.norm4 = StdConv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.two_ways(x)
        x = x + self.norm1(x)
        x = self.norm3(self.twice(self.norm2(self.twice(x))))
        return self.norm4(self.standardised(x))


class Branching(nn.Module):
    """A network that cannot be traced, around one that can."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else x


def test_an_encoder_is_folded_too():
    torch.manual_seed(0)
    net = lively(TimmEncoder("test_resnet", tile_px=64))
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = net.embed(x)
        assert fold_norms(net) > 0
        assert n_norms(net) == 0
        torch.testing.assert_close(net.embed(x), before, rtol=1e-4, atol=1e-5)


def test_a_network_that_does_not_end_in_a_linear_layer_is_refused():
    with pytest.raises(ModelError, match="no linear layer"):
        TimmNet("resnetv2_50x1_bit", num_classes=2)


class Aliased(nn.Module):
    """Modules under two names, in a network that cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.first, self.second = nn.Sequential(conv, norm), nn.Sequential(conv, nn.BatchNorm2d(3))
        self.a = self.b = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.b(self.second(self.first(x))) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("kind", "folded", "off"),
    [(Shared, 0, 0.0), (Branching, 1, 1e-5), (Aliased, 0, 0.0)],
    ids=["shared or standardised: stays", "cannot be traced: its parts", "two names: stays"],
)
def test_what_is_folded_of_odd_networks(kind, folded, off):
    torch.manual_seed(0)
    net = lively(kind())
    x = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        before = net(x)
        assert fold_norms(net) == folded
        torch.testing.assert_close(net(x), before, rtol=off, atol=off)
