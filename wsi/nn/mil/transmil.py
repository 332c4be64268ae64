"""TransMIL: self-attention among all tiles by Nystrom's approximation, with positions encoded by a convolution.

Written from the equations of Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning for Whole
Slide Image Classification", NeurIPS 2021 (arXiv:2106.00908), and of Xiong et al., "Nyströmformer", AAAI 2021
(arXiv:2102.03902)::

    x = [cls; h_1 .. h_n]    x <- x + MSA(LN(x))    x <- PPEG(x)    x <- x + MSA(LN(x))    logits = W LN(x)_cls + b
    MSA ~ softmax(q kl^T) pinv(softmax(ql kl^T)) softmax(ql k^T) v  +  conv33(v)

``ql`` and ``kl`` are means of q and k over consecutive segments of the sequence (landmarks).

The class token attends by exact softmax in both layers; tiles attend by the approximation. The published model
approximates all rows. With 10,000 tiles a landmark is the mean of 39, in which a single tile is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from wsi.nn.mil.net import BagScores, MilNet

_TOKENS = 4096  # computed at a time; each has heads x landmarks similarities
_REACH = 3  # of the 7 x 7 convolution, in tiles


class TransMil(MilNet):
    """TransMIL.

    Contributions are None: the logits are not a sum over tiles. Attention is rolled out through both layers (Abnar &
    Zuidema 2020, arXiv:2005.00928), with means over heads, half of each layer as residual, and the convolution between
    them left out. The last layer's own row is not enough: a tile often reaches the class token in the first layer
    already.

    Parameters
    ----------
    in_features, num_classes, hidden, dropout
        See ``MilNet``; `hidden` is one width, a multiple of `heads`.
    heads, landmarks, iterations : int
        Of the attention, of its approximation, and of the pseudo-inverse's.
    positions : {"slide", "bag"}
        "slide": tiles lie where their boxes say, so that the bag's order does not matter. "bag", as published: they are
        laid out in a square in bag order, and the first ones repeated to fill it.

    Notes
    -----
    The published program pads sequences with zeros, which enter the landmarks' means. Here landmarks are means of real
    tokens only. A small bag has as many landmarks as tokens, and the approximation becomes softmax attention.

    At inference, tokens are recomputed from the features each time a layer reads them. So memory beyond the features is
    a block of tokens, some rows of tiles and a few numbers a tile. Training keeps a few arrays (n, hidden).

    Examples
    --------
    >>> net = TransMil(in_features=4, hidden=8, heads=2, positions="bag").eval()
    >>> tuple(net(torch.ones(3, 4)).attention.shape)
    (3,)
    """

    def __init__(
        self,
        *,
        in_features: int,
        num_classes: int = 2,
        hidden: int = 64,
        dropout: float = 0.25,
        heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        positions: Literal["slide", "bag"] = "slide",
    ) -> None:
        super().__init__(in_features=in_features, num_classes=num_classes, hidden=hidden, dropout=dropout)
        if not isinstance(hidden, int) or hidden < 1 or hidden % heads or positions not in ("slide", "bag"):
            raise TypeError(f"TransMIL: hidden={hidden} must be a multiple of heads={heads}, positions slide or bag")
        self.positions = positions
        self.cls = nn.Parameter(torch.randn(1, hidden))
        self.first = Nystrom(hidden, heads, landmarks, iterations)
        self.ppeg = Ppeg(hidden)
        self.last = SelfAttention(hidden, heads)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def score(self, features: Tensor, boxes: Tensor | None) -> BagScores:
        layout = self._layout(len(features), boxes)
        order = torch.from_numpy(layout.order).to(features.device)

        def embedded(block: Tensor) -> tuple[Tensor]:
            return (self.embed(block).float(),)

        def tokens(lo: int, hi: int) -> Tensor:
            tiles = embedded(features[order[max(lo - 1, 0) : hi - 1]])[0]
            return tiles if lo else torch.cat([self.cls, tiles])

        x: Tokens
        if torch.is_grad_enabled() or self.training:  # dropout must not be drawn again
            x = torch.cat([self.cls, *self.by_block(embedded, features, order)])
        else:
            x = Computed(1 + len(order), tokens)
        y, back = self.first(x)
        token, row = self.last.class_token(self.ppeg(y, layout))
        logits = self.classifier(self.norm(token)).float()
        with torch.no_grad():
            row = row / 2
            row[0] += 0.5
            row = (row / 2 + back(row) / 2)[1:].clamp(min=0)  # an approximated row may be slightly negative
            row = row / row.sum()
        attention = torch.zeros(len(features), device=row.device).index_add(0, order, row)  # repeated tiles add up
        return BagScores(logits, attention, None)

    def _layout(self, n: int, boxes: Tensor | None) -> Layout:
        if self.positions == "bag":
            side = int(np.ceil(np.sqrt(n)))
            place = np.arange(side * side)
            return Layout(place % n, place // side, place % side)
        if boxes is None:
            raise ValueError("MIL bag: this TransMIL reads where tiles are, and no boxes were given; pass boxes (n, 4)")
        box = boxes.cpu().double().numpy()
        columns, rows = _cells(box[:, 0], box[:, 2]), _cells(box[:, 1], box[:, 3])
        order = np.lexsort((columns, rows))
        return Layout(order, rows[order], columns[order])


class Layout(NamedTuple):
    """The tile of each token, int64 (t,), with its row (sorted) and column."""

    order: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]


def _cells(start: npt.NDArray[np.float64], side: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Level-0 positions along one axis to indices of the tile grid; gaps wider than the convolution are shortened."""
    steps = np.diff(np.unique(start))
    steps = steps[steps > np.median(side) / 8]  # smaller steps are rounding
    cell = steps[steps < 1.5 * steps.min()].mean() if len(steps) else 1.0
    index = np.round((start - start.min()) / cell).astype(np.int64)
    seen, inverse = np.unique(index, return_inverse=True)
    return np.concatenate([[0], np.minimum(np.diff(seen), _REACH + 1).cumsum()]).astype(np.int64)[inverse]


