"""A small convolutional network that is invariant to quarter turns and mirror images of a patch.

Tissue has no preferred orientation. A group convolution (Cohen & Welling, "Group Equivariant Convolutional
Networks", ICML 2016, arXiv:1602.07576) builds that into the layers: each filter is applied in all eight
orientations of the dihedral group D4 (the point group of p4m), and from the second layer on it also sees the
eight orientations of its input. Veeling et al., "Rotation Equivariant CNNs for Digital Pathology", MICCAI
2018 (arXiv:1806.03962) showed on lymph node patches that this helps most where training patients are few.

Layout: a map on the group is a tensor ``(b, 8 * c, h, w)``, orientation-major: channel ``g * c + i`` is map
``i`` in orientation ``g``. For ``conv2d`` it is an ordinary image, so channels_last and bf16 autocast work as
usual. Rotating the input rotates the maps and permutes their eight orientations; the mean over orientations
and positions does not change.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

ORIENTATIONS = 8


def dihedral_group() -> Tensor:
    """Return the eight elements of D4 as matrices that act on (row, column): int64 (8, 2, 2)."""
    quarter_turn = torch.tensor([[0, -1], [1, 0]])
    mirror = torch.tensor([[1, 0], [0, -1]])
    elements = []
    for flips, turns in itertools.product(range(2), range(4)):
        element = torch.eye(2, dtype=torch.int64)
        for _ in range(turns):
            element = quarter_turn @ element
        elements.append(element @ mirror if flips else element)
    return torch.stack(elements)


def turned_filter_index(side: int, in_orientations: int) -> Tensor:
    """Return the source index of each tap of a rotated or mirrored filter.

    `side` is the filter's height and width. `in_orientations` is 1 for a filter that reads an image (the lifting
    layer), and 8 for one that reads maps on the group. The result is int64 (8, in_orientations * side * side):
    ``flat_filter[index[g]]`` is the filter transformed by element ``g``, ``f(g^-1 h, g^-1 y)``.
    """
    group = dihedral_group()
    # Coordinates relative to the centre, in half pixels: even sides have a centre between pixels.
    axis = 2 * torch.arange(side) - (side - 1)
    taps = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # (2, side * side)
    rows = []
    for g in group:
        back = g.T  # the matrices are orthogonal: the transpose is the inverse
        row, column = (back @ taps + (side - 1)) // 2
        tap = row * side + column
        if in_orientations == 1:
            rows.append(tap)
            continue
        source = [int((group == back @ h).all(dim=(1, 2)).nonzero()) for h in group]
        rows.append(torch.cat([h * side * side + tap for h in source]))
    return torch.stack(rows)


class P4MConv(nn.Module):
    """Group convolution over p4m, ``(b, in_orientations * c_in, h, w)`` -> ``(b, 8 * c_out, h', w')``.

    One filter is learnt for each map, and transformed into its eight orientations at each call. So the layer has an
    eighth of the weights of a plain convolution of the same width (Cohen & Welling 2016, section 7).
    """

    index: Tensor

    def __init__(
        self, c_in: int, c_out: int, side: int, *, padding: int = 0, in_orientations: int = ORIENTATIONS
    ) -> None:
        super().__init__()
        self.side = side
        self.padding = padding
        self.plain: nn.Module | None = None  # this and the norm after it as one convolution, once folded to infer
        taps = in_orientations * side * side
        self.weight = nn.Parameter(torch.randn(c_out, c_in, taps) * (2 / (c_in * taps)) ** 0.5)  # He et al. 2015
        self.register_buffer("index", turned_filter_index(side, in_orientations), persistent=False)

    def filters(self) -> Tensor:
        """Return the filters in all orientations, in conv2d's layout: (8 * c_out, 8 * c_in, side, side)."""
        c_out, c_in, _ = self.weight.shape
        turned = self.weight[:, :, self.index.flatten()]
        turned = turned.view(c_out, c_in, ORIENTATIONS, -1, self.side, self.side)
        turned = turned.permute(2, 0, 3, 1, 4, 5)  # (g, c_out, h, c_in, side, side)
        return turned.reshape(ORIENTATIONS * c_out, -1, self.side, self.side)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.filters(), None)

    def convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        filters = filters.contiguous(memory_format=torch.channels_last)
        return functional.conv2d(x, filters, bias, padding=self.padding)


