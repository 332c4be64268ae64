"""TransMIL against dense attention and convolutions written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nn.mil.make import a_bag, a_net, embedded, softmax, weights_of
from wsi.nn.mil import transmil
from wsi.nn.mil.transmil import TransMil, _cells, pseudo_inverse


def norm(x: np.ndarray, p: dict[str, np.ndarray], at: str) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * p[f"{at}weight"] + p[f"{at}bias"]


def attention_layer(x: np.ndarray, p: dict[str, np.ndarray], at: str, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact softmax attention with the residual convolution: tokens, and attention (t, t), mean over heads."""
    t, width = x.shape
    q, k, v = (norm(x, p, f"{at}norm.") @ p[f"{at}qkv.weight"].T).reshape(t, 3, heads, -1).transpose(1, 2, 0, 3)
    weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(width / heads), axis=2)  # (heads, t, t)
    mixed = weights @ v
    for head in range(heads):
        kernel = p[f"{at}residual.weight"][head, 0]
        for i in range(t):
            for j in range(33):
                if 0 <= i + j - 16 < t:
                    mixed[head, i] += kernel[j] * v[head, i + j - 16]
    told = mixed.transpose(1, 0, 2).reshape(t, width) @ p[f"{at}out.0.weight"].T + p[f"{at}out.0.bias"]
    return x + told, weights.mean(0)


