"""A measured number with its uncertainty, or the reason why it is undefined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: Half width of a 95 % interval, in standard deviations.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A measured number; undefined is None with a reason, never 0 or NaN.

    Attributes
    ----------
    value : float, optional
    low, high : float, optional
        Ends of the 95 % interval, where there is one.
    n : int
        Number of independent cases.
    method : str
        Method of the interval.
    reason : str
        Why the value or its interval is undefined.

    Raises
    ------
    ValueError
        An undefined value without a reason, or a number that is not finite.

    Examples
    --------
    >>> Estimate.undefined("no lesion", n=3)
    Estimate(value=None, low=None, high=None, n=3, method='', reason='no lesion')
    >>> print(Estimate(0.91234, 0.87, 0.95, n=129))
    0.912 (0.870 to 0.950)
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not np.isfinite(number):
                raise ValueError(f"an estimate must be finite or None, got {number}")
        if self.value is None and not self.reason:
            raise ValueError("an undefined estimate needs a reason")

    @classmethod
    def undefined(cls, reason: str, n: int = 0) -> Estimate:
        """Return an estimate without a value."""
        return cls(None, n=n, reason=reason)

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined: {self.reason}"
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"

    def json(self) -> dict[str, Any]:
        """Return a dict that JSON can hold."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "n", "method", "reason")}


def labels_and_scores(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Bools, F64]:
    """Convert n labels of 0 or 1 and n finite scores to arrays; ValueError for anything else.

    Examples
    --------
    >>> labels_and_scores([0, 1], [0.2, 0.7])
    (array([False,  True]), array([0.2, 0.7]))
    """
    truth, values = np.asarray(labels), np.asarray(scores, np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"labels and scores must be lists of one length, got {truth.shape} and {values.shape}")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, {np.count_nonzero(~np.isfinite(values))} are not")
    return truth.astype(bool), values


def one_class(truth: Bools) -> str:
    """Return why a comparison of two classes is undefined, or an empty string."""
    if not len(truth):
        return "no cases"
    return "" if 0 < truth.sum() < len(truth) else f"all cases are {'positive' if truth[0] else 'negative'}"