class P4MNorm(nn.BatchNorm2d):
    """Batch normalisation with one mean and variance for the eight orientations of a map."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        # A channels_last map lies in memory as (b, h, w, 8, c). Viewed as an image w * 8 wide, it is not copied.
        x = x.permute(0, 2, 3, 1).reshape(b, h, w * ORIENTATIONS, self.num_features).permute(0, 3, 1, 2)
        x = super().forward(x)
        return x.permute(0, 2, 3, 1).reshape(b, h, w, ORIENTATIONS * self.num_features).permute(0, 3, 1, 2)


def folded(conv: P4MConv, norm: P4MNorm) -> tuple[Tensor, Tensor]:
    """Return the filters and the bias of ``norm(conv(x))`` at inference, in conv2d's layout."""
    assert norm.running_var is not None and norm.running_mean is not None  # for mypy: they are tracked
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # (c,)
    bias = norm.bias - norm.running_mean * scale
    return conv.filters() * scale.repeat(ORIENTATIONS).view(-1, 1, 1, 1), bias.repeat(ORIENTATIONS)


def conv_norm(conv: P4MConv, norm: P4MNorm, x: Tensor) -> Tensor:
    """Return ``norm(conv(x))``; at inference the normalisation is folded into the filters, which saves a pass."""
    normed: Tensor
    if norm.training:
        normed = norm(conv(x))
    elif conv.plain is not None:
        normed = conv.plain(x)
    else:
        normed = conv.convolve(x, *folded(conv, norm))
    return normed


class P4MBlock(nn.Module):
    """Two group convolutions and a shortcut (He et al., CVPR 2016): ``(b, 8 * c_in, h, w)`` -> ``(b, 8 * c, h, w)``."""

    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.conv1 = P4MConv(c_in, c, 3, padding=1)
        self.norm1 = P4MNorm(c)
        self.conv2 = P4MConv(c, c, 3, padding=1)
        self.norm2 = P4MNorm(c)
        self.shortcut = nn.ModuleList([P4MConv(c_in, c, 1), P4MNorm(c)] if c_in != c else [])

    def pairs(self) -> list[tuple[P4MConv, P4MNorm]]:
        """Return each convolution with the normalisation after it."""
        shortcut = [cast("tuple[P4MConv, P4MNorm]", tuple(self.shortcut))] if self.shortcut else []
        return [(self.conv1, self.norm1), (self.conv2, self.norm2), *shortcut]

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(conv_norm(self.conv1, self.norm1, x))
        h = conv_norm(self.conv2, self.norm2, h)
        for conv, norm in self.pairs()[2:]:
            x = conv_norm(conv, norm, x)
        return functional.relu(h + x)


