"""MIL models: from the features of a slide's tiles to its grade and each tile's attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi.errors import ModelError
from wsi.nn.checkpoint import ModelConfig, find_model, fit_weights, load_weights, read_config, weights_sha256
from wsi.nn.mil import MIL_NETS, MilNet, make_net
from wsi.nn.mil.net import BLOCK
from wsi.nn.patch import PatchModel
from wsi.nn.uncertainty import Uncertainty, prediction_set, uncertainty
from wsi.result import called, rounded

#: Abstain where a larger share of the tissue is unreadable: the decisive part may be missing.
MOST_UNREADABLE = 0.1
#: Abstain where a slide has more tiles than this times the largest training bag, or the smallest one has more than this
#: times the slide's.
BAG_FACTOR = 2


class SlideGrade(NamedTuple):
    """The output of a MIL model for a slide.

    Attributes
    ----------
    probabilities : float64 (k,)
        Sum to 1. For survival: that the event falls in each interval.
    attention : float32 (n,)
        Weight of each tile; sums to 1. It ranks the slide's tiles, and is not a probability.
    contributions : float32 (n, logits), optional
        What each tile adds to each logit (before the temperature); None where the network is not a sum over tiles.
    members : float64 (m, k)
        Probabilities of each member of the ensemble; `probabilities` is their mean.
    """

    probabilities: npt.NDArray[np.float64]
    attention: npt.NDArray[np.float32]
    contributions: npt.NDArray[np.float32] | None
    members: npt.NDArray[np.float64]


class MilModel:
    """A MIL head ready to run. It runs on the CPU in float32, where a slide takes milliseconds.

    Attributes
    ----------
    config : ModelConfig
    sha256 : str
        Of the weights file.
    head : Head
        Interpretation of the logits.
    """

    def __init__(self, config: ModelConfig, nets: Sequence[MilNet], sha256: str) -> None:
        self.config = config
        self.sha256 = sha256
        self.head = config.head
        self._nets = [net.eval() for net in nets]

    @torch.inference_mode()
    def __call__(self, features: npt.NDArray[Any], boxes: npt.NDArray[Any] | None = None) -> SlideGrade:
        """Grade a slide.

        Parameters
        ----------
        features : float (n, d)
            Features of n >= 1 tiles, as the encoder gave them.
        boxes : float (n, 4), optional
            Level-0 x, y, w, h of each tile; required by networks that use positions (``transmil``).

        Raises
        ------
        ModelError
            No tile, another width, numbers that are not finite, or missing boxes.
        """
        table = torch.from_numpy(np.require(features, requirements=["C", "W"]))
        places = None if boxes is None else torch.from_numpy(np.array(boxes, np.float64))
        try:
            scores = [net(table, places) for net in self._nets]
        except ValueError as error:
            raise ModelError(self.config.folder, str(error)) from error
        # float64: the order of the members does not change the rounded mean
        members = self.head.probabilities(torch.stack([score.logits for score in scores]).double())
        attention = torch.stack([score.attention for score in scores]).mean(0)
        parts = [score.contributions for score in scores if score.contributions is not None]
        contributions = torch.stack(parts).mean(0).numpy() if len(parts) == len(scores) else None
        return SlideGrade(members.mean(0).numpy(), attention.numpy(), contributions, members.numpy())

    def grade(self, probabilities: npt.NDArray[np.float64]) -> str:
        """Return the class that a slide is called.

        With positive classes: the likeliest of them where their summed probability reaches the threshold, else the
        likeliest of the others. Without: the likeliest, and for ordinal grades the median.
        """
        if self.head.kind == "ordinal" and not self.config.positive_classes:
            return self.config.class_names[int((probabilities.cumsum() < 0.5 - 1e-12).sum())]
        return self.config.class_names[int(pick_class(probabilities[None], self.config)[0])]

    @property
    def grade_threshold(self) -> float | None:
        """Threshold of the positive classes' summed probability; None where it has no effect."""
        decides = 0 < len(self.config.positive_classes) < len(self.config.class_names)
        return self.config.threshold if decides else None

    def evidence(self, grade: SlideGrade) -> dict[str, npt.NDArray[Any]]:
        """Return each tile's evidence for each class, {class: (n,)}; of two classes, for the second only.

        Evidence is the contribution to the class's logit minus the mean over classes, since softmax ignores a shared
        offset. It is the attention where the network is not a sum over tiles, and for ordinal and survival heads.
        """
        parts, names = grade.contributions, self.config.class_names
        if parts is None or self.head.kind not in ("softmax", "binary"):
            return {"attention": grade.attention}
        if len(names) == 2:  # from one logit or two
            return {names[1]: parts[:, -1] - (parts[:, 0] if parts.shape[1] == 2 else 0)}
        over = parts - parts.mean(1, keepdims=True)
        return {name: over[:, i] for i, name in enumerate(names)}

    def doubts(
        self, grade: SlideGrade, features: npt.NDArray[Any], *, unreadable: float = 0.0, stain: str | None = None
    ) -> Doubts:
        """Return how certain a grade is, and whether to abstain.

        Parameters
        ----------
        features : float (n, d)
            Those that were graded.
        unreadable : float
            Share of the slide's tissue that could not be read.
        stain : str, optional
            Why the slide's stain lies outside that of the training slides (``wsi.stain.range``).
        """
        config = self.config
        names = config.class_names
        reasons = []
        if unreadable > MOST_UNREADABLE:
            reasons.append(f"{unreadable:.0%} of tissue unreadable")
        if stain is not None:
            reasons.append(stain)
        if config.bag_tiles is not None:
            (least, most), n = config.bag_tiles, len(features)
            if n > BAG_FACTOR * most or n * BAG_FACTOR < least:
                reasons.append(f"{n} tiles, but the head was trained on slides of {least} to {most}")
        chosen: tuple[str, ...] | None = None
        if config.conformal_threshold is not None:
            chosen = tuple(names[i] for i in prediction_set(grade.probabilities, config.conformal_threshold))
            if len(chosen) != 1:
                either = f"{' or '.join(chosen)} cannot be told apart" if chosen else "no grade is likely enough"
                reasons.append(f"{either} at {config.coverage:.0%} coverage")
        if config.largest_shift is not None:
            shift = feature_shift(self._nets[0], torch.from_numpy(np.require(features, requirements=["C", "W"])))
            if shift > config.largest_shift:
                reasons.append(
                    "features lie outside the range of the training slides (scanner or tissue unlike theirs): "
                    f"{shift / config.largest_shift:.2g} times the farthest of them"
                )
        return Doubts(uncertainty(grade.members), chosen, "; ".join(reasons) or None)


