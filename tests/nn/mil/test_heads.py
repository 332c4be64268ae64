"""Heads against SciPy, scikit-learn and literal sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from wsi.nn.mil.heads import Head, Targets, breslow, cox_loss

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def heads() -> list[Head]:
    return [
        Head("softmax", 4), Head("binary", 2), Head("ordinal", 5), Head("hazard", 5),
        Head("cox", 3, baseline=(0.8, 0.3)), Head("softmax", 4, temperature=2.5),
    ]  # fmt: skip


@pytest.mark.parametrize("head", heads(), ids=lambda head: f"{head.kind}-{head.temperature:g}")
def test_probabilities_are_not_negative_and_sum_to_one(head: Head) -> None:
    for scale in (1, 50):
        probabilities = head.probabilities(scale * LOGITS[:, : head.num_logits])
        assert probabilities.shape == (6, head.num_classes)
        assert float(probabilities.min()) >= 0
        torch.testing.assert_close(probabilities.sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("head", [h for h in heads() if h.kind not in ("cox", "hazard")], ids=lambda head: head.kind)
def test_the_loss_is_minus_the_log_of_the_probability(head: Head) -> None:
    logits = LOGITS[:, : head.num_logits]
    label = torch.arange(6) % head.num_classes
    own = head.probabilities(logits)[torch.arange(6), label]
    targets = Targets(label)
    assert float(head.loss(logits, targets)) == pytest.approx(float(-own.log().mean()), abs=1e-9)


def test_ordinal_is_made_of_falling_cumulative_logits() -> None:
    z = LOGITS.numpy()
    c = z[:, :1] - np.concatenate([np.zeros((6, 1)), np.log1p(np.exp(z[:, 1:]))], 1).cumsum(1)
    above = Head("ordinal", 5).probabilities(LOGITS).numpy()[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
    np.testing.assert_allclose(above, expit(c), atol=1e-12)
    assert (np.diff(c) < 0).all()


def test_a_hazard_is_the_chance_of_an_interval_given_that_it_is_reached() -> None:
    probabilities = Head("hazard", 5).probabilities(LOGITS).numpy()
    h = expit(LOGITS.numpy())
    for t in range(4):
        np.testing.assert_allclose(probabilities[:, t], h[:, t] * np.prod(1 - h[:, :t], axis=1), atol=1e-12)
    label, event = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([True, False, True, False, True, False])
    likelihood = []
    for i in range(6):
        t = int(label[i])
        seen = bool(event[i]) and t < 4
        likelihood.append(np.prod(1 - h[i, :t]) * (h[i, t] if seen else 1))
    loss = Head("hazard", 5).loss(LOGITS, Targets(label, event=event))
    assert float(loss) == pytest.approx(-np.log(likelihood).mean(), abs=1e-9)


def test_cox_is_the_partial_likelihood_with_ties() -> None:
    time = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 4.0])
    event = torch.tensor([True, True, True, True, False, False])
    risk = LOGITS[:, 0]
    expected = 0.0
    for i in range(6):
        if event[i]:
            expected -= float(risk[i]) - np.log(sum(np.exp(float(risk[j])) for j in range(6) if time[j] >= time[i]))
    assert float(cox_loss(risk, Targets(torch.zeros(6).long(), time, event))) == pytest.approx(expected / 4, abs=1e-6)
    nobody = Targets(torch.zeros(6).long(), time, torch.zeros(6, dtype=torch.bool))
    assert float(cox_loss(risk, nobody)) == 0


def test_without_covariates_breslow_is_nelson_aalen_and_cox_gives_it_back() -> None:
    time, event = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, True])
    baseline = breslow(np.zeros(4), time, event, [1.5, 3.5])
    np.testing.assert_allclose(baseline, np.exp([-1 / 4, -(1 / 4 + 1 / 2)]))
    probabilities = Head("cox", 3, baseline=tuple(baseline)).probabilities(torch.zeros(1, dtype=torch.float64))
    np.testing.assert_allclose(probabilities.numpy(), [1 - baseline[0], baseline[0] - baseline[1], baseline[1]])


@pytest.mark.parametrize("head", heads()[:4], ids=lambda head: head.kind)
def test_gradients_are_finite_far_out(head: Head) -> None:
    logits = (LOGITS[:, : head.num_logits].float() * 40).requires_grad_()
    targets = Targets(torch.arange(6) % head.num_classes, event=torch.ones(6, dtype=torch.bool))
    head.loss(logits, targets).backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
