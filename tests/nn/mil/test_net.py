"""The contract that every MIL network inherits, whatever its equations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.nn.mil.make import ADDITIVE, ALL, a_bag, a_net
from wsi.nn.mil import Head, Targets, TrainingBag, make_net, net, transmil


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import wsi.nn.mil.dsmil
    import wsi.nn.mil.pooling

    for module in (net, wsi.nn.mil.dsmil, wsi.nn.mil.pooling):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(transmil, "_TOKENS", 7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [1, 2, 40])
@torch.no_grad()
def test_shapes_sums_and_finiteness(name: str, n: int) -> None:
    scores = a_net(name)(*a_bag(n))
    assert scores.logits.shape == (3,) and scores.logits.dtype == torch.float32
    assert scores.attention.shape == (n,) and bool((scores.attention >= 0).all())
    assert float(scores.attention.double().sum()) == pytest.approx(1, abs=1e-5)
    assert bool(torch.isfinite(scores.logits).all())
    assert (scores.contributions is not None) == (name in ADDITIVE)


@pytest.mark.parametrize("name", ADDITIVE)
@torch.no_grad()
def test_contributions_sum_to_the_logits(name: str) -> None:
    for n in (1, 2, 40):
        scores = a_net(name)(*a_bag(n))
        assert scores.contributions is not None and scores.contributions.shape == (n, 3)
        torch.testing.assert_close(scores.contributions.sum(0), scores.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_order_of_the_tiles_does_not_matter(name: str) -> None:
    features, boxes = a_bag(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    one, other = a_net(name)(features, boxes), a_net(name)(features[order], boxes[order])
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.attention, one.attention[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_in_blocks_it_is_the_same_to_1e5_and_so_is_its_gradient(name: str, request: pytest.FixtureRequest) -> None:
    features, boxes = a_bag(40)
    found = []
    for blocks in (False, True):
        if blocks:
            request.getfixturevalue("in_small_blocks")
        model = a_net(name)
        with torch.no_grad():
            scores = model(features, boxes)
        targets = Targets(torch.tensor([1]))
        loss = model.loss([TrainingBag(features, boxes)], targets, Head("softmax", 3).loss)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*(part for part in scores if part is not None), loss.detach(), *gradients])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ALL), ("dsmil", torch.bfloat16), ("dtfd", torch.bfloat16)]
)
def test_blocks_computed_again_give_the_gradient_of_torchs_own_graph(
    name: str, dtype: torch.dtype, in_small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which must fall on the same values again; under autocast, which must be as it was."""

    def kept(blocks: Any, n: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [blocks.part(span, tensors[:n]) for span in blocks.spans]
        return tuple(torch.cat(of) for of in zip(*parts, strict=True))

    found = []
    for apply in (net._Streamed.apply, kept):
        monkeypatch.setattr(net._Streamed, "apply", apply)
        model = a_net(name, dropout=0.5).train()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss([TrainingBag(*a_bag(40))], Targets(torch.tensor([1])), Head("softmax", 3).loss)
        torch.randn(3)  # chance goes on between the passes,
        before = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)  # and after them as if there had been one
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for streamed, own in zip(*found, strict=True):
        torch.testing.assert_close(streamed, own, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-4)


def test_a_gradient_reaches_the_features_too(in_small_blocks: None) -> None:
    features = a_bag(40)[0].requires_grad_()
    a_net("gated-attention")(features).logits.sum().backward()
    assert features.grad is not None and bool((features.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", ALL)
def test_every_weight_learns(name: str) -> None:
    model = a_net(name)
    bags = [TrainingBag(*a_bag(30, seed)) for seed in (1, 2, 3)]
    targets = Targets(torch.tensor([0, 1, 2]))
    model.loss(bags, targets, Head("softmax", 3).loss).backward()
    for weight, value in model.named_parameters():
        assert value.grad is not None and float(value.grad.abs().sum()) > 0, weight


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_half_precision_features_are_read_as_they_are(name: str) -> None:
    features, boxes = a_bag(30)
    half = features.half()
    torch.testing.assert_close(a_net(name)(half, boxes).logits, a_net(name)(half.float(), boxes).logits)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("transmil", "dsmil", "clam-mb")])
@torch.no_grad()
def test_one_logit_is_enough(name: str) -> None:
    assert a_net(name, num_classes=1)(*a_bag(9)).logits.shape == (1,)


def test_hidden_layers_by_list() -> None:
    model = make_net("mean", in_features=6, hidden=[5, 4])
    assert [tuple(p.shape) for p in model.embedding.parameters()] == [(5, 6), (5,), (4, 5), (4,)]


def test_standardise_centres_scales_and_survives_a_constant_feature() -> None:
    model = make_net("mean", in_features=3)
    model.standardise(torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 3.0]]))
    torch.testing.assert_close(model.mean, torch.tensor([1.0, 5.0, 2.0]))
    torch.testing.assert_close(model.std, torch.tensor([1.0, 1.0, 1.0]))
    assert {"mean", "std"} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.zeros(0, 6), "no tiles"),
        (torch.zeros(5, 7), r"\(n, 6\)"),
        (torch.zeros(6), r"\(n, 6\)"),
        (torch.zeros(2, 5, 6), r"\(n, 6\)"),
        (torch.tensor([[0.0] * 6, [float("nan")] + [0.0] * 5]), "first is tile 1"),
        (torch.full((3, 6), float("inf")), "3 of 3 tiles"),
    ],
)
def test_bags_that_cannot_be_graded_are_refused_with_the_reason(features: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        a_net("gated-attention")(features)


def test_boxes_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, 4\)"):
        a_net("mean")(torch.zeros(3, 6), torch.zeros(2, 4))


def test_half_precision_features_are_never_copied_as_a_whole() -> None:
    code = """
import resource, torch
from wsi.nn.mil import make_net
torch.set_num_threads(1)
features = torch.ones(400_000, 256, dtype=torch.float16)  # 195 MiB, as float32 390
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
net = make_net("gated-attention", in_features=256, hidden=8).eval()
with torch.inference_mode():
    net(features[:9000])
    before = peak()
    net(features)
assert peak() - before < 100, peak() - before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr


def test_half_a_million_tiles_are_graded_within_bounded_memory() -> None:
    """In a process of its own, since peaks only rise; every network's numbers and its share of the peak."""
    code = """
import resource, torch
from tests.nn.mil.make import ALL, a_bag, a_net
torch.set_num_threads(1)
features, boxes = a_bag(500_000, columns=700)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for name in ALL:
    net, before = a_net(name), peak()
    with torch.inference_mode():
        net(features[:5000], boxes[:5000])
        scores = net(features, boxes)
    assert scores.logits.isfinite().all() and abs(float(scores.attention.double().sum()) - 1) < 1e-4, name
    assert peak() - before < 1000, (name, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
