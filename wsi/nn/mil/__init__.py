"""Multiple-instance learning: networks that read a bag of tile features, one file a family.

``net`` defines the common interface, ``heads`` turns logits into probabilities, and ``MIL_NETS`` lists the networks by
name. Slides are graded by ``wsi.nn.grade.MilModel``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from wsi.nn.mil.attention import AdditiveMil, AttentionMil
from wsi.nn.mil.clam import ClamMb, ClamSb
from wsi.nn.mil.dsmil import DsMil
from wsi.nn.mil.dtfd import DtfdMil
from wsi.nn.mil.heads import KINDS, Head, Targets
from wsi.nn.mil.net import BagScores, MilNet, TrainingBag
from wsi.nn.mil.pooling import MaxMil, MeanMil, NoisyOrMil, TopKMil
from wsi.nn.mil.transmil import TransMil

__all__ = ["KINDS", "MIL_NETS", "BagScores", "Head", "MilNet", "Targets", "TrainingBag", "make_net"]

#: Architectures by the name that a model folder gives.
MIL_NETS: dict[str, Any] = {
    "mean": MeanMil,
    "max": MaxMil,
    "top-k": TopKMil,
    "noisy-or": NoisyOrMil,
    "attention": partial(AttentionMil, gated=False),
    "gated-attention": AttentionMil,
    "additive": AdditiveMil,
    "clam-sb": ClamSb,
    "clam-mb": ClamMb,
    "dsmil": DsMil,
    "transmil": TransMil,
    "dtfd": DtfdMil,
}


def make_net(architecture: str, **arguments: Any) -> MilNet:
    """Make a network with random weights; KeyError for an unknown architecture, TypeError for unknown arguments.

    Examples
    --------
    >>> make_net("mean", in_features=3).num_classes
    2
    """
    net: MilNet = MIL_NETS[architecture](**arguments)
    return net