class Computed:
    """Tokens (t, width) that are computed when they are read, instead of being stored.

    The last block read is kept, so that an overlapping or following one is computed only from its end on.
    """

    def __init__(self, n: int, of: Callable[[int, int], Tensor]) -> None:
        self._n, self._of = n, of
        self._start, self._block = 0, of(0, 1)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, _ = span.indices(self._n)
        end = self._start + len(self._block)
        if not self._start <= start <= end:
            self._start, self._block = start, self._of(start, stop)
        elif stop > end:
            more = self._of(end, stop)
            self._start, self._block = start, torch.cat([self._block[start - self._start :], more])
        return self._block[start - self._start : stop - self._start]


#: Tokens (t, width), read in blocks.
Tokens = Tensor | Computed


def _as(x: Tokens, of: Callable[[int, int], Tensor]) -> Tokens:
    """Make as many tokens with `of(start, stop)`: lazily where `x` is lazy, else at once."""
    n = len(x)
    if isinstance(x, Computed):
        return Computed(n, of)
    return torch.cat([of(start, min(n, start + _TOKENS)) for start in range(0, n, _TOKENS)])


class Ppeg(nn.Module):
    """Pyramid position encoding: depthwise convolutions 7 x 7, 5 x 5, 3 x 3 on the tile grid, added to the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, side, padding=side // 2, groups=width) for side in (7, 5, 3)
        )

    def forward(self, x: Tokens, layout: Layout) -> Tokens:
        """Tokens (1 + t, width) to tokens, computed in strips of rows; grid cells without a tile are 0."""
        # All three as one convolution, with the smaller kernels centred in the largest.
        layers: Any = self.convolutions
        seven, five, three = (conv.weight for conv in layers)
        weight = seven + functional.pad(five, [1] * 4) + functional.pad(three, [2] * 4)
        bias = torch.stack([conv.bias for conv in layers]).sum(0)
        columns, width = int(layout.columns.max()) + 1, weight.shape[0]
        height = min(max(1, _TOKENS // columns), int(layout.rows[-1]) + 1)

        def strip(top: int, first: int, last: int) -> Tensor | None:
            """Tiles first to last, as far as they lie in the rows from top on."""
            lo, start, stop, hi = np.searchsorted(layout.rows, [top - _REACH, top, top + height, top + height + _REACH])
            start, stop = max(start, first), min(stop, last)
            if start >= stop:
                return None
            tiles = x[1 + lo : 1 + hi]
            cells = torch.from_numpy((layout.rows[lo:hi] - top + _REACH) * columns + layout.columns[lo:hi])
            cells = cells.to(tiles.device)
            canvas = torch.zeros((height + 2 * _REACH) * columns, width, device=tiles.device)
            image = canvas.index_add(0, cells, tiles).T.reshape(1, width, -1, columns)
            seen = functional.conv2d(image, weight, bias, padding=(0, _REACH), groups=width)
            own = cells[start - lo : stop - lo] - _REACH * columns
            return tiles[start - lo : stop - lo] + seen[0].flatten(1).T[own]

        def placed(lo: int, hi: int) -> Tensor:
            token = [] if lo else [x[:1]]
            first, last = max(lo - 1, 0), hi - 1
            if first == last:
                return token[0]
            tops = range(int(layout.rows[first]), int(layout.rows[last - 1]) + 1, height)
            strips = (strip(top, first, last) for top in tops)
            return torch.cat([*token, *(tiles for tiles in strips if tiles is not None)])

        return _as(x, placed)


class SelfAttention(nn.Module):
    """``x + MSA(LN(x))`` in blocks of tokens, for the class token only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.residual = nn.Conv1d(heads, heads, 33, padding=16, groups=heads, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def class_token(self, x: Tokens) -> tuple[Tensor, Tensor]:
        """Tokens (t, width) to the first token (width,) and its exact attention to each (t,), mean over heads."""
        starts = range(0, len(x), _TOKENS)
        query = self._qkv(x[:1])[0][0]  # (heads, dim)

        def towards(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            _, k, v = self._qkv(block)
            scores = torch.einsum("hd,bhd->hb", query, k)
            top = scores.amax(1, keepdim=True)
            exponent = torch.exp(scores - top)
            return top, exponent.sum(1, keepdim=True), torch.einsum("hb,bhd->hd", exponent, v), scores

        scores: list[Tensor] = []

        def kept(top: Tensor, total: Tensor, seen: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scores.append(own)
            return top, total, seen

        top, total, seen = reduce(_merged, (kept(*_run(towards, x[s : s + _TOKENS])) for s in starts))
        mixed = seen / total + self._along(self._qkv(x[:17])[2])[0]
        row = torch.exp(torch.cat(scores, 1) - top) / total
        return x[:1][0] + self.out(mixed.flatten()), row.mean(0)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        """Tokens (b, width) to q, k and v, each (b, heads, dim)."""
        q, k, v = self.qkv(self.norm(x)).float().view(len(x), 3, self.heads, -1).unbind(1)
        return [q * q.shape[-1] ** -0.5, k, v]

    def _along(self, v: Tensor) -> Tensor:
        """Convolve values (b, heads, dim) along the sequence."""
        convolved: Tensor = self.residual(v.permute(2, 1, 0)).permute(2, 1, 0)
        return convolved


class Nystrom(SelfAttention):
    """``x + MSA(LN(x))`` in blocks of tokens, with Nystrom's approximation of softmax attention for the tiles."""

    def __init__(self, width: int, heads: int, landmarks: int, iterations: int) -> None:
        super().__init__(width, heads)
        self.landmarks, self.iterations = landmarks, iterations

    def forward(self, x: Tokens) -> tuple[Tokens, Callable[[Tensor], Tensor]]:
        """Tokens (t, width) to tokens, and a function that maps weights of the new tokens (t,) to those of the old."""
        t, device = len(x), self.qkv.weight.device
        m = min(self.landmarks, t)
        segment = torch.arange(t, device=device) * m // t
        count = torch.bincount(segment, minlength=m).float()[:, None, None]
        starts = range(0, t, _TOKENS)

        def means(block: Tensor, into: Tensor) -> Tensor:
            qk = torch.stack(self._qkv(block)[:2], 1)  # (b, 2, heads, dim)
            return torch.zeros(m, *qk.shape[1:], device=device).index_add(0, into, qk)

        landmark: Any = sum(_run(means, x[s : s + _TOKENS], segment[s : s + _TOKENS]) for s in starts)
        ql, kl = (landmark[:, i] / count for i in (0, 1))  # (m, heads, dim)

        def towards(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            _, k, v = self._qkv(block)
            scores = torch.einsum("mhd,bhd->hmb", ql, k)
            top = scores.amax(2, keepdim=True)
            exponent = torch.exp(scores - top)
            return top, exponent.sum(2, keepdim=True), torch.einsum("hmb,bhd->hmd", exponent, v)

        top, total, middle = reduce(_merged, (_run(towards, x[s : s + _TOKENS]) for s in starts))
        inverse = pseudo_inverse(torch.softmax(torch.einsum("mhd,lhd->hml", ql, kl), 2), self.iterations)
        middle = inverse @ (middle / total)  # (heads, m, dim)

        def outwards(block: Tensor, start: int, stop: int) -> Tensor:
            q, _, v = self._qkv(block)
            near = torch.softmax(torch.einsum("bhd,mhd->bhm", q, kl), 2)
            mixed = torch.einsum("bhm,hmd->bhd", near, middle) + self._along(v)
            out: Tensor = self.out(mixed[start:stop].flatten(1))
            return out

        token, row = self.class_token(x)

        def attended(start: int, stop: int) -> Tensor:
            lo = max(0, start - 16)  # 16 more tokens on either side for the convolution along the sequence
            block = x[lo : stop + 16]
            out = block[start - lo : stop - lo] + _run(outwards, block, start - lo, stop - lo)
            return out if start else torch.cat([token[None], out[1:]])

        def back(weights: Tensor) -> Tensor:
            through = torch.zeros(self.heads, m, device=device)
            for s in starts:
                q = self._qkv(x[s : s + _TOKENS])[0]
                near = torch.softmax(torch.einsum("bhd,mhd->bhm", q, kl), 2)
                if s == 0:
                    near[0] = 0  # the class token's row is not approximated
                through = through + torch.einsum("b,bhm->hm", weights[s : s + _TOKENS], near)
            through = (through[:, None] @ inverse)[:, 0]  # (heads, m)
            old = weights[0] * row
            for s in starts:
                k = self._qkv(x[s : s + _TOKENS])[1]
                far = torch.exp(torch.einsum("mhd,bhd->hmb", ql, k) - top) / total
                old[s : s + _TOKENS] += torch.einsum("hm,hmb->b", through, far) / self.heads
            return old

        return _as(x, attended), back


def _merged(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the softmaxes of two blocks: maximum score, and relative to it the sums of exponents and of values.

    Blocks are merged pairwise as they come: keeping small tensors between large temporary ones would fragment the heap.
    """
    top = torch.maximum(a[0], b[0])
    left, right = torch.exp(a[0] - top), torch.exp(b[0] - top)
    return top, left * a[1] + right * b[1], left * a[2] + right * b[2]


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of matrices (heads, m, m) by Razavi's third-order iteration, each with its own scale."""
    size = a.abs()
    z = a.mT / (size.sum(1).amax(1) * size.sum(2).amax(1))[:, None, None]
    eye = torch.eye(a.shape[-1], device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def _run(of: Callable[..., Any], x: Tensor, *others: Any) -> Any:
    """Run a block; for long sequences in training, recompute it for the gradient instead of keeping it."""
    if torch.is_grad_enabled() and len(x) >= _TOKENS:
        return checkpoint(of, x, *others, use_reentrant=False)
    return of(x, *others)
