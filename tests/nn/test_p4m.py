"""The group convolution against rotated images, and the whole network against all eight orientations."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wsi.nn.fold import for_inference  # noqa: E402
from wsi.nn.p4m import P4MConv, P4MNet, P4MNorm, conv_norm, dihedral_group, turned_filter_index  # noqa: E402

SMALL = {"widths": (2, 3, 4), "depths": (1, 1, 1), "stem": 2, "head": 5}


def act(g: int, image: "torch.Tensor") -> "torch.Tensor":
    """Turn an image (..., h, w) by element `g` as torch does it: mirror the columns, then quarter turns."""
    return torch.rot90(image.flip(-1) if g >= 4 else image, g % 4, (-2, -1))


def permutation(g: int) -> list[int]:
    """Where orientation h of a map comes from when the input is turned by `g`: the index of g^-1 h."""
    group = [e.numpy() for e in dihedral_group()]
    back = np.linalg.inv(group[g]).round().astype(int)
    return [next(i for i, e in enumerate(group) if (e == back @ h).all()) for h in group]


def lively(net: "torch.nn.Module", seed: int = 0) -> "torch.nn.Module":
    """Give the normalisations statistics as after training, so that they are not the identity."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=rng) * 0.2)
        elif name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    return net.eval()


def test_the_group_has_eight_elements_and_is_closed():
    group = dihedral_group()
    seen = {tuple(e.flatten().tolist()) for e in group}
    assert len(seen) == 8
    assert {tuple((a @ b).flatten().tolist()) for a in group for b in group} == seen
    assert sorted(int(np.linalg.det(e.numpy()).round()) for e in group) == [-1] * 4 + [1] * 4


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_turned_filters_are_the_turned_images(side):
    image = torch.arange(side * side)
    for g, index in enumerate(turned_filter_index(side, 1)):
        torch.testing.assert_close(image[index].view(side, side), act(g, image.view(side, side)))


@pytest.mark.parametrize("g", range(8))
def test_a_lifting_layer_turns_with_its_input(g):
    torch.manual_seed(0)
    lift = P4MConv(3, 2, 3, in_orientations=1)
    x = torch.randn(2, 3, 9, 9)
    expected = act(g, lift(x)).unflatten(1, (8, 2))[:, permutation(g)].flatten(1, 2)
    torch.testing.assert_close(lift(act(g, x)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("g", range(8))
def test_a_group_layer_turns_with_its_input(g):
    torch.manual_seed(0)
    conv = P4MConv(3, 2, 3, padding=1)
    x = torch.randn(2, 8 * 3, 6, 6)
    turned = act(g, x).unflatten(1, (8, 3))[:, permutation(g)].flatten(1, 2)
    expected = act(g, conv(x)).unflatten(1, (8, 2))[:, permutation(g)].flatten(1, 2)
    torch.testing.assert_close(conv(turned), expected, atol=1e-5, rtol=0)


def test_the_norm_shares_its_statistics_among_the_orientations():
    torch.manual_seed(0)
    norm = P4MNorm(3)
    x = torch.randn(4, 24, 5, 7) * 2 + 1
    y = norm(x)
    by_map = x.unflatten(1, (8, 3))
    mean = by_map.mean((0, 1, 3, 4)).view(3, 1, 1)
    var = by_map.var((0, 1, 3, 4), correction=0).view(3, 1, 1)
    expected = (by_map - mean) / torch.sqrt(var + norm.eps)
    torch.testing.assert_close(y, expected.flatten(1, 2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_norm_folded_into_the_filters_is_the_norm():
    torch.manual_seed(0)
    conv, norm = P4MConv(3, 2, 3, padding=1), lively(P4MNorm(2))
    norm.weight.uniform_(0.5, 2.0)
    norm.bias.normal_()
    x = torch.randn(2, 24, 6, 6)
    torch.testing.assert_close(conv_norm(conv, norm, x), norm(conv(x)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("g", range(8))
@pytest.mark.parametrize("members", [1, 2])
@torch.no_grad()
def test_features_and_logits_do_not_see_the_orientation(g, members):
    torch.manual_seed(1)
    net = lively(P4MNet(**SMALL, members=members))
    x = torch.rand(3, 3, 50, 50) * 2 - 1
    torch.testing.assert_close(net.embed(act(g, x)), net.embed(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(act(g, x)), net(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_does_see_what_is_not_a_symmetry():
    torch.manual_seed(1)
    net = lively(P4MNet(**SMALL))
    x = torch.rand(2, 3, 50, 50) * 2 - 1
    shuffled = x.flatten(2)[:, :, torch.randperm(2500)].view_as(x)
    assert float((net.embed(shuffled) - net.embed(x)).abs().max()) > 1e-2


@pytest.mark.parametrize("side", [50, 47, 96])
@torch.no_grad()
def test_shapes_for_any_size_and_batch(side):
    net = lively(P4MNet(**SMALL, num_classes=3, members=2))
    for b in (0, 1, 4):
        x = torch.rand(b, 3, side, side)
        features = net.embed(x)
        assert features.shape == (b, net.num_features) and features.dtype == torch.float32
        assert net.classify(features).shape == net(x).shape == (b, 3)


@torch.no_grad()
def test_memory_layout_and_bf16_change_little_and_repeats_nothing():
    torch.manual_seed(2)
    net = lively(P4MNet(**SMALL))
    x = torch.rand(8, 3, 50, 50) * 2 - 1
    plain = net(x)
    assert torch.equal(net(x), plain)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), plain, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x).float()
    torch.testing.assert_close(rounded.softmax(1), plain.softmax(1), atol=0.03, rtol=0)


@torch.no_grad()
def test_members_are_averaged():
    torch.manual_seed(3)
    both = lively(P4MNet(**SMALL, members=2))
    x = torch.rand(2, 3, 50, 50)
    logits = []
    for i in range(2):
        one = P4MNet(**SMALL).eval()
        one.trunks[0].load_state_dict(both.trunks[i].state_dict())
        one.classifiers[0].load_state_dict(both.classifiers[i].state_dict())
        logits.append(one(x))
    torch.testing.assert_close(both(x), (logits[0] + logits[1]) / 2)


def test_it_learns():
    """Two textures that differ in scale only are told apart after a few steps."""
    torch.manual_seed(4)
    net = P4MNet(**SMALL)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    labels = torch.arange(16) % 2
    fine = torch.rand(16, 3, 50, 50)
    coarse = torch.nn.functional.interpolate(torch.rand(16, 3, 10, 10), (50, 50))
    x = torch.where(labels.view(-1, 1, 1, 1) == 1, coarse, fine)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(net(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2


def test_folded_it_is_the_same_network():
    torch.manual_seed(0)
    net = lively(P4MNet(widths=(4, 8), depths=(1, 2), stem=4, head=5, members=2))
    x = torch.rand(2, 3, 50, 50)
    with torch.inference_mode():
        expected = net.embed(x)
        assert net.fold_norms() == 2 * (2 + 2 + 3 + 2)  # stem and head; three blocks, one of them with a shortcut
        torch.testing.assert_close(net.embed(x), expected, rtol=1e-5, atol=1e-6)
        for_inference(net, "cpu", "float32")
        torch.testing.assert_close(net.embed(x), expected, rtol=1e-5, atol=1e-5)
