"""DTFD-MIL: a bag is split into pseudo-bags, whose pooled features a second tier classifies.

Written from the equations of Zhang et al., "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for
Histopathology Whole Slide Image Classification", CVPR 2022 (arXiv:2203.12081), with aggregated features (AFS)::

    f_m = sum_{n in m} a_n h_n        a: gated attention, softmax inside pseudo-bag m      tier 1
    logits = W2 sum_m b_m f_m + c2    b: gated attention over the pseudo-bags              tier 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi.nn.mil.attention import AttentionMil
from wsi.nn.mil.net import BagScores, LossOf, TrainingBag


class DtfdMil(AttentionMil):
    """Double-tier feature distillation.

    Tiles are sorted by their boxes (or kept in bag order without boxes), then split by a permutation that depends only
    on `seed` and the number of tiles. So a slide has the same grade in any order of its tiles. In training each pass
    draws a new split. Contributions ``b_m a_n (W2 h_n + c2)`` are exact.

    Parameters
    ----------
    in_features, num_classes, hidden, attention, dropout
        See ``AttentionMil``; tier 2 has attention of the same width.
    groups : int
        Number of pseudo-bags; in smaller bags, the number of tiles.
    seed : int
        Of the split outside training.

    Notes ----- The published program shuffles at test time, so that grades vary between runs. It also makes empty
    pseudo-bags of small bags, and steps two optimisers alternately. Here both tiers' losses are summed, and the second
    tier's gradient reaches the first.
    """

    def __init__(
        self, *, in_features: int, num_classes: int = 2, attention: int = 32, groups: int = 4, seed: int = 0,
        **arguments: Any,
    ) -> None:  # fmt: skip
        if groups < 1:
            raise TypeError(f"DTFD: groups={groups} must be at least 1")
        super().__init__(in_features=in_features, num_classes=num_classes, attention=attention, **arguments)
        self.groups = groups
        self.seed = seed
        self.second = AttentionMil(in_features=self.width, num_classes=num_classes, hidden=0, attention=attention)
        del self.second.mean, self.second.std  # its input is not standardised

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        return self._tiers(features, boxes)[0]

    def loss(self, bags: Sequence[TrainingBag], targets: Any, loss_of: LossOf) -> Tensor:
        """Return the bag loss plus the mean loss of the pseudo-bags, each with its bag's label."""
        of_bags, of_groups, owner = [], [], []
        for i, bag in enumerate(bags):
            self._check(*bag)
            scores, groups = self._tiers(bag.features, bag.boxes)
            of_bags.append(scores.logits)
            of_groups.append(groups)
            owner += [i] * len(groups)
        index = torch.tensor(owner, device=of_bags[0].device)
        return loss_of(torch.stack(of_bags), targets) + loss_of(torch.cat(of_groups), targets[index])

    def _tiers(self, features: Tensor, boxes: Tensor | None) -> tuple[BagScores, Tensor]:
        groups = self._groups(features, boxes)
        pooled = [self.pool(features, rows) for rows in groups]
        distilled = torch.cat([part.sums for part in pooled])  # (m, width)
        of_groups = self.classifier(distilled).float()
        scores = self.second.scores_of(distilled)
        b = torch.softmax(scores, 0)  # (m, 1)
        logits = self.second.classifier((b.T @ distilled)[0]).float()
        order = torch.cat(groups)
        weights = torch.cat([part.weights[:, 0] * b_m for part, b_m in zip(pooled, b, strict=True)])
        votes = torch.cat([part.votes for part in pooled])
        attention = torch.zeros_like(weights).scatter(0, order, weights)
        contributions = torch.zeros_like(votes).index_copy(0, order, weights[:, None] * votes)
        return BagScores(logits, attention, contributions), of_groups

    def votes_of(self, h: Tensor) -> Tensor:
        """Embedded features (b, width) to tier 2's logits of each tile alone (b, k)."""
        return self.second.votes_of(h)

    def _groups(self, features: Tensor, boxes: Tensor | None) -> list[Tensor]:
        n = len(features)
        order = np.arange(n) if boxes is None else np.lexsort(boxes.cpu().numpy().T)
        if self.training:
            shuffled = order[torch.randperm(n).numpy()]
        else:
            shuffled = order[np.random.default_rng((self.seed, n)).permutation(n)]
        parts = np.array_split(shuffled, min(self.groups, n))
        return [torch.from_numpy(np.ascontiguousarray(part)).to(features.device) for part in parts]
