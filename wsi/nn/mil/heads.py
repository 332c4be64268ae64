"""From logits to probabilities and to a loss: binary, classes, ordinal grades, survival.

A head has no weights. Its probabilities sum to 1 over `num_classes` classes. For survival these are the intervals in
which the event may fall; the last one is "after all of them".

==========  ==============  ==================================================================================
kind        logits          probabilities
==========  ==============  ==================================================================================
softmax     K               softmax
binary      1               ``(1 - p, p)``, ``p = sigmoid(z)``
ordinal     K - 1           ``P(y > j) = sigmoid(c_j)``, ``c_0 = z_0``, ``c_j = c_{j-1} - softplus(z_j)``
hazard      K - 1           ``P(t) = h_t prod_{s<t} (1 - h_s)``, ``h = sigmoid(z)``
cox         1               differences of ``S0(t) ** exp(z)``
==========  ==============  ==================================================================================

Sources: cumulative logits, McCullagh, "Regression models for ordinal data", J. R. Stat. Soc. B 1980 (the falling
``c_j`` keep every class's probability positive); discrete hazards, Gensheimer & Narasimhan, PeerJ 2019
(arXiv:1805.00917); Cox, "Regression models and life-tables", J. R. Stat. Soc. B 1972, with Breslow's baseline and ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["softmax", "binary", "ordinal", "hazard", "cox"]
KINDS: tuple[Kind, ...] = ("softmax", "binary", "ordinal", "hazard", "cox")


class Targets(NamedTuple):
    """Targets of a batch of bags.

    Attributes
    ----------
    label : int64 (b,)
        Class, or survival interval of `time`.
    time : float32 (b,), optional
        Survival: time of the event, or of the last visit.
    event : bool (b,), optional
        Survival: True where the event was observed, False where censored.
    """

    label: Tensor
    time: Tensor | None = None
    event: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Targets:  # type: ignore[override]
        """Return the targets of `rows`."""
        return Targets(*(None if part is None else part[rows] for part in (self.label, self.time, self.event)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Head:
    """Interpretation of logits.

    Attributes
    ----------
    kind : {"softmax", "binary", "ordinal", "hazard", "cox"}
    num_classes : int
        K; for survival, intervals with the open last one.
    temperature : float
        Divides the logits; fitted on validation, 1 in training.
    baseline : tuple of float, or of tuples
        Cox: baseline survival S0 at the K - 1 ends of the intervals; for an ensemble one row a member, since risks are
        relative to the member's own baseline.

    Examples
    --------
    >>> Head("ordinal", 3).probabilities(torch.tensor([0.0, 1.0])).sum().item()
    1.0
    """

    kind: Kind
    num_classes: int
    temperature: float = 1.0
    baseline: tuple[float, ...] | tuple[tuple[float, ...], ...] = ()

    @property
    def num_logits(self) -> int:
        """Number of logits that a network must give."""
        if self.kind == "softmax":
            return self.num_classes
        return 1 if self.kind in ("binary", "cox") else self.num_classes - 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (..., num_logits) to probabilities (..., num_classes) that sum to 1."""
        z = logits / self.temperature
        if self.kind == "softmax":
            return torch.softmax(z, -1)
        if self.kind == "hazard":
            surviving = functional.logsigmoid(-z).cumsum(-1).exp()
        elif self.kind == "cox":
            log_baseline = torch.tensor(self.baseline, dtype=z.dtype, device=z.device).clamp(min=1e-30).log()
            surviving = (z.exp() * log_baseline).exp()  # (..., K - 1); of an ensemble (m, K - 1)
        else:
            surviving = torch.sigmoid(_cumulative(z))  # P(y > j)
        ends = torch.ones_like(surviving[..., :1])
        return torch.cat([ends, surviving], -1) - torch.cat([surviving, torch.zeros_like(ends)], -1)

    def loss(self, logits: Tensor, targets: Targets) -> Tensor:
        """Return the mean negative log likelihood of a batch: logits (b, num_logits) and targets."""
        if self.kind == "cox":
            return cox_loss(logits[:, 0], targets)
        return self._each(logits / self.temperature, targets).mean()

    def _each(self, z: Tensor, targets: Targets) -> Tensor:
        label = targets.label
        if self.kind == "softmax":
            return functional.cross_entropy(z, label, reduction="none")
        if self.kind == "binary":
            return functional.binary_cross_entropy_with_logits(z[:, 0], label.to(z.dtype), reduction="none")
        if self.kind == "ordinal":
            # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)); a > b are the class's two cut points
            c = _cumulative(z)
            first = functional.logsigmoid(c.gather(1, (label - 1).clamp(min=0)[:, None]))[:, 0]
            last = functional.logsigmoid(-c.gather(1, label.clamp(max=c.shape[1] - 1)[:, None]))[:, 0]
            inside = (label > 0) & (label < c.shape[1])
            gap = functional.softplus(z.gather(1, label.clamp(max=c.shape[1] - 1)[:, None]))[:, 0]
            between = torch.where(inside, torch.log(-torch.expm1(-gap.clamp(min=1e-6))), torch.zeros_like(gap))
            return -(torch.where(label > 0, first, 0.0) + torch.where(label < c.shape[1], last, 0.0) + between)
        # hazard: earlier intervals are survived; in its own the event happens, or the patient is censored
        survived = functional.logsigmoid(-z).cumsum(1)
        survived = torch.cat([torch.zeros_like(survived[:, :1]), survived], 1).gather(1, label[:, None])[:, 0]
        hazard = functional.logsigmoid(z.gather(1, label.clamp(max=z.shape[1] - 1)[:, None]))[:, 0]
        assert targets.event is not None
        return -(survived + torch.where(targets.event & (label < z.shape[1]), hazard, 0.0))


def cox_loss(risk: Tensor, targets: Targets) -> Tensor:
    """Return Cox's negative log partial likelihood per event, with Breslow's ties; 0 for a batch without events.

    `risk` (b,) is each patient's log hazard ratio.
    """
    assert targets.time is not None and targets.event is not None
    at_risk = targets.time[None, :] >= targets.time[:, None]  # [i, j]: j is at risk when i has the event
    log_sum = torch.logsumexp(torch.where(at_risk, risk[None, :], -torch.inf), 1)
    return ((log_sum - risk) * targets.event).sum() / targets.event.sum().clamp(min=1)


def breslow(
    risk: npt.NDArray[np.float64], time: npt.NDArray[np.float64], event: npt.NDArray[np.bool_], at: list[float]
) -> list[float]:
    """Breslow's baseline survival ``S0(t) = exp(-sum_{events <= t} 1 / sum_{at risk} exp(risk))`` at the times `at`."""
    hazard = np.exp(risk)
    steps = [(t, 1 / hazard[time >= t].sum()) for t in time[event]]
    return [float(np.exp(-sum(step for t, step in steps if t <= end))) for end in at]


def _cumulative(z: Tensor) -> Tensor:
    """Logits of ``P(y > j)``, which fall from j to j + 1 for any z."""
    return z[..., :1] - torch.cat([torch.zeros_like(z[..., :1]), functional.softplus(z[..., 1:])], -1).cumsum(-1)
