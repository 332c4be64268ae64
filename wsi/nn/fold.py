"""Networks made ready to infer: batch norms folded into the convolutions before them, and faster convolutions."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from wsi.nn.winograd import use_winograd

#: Classes of torch and timm, by name: networks without timm need not import it. The convolutions compute with
#: their weight as it is, unlike others that standardise it first; the norms are followed by `drop` and `act`, if any.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
_NORMS = ("BatchNorm2d", "BatchNormAct2d")


class _Tracer(fx.Tracer):
    """Follow a network down to what is folded, and to torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in (*_CONVOLUTIONS, *_NORMS) or super().is_leaf_module(m, module_qualified_name)


def for_inference(net: nn.Module, device: str, precision: str) -> None:
    """Fold batch norms into convolutions, and in float32 on the CPU compute those of 3 x 3 with fewer multiplications.

    In place; results change by rounding, and the weights cannot be trained any more.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> for_inference(net, "cpu", "float32")
    """
    own: Callable[[], int] = getattr(net, "fold_norms", lambda: fold_norms(net))
    own()
    if (device, precision) == ("cpu", "float32"):
        use_winograd(net)


@torch.no_grad()
def fold_norms(net: nn.Module, shared: frozenset[int] = frozenset()) -> int:
    """Fold each batch norm that alone follows a convolution into its weights, in place; return how many.

    In evaluation a batch norm is a scale and an offset a channel, which a convolution can do with other weights (Jacob
    et al. 2018, equation 14, without quantising): a pass over memory less. Of a network that ``torch.fx`` cannot trace
    its parts are tried; a convolution or norm that is used twice stays as it is. Results change by rounding.

    Parameters
    ----------
    net : Module
        In evaluation mode, on the CPU, in float32.
    shared : set of int
        Identities of modules that are reached in several ways, which stay; those inside `net` are found here.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> fold_norms(net), net[1]
    (1, Identity())
    """
    modules = dict(net.named_modules())
    seen = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    shared |= {identity for identity, n in seen.items() if n > 1}
    try:
        nodes = list(_Tracer().trace(net).nodes)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
        # It branches, asserts or computes by what only real pixels can answer.
        return sum(fold_norms(part, shared) for part in net.children())
    called = [node.target for node in nodes if node.op == "call_module"]
    folded = 0
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        if type(conv).__name__ not in _CONVOLUTIONS or type(norm).__name__ not in _NORMS:
            continue
        if {id(conv), id(norm)} & shared:
            continue
        if called.count(node.target) > 1 or called.count(before.target) > 1 or norm.running_mean is None:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        after = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
        rest = [module for module in after if not isinstance(module, nn.Identity)]
        _replace(net, str(node.target), nn.Sequential(*rest) if rest else nn.Identity())
        folded += 1
    return folded


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    parent: Any = functools.reduce(getattr, path.split("."), net) if path else net
    setattr(parent, last, module)
