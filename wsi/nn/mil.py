"""Gated-attention multiple-instance learning: one grade for a bag of tiles, and how much each tile counted.

Written from the equations of Ilse, Tomczak & Welling, "Attention-based Deep Multiple Instance Learning",
ICML 2018 (arXiv:1802.04712), equations 8 and 9, with ``h_k`` the embedded features of tile ``k``::

    a_k = softmax_k( w^T ( tanh(V h_k) * sigmoid(U h_k) ) )
    z   = sum_k a_k h_k
    logits = W z + b
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class SlideGrade(NamedTuple):
    """What the head says about one bag; always the same three tensors, whatever the bag."""

    logits: Tensor
    """float32 (k,): one a class."""
    probabilities: Tensor
    """float32 (k,): the softmax of the logits, sums to 1."""
    attention: Tensor
    """float32 (n,): the weight of each tile in bag order, not negative, sums to 1."""


class GatedAttentionMil(nn.Module):
    """Gated-attention pooling over one bag of tile features, then a linear classifier.

    The order of the tiles does not matter, and a bag of one tile is graded like any other (its attention
    is 1). Features are standardised first with `mean` and `std`, buffers that travel in the weights file, so
    that callers hand over what the encoder produced and nothing else.

    Parameters
    ----------
    in_features : int
        Width ``d`` of the tile features, the encoder's ``num_features``.
    num_classes : int
        Number of classes ``k``.
    hidden : int
        Width of the Linear + ReLU embedding in front of the attention; 0 leaves the features as they are.
    attention : int
        Width of the two attention branches V and U.
    dropout : float
        Probability of dropping an embedded feature, in training only.

    References
    ----------
    Ilse, Tomczak & Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv:1802.04712.

    Examples
    --------
    >>> head = GatedAttentionMil(in_features=4).eval()
    >>> grade = head(torch.ones(3, 4))
    >>> tuple(grade.logits.shape), tuple(grade.attention.shape)
    ((2,), (3,))
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int = 2,
        hidden: int = 64,
        attention: int = 32,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))
        self.embedding: nn.Module = nn.Identity()
        if hidden > 0:
            self.embedding = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout))
        width = hidden if hidden > 0 else in_features
        self.V = nn.Linear(width, attention)
        self.U = nn.Linear(width, attention)
        self.w = nn.Linear(attention, 1)
        self.classifier = nn.Linear(width, num_classes)

    def standardise(self, features: Tensor) -> None:
        """Take `mean` and `std` from training tiles.

        Parameters
        ----------
        features : float Tensor (n, d)
            The tiles of the training bags, all in one table. A feature that never varies is only centred.
        """
        self._check(features)
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> SlideGrade:
        """Grade one bag.

        Parameters
        ----------
        features : float Tensor (n, d)
            The features of the bag's ``n`` tiles, in any order.

        Returns
        -------
        SlideGrade
            Logits (k,), probabilities (k,) and attention (n,), all float32.

        Raises
        ------
        ValueError
            The bag is empty, its features are not ``d`` wide, or some are not finite.
        """
        self._check(features)
        h = self.embedding((features.float() - self.mean) / self.std)  # (n, width)
        scores = self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))).squeeze(1)  # (n,)
        # The softmax runs in float32 also under autocast: with 10^5 tiles a bf16 sum would not reach 1.
        attention = torch.softmax(scores.float(), dim=0)
        z = attention @ h.float()  # (width,)
        logits = self.classifier(z).float()  # (k,)
        return SlideGrade(logits, torch.softmax(logits, dim=0), attention)

    def _check(self, features: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"MIL bag: features have shape {tuple(features.shape)}, but this head reads "
                f"(n, {self.in_features}); pass the features of the encoder it was trained with"
            )
        if len(features) == 0:
            raise ValueError(
                "MIL bag: it holds no tiles, so there is nothing to grade; "
                "check the tissue mask and the tile size, or report the slide as not gradable"
            )
        bad = ~torch.isfinite(features).all(dim=1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"MIL bag: {int(bad.sum())} of {len(features)} tiles have features that are not finite "
                f"(the first is tile {first}); compute them again or leave those tiles out"
            )
