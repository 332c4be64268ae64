"""Small model folders with random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TILE_PX = 32


def write_model(
    folder: Path,
    *,
    mpp: float = 1.0,
    classes: tuple[str, ...] = ("other", "tumour"),
    network: str = "test_resnet",
    **changes: Any,
) -> Path:
    """Write a patch model folder of timm's smallest ResNet or another `network`; `changes` go over its config.json."""
    from wsi.nn.backbone import TimmNet

    torch.manual_seed(0)
    net = TimmNet(network, num_classes=len(classes))
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "weights.safetensors")
    config: dict[str, Any] = {
        "spec_version": "1.0",
        "task": "patch",
        "architecture": network,
        "num_classes": len(classes),
        "class_names": list(classes),
        "patch_size_pixels": TILE_PX,
        "spacing_um_px": mpp,
        "transform": [
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.2]}},
        ],
        "positive_classes": [classes[-1]],
        "weights_sha256": hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def write_head(folder: Path, in_features: int, encoder_sha256: str | None = None, **changes: Any) -> Path:
    """Write a MIL model folder with random weights."""
    from wsi.nn.mil.attention import AttentionMil

    torch.manual_seed(1)
    arguments = {"in_features": in_features, "hidden": 8, "attention": 4}
    net = AttentionMil(num_classes=2, **arguments)
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "weights.safetensors")
    config = {
        "spec_version": "1.0",
        "task": "mil",
        "architecture": "gated-attention",
        "architecture_args": arguments,
        "num_classes": 2,
        "class_names": ["no tumour", "tumour"],
        "positive_classes": ["tumour"],
        "encoder_sha256": encoder_sha256,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
