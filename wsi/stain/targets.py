"""Targets by name: numbers only, without images."""

from __future__ import annotations

from dataclasses import dataclass

from wsi.stain.statistics import LabStatistics, Stains


@dataclass(frozen=True)
class Target:
    """The stains of a reference.

    Attributes
    ----------
    stains : Stains
        For macenko, vahadane and ruifrok.
    lab : LabStatistics
        For reinhard.
    origin : str
        Source of the numbers.
    """

    stains: Stains
    lab: LabStatistics
    origin: str


_CAMELYON = "measured by us on a 2048 px tile of CAMELYON17 (CC0), centre {}: lymph node"

#: The packaged targets.
TARGETS = {
    "veta": Target(
        Stains(((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)), (1.9705, 1.0308)),
        LabStatistics((59.946, 26.415, -10.580), (12.301, 5.846, 6.955)),
        "HERef and maxCRef of M. Veta's MATLAB version of Macenko's method, measured with OD = -ln((I + 1) / 240); "
        "CIELAB: by us, of its first example picture normalised to them",
    ),
    "camelyon17-centre-0": Target(
        Stains(((0.5279, 0.7390, 0.4185), (0.2684, 0.8233, 0.5002)), (2.1036, 0.9623)),
        LabStatistics((53.399, 24.296, -12.768), (15.024, 4.717, 5.556)),
        _CAMELYON.format(0),
    ),
    "camelyon17-centre-1": Target(
        Stains(((0.6010, 0.6696, 0.4364), (0.4592, 0.8037, 0.3785)), (1.8664, 2.8472)),
        LabStatistics((42.555, 19.508, -16.649), (19.147, 4.936, 6.124)),
        _CAMELYON.format(1),
    ),
    "camelyon17-centre-2": Target(
        Stains(((0.6016, 0.7549, 0.2611), (0.2729, 0.9046, 0.3274)), (2.2905, 1.1910)),
        LabStatistics((47.004, 36.225, -38.674), (13.670, 5.706, 8.837)),
        _CAMELYON.format(2),
    ),
}
