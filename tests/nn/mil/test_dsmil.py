"""DSMIL against literal NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.mil.make import a_bag, a_net, embedded, softmax, weights_of
from wsi.nn.mil import Head, Targets, TrainingBag


@pytest.mark.parametrize("n", [1, 2, 23])
@torch.no_grad()
def test_it_is_the_equations(n: int) -> None:
    net, (features, _) = a_net("dsmil"), a_bag(n)
    p = weights_of(net)
    h = embedded(p, features)
    tiles = h @ p["tiles.weight"].T + p["tiles.bias"]
    critical = tiles.argmax(0)

    def q(x: np.ndarray) -> np.ndarray:
        return np.tanh(np.maximum(x @ p["q.0.weight"].T + p["q.0.bias"], 0) @ p["q.2.weight"].T + p["q.2.bias"])

    a = softmax(q(h) @ q(h[critical]).T / np.sqrt(6))  # (n, classes)
    bags = a.T @ h  # (classes, width)
    # The published form: a convolution over the width, whose channels are the classes.
    kernel = p["classifier.weight"].reshape(3, 3, 8)
    logits = np.einsum("jcd,cd->j", kernel, bags) + p["classifier.bias"]
    scores = net(features)
    np.testing.assert_allclose(scores.logits.numpy(), logits, atol=1e-5)
    np.testing.assert_allclose(scores.attention.numpy(), a @ softmax(logits), atol=1e-6)
    loss = net.loss([TrainingBag(features)], Targets(torch.tensor([2])), Head("softmax", 3).loss)
    assert float(loss) == pytest.approx(-0.5 * np.log(softmax(logits)[2] * softmax(tiles.max(0))[2]), abs=1e-5)
