"""MIL models: the features of all tiles of a slide in, its grade and each tile's attention out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi.errors import ModelError
from wsi.nn.checkpoint import (
    ModelConfig,
    find_model,
    fit_weights,
    load_weights,
    read_config,
    weights_sha256,
)
from wsi.nn.mil import GatedAttentionMil
from wsi.nn.patch import PatchModel


class SlideScores(NamedTuple):
    """What a MIL model says of a slide.

    Attributes
    ----------
    probabilities : float64 (k,)
        Sum to 1.
    attention : float32 (n,)
        Weight of each tile; sums to 1. A rank among the slide's tiles, not a probability.
    """

    probabilities: npt.NDArray[np.float64]
    attention: npt.NDArray[np.float32]


class MilModel:
    """A MIL head ready to run; always on the CPU in float32, where a slide takes milliseconds.

    Attributes
    ----------
    config : ModelConfig
    sha256 : str
        Of the weights file.
    """

    def __init__(self, config: ModelConfig, net: GatedAttentionMil, sha256: str) -> None:
        self.config = config
        self.sha256 = sha256
        self._net = net.eval()

    @torch.inference_mode()
    def __call__(self, features: npt.NDArray[Any]) -> SlideScores:
        """Grade a slide from the features (n, d) of its tiles, n >= 1."""
        grade = self._net(torch.from_numpy(np.ascontiguousarray(features, np.float32)))
        return SlideScores(grade.probabilities.double().numpy(), grade.attention.numpy())

    def grade(self, probabilities: npt.NDArray[np.float64]) -> str:
        """Return the class a slide is called.

        With positive classes: the likeliest of them where their probabilities reach the threshold
        together, else the likeliest of the others. Without: the likeliest.
        """
        return self.config.class_names[int(pick_class(probabilities[None], self.config)[0])]


def pick_class(
    probabilities: npt.NDArray[Any], config: ModelConfig, threshold: float | None = None
) -> npt.NDArray[np.int64]:
    """Return the class index, int64 (n,), that each row of probabilities (n, k) is called; see ``MilModel.grade``."""
    positive = np.array([name in config.positive_classes for name in config.class_names])
    if not positive.any() or positive.all():
        return np.asarray(probabilities.argmax(axis=1))
    is_positive = probabilities[:, positive].sum(axis=1) >= (config.threshold if threshold is None else threshold)
    allowed = np.where(is_positive[:, None], positive, ~positive)
    return np.asarray(np.where(allowed, probabilities, -1.0).argmax(axis=1))


def load_mil_model(name: str | Path, encoder: PatchModel) -> MilModel:
    """Load the MIL head in a folder, or of a name, for the features of `encoder`.

    Raises
    ------
    ModelError
        Also where the head was trained on the features of another model: its grades would mean nothing.
    """
    folder = find_model(str(name))
    if (folder / "mil" / "config.json").is_file():  # a patch model's folder: the head inside it
        folder = folder / "mil"
    config = read_config(folder, "mil")
    if config.architecture != "gated-attention":
        raise ModelError(config.folder, f"is of architecture {config.architecture!r}", "Known: gated-attention")
    if not encoder.num_features:
        raise ModelError(config.folder, "needs features, and a TorchScript patch model shows none", "Leave out --mil")
    if config.encoder_sha256 is not None and config.encoder_sha256 != encoder.sha256:
        raise ModelError(
            config.folder,
            f"was trained on the features of another patch model than {encoder.config.folder.name}",
            "Use the patch model it names (encoder_sha256), or train a head for this one",
        )
    state = load_weights(config)
    try:
        net = GatedAttentionMil(**{"num_classes": len(config.class_names), **config.architecture_args})
    except TypeError as error:
        raise ModelError(config.folder / "config.json", f"architecture_args do not fit: {error}") from error
    fit_weights(net, state, config)
    return MilModel(config, net, weights_sha256(config))
