"""CLAM's bag logits and instance loss against literal NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.mil.make import a_bag, a_net, embedded, softmax, weights_of
from wsi.nn.mil import Head, Targets, TrainingBag


def attention_of(p: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
    gate = 1 / (1 + np.exp(-(h @ p["U.weight"].T + p["U.bias"])))
    return softmax((np.tanh(h @ p["V.weight"].T + p["V.bias"]) * gate) @ p["w.weight"].T + p["w.bias"])


def logits_of(p: dict[str, np.ndarray], h: np.ndarray, a: np.ndarray) -> np.ndarray:
    z = a.T @ h  # (rows, width)
    rows = range(3) if len(z) == 3 else [0] * 3
    return np.array([p["classifier.weight"][c] @ z[row] + p["classifier.bias"][c] for c, row in enumerate(rows)])


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb"])
@torch.no_grad()
def test_the_bag_is_graded_by_the_equations(name: str) -> None:
    net, (features, _) = a_net(name), a_bag(19)
    p = weights_of(net)
    h = embedded(p, features)
    a = attention_of(p, h)
    assert a.shape == (19, 1 if name == "clam-sb" else 3)
    expected = logits_of(p, h, a)
    scores = net(features)
    np.testing.assert_allclose(scores.logits.numpy(), expected, atol=1e-5)
    row = a[:, 0] if name == "clam-sb" else a @ softmax(expected)
    np.testing.assert_allclose(scores.attention.numpy(), row, atol=1e-6)


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb"])
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("n", [1, 5, 19])
@torch.no_grad()
def test_the_loss_is_the_bags_and_the_tiles(name: str, subtyping: bool, n: int) -> None:
    net, (features, _) = a_net(name, instances=4, subtyping=subtyping, bag_weight=0.6), a_bag(n)
    p = weights_of(net)
    h = embedded(p, features)
    a = attention_of(p, h)
    label, k = 1, min(4, n // 2)
    tiles = 0.0
    for c in range(3):
        row = a[:, c if a.shape[1] == 3 else 0]
        order = np.argsort(-row)
        chosen = [(i, 1) for i in order[:k]] + [(i, 0) for i in order[::-1][:k]] if c == label else []
        if c != label and subtyping:
            chosen = [(i, 0) for i in order[:k]]
        said = [
            -np.log(softmax(p[f"instance_classifiers.{c}.weight"] @ h[i] + p[f"instance_classifiers.{c}.bias"])[truth])
            for i, truth in chosen
        ]
        tiles += np.mean(said) if said else 0.0
    tiles /= 3 if subtyping else 1
    bag = -np.log(softmax(logits_of(p, h, a))[label])
    loss = net.loss([TrainingBag(features)], Targets(torch.tensor([label])), Head("softmax", 3).loss)
    assert float(loss) == pytest.approx(0.6 * bag + 0.4 * tiles, abs=1e-5)


def test_it_needs_classes() -> None:
    with pytest.raises(ValueError, match="softmax head"):
        a_net("clam-sb", num_classes=1).loss(
            [TrainingBag(a_bag(9)[0])], Targets(torch.tensor([1])), Head("binary", 2).loss
        )
