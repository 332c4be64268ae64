"""Convolutions of 3 x 3 by Winograd's minimal filtering, for networks that only infer, in float32 on a CPU."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from wsi import native

_P, _Q = 0.5**0.5, 2**0.5
#: The transform of a filter, G; those of input and output, and why these points, are in ``wsi.native.twin``.
_G = torch.tensor(
    [
        [1, 0, 0],
        *([x / -1.5 for x in (1, sign * _P, 0.5)] for sign in (1, -1)),
        *([x / 6 for x in (1, sign * _Q, 2)] for sign in (1, -1)),
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
_LANES, _PANEL = 16, 32  # the kernel takes channels in and out in multiples of these


class WinogradConv2d(nn.Module):
    """A convolution of 3 x 3, stride 1 and zero padding of 1, with a quarter of the multiplications.

    A tile of 4 x 4 output pixels is made of 36 products a pair of channels instead of 144, F(4 x 4, 3 x 3). Rounding
    errors are three to five times those of torch's sum: below 2e-5 of the output's standard deviation in the tests. The
    bytes do not depend on the batch or the threads (``torch.get_num_threads``). Gradients do not pass: an error.

    Parameters
    ----------
    conv : Conv2d
        One that ``takes`` accepts. Its weights stay for who reads them; transformed, they take 4 times their memory.

    References
    ----------
    A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308.

    Examples
    --------
    >>> conv = nn.Conv2d(16, 32, 3, padding=1)
    >>> with torch.inference_mode():
    ...     WinogradConv2d(conv)(torch.ones(1, 16, 8, 8)).shape               # doctest: +SKIP
    torch.Size([1, 32, 8, 8])
    """

    filters: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # Frozen, since the transformed filters would not follow them.
        self.weight = nn.Parameter(conv.weight.detach(), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        n, c_in = conv.out_channels, conv.in_channels
        filters = torch.empty(36, n // _PANEL, c_in, _PANEL)
        for panel, g in enumerate(conv.weight.detach().split(_PANEL)):  # by parts: float64 would take twice the memory
            # G g G^T, flattened by rows, is the Kronecker product of G and G times the flattened filter g.
            u = torch.kron(_G, _G) @ g.double().reshape(-1, 9).T
            filters[:, panel] = u.reshape(36, _PANEL, c_in).transpose(1, 2)
        # Flat, since a network of which the memory format changes turns all that has four axes.
        self.register_buffer("filters", filters.flatten(), persistent=False)
        offsets = torch.zeros(n) if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("offsets", offsets, persistent=False)
        self.instructions = native.winograd_instructions()[0]

    @staticmethod
    def takes(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a convolution that this one can replace."""
        return (
            type(conv) is nn.Conv2d
            and (conv.kernel_size, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
            and conv.padding in ((1, 1), "same")
            and conv.padding_mode == "zeros"
            and conv.in_channels % _LANES == 0
            and conv.out_channels % _PANEL == 0
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve float32 (b, c_in, h, w) to (b, c_out, h, w), channels-last in memory.

        Raises
        ------
        RuntimeError
            A gradient is asked for.
        """
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *self.parameters())):
            raise RuntimeError("a network made ready to infer passes no gradients: load it with fold=False")
        out = torch.empty((len(x), len(self.offsets), *x.shape[2:]), memory_format=torch.channels_last)
        native.winograd(
            x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy(),
            self.filters.view(36, -1, x.shape[1], _PANEL).numpy(),
            self.offsets.numpy(),
            out.permute(0, 2, 3, 1).numpy(),
            torch.get_num_threads(),
            self.instructions,
        )
        return out


def use_winograd(net: nn.Module) -> int:
    """Replace each convolution that ``WinogradConv2d`` takes, in place; return how many.

    None where the package was built without a compiler, or on a processor without AVX2.

    Examples
    --------
    >>> use_winograd(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1))), "three channels are too few"
    (0, 'three channels are too few')
    """
    if not native.winograd_instructions():
        return 0
    replaced = 0
    for name, module in list(net.named_children()):
        if WinogradConv2d.takes(module):
            setattr(net, name, WinogradConv2d(module))
            replaced += 1
        else:
            replaced += use_winograd(module)
    return replaced
