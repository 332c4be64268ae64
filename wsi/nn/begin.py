"""Patch models at the start of training: with random weights, or with those of a model or an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi.errors import ModelError
from wsi.nn.checkpoint import ModelConfig
from wsi.nn.encoder import load_encoder
from wsi.nn.patch import PatchModel, make_net


def fresh_model(
    architecture: str,
    arguments: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    tile_px: int,
    mpp: float,
    mean: Sequence[float],
    std: Sequence[float],
    device: str = "cpu",
    precision: str = "float32",
) -> PatchModel:
    """Make a patch model with random weights from torch's generator.

    `architecture` is "wsi-p4m" or a timm name, and `arguments` are its constructor's. `tile_px` and `mpp` describe the
    patches; `mean` and `std` normalise the input. Raises ModelError for an unknown architecture, or arguments or a
    patch size that it does not take.

    Examples
    --------
    >>> model = fresh_model("wsi-p4m", {"head": 4}, ("a", "b"), tile_px=50, mpp=4, mean=[0.5] * 3, std=[0.5] * 3)
    >>> model.num_features
    4
    """
    if architecture == "wsi-p4m":  # it undoes the normalisation inside
        arguments = {"mean": list(mean), "std": list(std), **arguments}
    config = ModelConfig(
        Path(architecture), "patch", architecture, tuple(class_names), len(class_names), dict(arguments),
        tile_px=tile_px, mpp=mpp, mean=tuple(mean), std=tuple(std),
    )  # fmt: skip
    return _ready(config, make_net(config), device, precision)


def model_from(
    start: str,
    class_names: Sequence[str],
    *,
    tile_px: int,
    mpp: float,
    device: str = "cpu",
    precision: str = "float32",
) -> PatchModel:
    """Make a patch model with the weights of a model or an encoder.

    `start` is a name as for ``load_encoder``; the model's ``sha256`` is that of its weights. The classifier is kept
    where the classes are the same, and random otherwise. Patches of another size are resized to the model's own.

    Examples
    --------
    >>> model = model_from("phantom", ("benign", "malignant"), tile_px=32, mpp=2)
    >>> model.config.class_names, model.config.resize_px
    (('benign', 'malignant'), 64)
    """
    base = load_encoder(start, device="cpu", precision="float32", fold=False)
    config = replace(
        base.config, class_names=tuple(class_names), num_logits=len(class_names), positive_classes=(), threshold=0.5,
        tile_px=tile_px, mpp=mpp, weights_sha256=None,
    )  # fmt: skip
    if tile_px != base.config.tile_px:
        config = replace(config, resize_px=base.config.resize_px or base.config.tile_px)
    state = base.net.state_dict()
    if not base.config.class_names:
        arguments = {"encoder": config.architecture, "tile_px": base.config.tile_px, "pool": base.net.pooling}
        config = replace(config, architecture="wsi-encoder", architecture_args=arguments | config.architecture_args)
        state = {f"encoder.{name}": value for name, value in state.items()}
    net = make_net(config)
    if (base.config.class_names, base.config.num_logits) != (config.class_names, config.num_logits):
        fresh = classifier_of(net, base.num_features)
        state = {name: value for name, value in state.items() if name not in fresh}
    net.load_state_dict(net.state_dict() | state)
    return _ready(config, net, device, precision, base.sha256)


def classifier_of(net: Any, num_features: int) -> set[str]:
    """Return the names of the weights that ``classify`` uses."""
    net.eval()
    weights = dict(net.named_parameters())
    device = next(iter(weights.values())).device
    logits = net.classify(torch.zeros(1, num_features, device=device))
    found = torch.autograd.grad(logits.sum(), list(weights.values()), allow_unused=True)
    return {name for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def _ready(config: ModelConfig, net: Any, device: str, precision: str, sha256: str = "") -> PatchModel:
    """Return the model after a test pass with a patch of its size."""
    model = PatchModel(
        config, net, name=config.folder.name, num_features=int(net.num_features), sha256=sha256, device=device,
        precision=precision,
    )  # fmt: skip
    try:
        model(np.zeros((1, config.tile_px, config.tile_px, 3), np.uint8))
    except (RuntimeError, AssertionError) as error:
        what = f"does not take patches of {config.tile_px} px ({str(error).splitlines()[0]})"
        remedy = "Give it another size with --set img_size=..., or take another architecture"
        raise ModelError(config.architecture, what, remedy) from error
    return model