class P4MTrunk(nn.Module):
    """One member network up to its features: ``(b, 6, h, w)`` -> ``(b, head)``, invariant to D4.

    The features are the means of the last maps over positions and orientations.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], stem: int, head: int) -> None:
        super().__init__()
        self.stem = P4MConv(6, stem, 3, in_orientations=1)
        self.stem_norm = P4MNorm(stem)
        self.stages = nn.ModuleList()
        c = stem
        for width, depth in zip(widths, depths, strict=True):
            blocks = [P4MBlock(c if i == 0 else width, width) for i in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            c = width
        self.head = P4MConv(c, head, 1)
        self.head_norm = P4MNorm(head)

    def pairs(self) -> list[tuple[P4MConv, P4MNorm]]:
        """Return each convolution with the normalisation after it."""
        blocks = [block for block in self.modules() if isinstance(block, P4MBlock)]
        ends = [(self.stem, self.stem_norm), (self.head, self.head_norm)]
        return ends + [pair for block in blocks for pair in block.pairs()]

    def maps(self, x: Tensor) -> Tensor:
        """Return the last maps, (b, 8 * head, h', w')."""
        # No padding here: 50 -> 48, which the three poolings divide evenly.
        x = functional.relu(conv_norm(self.stem, self.stem_norm, x))  # (b, 8 * stem, 48, 48)
        for i, stage in enumerate(self.stages):
            x = functional.max_pool2d(x, 2) if i == 0 else functional.avg_pool2d(x, 2)
            x = stage(x)  # (b, 8 * widths[i], 24, 24), then 12, then 6
        return functional.relu(conv_norm(self.head, self.head_norm, x))  # (b, 8 * head, 6, 6)

    def pool(self, maps: Tensor) -> Tensor:
        """Return the features of maps, float32 (b, head)."""
        by_orientation: Tensor = maps.float().mean((2, 3)).unflatten(1, (ORIENTATIONS, -1))  # (b, 8, head)
        return by_orientation.mean(1)


class P4MNet(nn.Module):
    """A patch classifier with the same output for all eight orientations of the patch.

    It may hold several separately trained members of one shape. Its features are then those of all members side by
    side, and its logits the mean of theirs.

    Parameters
    ----------
    num_classes : int
        Number of classes ``k``.
    widths, depths : sequence of int
        Maps and residual blocks of each stage; each stage works at half the resolution of the one before.
        A map has eight orientations, so a width of 24 costs as much as 192 plain channels.
    stem, head : int
        Maps of the first layer (at full resolution) and of the last.
    members : int
        Networks averaged.
    dropout : float
        Probability of dropping a feature, in training only.
    mean, std : sequence of 3 floats
        Normalisation of the input, undone inside to compute optical densities.

    Attributes
    ----------
    num_features : int
        ``d``, of all members together.

    Notes
    -----
    Invariant up to rounding where the poolings divide the maps evenly, as for 50 x 50 px patches:
    ``(side - 2) % 2**stages == 0``. For other sizes they drop the odd row, and the invariance is approximate.

    Examples
    --------
    >>> net = P4MNet(widths=(2, 2), depths=(1, 1), stem=2, head=4).eval()
    >>> patch = torch.rand(1, 3, 50, 50)
    >>> bool(torch.allclose(net(patch), net(patch.rot90(1, (2, 3))), atol=1e-5))
    True
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        num_classes: int = 2,
        widths: Sequence[int] = (8, 16, 24),
        depths: Sequence[int] = (1, 1, 1),
        stem: int = 4,
        head: int = 64,
        members: int = 1,
        dropout: float = 0.2,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.trunks = nn.ModuleList(P4MTrunk(widths, depths, stem, head) for _ in range(members))
        self.num_features = members * head
        self.dropout = nn.Dropout(dropout)
        self.classifiers = nn.ModuleList(nn.Linear(head, num_classes) for _ in range(members))

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return each member's last maps of normalised patches: float (b, 3, h, w) -> (b, 8 * head, h', w')."""
        x = x.float()
        # Beer-Lambert: optical density, unlike colour, is linear in the amount of stain.
        density = -torch.log((x * self.std + self.mean).clamp(min=1 / 255))
        x = torch.cat([x, density], 1).contiguous(memory_format=torch.channels_last)  # (b, 6, h, w)
        return tuple(cast("P4MTrunk", trunk).maps(x) for trunk in self.trunks)

    @torch.no_grad()
    def fold_norms(self) -> int:
        """Make plain convolutions of the group convolutions and their normalisations, to infer; return how many."""
        pairs = [pair for trunk in self.trunks for pair in cast("P4MTrunk", trunk).pairs()]
        for conv, norm in pairs:
            filters, bias = folded(conv, norm)
            n, c, side, _ = filters.shape
            plain = nn.Conv2d(c, n, side, padding=conv.padding)
            plain.weight, plain.bias = nn.Parameter(filters), nn.Parameter(bias)
            conv.plain = plain
        return len(pairs)

    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the features of maps, float32 (b, d)."""
        return torch.cat([cast("P4MTrunk", t).pool(m) for t, m in zip(self.trunks, maps, strict=True)], 1)

    def embed(self, x: Tensor) -> Tensor:
        """Return the features of normalised patches: float (b, 3, h, w) -> float32 (b, d)."""
        return self.pool(self.maps(x))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of embedded patches: float (b, d) -> float (b, k)."""
        parts = self.dropout(features).chunk(len(self.trunks), 1)
        logits = [classifier(part) for classifier, part in zip(self.classifiers, parts, strict=True)]
        return torch.stack(logits).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalised patches: float (b, 3, h, w) -> float (b, k)."""
        return self.classify(self.embed(x))
