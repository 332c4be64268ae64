"""CLAM: gated attention, with an additional loss on the tiles of highest and lowest attention.

Written from the equations of Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide
images", Nature Biomedical Engineering 2021 (arXiv:2004.09666). Each class has a classifier of single tiles. For the
bag's own class, it learns to call the `instances` tiles of highest attention 1 and those of lowest attention 0. For the
other classes, where classes exclude each other (`subtyping`), it learns to call those of highest attention 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wsi.nn.mil.attention import AttentionMil
from wsi.nn.mil.net import LossOf, Pooled, TrainingBag


class ClamSb(AttentionMil):
    """CLAM with a single attention branch.

    Parameters
    ----------
    dropout and others
        See ``AttentionMil``; the dropout also applies to the attention branches.
    instances : int
        Tiles learnt from at each end, B; half the tiles of a bag with fewer than 2 B.
    bag_weight : float
        Weight of the bag loss in the sum.
    subtyping : bool
        The classes exclude each other: also learn that tiles are *not* of the other classes.

    Notes
    -----
    The tile loss is cross-entropy (the published program's other choice, a smoothed top-1 SVM, is not here).
    It needs a class index as target: not for survival.
    """

    def __init__(
        self, *, num_classes: int = 2, dropout: float = 0.25, instances: int = 8, bag_weight: float = 0.7,
        subtyping: bool = False, **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, dropout=dropout, attention_dropout=dropout, **arguments)
        self.instances = instances
        self.bag_weight = bag_weight
        self.subtyping = subtyping
        self.instance_classifiers = nn.ModuleList(nn.Linear(self.width, 2) for _ in range(num_classes))

    def loss(self, bags: Sequence[TrainingBag], targets: Any, loss_of: LossOf) -> Tensor:
        """Return ``bag_weight * bag loss + (1 - bag_weight) * tile loss``."""
        labels = getattr(targets, "label", None)
        if labels is None or len(self.instance_classifiers) <= int(labels.max()):
            raise ValueError("CLAM learns from single tiles of each class: it needs a softmax head with classes")
        logits, instance = [], []
        for bag, label in zip(bags, labels.tolist(), strict=True):
            self._check(*bag)
            pooled = self.pool(bag.features)
            logits.append(self.classify(pooled))
            instance.append(self._instance_loss(bag.features, pooled.weights.detach(), label))
        of_bags, of_tiles = loss_of(torch.stack(logits), targets), torch.stack(instance).mean()
        return self.bag_weight * of_bags + (1 - self.bag_weight) * of_tiles

    def _instance_loss(self, features: Tensor, weights: Tensor, label: int) -> Tensor:
        k = min(self.instances, len(features) // 2)
        if k == 0:  # a single tile
            return features.new_zeros((), dtype=torch.float32)
        losses = []
        for i, classifier in enumerate(self.instance_classifiers):
            if i != label and not self.subtyping:
                continue
            row = weights[:, i if weights.shape[1] > 1 else 0]
            most = row.topk(k).indices
            tiles, truth = (
                (torch.cat([most, (-row).topk(k).indices]), [1] * k + [0] * k) if i == label else (most, [0] * k)
            )
            logits = classifier(self.embed(features[tiles]))
            losses.append(functional.cross_entropy(logits, torch.tensor(truth, device=logits.device)))
        return torch.stack(losses).sum() / (len(self.instance_classifiers) if self.subtyping else 1)


class ClamMb(ClamSb):
    """CLAM with one attention branch and one linear classifier a class; parameters as for ``ClamSb``."""

    def __init__(self, *, num_classes: int = 2, **arguments: Any) -> None:
        self.rows = num_classes
        super().__init__(num_classes=num_classes, **arguments)

    def classify(self, pooled: Pooled) -> Tensor:
        """Return each class's logit from its own pooled features: the diagonal of (r, k)."""
        logits: Tensor = self.classifier(pooled.sums).float().diagonal()
        return logits
