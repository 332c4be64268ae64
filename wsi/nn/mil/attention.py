"""Attention-based MIL, plain and gated, and its additive form.

Written from the equations of Ilse, Tomczak & Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018
(arXiv:1802.04712), equations 7 to 9, with ``h_n`` the embedded features of tile ``n``::

    a_n = softmax_n( w^T tanh(V h_n) )                             plain
    a_n = softmax_n( w^T ( tanh(V h_n) * sigmoid(U h_n) ) )        gated
    logits = W sum_n a_n h_n + b

Weights sum to 1 and the classifier is linear, so each tile's contribution to the logits, ``a_n (W h_n + b)``, is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsi.nn.mil.net import BagScores, MilNet, Parts, Pooled, block_of_pool, softmax_pool, weighted_by_class


class AttentionMil(MilNet):
    """Attention pooling over the tile features of a bag, then a linear classifier.

    The order of the tiles does not matter. In a bag of one tile its attention is 1.

    Parameters
    ----------
    in_features, num_classes, hidden, dropout
        See ``MilNet``.
    attention : int
        Width of the attention branches V and U.
    gated : bool
        With the branch U.
    attention_dropout : float
        Probability of dropping an element of the branches, in training only.

    Examples
    --------
    >>> net = AttentionMil(in_features=4).eval()
    >>> scores = net(torch.ones(3, 4))
    >>> tuple(scores.logits.shape), tuple(scores.attention.shape), tuple(scores.contributions.shape)
    ((2,), (3,), (3, 2))
    """

    rows = 1  # of attention

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int = 2,
        hidden: int | Sequence[int] = 64,
        attention: int = 32,
        dropout: float = 0.25,
        gated: bool = True,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features=in_features, num_classes=num_classes, hidden=hidden, dropout=dropout)
        self.V = nn.Linear(self.width, attention)
        if gated:
            self.U = nn.Linear(self.width, attention)
        self.gated = gated
        self.w = nn.Linear(attention, self.rows)
        self.drop = nn.Dropout(attention_dropout)
        self.classifier: nn.Module = nn.Linear(self.width, num_classes)

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        pooled = self.pool(features)
        logits = self.classify(pooled)
        return BagScores(logits, weighted_by_class(pooled.weights, logits), pooled.weights * pooled.votes)

    def classify(self, pooled: Pooled) -> Tensor:
        """Pooled features (r, width) to logits (k,)."""
        logits: Tensor = self.classifier(pooled.sums[0]).float()
        return logits

    def scores_of(self, h: Tensor) -> Tensor:
        """Embedded features (b, width) to attention scores before the softmax (b, r)."""
        branch = self.drop(torch.tanh(self.V(h)))
        if self.gated:
            branch = branch * self.drop(torch.sigmoid(self.U(h)))
        scores: Tensor = self.w(branch)
        return scores.float()  # under autocast too: with 10^5 tiles a bfloat16 sum would not reach 1

    def votes_of(self, h: Tensor) -> Tensor:
        """Embedded features (b, width) to the logits of each tile alone (b, k)."""
        votes: Tensor = self.classifier(h)
        return votes.float()

    def pool(self, features: Tensor, rows: Tensor | None = None) -> Pooled:
        """Pool the tiles `rows` (default: all), in blocks."""

        def of(block: Tensor) -> Parts:
            h = self.embed(block)
            return block_of_pool(self.scores_of(h), h.float(), self.votes_of(h))

        return softmax_pool(*self.by_block(of, features, rows))


class AdditiveMil(AttentionMil):
    """Additive MIL: the logits are a sum over tiles of a nonlinear function of each tile.

    ``logits = sum_n psi(a_n h_n) + b`` (Javed et al. 2022, equation 5), with gated attention ``a``. `psi` is a
    perceptron with one hidden layer and no biases. With biases, each of 10^5 tiles without attention would add
    ``psi(0)``, and the logits would grow with the bag. Without, `psi` is positively homogeneous: ``psi(a h) = a
    psi(h)``. ``b`` is divided among the tiles by attention, so that the contributions sum to the logits.

    Parameters
    ----------
    arguments
        See ``AttentionMil``.
    psi : int
        Width of psi's hidden layer.

    References
    ----------
    Javed et al., "Additive MIL: Intrinsically Interpretable Multiple Instance Learning for Pathology", NeurIPS 2022,
    arXiv:2206.01794.
    """

    def __init__(self, *, num_classes: int = 2, psi: int = 32, **arguments: Any) -> None:
        super().__init__(num_classes=num_classes, **arguments)
        self.classifier = nn.Sequential(
            nn.Linear(self.width, psi, bias=False), nn.ReLU(), nn.Linear(psi, num_classes, bias=False)
        )
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def votes_of(self, h: Tensor) -> Tensor:
        """Embedded features (b, width) to ``psi(h) + b`` (b, k)."""
        return super().votes_of(h) + self.bias

    def classify(self, pooled: Pooled) -> Tensor:
        return (pooled.weights * pooled.votes).sum(0)
