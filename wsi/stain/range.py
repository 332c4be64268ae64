"""The stain range of a model's training slides, and whether a slide lies outside it.

A slide's stain is a point: the directions of haematoxylin and eosin in optical density and their full strengths,
measured by Macenko's method on tiles as the model sees them. The distance of two slides is the root of the sum of four
squares: the angles between their two stains, in degrees, and ten times the binary logarithm of the two ratios of
strength, so that twice the strength counts as 10 degrees. This metric is fixed, not fitted.

A slide is outside if it is farther than `limit` from the nearest training slide. Each of n training patients has a
score: the largest, over the patient's slides, of the distance to the nearest slide of another patient. `limit` is the
``ceil((n + 1) c)``-th smallest score, where c is the coverage. Then at most a share ``1 - c`` of new patients from the
same population is expected outside, for any distribution. Proof: among n + 1 exchangeable patients, scored against each
other, every rank of the new one is equally likely. So with probability c or more its score is at most the
``ceil((n + 1) c)``-th smallest of the others' scores. Without the new patient's slides these can only grow. The
argument says nothing of how many slides from elsewhere are detected.

References
----------
Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005 (the argument of exchangeability); Laxhammar &
Falkman, Annals of Mathematics and Artificial Intelligence 74 (2015) 67-94 (anomalies by distance to the nearest).
Macenko et al., ISBI 2009.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsi.errors import ModelError
from wsi.files import write_json
from wsi.grid import TileGrid
from wsi.result import rounded
from wsi.slide.base import U8, Slide
from wsi.stain import macenko
from wsi.stain.config import FitConfig
from wsi.stain.pixels import evenly, read_tiles
from wsi.stain.statistics import F64, Stains, Unmeasurable
from wsi.stain.transform import StainTransform
from wsi.store import PatchStore, slide_of

FILE = "stain.json"
COVERAGE = 0.95
#: Distance of twice the strength.
DOUBLING_DEG = 10.0
#: Maximum number of tiles on which a slide's stain is measured.
N_TILES = 64

Point = tuple[float, ...]


class StainCheck(NamedTuple):
    """Result of comparing a slide's stain with the training slides'.

    Attributes
    ----------
    distance : float, optional
        To the nearest training slide, in degrees.
    outside : str, optional
        Why the model should not be trusted on this slide; None for no objection.
    undefined : str, optional
        Why there is no distance.
    """

    distance: float | None = None
    outside: str | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class StainRange:
    """Stains of a model's training slides.

    Attributes
    ----------
    slides : tuple of 8 floats each
        Unit vector of haematoxylin (3), of eosin (3), and both strengths.
    patients : int
        Number of patients.
    limit : float, optional
        Distance in degrees beyond which a slide is outside; None if unknown.
    coverage : float
        Expected least share of new patients, from the same population, that are inside.
    reason : str, optional
        Why there is no limit.

    Examples
    --------
    >>> train = [Stains(((0.65, 0.70, 0.29), (0.07, 0.99, 0.1 + i / 200)), (1.0, 1.0)) for i in range(20)]
    >>> known = StainRange.of([point_of(stains) for stains in train], list(range(20)))
    >>> known.check(known.slides[3])
    StainCheck(distance=0.0, outside=None, undefined=None)
    >>> StainRange.of([], []).reason
    'of 0 training patients; 19 or more are needed to tell what 95% of them are like'
    """

    slides: tuple[Point, ...] = ()
    patients: int = 0
    limit: float | None = None
    coverage: float = COVERAGE
    reason: str | None = None

    @classmethod
    def of(cls, points: Sequence[Point], patients: Sequence[Any], coverage: float = COVERAGE) -> StainRange:
        """Compute the limit from one point a slide and the slides' patients; see the module's docstring."""
        table = np.array(points, np.float64).reshape(-1, 8)
        owner = np.unique(np.array(patients, str), return_inverse=True)[1]
        n = int(owner.max()) + 1 if len(owner) else 0
        rank = math.ceil((n + 1) * coverage - 1e-9)
        if rank > n:
            needed = math.ceil(coverage / (1 - coverage) - 1e-9)
            what = f"of {n} training patients; {needed} or more are needed to tell what {coverage:.0%} of them are like"
            return cls(coverage=coverage, patients=n, reason=what)
        alone = [_distances(table[owner == k], table[owner != k]).min(1).max() for k in range(n)]
        return cls(tuple(points), n, rounded(np.sort(alone)[rank - 1]), coverage)

    def check(self, seen: Point | U8) -> StainCheck:
        """Check a slide, given as a point or as some of its pixels, uint8 (..., 3)."""
        if self.limit is None:
            return StainCheck(undefined=f"no range of training stains: {self.reason}")
        try:
            point = seen if isinstance(seen, tuple) else point_of(measure(seen))
        except Unmeasurable as error:
            return StainCheck(undefined=f"the slide's stains could not be measured: {error.what}")
        known, own = np.array(self.slides), np.array([point])
        nearest = int((apart := _distances(own, known)[0]).argmin())
        distance = rounded(apart[nearest])
        if distance <= self.limit:
            return StainCheck(distance)
        h, e = (float(_angles(own[:, i : i + 3], known[nearest, None, i : i + 3])[0, 0]) for i in (0, 3))
        times_h, times_e = own[0, 6:] / known[nearest, 6:]
        return StainCheck(
            distance,
            f"stain outside the training range: haematoxylin {h:.0f} and eosin {e:.0f} degrees from the nearest "
            f"training slide's, {times_h:.2g} and {times_e:.2g} times as strong; together {distance:.3g}, and "
            f"{self.coverage:.0%} of {self.patients} training patients lie within {self.limit:.3g} of another",
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of stain.json, with one string a slide."""
        return asdict(self) | {"slides": [" ".join(f"{value:g}" for value in row) for row in self.slides]}

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(json.dumps(self.as_json()).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write stain.json into a model folder."""
        write_json(folder / FILE, self.as_json())

    @classmethod
    def read(cls, folder: Path) -> StainRange | None:
        """Read stain.json from a model folder; None if there is none, ModelError where it is damaged.

        A head without one of its own (``mil/``) uses its model's.
        """
        path = folder / FILE
        if not path.is_file():
            return cls.read(folder.parent) if folder.name == "mil" else None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(tuple(map(float, row.split())) for row in raw["slides"])
            limit, patients, coverage = raw["limit"], int(raw["patients"]), float(raw["coverage"])
            if limit is not None:
                limit, table = float(limit), np.array(rows, np.float64).reshape(-1, 8)
                lengths = np.linalg.norm(table[:, :6].reshape(-1, 2, 3), axis=2)
                sizes = [*lengths.flat, *table[:, 6:].flat]
                if not rows or not np.isfinite(table).all() or not limit >= 0 or min(sizes) <= 0:
                    raise ValueError("rows of eight numbers, no vector or strength 0, and a limit are needed")
            return cls(rows, patients, limit, coverage, raw["reason"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(path, f"is damaged ({error})", "Fetch the model again") from error


def measure(rgb: U8) -> Stains:
    """Measure the stains of pooled pixels, uint8 (..., 3); raises Unmeasurable, see ``wsi.stain.FALLBACKS``."""
    return macenko.measure(rgb, FitConfig())


def point_of(stains: Stains) -> Point:
    """Return stains as the point that a range stores, to five decimals."""
    vectors = np.array(stains.vectors)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return tuple(np.round([*vectors.ravel(), *stains.max_amounts], 5).tolist())


def sample_tiles(slide: Slide, grid: TileGrid, stain: StainTransform | None = None) -> U8:
    """Read tiles evenly spaced over a grid, as a model sees them: uint8 (m, tile_px, tile_px, 3)."""
    tiles = read_tiles(slide, grid, evenly(len(grid), N_TILES))
    return tiles if stain is None or not len(tiles) else stain.apply(tiles)


def sample_store(store: PatchStore) -> U8:
    """Return such tiles of a store, from its own pixels or from its slide.

    Raises StoreError or SlideError where it keeps no pixels and the slide cannot be found.
    """
    used = store.attributes.get("stain")
    stain = None if used is None else StainTransform.from_json(json.dumps(used))
    if store.pixels == "none":
        with slide_of(store) as slide:
            return sample_tiles(slide, store.grid, stain)
    tiles = store.read(evenly(len(store), N_TILES))
    return tiles if stain is None or not len(tiles) else stain.apply(tiles)


def _angles(a: F64, b: F64) -> F64:
    """Angles in degrees between vectors (m, 3) and (n, 3), from the chord, which is accurate for small angles too."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    chord = np.linalg.norm(a[:, None] - b[None], axis=2)
    return np.asarray(np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1))))


def _distances(a: F64, b: F64) -> F64:
    """Distances between points (m, 8) and (n, 8)."""
    strength = DOUBLING_DEG * np.log2(a[:, None, 6:] / b[None, :, 6:])
    squares = _angles(a[:, :3], b[:, :3]) ** 2 + _angles(a[:, 3:6], b[:, 3:6]) ** 2 + (strength**2).sum(2)
    return np.asarray(np.sqrt(squares))
