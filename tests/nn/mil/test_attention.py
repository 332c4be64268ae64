"""Gated attention against a literal NumPy restatement of Ilse 2018, and what a bag may and may not be."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.nn.mil.make import a_bag, a_net, embedded, softmax, weights_of  # noqa: E402
from wsi.nn.mil.attention import AttentionMil  # noqa: E402


def a_head(seed: int = 0, **kwargs) -> AttentionMil:
    torch.manual_seed(seed)
    head = AttentionMil(**({"in_features": 6, "hidden": 5, "attention": 4} | kwargs)).eval()
    head.standardise(torch.randn(50, head.in_features) * 3 + 1)
    return head


def by_the_equations(head: AttentionMil, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations 8 and 9 of Ilse 2018, one tile at a time, in float64: logits and attention."""
    p = {name: value.double().numpy() for name, value in head.state_dict().items()}
    scores, embedded = [], []
    for row in features.astype(np.float64):
        h = (row - p["mean"]) / p["std"]
        if "embedding.0.weight" in p:
            h = np.maximum(p["embedding.0.weight"] @ h + p["embedding.0.bias"], 0.0)
        v = np.tanh(p["V.weight"] @ h + p["V.bias"])
        u = 1.0 / (1.0 + np.exp(-(p["U.weight"] @ h + p["U.bias"]))) if head.gated else 1.0
        scores.append(float(p["w.weight"][0] @ (v * u) + p["w.bias"][0]))
        embedded.append(h)
    total = sum(np.exp(s) for s in scores)
    attention = np.array([np.exp(s) / total for s in scores])
    z = sum(a * h for a, h in zip(attention, embedded, strict=True))
    return p["classifier.weight"] @ z + p["classifier.bias"], attention


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("gated", [False, True])
def test_it_is_the_published_equation(hidden, n, gated):
    head = a_head(hidden=hidden, gated=gated)
    features = np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32)
    with torch.no_grad():
        grade = head(torch.from_numpy(features))
    logits, attention = by_the_equations(head, features)
    np.testing.assert_allclose(grade.logits.numpy(), logits, atol=1e-5)
    np.testing.assert_allclose(grade.attention.numpy(), attention, atol=1e-6)


@torch.no_grad()
def test_doubling_every_tile_changes_no_grade():
    head = a_head()
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    one, twice = head(features), head(features.repeat(2, 1))
    torch.testing.assert_close(twice.logits, one.logits)
    torch.testing.assert_close(twice.attention[:9], one.attention / 2)


@torch.no_grad()
def test_extreme_features_still_give_a_finite_grade():
    grade = a_head()(torch.full((4, 6), 1e30))
    assert bool(torch.isfinite(grade.attention).all())
    torch.testing.assert_close(grade.attention, torch.full((4,), 0.25))


@torch.no_grad()
def test_under_bf16_autocast_the_outputs_stay_float32_and_close():
    head = a_head()
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(5))
    exact = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(features)
    assert {t.dtype for t in rounded} == {torch.float32}
    assert float(rounded.attention.sum()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(rounded.logits.softmax(0), exact.logits.softmax(0), atol=0.02, rtol=0)


def test_it_learns_to_find_the_one_odd_tile():
    """Bag labels alone must be enough: a positive bag holds one tile shifted along one axis."""
    torch.manual_seed(0)
    head = AttentionMil(in_features=4, hidden=8, attention=8, dropout=0.0)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(6)

    def bag(label: int) -> torch.Tensor:
        tiles = torch.randn(8, 4, generator=rng)
        tiles[3, 0] += 6.0 * label
        return tiles

    for step in range(300):
        loss = torch.nn.functional.cross_entropy(head(bag(step % 2)).logits[None], torch.tensor([step % 2]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval()
    with torch.no_grad():
        grades = [head(bag(step % 2)) for step in range(40)]
    assert np.mean([int(grade.logits.argmax()) == step % 2 for step, grade in enumerate(grades)]) >= 0.9
    assert np.mean([int(grade.attention.argmax()) == 3 for grade in grades[1::2]]) >= 0.9


@pytest.mark.parametrize("n", [1, 25])
@torch.no_grad()
def test_additive_is_the_sum_of_psi_of_what_attention_scales(n):
    net, (features, _) = a_net("additive"), a_bag(n)
    p = weights_of(net)
    h = embedded(p, features)
    gate = 1 / (1 + np.exp(-(h @ p["U.weight"].T + p["U.bias"])))
    a = softmax((np.tanh(h @ p["V.weight"].T + p["V.bias"]) * gate) @ p["w.weight"].T)
    psi = np.maximum((a * h) @ p["classifier.0.weight"].T, 0) @ p["classifier.2.weight"].T
    np.testing.assert_allclose(net(features).logits.numpy(), psi.sum(0) + p["bias"], atol=1e-5)
    np.testing.assert_allclose(net(features).contributions.numpy(), psi + a * p["bias"], atol=1e-6)