class Doubts(NamedTuple):
    """The certainty of a grade.

    Attributes
    ----------
    uncertainty : Uncertainty
        Entropy and mutual information of the ensemble.
    prediction_set : tuple of str, optional
        Classes that cannot be excluded at the model's coverage; None where the model has no conformal threshold.
    abstain : str, optional
        Why the grade should not be used; None for no objection.
    """

    uncertainty: Uncertainty
    prediction_set: tuple[str, ...] | None
    abstain: str | None

    def reasons(self) -> dict[str, str]:
        """Return the reason for each value that ``as_json`` has as None."""
        why = {
            "mutual_information": "the head is a single network: nothing to disagree",
            "prediction_set": "the head holds no threshold of prediction sets",
            "abstain": "nothing speaks against the grade",
        }
        return {name: why[name] for name, value in self.as_json().items() if value is None}

    def as_json(self) -> dict[str, Any]:
        """Return the values as result.json holds them: entropies in nats to six digits."""
        exact = self.uncertainty.mutual_information
        return {
            "entropy": rounded(self.uncertainty.entropy),
            "mutual_information": None if exact is None else rounded(exact),
            "prediction_set": None if self.prediction_set is None else list(self.prediction_set),
            "abstain": self.abstain,
        }


@torch.inference_mode()
def feature_shift(net: MilNet, features: torch.Tensor) -> float:
    """Return the root mean square distance of a slide's mean features from the training mean, in deviations."""
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    for block in features.split(BLOCK):
        mean += block.double().sum(0)
    mean /= len(features)
    return float((((mean - net.mean) / net.std) ** 2).mean().sqrt())


def pick_class(
    probabilities: npt.NDArray[Any], config: ModelConfig, threshold: float | None = None
) -> npt.NDArray[np.int64]:
    """Return the class index called in each row of probabilities (n, k), int64 (n,); see ``MilModel.grade``."""
    positive = np.array([name in config.positive_classes for name in config.class_names])
    return called(probabilities, positive, config.threshold if threshold is None else threshold)


def load_mil_model(name: str | Path, encoder: PatchModel | None = None) -> MilModel:
    """Load a MIL head by name or folder.

    Parameters
    ----------
    name : str or Path
    encoder : PatchModel, optional
        Source of the features. Without it only their width can be checked.

    Raises
    ------
    ModelError
        Also where the head was trained on the features of another model: its grades would mean nothing.
    """
    folder = find_model(str(name))
    if (folder / "mil" / "config.json").is_file():  # a patch model's folder: take its head
        folder = folder / "mil"
    config = read_config(folder, "mil")
    if config.architecture not in MIL_NETS:
        raise ModelError(config.folder, f"is of architecture {config.architecture!r}", f"Known: {', '.join(MIL_NETS)}")
    if encoder is not None and not encoder.num_features:
        raise ModelError(config.folder, "needs features, and a TorchScript patch model shows none", "Leave out --mil")
    if encoder is not None and config.encoder_sha256 not in (None, encoder.sha256):
        what = f"was trained on the features of another patch model than {encoder.config.folder.name}"
        remedy = "Use the patch model it names (encoder_sha256), or train a head for this one"
        raise ModelError(config.folder, what, remedy)
    state = load_weights(config)
    arguments = {**config.architecture_args, "num_classes": config.num_logits}
    try:
        nets = [make_net(config.architecture, **arguments) for _ in range(config.members)]
    except TypeError as error:
        raise ModelError(config.folder / "config.json", f"architecture_args do not fit: {error}") from error
    if encoder is not None and nets[0].in_features != encoder.num_features:
        what = f"reads features of width {nets[0].in_features}, and {encoder.name} gives {encoder.num_features}"
        raise ModelError(config.folder, what, "Use the patch model it was trained with, or train a head for this one")
    # One file holds the whole ensemble, so that one hash identifies a grade's weights.
    fit_weights(nets[0] if config.members == 1 else torch.nn.ModuleList(nets), state, config)
    return MilModel(config, nets, weights_sha256(config))
