"""Pooling without learnt attention: mean, max, top-k and noisy-or, the baselines for all other models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi.nn.mil.net import BLOCK, BagScores, MilNet, Parts, weighted_by_class


class _Linear(MilNet):
    """An embedding with a linear classifier."""

    def __init__(self, *, num_classes: int = 2, **arguments: Any) -> None:
        super().__init__(num_classes=num_classes, **arguments)
        self.classifier = nn.Linear(self.width, num_classes)


class MeanMil(_Linear):
    """Mean of the embedded features, then a linear classifier: ``logits = W mean_n(h_n) + b``. Attention is uniform."""

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        n = len(features)

        def of(block: Tensor) -> Parts:
            h = self.embed(block)
            return h.float().sum(0)[None], self.classifier(h).float()

        sums, votes = self.by_block(of, features)
        logits = self.classifier(sums.sum(0) / n).float()
        return BagScores(logits, torch.full((n,), 1 / n, device=logits.device), votes / n)


class MaxMil(_Linear):
    """Largest value of each embedded feature, then a linear classifier: ``logits = W max_n(h_n) + b``.

    A tile's attention is the share of features whose largest value it has; the bias is divided by attention.
    """

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:

        def of(block: Tensor) -> Parts:
            best = self.embed(block).float().max(0)
            return best.values[None], best.indices[None]

        largest, inside = self.by_block(of, features)  # (blocks, width)
        starts = torch.arange(len(largest), device=features.device) * BLOCK
        values, which = largest.max(0)
        winner = (inside + starts[:, None]).gather(0, which[None])[0]
        logits = self.classifier(values).float()
        attention = torch.zeros(len(features), device=logits.device)
        attention.index_add_(0, winner, torch.full((self.width,), 1 / self.width, device=logits.device))
        contributions = attention[:, None] * self.classifier.bias
        contributions = contributions.index_add(0, winner, (self.classifier.weight * values).T)
        return BagScores(logits, attention, contributions)


class TopKMil(_Linear):
    """Mean of the `top` largest logits of single tiles, for each class; with ``top=1`` the instance maximum.

    Attention is shared equally by the tiles taken.

    Parameters
    ----------
    in_features, num_classes, hidden, dropout
        See ``MilNet``.
    top : int
        Number of tiles taken; in smaller bags, all.
    """

    def __init__(self, *, top: int = 10, **arguments: Any) -> None:
        if top < 1:
            raise TypeError(f"top-k: top={top} must be at least 1")
        super().__init__(**arguments)
        self.top = top

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        (votes,) = self.by_block(lambda block: (self.classifier(self.embed(block)).float(),), features)
        best = votes.topk(min(self.top, len(votes)), dim=0)  # (top, k)
        logits = best.values.mean(0)
        taken = torch.zeros_like(votes).scatter(0, best.indices, 1 / len(best.indices))
        return BagScores(logits, weighted_by_class(taken, logits), taken * votes)


class NoisyOrMil(MilNet):
    """A bag is positive where at least one tile is: ``p = 1 - prod_n (1 - p_n)``.

    The first of k logits is 0 and stands for "none of the classes", so that the softmax of two logits is exactly
    ``(1 - p, p)``. A single logit is that of ``p``. Attention is each tile's share of
    ``-log(1 - p) = -sum_n log(1 - p_n)``. Contributions are None: the logits are not a sum over tiles.

    References
    ----------
    Maron & Lozano-Pérez, "A framework for multiple-instance learning", NIPS 1997.
    """

    def __init__(self, *, num_classes: int = 2, **arguments: Any) -> None:
        super().__init__(num_classes=num_classes, **arguments)
        self.classifier = nn.Linear(self.width, max(1, num_classes - 1))
        nn.init.constant_(self.classifier.bias, -4.0)  # at 0, 10^3 tiles would start at p = 1 without gradient

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        (votes,) = self.by_block(lambda block: (self.classifier(self.embed(block)).float(),), features)
        # log(-log(1 - p_n)), whose softmax is the share. For small v, softplus(v) is exp(v) and would underflow.
        evidence = torch.where(votes < -15, votes, functional.softplus(votes.clamp(min=-15)).log())
        log_total = evidence.logsumexp(0)
        total = log_total.exp()
        # logit(p) = log(p / (1 - p)) = log(exp(total) - 1): about log(total) if small, and total if large
        logits = torch.log(torch.expm1(total.clamp(1e-6, 20)))
        logits = torch.where(total > 20, total, torch.where(total < 1e-6, log_total, logits))
        attention = weighted_by_class(torch.softmax(evidence, 0), logits)
        if self.num_classes > 1:
            logits = torch.cat([logits.new_zeros(1), logits])
        return BagScores(logits, attention, None)