def ppeg(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    out = x.copy()
    at = {(r, c): i for i, (r, c) in enumerate(zip(rows, columns, strict=True))}
    for conv, side in enumerate((7, 5, 3)):
        kernel, bias = p[f"ppeg.convolutions.{conv}.weight"][:, 0], p[f"ppeg.convolutions.{conv}.bias"]
        for (r, c), i in at.items():
            out[i] += bias
            for dy in range(side):
                for dx in range(side):
                    j = at.get((r + dy - side // 2, c + dx - side // 2))
                    if j is not None:
                        out[i] += kernel[:, dy, dx] * x[j]
    return out


def by_the_equations(p: dict[str, np.ndarray], h: np.ndarray, rows: np.ndarray, columns: np.ndarray, heads: int = 2):
    x = np.concatenate([p["cls"], h])
    x, first = attention_layer(x, p, "first.", heads)
    x = np.concatenate([x[:1], ppeg(x[1:], rows, columns, p)])
    x, last = attention_layer(x, p, "last.", heads)
    rolled = (np.eye(len(x)) + last) / 2 @ (np.eye(len(x)) + first) / 2  # Abnar & Zuidema 2020
    return norm(x[:1], p, "norm.")[0] @ p["classifier.weight"].T + p["classifier.bias"], rolled[0, 1:]


def sharp(**arguments: str) -> TransMil:
    """Make a network whose tokens attend to few others: the landmarks' matrix can then be inverted in float32."""
    net = a_net("transmil", iterations=16, **arguments)
    assert isinstance(net, TransMil)
    for layer in (net.first, net.last):
        layer.qkv.weight *= 5
        layer.qkv.weight[:8] = layer.qkv.weight[8:16]  # q = k
    return net


@pytest.mark.parametrize("n", [1, 5, 40])
@torch.no_grad()
def test_with_a_landmark_a_token_it_is_softmax_attention_on_the_slide(n: int) -> None:
    net, (features, boxes) = sharp(), a_bag(n)
    p = weights_of(net)
    place = np.arange(n)
    logits, attention = by_the_equations(p, embedded(p, features), place // 7, place % 7)
    scores = net(features, boxes)
    np.testing.assert_allclose(scores.logits.numpy(), logits, atol=2e-4)
    np.testing.assert_allclose(scores.attention.numpy(), attention / attention.sum(), atol=2e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@torch.no_grad()
def test_in_the_order_of_the_bag_the_first_tiles_are_repeated(n: int) -> None:
    net, (features, _) = sharp(positions="bag"), a_bag(n)
    p = weights_of(net)
    side = int(np.ceil(np.sqrt(n)))
    place = np.arange(side**2)
    logits, attention = by_the_equations(p, embedded(p, features)[place % n], place // side, place % side)
    folded = np.bincount(place % n, attention / attention.sum())
    scores = net(features)
    np.testing.assert_allclose(scores.logits.numpy(), logits, atol=2e-4)
    np.testing.assert_allclose(scores.attention.numpy(), folded, atol=2e-4)


@torch.no_grad()
def test_with_fewer_landmarks_it_is_nystroms_formula() -> None:
    layer = a_net("transmil", landmarks=4).first
    x = torch.randn(23, 8, generator=torch.Generator().manual_seed(3))
    p = weights_of(layer)
    q, k, v = (norm(x.double().numpy(), p, "norm.") @ p["qkv.weight"].T).reshape(23, 3, 2, 4).transpose(1, 2, 0, 3)
    q = q / 2
    segment = [np.flatnonzero(np.arange(23) * 4 // 23 == i) for i in range(4)]
    ql, kl = (np.stack([y[:, s].mean(1) for s in segment], 1) for y in (q, k))
    middle = torch.from_numpy(softmax(ql @ kl.transpose(0, 2, 1), 2)).float()
    inverse = pseudo_inverse(middle, 6).double().numpy()
    mixed = softmax(q @ kl.transpose(0, 2, 1), 2) @ inverse @ softmax(ql @ k.transpose(0, 2, 1), 2) @ v
    padded = np.pad(v, ((0, 0), (16, 16), (0, 0)))
    mixed += sum(p["residual.weight"][:, 0, j][:, None, None] * padded[:, j : j + 23] for j in range(33))
    told = mixed.transpose(1, 0, 2).reshape(23, 8) @ p["out.0.weight"].T + p["out.0.bias"]
    tokens, lead_back = layer(x)
    np.testing.assert_allclose(tokens[1:].numpy(), (x.numpy() + told)[1:], atol=1e-4)
    exact, weights = attention_layer(x.double().numpy(), p, "", 2)  # of the class token, which is not approximated
    np.testing.assert_allclose(tokens[:1].numpy(), exact[:1], atol=1e-4)
    # and weights of what comes out lead back through the same rows
    rows = softmax(q @ kl.transpose(0, 2, 1), 2) @ inverse @ softmax(ql @ k.transpose(0, 2, 1), 2)
    rows = np.concatenate([weights[:1], rows.mean(0)[1:]])
    given = np.random.default_rng(0).random(23)
    back = lead_back(torch.from_numpy(given).float())
    np.testing.assert_allclose(back.numpy(), given @ rows, atol=1e-4)


def test_the_pseudo_inverse_converges_to_numpys() -> None:
    a = torch.softmax(2 * torch.eye(6) + torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1)) / 3, 2)
    np.testing.assert_allclose(pseudo_inverse(a, 30).numpy(), np.linalg.pinv(a.numpy()), atol=1e-3)


def test_places_are_those_of_the_grid_and_wide_gaps_are_shortened() -> None:
    side = np.full(5, 100.0)
    assert _cells(np.array([0, 100.7, 201.4, 302.1, 1000.0]), side).tolist() == [0, 1, 2, 3, 7]
    assert _cells(np.round(np.arange(5) * 100.4), side).tolist() == [0, 1, 2, 3, 4]
    assert _cells(np.zeros(5), side).tolist() == [0] * 5


@torch.no_grad()
def test_moving_a_slide_changes_nothing_and_moving_a_tile_does() -> None:
    net, (features, boxes) = a_net("transmil"), a_bag(20)
    moved = boxes + torch.tensor([5000.0, 300.0, 0.0, 0.0])
    torch.testing.assert_close(net(features, moved).logits, net(features, boxes).logits)
    boxes[19, 0] += 100.7 * 4
    assert not torch.allclose(net(features, boxes).logits, net(features, moved).logits, atol=1e-4)


@pytest.mark.parametrize("positions", ["slide", "bag"])
def test_tiles_are_embedded_block_by_block_and_graded_as_where_all_are_kept(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transmil, "_TOKENS", 16)
    net, (features, boxes) = a_net("transmil", landmarks=8, positions=positions), a_bag(900, columns=9)
    chosen = torch.randperm(900, generator=torch.Generator().manual_seed(4))[:500]  # a slide with holes
    features, boxes = features[chosen], boxes[chosen]
    embedded: list[int] = []
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda block: embedded.append(len(block)) or embed(block))
    with torch.no_grad():
        scores = net(features, boxes)
    assert max(embedded) < 200 and sum(embedded) < 8 * 529  # a block and rows around it; every layer's passes
    kept = net(features, boxes)
    assert embedded[-1] >= 500
    torch.testing.assert_close(scores.logits, kept.logits.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.attention, kept.attention, atol=1e-6, rtol=0)


def test_dropout_is_drawn_once_a_tile_also_where_no_gradient_is_wanted() -> None:
    net, (features, boxes) = a_net("transmil").train(), a_bag(40)
    torch.manual_seed(3)
    learning = net(features, boxes).logits.detach()
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(net(features, boxes).logits, learning, atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="multiple of heads"):
        a_net("transmil", hidden=9)
    with pytest.raises(ValueError, match="no boxes were given"):
        a_net("transmil")(a_bag(4)[0])
