"""DSMIL: the critical tile of each class, and attention by similarity to it.

Written from the equations of Li, Li & Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image
Classification with Self-supervised Contrastive Learning", CVPR 2021 (arXiv:2011.08939)::

    c_n = W0 h_n                      m_c = argmax_n c_nc          stream 1: logits of single tiles
    A_nc = softmax_n( q(h_n) . q(h_{m_c}) / sqrt(width of q) )     stream 2: attention
    B_c = sum_n A_nc h_n              logits_k = sum_c W_kc . B_c + b_k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsi.nn.mil.net import (
    BLOCK,
    BagScores,
    LossOf,
    MilNet,
    Parts,
    TrainingBag,
    block_of_pool,
    softmax_pool,
    weighted_by_class,
)


class DsMil(MilNet):
    """Dual-stream MIL.

    The logits are those of stream 2. Stream 1 chooses the critical tiles, and its logits give half of the loss.
    Contributions are exact: ``sum_c A_nc (W_kc . h_n)``, plus the bias divided by attention.

    Parameters
    ----------
    in_features, num_classes, hidden, dropout
        See ``MilNet``.
    query : int
        Width of q, a two-layer network.

    Examples
    --------
    >>> net = DsMil(in_features=4, num_classes=1, hidden=0).eval()
    >>> tuple(net(torch.ones(3, 4)).contributions.shape)
    (3, 1)
    """

    def __init__(self, *, in_features: int, num_classes: int = 2, query: int = 128, **arguments: Any) -> None:
        super().__init__(in_features=in_features, num_classes=num_classes, **arguments)
        self.tiles = nn.Linear(self.width, num_classes)
        self.q = nn.Sequential(nn.Linear(self.width, query), nn.ReLU(), nn.Linear(query, query), nn.Tanh())
        self.classifier = nn.Linear(num_classes * self.width, num_classes)  # published as a convolution

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        return self._streams(features)[0]

    def loss(self, bags: Sequence[TrainingBag], targets: Any, loss_of: LossOf) -> Tensor:
        """Return the mean of the losses of both streams."""
        both = []
        for bag in bags:
            self._check(*bag)
            scores, critical = self._streams(bag.features)
            both.append(torch.stack([scores.logits, critical]))
        logits = torch.stack(both)  # (b, 2, k)
        return 0.5 * loss_of(logits[:, 0], targets) + 0.5 * loss_of(logits[:, 1], targets)

    def _streams(self, features: Tensor) -> tuple[BagScores, Tensor]:
        critical = self.embed(features[self._critical(features)])  # (k, width)
        towards = self.q(critical).float()
        k = self.num_classes

        def of(block: Tensor, towards: Tensor) -> Parts:
            h = self.embed(block)
            scores = self.q(h).float() @ towards.T / towards.shape[1] ** 0.5  # (b, k)
            # votes[n, c, j]: what tile n adds to logit j by the attention of class c
            votes = torch.einsum("nd,jcd->ncj", h.float(), self.classifier.weight.view(k, k, -1))
            return block_of_pool(scores, h.float(), votes)

        pooled = softmax_pool(*self.by_block(of, features, carried=(towards,)))
        logits = self.classifier(pooled.sums.flatten()).float()
        attention = weighted_by_class(pooled.weights, logits)
        contributions = torch.einsum("nc,ncj->nj", pooled.weights, pooled.votes)
        contributions = contributions + attention[:, None] * self.classifier.bias
        return BagScores(logits, attention, contributions), self.tiles(critical).float().diagonal()

    @torch.no_grad()
    def _critical(self, features: Tensor) -> Tensor:
        """Return the index of the tile with each class's largest logit (k,)."""

        def of(block: Tensor) -> Parts:
            best = self.tiles(self.embed(block)).float().max(0)
            return best.values[None], best.indices[None]

        values, inside = self.by_block(of, features)  # (blocks, k)
        block = values.argmax(0)
        return block * BLOCK + inside.gather(0, block[None])[0]
