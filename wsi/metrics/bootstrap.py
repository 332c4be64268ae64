"""Bootstrap intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from wsi.metrics.estimate import Estimate

Rows = npt.NDArray[np.intp]

#: Least number of patients in a stratum. n patients can be drawn in C(2n - 1, n) ways. For two to four patients these
#: are 3, 10 and 35, of which a tail of 1 in 40 is only the most extreme; for five they are 126.
FEWEST = 5


def bootstrap(
    statistic: Callable[[Rows], float | None],
    patients: Sequence[Hashable],
    *,
    strata: Sequence[Hashable] | None = None,
    n_draws: int = 2000,
    seed: int = 0,
    unit: str = "patients",
) -> Estimate:
    """Return a statistic with a 95 % percentile interval from drawing patients with replacement (Efron 1979).

    A patient's rows are drawn together, since slides of one patient, or tiles of one slide, are not independent.

    Parameters
    ----------
    statistic : callable
        Takes row indices, intp (k,), and returns a number, or None where it is undefined.
    patients : sequence (n,)
        Patient of each row.
    strata : sequence (n,), optional
        Stratum of each row, such as its label. A patient's stratum is the highest of its rows. Patients are drawn
        within strata, so that each draw holds as many of each. With fewer than five patients in a stratum there is no
        interval.
    n_draws : int
        0 for no interval.
    seed : int
    unit : str
        Word for `patients` in the method's name.

    Returns
    -------
    Estimate
        n is the number of patients. Draws with an undefined statistic are left out, and counted in `method`. The
        interval is undefined where these are more than half, or where all draws give one value: for a perfect score,
        say, the draws contain no information on errors.

    Examples
    --------
    >>> values = np.arange(10.0)
    >>> print(bootstrap(lambda rows: float(values[rows].mean()), patients=range(10), n_draws=200))
    4.500 (2.900 to 6.400)
    """
    names = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    of = np.array([names[patient] for patient in patients], np.intp)
    n = len(names)
    order = np.argsort(of, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(of, minlength=n))[:-1]) if n else []
    value = statistic(np.arange(len(of), dtype=np.intp))
    if value is None:
        return Estimate.undefined("undefined on these cases", n)
    if not n_draws:
        return Estimate(value, n=n)
    if n < 2:
        return Estimate(value, n=n, reason=f"no interval: fewer than two {unit}")
    if strata is None:
        groups = [np.arange(n)]
    else:
        ranks = {stratum: i for i, stratum in enumerate(sorted(set(strata), key=lambda s: (str(type(s)), s)))}
        highest = np.zeros(n, np.intp)
        np.maximum.at(highest, of, [ranks[stratum] for stratum in strata])
        groups = [np.flatnonzero(highest == stratum) for stratum in np.unique(highest)]
        if min(map(len, groups)) < FEWEST:
            return Estimate(value, n=n, reason=f"no interval: fewer than {FEWEST} {unit} of a class")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_draws):
        drawn = np.concatenate([group[rng.integers(len(group), size=len(group))] for group in groups])
        found = statistic(np.concatenate([rows_of[i] for i in drawn]))
        if found is not None:
            draws.append(found)
    estimate = Estimate(value, n=n, method=f"bootstrap over {unit}, {len(draws)} of {n_draws} draws")
    if 2 * len(draws) <= n_draws:
        return replace(estimate, reason="no interval: undefined in most draws")
    if min(draws) == max(draws):
        return replace(estimate, reason="no interval: all draws give the same")
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return replace(estimate, low=low, high=high)
