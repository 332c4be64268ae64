"""The interface of MIL networks: from a bag of tile features to logits, attention and contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

#: Tiles computed at a time. A bag's memory beyond its features is a block and a few numbers a tile. Small blocks stay
#: in the processor's cache, and are faster.
BLOCK = 4096

#: Results of one block, or of all blocks concatenated.
Parts = tuple[Tensor, ...]
#: (logits (b, k), targets) -> scalar; see ``wsi.nn.mil.heads``.
LossOf = Callable[[Tensor, Any], Tensor]


class BagScores(NamedTuple):
    """The output of a network for one bag.

    Attributes
    ----------
    logits : float32 Tensor (k,)
    attention : float32 Tensor (n,)
        Weight of each tile in bag order, not negative; sums to 1. Where a network has one attention row a class, this
        is the mean of the rows weighted by the softmax of the logits.
    contributions : float32 Tensor (n, k), optional
        What each tile adds to each logit; they sum to the logits. None where the network is not a sum over tiles.
    """

    logits: Tensor
    attention: Tensor
    contributions: Tensor | None


class TrainingBag(NamedTuple):
    """A bag for training: features (n, d) and, where known, level-0 boxes (n, 4)."""

    features: Tensor
    boxes: Tensor | None = None


class MilNet(nn.Module):
    """Base class with standardisation and embedding; subclasses define `score`, and optionally `loss`.

    Features are standardised with the buffers `mean` and `std`, which are saved with the weights. So callers pass the
    encoder's output unchanged.

    Parameters
    ----------
    in_features : int
        Width ``d`` of the tile features.
    num_classes : int
        Logits ``k``: one a class; binary and survival heads take fewer (``wsi.nn.mil.heads``).
    hidden : int or sequence of int
        Widths of the embedding's layers (Linear, ReLU, Dropout); 0 or () for no embedding.
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
        """Set `mean` and `std` from the tiles of all training bags (n, d). A constant feature is only centred."""
        self._check(features, None)
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.set_scale(mean, std)

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """Set `mean` and `std` (d,); see ``standardise``."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, features: Tensor, boxes: Tensor | None = None) -> BagScores:
        """Score one bag.

        Parameters
        ----------
        features : float Tensor (n, d)
            Features of ``n`` >= 1 tiles, of any float dtype; computed in float32.
        boxes : float Tensor (n, 4), optional
            Level-0 x, y, w, h of each tile, for networks that use positions.

        Raises
        ------
        ValueError
            The bag is empty, its features are not ``d`` wide or not finite, or boxes are of another number.
        """
        self._check(features, boxes)
        return self.score(features, boxes)

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        """Score one checked bag; see ``forward``."""
        raise NotImplementedError

    def loss(self, bags: Sequence[TrainingBag], targets: Any, loss_of: LossOf) -> Tensor:
        """Return the loss of a batch of bags; by default the head's loss of the logits."""
        return loss_of(torch.stack([self(*bag).logits for bag in bags]), targets)

    def embed(self, features: Tensor) -> Tensor:
        """Tile features (b, d) to embedded features (b, width), float32."""
        embedded: Tensor = self.embedding((features.float() - self.mean).div_(self.std))
        return embedded

    def by_block(
        self, of: Callable[..., Parts], features: Tensor, rows: Tensor | None = None, carried: Parts = ()
    ) -> Parts:
        """Apply `of` to the features block by block, and concatenate the results.

        In training, a block's intermediate results are recomputed for the gradient instead of being kept, so that
        memory does not grow with bag size times network width.

        Parameters
        ----------
        of : callable
            From a block (b, d), and `carried`, to tensors with b rows, or with one row a block.
        features : float Tensor (n, d)
        rows : int64 Tensor (m,), optional
            Tiles to take; default: all.
        carried : tuple of Tensor
            Other inputs of `of` besides this network's weights that need a gradient.
        """
        n = len(features) if rows is None else len(rows)
        if n <= BLOCK or features.requires_grad:  # a gradient of the features needs their memory anyway
            return of(features if rows is None else features[rows], *carried)
        blocks = _Blocks(of, features, rows, n, self.training)
        if not torch.is_grad_enabled():
            return blocks.run(carried)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        parts: Parts = _Streamed.apply(blocks, len(carried), *carried, *weights)  # type: ignore[no-untyped-call]
        return parts

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
        # A sum is finite only if all numbers are. Checking each tile takes ten times as long; one sum over float16
        # features would copy them all.
        total = features.new_zeros((), dtype=torch.float32)
        for block in features.split(BLOCK):
            total += block.sum(dtype=torch.float32)
        if bool(total.isfinite()):
            return
        bad = torch.cat([~torch.isfinite(block).all(dim=1) for block in features.split(BLOCK)])
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"MIL bag: {int(bad.sum())} of {len(features)} tiles have features that are not finite "
                f"(the first is tile {first}); compute them again or leave those tiles out"
            )


