"""Grad-CAM: which places in a patch a convolutional model's class score depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi.errors import ModelError
from wsi.nn.patch import PatchModel


def grad_cam(model: PatchModel, rgb: npt.NDArray[np.uint8], targets: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the Grad-CAM map of a class for each patch.

    ``L = ReLU(sum_k a_k A_k)`` over the last maps ``A_k``, where ``a_k`` is the gradient of the class's logit with
    respect to ``A_k``, averaged over positions (equations 1 and 2 of the source); enlarged to the patch bilinearly. The
    maps of an ensemble's members are summed. Of two classes with a single logit, the first one's logit is its negative.

    Parameters
    ----------
    rgb : uint8 (b, tile_px, tile_px, 3)
    targets : sequence of str (b,)
        One of the model's classes for each patch.

    Returns
    -------
    float32 (b, tile_px, tile_px)
        0 or more, in logits; comparable only within a patch.

    Raises
    ------
    ModelError
        The network's last layer has no maps (a transformer, TorchScript), or there is no such class.

    References
    ----------
    R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV
    2017, arXiv:1610.02391.

    Examples
    --------
    >>> from wsi.nn.patch import load_patch_model
    >>> model = load_patch_model("phantom", device="cpu", precision="float32")
    >>> grad_cam(model, np.full((1, 64, 64, 3), 200, np.uint8), model.config.class_names[:1]).shape
    (1, 64, 64)
    """
    names, net = model.config.class_names, model.net
    unknown = set(targets) - set(names)
    if unknown:
        raise ModelError(f"class {unknown.pop()!r}", "is none of the model's", f"Classes: {', '.join(names)}")
    with torch.no_grad():
        x = model.resized(model.normalised(rgb).float())
        maps: Any = net.maps(x) if model.num_features else ()
    if not maps or any(a.ndim != 4 for a in maps):
        raise ModelError(model.config.folder, "is not convolutional: Grad-CAM has no maps to look into")
    with torch.enable_grad():
        maps = tuple(a.requires_grad_() for a in maps)
        logits = net.classify(net.pool(maps))
        if logits.shape[1] == 1:
            logits = torch.cat([-logits, logits], 1)
        y = logits[torch.arange(len(rgb)), [names.index(target) for target in targets]]
        gradients = torch.autograd.grad(y.sum(), maps)  # a patch's logit depends on its own maps alone
    found = sum((g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True) for a, g in zip(maps, gradients, strict=True))
    side = model.config.tile_px
    cam = torch.nn.functional.interpolate(found.detach().relu(), (side, side), mode="bilinear")
    return np.asarray(cam[:, 0].float().cpu().numpy())


def check_maps(model: PatchModel) -> None:
    """Raise ModelError for a model that is not convolutional."""
    side = model.config.tile_px
    grad_cam(model, np.zeros((1, side, side, 3), np.uint8), model.config.class_names[:1])
