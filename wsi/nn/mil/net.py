"""What every MIL network is: a bag of tile features in; logits, attention and contributions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Tiles worked on at a time. Beyond its features, what a bag needs in memory is a block and a few numbers a tile; small
#: blocks, which stay in the processor's cache, are faster too.
BLOCK = 4096

#: (logits (b, k), targets) -> scalar; see ``wsi.nn.mil.heads``.
LossOf = Callable[[Tensor, Any], Tensor]


class BagScores(NamedTuple):
    """What a network says about one bag; always the same three, whatever the bag.

    Attributes
    ----------
    logits : float32 Tensor (k,)
    attention : float32 Tensor (n,)
        Weight of each tile in bag order, not negative, sums to 1. Where a network has a row of attention a class,
        the rows are weighted by the softmax of the logits.
    contributions : float32 Tensor (n, k), optional
        What each tile adds to each logit: the sum over tiles is the logits. None where the network is not a sum.
    """

    logits: Tensor
    attention: Tensor
    contributions: Tensor | None


class TrainingBag(NamedTuple):
    """A bag to learn from: features (n, d) and, where known, level-0 boxes (n, 4)."""

    features: Tensor
    boxes: Tensor | None = None


class MilNet(nn.Module):
    """Standardisation, an embedding, and the contract; a family adds `score`, and `loss` where it has its own.

    Features are standardised first with `mean` and `std`, buffers that travel in the weights file, so that
    callers hand over what the encoder produced and nothing else.

    Parameters
    ----------
    in_features : int
        Width ``d`` of the tile features.
    num_classes : int
        Logits ``k``: one a class; binary and survival heads take fewer (``wsi.nn.mil.heads``).
    hidden : int or sequence of int
        Widths of Linear + ReLU + Dropout layers in front; 0 or () leaves the features as they are.
    dropout : float
        Probability of dropping an embedded feature, in training only.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, in_features: int, num_classes: int = 2, hidden: int | Sequence[int] = 64, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))
        layers: list[nn.Module] = []
        self.width = in_features
        for width in [hidden] * (hidden > 0) if isinstance(hidden, int) else hidden:
            layers += [nn.Linear(self.width, width), nn.ReLU(), nn.Dropout(dropout)]
            self.width = width
        self.embedding: nn.Module = nn.Sequential(*layers) if layers else nn.Identity()

    def standardise(self, features: Tensor) -> None:
        """Take `mean` and `std` from training tiles.

        Parameters
        ----------
        features : float Tensor (n, d)
            The tiles of the training bags, all in one table. A feature that never varies is only centred.
        """
        self._check(features, None)
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.set_scale(mean, std)

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """Take `mean` and `std` (d,) as given; see ``standardise``."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, features: Tensor, boxes: Tensor | None = None) -> BagScores:
        """Score one bag.

        Parameters
        ----------
        features : float Tensor (n, d)
            The features of the bag's ``n`` >= 1 tiles; any float dtype, computed in float32.
        boxes : float Tensor (n, 4), optional
            Level-0 x, y, w, h of each tile, for networks that know where tiles are.

        Raises
        ------
        ValueError
            The bag is empty, its features are not ``d`` wide, some are not finite, or boxes are of another number.
        """
        self._check(features, boxes)
        return self.score(features, boxes)

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        """Score one bag that has been checked; see ``forward``."""
        raise NotImplementedError

    def loss(self, bags: Sequence[TrainingBag], targets: Any, loss_of: LossOf) -> Tensor:
        """Return the scalar to minimise for a batch of bags: by default the head's loss of the logits."""
        return loss_of(torch.stack([self(*bag).logits for bag in bags]), targets)

    def embed(self, features: Tensor) -> Tensor:
        """Tile features (b, d) to embedded features (b, width), float32."""
        embedded: Tensor = self.embedding((features.float() - self.mean) / self.std)
        return embedded

    def by_block(self, of: Callable[[Tensor], Any], features: Tensor, rows: Tensor | None = None) -> Iterator[Any]:
        """Give ``of(block of features)`` block after block, over all tiles or over those of `rows`.

        While training, what a block computed on its way is computed again for the gradient instead of being
        kept, so that the memory of a bag does not grow with the network's width either.
        """
        n = len(features) if rows is None else len(rows)
        for start in range(0, n, BLOCK):
            block = slice(start, start + BLOCK)
            which = block if rows is None else rows[block]

            def part(which: Any = which) -> Any:  # picked inside: what is picked by rows would be kept as a copy
                return of(features[which])

            yield checkpoint(part, use_reentrant=False) if torch.is_grad_enabled() and n > BLOCK else part()

    def _check(self, features: Tensor, boxes: Tensor | None) -> None:
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
        if boxes is not None and tuple(boxes.shape) != (len(features), 4):
            raise ValueError(f"MIL bag: {len(features)} tiles and boxes of shape {tuple(boxes.shape)}; pass (n, 4)")
        if bool(features.sum(dtype=torch.float32).isfinite()):
            return  # one number that is not finite would make the sum so; tile by tile takes ten times as long
        bad = torch.cat([~torch.isfinite(block).all(dim=1) for block in features.split(BLOCK)])
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"MIL bag: {int(bad.sum())} of {len(features)} tiles have features that are not finite "
                f"(the first is tile {first}); compute them again or leave those tiles out"
            )


class Pooled(NamedTuple):
    """A softmax-weighted sum over tiles, for each of r rows of weights.

    Attributes
    ----------
    weights : (n, r)
        Each column sums to 1.
    sums : (r, width)
        ``weights.T @ values``.
    votes : (n, k)
        What `of` said of each tile beside.
    """

    weights: Tensor
    sums: Tensor
    votes: Tensor


def softmax_pool(parts: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Pooled:
    """Merge blocks into one softmax over all tiles and its weighted sum, exactly, in one pass.

    Parameters
    ----------
    parts : iterator of (scores (b, r), sums (r, width), votes (b, k))
        Of each block: its scores, ``exp(scores - scores.amax(0)).T @ values``, and what else is kept a tile.

    References
    ----------
    Milakov & Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    blocks = list(parts)
    scores = torch.cat([block[0] for block in blocks])
    top = scores.amax(0)  # (r,)
    exponent = torch.exp(scores - top)
    total = exponent.sum(0)
    # Each block's sum was taken relative to its own maximum.
    sums = torch.stack([torch.exp(s.amax(0) - top)[:, None] * part for s, part, _ in blocks]).sum(0)
    return Pooled(exponent / total, sums / total[:, None], torch.cat([block[2] for block in blocks]))


def weighted_by_class(rows: Tensor, logits: Tensor) -> Tensor:
    """Attention rows (n, r) to one (n,): the rows weighted by the softmax of the logits (r,)."""
    return rows[:, 0] if rows.shape[1] == 1 else rows @ torch.softmax(logits, 0)
