"""Small networks of every family, and a bag on a grid of tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wsi.nn.mil import MIL_NETS, MilNet, make_net

SMALL: dict[str, dict[str, Any]] = {
    "top-k": {"top": 3},
    "dsmil": {"query": 6},
    "transmil": {"heads": 2, "hidden": 8},
    "dtfd": {"groups": 3},
}
ALL = list(MIL_NETS)
#: Whose logits are sums over tiles.
ADDITIVE = [name for name in ALL if name not in ("noisy-or", "transmil")]


def a_net(name: str, seed: int = 0, **arguments: Any) -> MilNet:
    """Make a network in eval mode that reads 6 features, standardised."""
    torch.manual_seed(seed)
    net = make_net(name, **({"in_features": 6, "num_classes": 3, "hidden": 8} | SMALL.get(name, {}) | arguments)).eval()
    net.standardise(torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 1)
    return net


def a_bag(n: int, seed: int = 0, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 6) and boxes (n, 4) of tiles side by side, a little apart from whole pixels."""
    features = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    place = np.arange(n)
    side = np.full(n, 100.7)
    boxes = np.stack([place % columns * 100.7 + 13, place // columns * 100.7 + 5, side, side], 1)
    return features, torch.from_numpy(boxes)


def weights_of(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the weights as float64 arrays."""
    return {name: value.double().numpy() for name, value in net.state_dict().items()}


def embedded(p: dict[str, np.ndarray], features: torch.Tensor) -> np.ndarray:
    """Standardise and embed, literally: float64 (n, width)."""
    h = (features.double().numpy() - p["mean"]) / p["std"]
    if "embedding.0.weight" in p:
        h = np.maximum(h @ p["embedding.0.weight"].T + p["embedding.0.bias"], 0)
    return h


def softmax(x: np.ndarray, axis: int = 0) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)
