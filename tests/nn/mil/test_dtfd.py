"""DTFD-MIL against literal NumPy, and its divisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.mil.make import a_bag, a_net, embedded, softmax, weights_of


def gated(p: dict[str, np.ndarray], x: np.ndarray, at: str = "") -> np.ndarray:
    gate = 1 / (1 + np.exp(-(x @ p[f"{at}U.weight"].T + p[f"{at}U.bias"])))
    branch = np.tanh(x @ p[f"{at}V.weight"].T + p[f"{at}V.bias"])
    return softmax((branch * gate) @ p[f"{at}w.weight"].T + p[f"{at}w.bias"])[:, 0]


@pytest.mark.parametrize("n", [1, 2, 23])
@torch.no_grad()
def test_it_is_the_equations(n: int) -> None:
    net, (features, boxes) = a_net("dtfd"), a_bag(n)
    p = weights_of(net)
    h = embedded(p, features)
    groups = [part.numpy() for part in net._groups(features, boxes)]
    assert sorted(np.concatenate(groups)) == list(range(n)) and len(groups) == min(3, n)
    inside = [gated(p, h[part]) for part in groups]
    f = np.stack([a @ h[part] for a, part in zip(inside, groups, strict=True)])
    b = gated(p, f, "second.")
    logits = p["second.classifier.weight"] @ (b @ f) + p["second.classifier.bias"]
    scores = net(features, boxes)
    np.testing.assert_allclose(scores.logits.numpy(), logits, atol=1e-5)
    for part, a, weight in zip(groups, inside, b, strict=True):
        np.testing.assert_allclose(scores.attention.numpy()[part], a * weight, atol=1e-6)


@torch.no_grad()
def test_grading_twice_is_the_same_and_training_divides_anew() -> None:
    net, (features, boxes) = a_net("dtfd"), a_bag(30)
    torch.testing.assert_close(net(features, boxes).logits, net(features, boxes).logits, atol=0, rtol=0)
    torch.testing.assert_close(net(features).logits, net(features).logits, atol=0, rtol=0)
    other = a_net("dtfd", groups=3)
    other.seed = 1
    assert not torch.equal(other(features, boxes).logits, net(features, boxes).logits)
    net.train()
    assert not torch.equal(net._groups(features, boxes)[0], net._groups(features, boxes)[0])
