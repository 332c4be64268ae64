"""Metrics of subgroups (by centre, scanner, resolution) beside those of all cases."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.estimate import Estimate

#: A subgroup with fewer events (cases of the rarer class, lesions, ...) has no metric.
MIN_EVENTS = 10

Rows = npt.NDArray[np.intp]
Statistic = Callable[[Rows], float | None]


def gap_of(first: float | None, second: float | None) -> float | None:
    """Return `first` minus `second`; None if either is undefined."""
    return None if first is None or second is None else first - second


def beside_all(
    statistic: Statistic,
    member: npt.NDArray[np.bool_],
    patients: Sequence[Hashable],
    *,
    events: int,
    what: str,
    strata: Sequence[Hashable] | None = None,
    **draws: Any,
) -> tuple[Estimate, Estimate]:
    """Return a statistic of a subgroup, and its difference from that of all cases, with intervals over patients.

    Both are undefined if the subgroup has fewer than ``MIN_EVENTS`` `events`; `what` names the events.

    Parameters
    ----------
    statistic : callable
        Takes rows, intp (k,), and returns a number, or None if it is undefined.
    member : bool (n,)
        Which cases belong to the subgroup.
    patients, strata : sequence (n,)
        As in ``bootstrap``; so are the further arguments.

    Examples
    --------
    >>> values = np.arange(10.0)
    >>> odd, apart = beside_all(
    ...     lambda rows: float(values[rows].mean()), values % 2 == 1, range(10), events=10, what="cases", n_draws=100
    ... )
    >>> odd.value, apart.value
    (5.0, 0.5)
    """
    if events < MIN_EVENTS:
        return (Estimate.undefined(f"fewer than {MIN_EVENTS} {what}", int(member.sum())),) * 2
    own = np.flatnonzero(member)
    alone = bootstrap(
        lambda rows: statistic(own[rows]),
        [patients[i] for i in own.tolist()],
        strata=None if strata is None else [strata[i] for i in own.tolist()],
        **draws,
    )
    apart = bootstrap(
        lambda rows: gap_of(statistic(rows[member[rows]]), statistic(rows)), patients, strata=strata, **draws
    )
    return alone, apart


def subgroup_rows(
    groups: Mapping[str, Sequence[str]],
    count: Callable[[Rows], tuple[int, str, Mapping[str, Any]]],
    statistic: Statistic,
    patients: Sequence[Hashable],
    forest: dict[str, Estimate],
    known: Sequence[int] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return a row for each value of each column: number of cases, metric, and difference from all cases.

    Parameters
    ----------
    groups : mapping of column to its value for each case
    count : callable
        Takes rows; returns the number of events, their name, and further columns of the table.
    statistic, patients, options
        As in ``beside_all``.
    forest : dict
        Receives the metric of each subgroup, for a forest plot.
    known : sequence of int, optional
        Positions in `groups` of the cases that `statistic` and `patients` refer to; default all.
    """
    table = []
    for column, values in groups.items():
        for value in sorted(set(values)):
            member = np.array([values[i] == value for i in (range(len(values)) if known is None else known)], bool)
            events, what, columns = count(np.flatnonzero(member))
            found, gap = beside_all(statistic, member, patients, events=events, what=what, **options)
            forest[f"{column} {value}"] = found
            table.append(
                {"column": column, "value": value, "n": int(member.sum()), **columns}
                | {"metric": found.value, "low": found.low, "high": found.high}
                | {"gap": gap.value, "gap_low": gap.low, "gap_high": gap.high, "reason": found.reason}
            )
    return table