class _Blocks:
    """The blocks of a bag, and the random and autocast states needed to recompute them.

    Results are written to tensors that are allocated once. Small tensors that stay, each between the large temporary
    ones of two blocks, would keep the allocator from reusing the large ones' memory.
    """

    def __init__(self, of: Callable[..., Parts], features: Tensor, rows: Tensor | None, n: int, random: bool) -> None:
        self._of, self._features, self._rows, self.random = of, features, rows, random
        self.spans = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
        self._random_states: list[tuple[Tensor, Any]] = []
        self._device = features.device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    def part(self, span: slice, carried: Parts) -> Parts:
        return self._of(self._features[span if self._rows is None else self._rows[span]], *carried)

    def run(self, carried: Parts) -> Parts:
        whole: list[Tensor] = []
        for i, span in enumerate(self.spans):
            if self.random:
                self._random_states.append((torch.get_rng_state(), get_device_states(self._features)))
            parts = self.part(span, carried)
            if not whole:  # one row a block, or one row a tile
                sizes = [len(self.spans) if len(x) == 1 else self.spans[-1].stop for x in parts]
                whole = [x.new_empty((size, *x.shape[1:])) for size, x in zip(sizes, parts, strict=True)]
            for x, into in zip(parts, whole, strict=True):
                into[self._place(into, i)] = x
        return tuple(whole)

    def recompute(self, i: int, carried: Parts, gradients: Sequence[Tensor]) -> tuple[Parts, list[Tensor]]:
        """Recompute block i with its graph; return it with its share of the gradients."""
        enabled, dtype = self._autocast
        with torch.enable_grad(), torch.autocast(self._device, dtype, enabled=enabled):
            if self.random:
                cpu, (devices, states) = self._random_states[i]
                torch.set_rng_state(cpu)
                set_device_states(devices, states)
            parts = self.part(self.spans[i], carried)
        return parts, [gradient[self._place(gradient, i)] for gradient in gradients]

    def _place(self, whole: Tensor, i: int) -> slice:
        return slice(i, i + 1) if len(whole) == len(self.spans) else self.spans[i]


class _Streamed(torch.autograd.Function):
    """Runs blocks without their graphs; backward rebuilds one block's graph at a time."""

    @staticmethod
    def forward(ctx: Any, blocks: _Blocks, n_carried: int, *tensors: Tensor) -> Parts:
        ctx.blocks, ctx.n_carried = blocks, n_carried
        ctx.save_for_backward(*tensors)
        whole = blocks.run(tensors[:n_carried])
        ctx.mark_non_differentiable(*(x for x in whole if not x.is_floating_point()))
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        blocks, tensors = ctx.blocks, ctx.saved_tensors
        carried = tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors[: ctx.n_carried])
        leaves = [*carried, *tensors[ctx.n_carried :]]
        wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
        totals: list[Tensor | None] = [None] * len(leaves)
        with torch.random.fork_rng(enabled=blocks.random):
            for i in range(len(blocks.spans)):
                parts, shares = blocks.recompute(i, carried, gradients)
                those = [(x, share) for x, share in zip(parts, shares, strict=True) if x.requires_grad]
                outputs, share = zip(*those, strict=True)
                found = torch.autograd.grad(outputs, [leaves[j] for j in wanted], share, allow_unused=True)
                for j, gradient in zip(wanted, found, strict=True):
                    if gradient is not None:
                        total = totals[j]
                        totals[j] = gradient.clone() if total is None else total.add_(gradient)
        return (None, None, *totals)


class Pooled(NamedTuple):
    """A softmax-weighted sum over tiles, for each of r rows of weights.

    Attributes
    ----------
    weights : (n, r)
        Each column sums to 1.
    sums : (r, width)
        ``weights.T @ values``.
    votes : (n, k)
        Logits of each tile alone.
    """

    weights: Tensor
    sums: Tensor
    votes: Tensor


def softmax_pool(scores: Tensor, tops: Tensor, sums: Tensor, votes: Tensor) -> Pooled:
    """Merge blocks into one softmax over all tiles and its weighted sum, exactly, in one pass.

    Parameters
    ----------
    scores : (n, r)
        Of each tile.
    tops : (blocks, r)
        ``scores.amax(0)`` of each block.
    sums : (blocks, r, width)
        ``exp(scores - scores.amax(0)).T @ values`` of each block.
    votes : (n, k)
        Passed through.

    References
    ----------
    Milakov & Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    top = scores.amax(0)  # (r,)
    exponent = torch.exp(scores - top)
    total = exponent.sum(0)
    # Each block's sum was taken relative to its own maximum.
    merged = (torch.exp(tops - top)[:, :, None] * sums).sum(0)
    return Pooled(exponent / total, merged / total[:, None], votes)


def block_of_pool(scores: Tensor, values: Tensor, votes: Tensor) -> Parts:
    """Return a block's part of ``softmax_pool`` from scores (b, r), values (b, width) and votes (b, k)."""
    top = scores.amax(0)
    return scores, top[None], (torch.exp(scores - top).T @ values)[None], votes


def weighted_by_class(rows: Tensor, logits: Tensor) -> Tensor:
    """Attention rows (n, r) to one row (n,): their mean weighted by the softmax of the logits (r,)."""
    return rows[:, 0] if rows.shape[1] == 1 else rows @ torch.softmax(logits, 0)
