"""Poolings against literal NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.mil.make import a_bag, a_net, embedded, weights_of


@pytest.mark.parametrize("name", ["mean", "max", "top-k", "noisy-or"])
@pytest.mark.parametrize("n", [1, 2, 23])
@torch.no_grad()
def test_it_is_the_formula(name: str, n: int) -> None:
    net, (features, boxes) = a_net(name), a_bag(n)
    p = weights_of(net)
    h = embedded(p, features)
    votes = h @ p["classifier.weight"].T + p["classifier.bias"]
    if name == "mean":
        expected = h.mean(0) @ p["classifier.weight"].T + p["classifier.bias"]
    elif name == "max":
        expected = h.max(0) @ p["classifier.weight"].T + p["classifier.bias"]
    elif name == "top-k":
        expected = np.sort(votes, axis=0)[::-1][:3].mean(0)
    else:
        probability = 1 - np.prod(1 - 1 / (1 + np.exp(-votes)), axis=0)
        expected = np.concatenate([[0.0], np.log(probability / (1 - probability))])
    np.testing.assert_allclose(net(features, boxes).logits.numpy(), expected, atol=1e-5)


@torch.no_grad()
def test_noisy_or_of_two_classes_is_the_probability_that_one_tile_is() -> None:
    net, (features, _) = a_net("noisy-or", num_classes=2), a_bag(12)
    p = weights_of(net)
    tile = 1 / (1 + np.exp(-(embedded(p, features) @ p["classifier.weight"].T + p["classifier.bias"])))
    probabilities = torch.softmax(net(features).logits, 0)
    assert float(probabilities[1]) == pytest.approx(float(1 - np.prod(1 - tile)), abs=1e-6)
    one = a_net("noisy-or", num_classes=1)(features).logits
    torch.testing.assert_close(torch.sigmoid(one[0]), probabilities[1])


@torch.no_grad()
def test_noisy_or_neither_overflows_nor_underflows() -> None:
    net = a_net("noisy-or", num_classes=2)
    for bias in (-80.0, 80.0):
        net.classifier.bias.fill_(bias)
        scores = net(torch.zeros(100_000, 6))
        assert bool(torch.isfinite(scores.logits).all()) and float(scores.attention.sum()) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_attention_says_which_tiles_were_taken() -> None:
    features, _ = a_bag(20)
    assert torch.allclose(a_net("mean")(features).attention, torch.full((20,), 0.05))
    assert int((a_net("top-k", num_classes=1)(features).attention > 0).sum()) == 3
    assert int((a_net("max")(features).attention > 0).sum()) <= 8
