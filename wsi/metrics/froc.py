"""Free-response ROC of lesion detection, by the official definition of CAMELYON16.

Follows ``Python/Evaluation_FROC.py`` of the challenge's organisers (computationalpathologygroup/Camelyon16): lesions
closer than 75 um are one, isolated tumour cells are neither hit nor false positive, and the score is the mean
sensitivity at 1/4, 1/2, 1, 2, 4 and 8 false positives a slide. As in the script, confidences of hits are float32 and
those of false positives float64. So of a hit and a false positive with confidence 0.8 the hit ranks first, and with
0.7 the false positive. Confidences that float32 holds exactly, as ``wsi evaluate`` writes them, tie as expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import measure

from wsi.metrics.bootstrap import bootstrap
from wsi.metrics.estimate import F64, Estimate

#: Microns per level-0 pixel, and level-0 pixels a mask pixel, that the official script assumes for every slide.
OFFICIAL_MPP = 0.243
OFFICIAL_DOWNSAMPLE = 32
#: Lesions closer than this are one: each grows by half of it before they are counted.
MERGE_UM = 75.0
#: Lesions with a shorter major axis (200 um, plus the growth) are isolated tumour cells.
ITC_UM = 200.0 + MERGE_UM
PER_SLIDE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, eq=False)
class Lesions:
    """The lesions of a slide, as the evaluation counts them.

    Attributes
    ----------
    labels : int32 (rows, columns)
        Number of the lesion at each pixel of the grown mask, from 1; 0 for none.
    major_axis_um : float64 (n,)
        Major axis of the ellipse with the second moments of the grown lesion.
    itc : bool (n,)
        Isolated tumour cells: too small to count.
    downsample : float
        Level-0 pixels a pixel of `labels`.
    origin : (int, int)
        Column and row of the whole mask at which `labels` begins.
    """

    labels: npt.NDArray[np.int32]
    major_axis_um: F64
    itc: npt.NDArray[np.bool_]
    downsample: float = OFFICIAL_DOWNSAMPLE
    origin: tuple[int, int] = (0, 0)

    def at(self, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Return the number of the lesion at level-0 points, int32 (n,); 0 for none, and outside the mask."""
        column, row = (
            np.floor(np.asarray(v, np.float64) / self.downsample).astype(np.int64) - start
            for v, start in zip((x, y), self.origin, strict=True)
        )
        height, width = self.labels.shape
        inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
        found = np.zeros(len(column), np.int32)
        found[inside] = self.labels[row[inside], column[inside]]
        return found


def find_lesions(
    mask: npt.NDArray[np.bool_], *, mpp: float = OFFICIAL_MPP, downsample: float = OFFICIAL_DOWNSAMPLE
) -> Lesions:
    """Grow, fill and number the lesions of a mask.

    Equivalent to thresholding the Euclidean distance to the mask at ``75 um / 2``, filling holes and labelling with
    8 neighbours, but computed only around the lesions.

    Parameters
    ----------
    mask : bool (rows, columns)
        True inside lesions. ValueError for another dtype: which value means tumour is decided where a mask is read.
    mpp : float
        Microns per level-0 pixel; the official script takes 0.243 for all slides.
    downsample : float
        Level-0 pixels a pixel of the mask.

    Examples
    --------
    >>> mask = np.zeros((60, 90), bool)
    >>> mask[10:50, 10:50] = True       # a lesion of 311 um
    >>> mask[20:24, 70:74] = True       # and one of 31 um: isolated tumour cells
    >>> lesions = find_lesions(mask)
    >>> lesions.itc.tolist(), lesions.at([400, 2300], [400, 700]).tolist()
    ([False, True], [1, 2])
    """
    if mask.dtype != bool or mask.ndim != 2:
        raise ValueError(f"a lesion mask must be bool (rows, columns), got {mask.dtype} {mask.shape}")
    pixel_um = mpp * downsample
    reach = MERGE_UM / (pixel_um * 2)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return Lesions(np.zeros((0, 0), np.int32), np.zeros(0), np.zeros(0, bool), downsample)
    # The margin is wider than the growth, so that background surrounds the lesions as in the whole mask.
    margin = math.ceil(reach) + 1
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    part = mask[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]
    labels = ndimage.label(_fill_holes(_grow(part, reach)), np.ones((3, 3), bool))[0].astype(np.int32, copy=False)
    axes = np.array([lesion.axis_major_length for lesion in measure.regionprops(labels)])  # type: ignore[no-untyped-call]
    return Lesions(labels, axes * pixel_um, axes < ITC_UM / pixel_um, downsample, (int(left), int(top)))


def _grow(mask: npt.NDArray[np.bool_], reach: float) -> npt.NDArray[np.bool_]:
    """Pixels nearer than `reach` to the mask, row by row: a disc is a stack of lines."""
    grown = np.zeros_like(mask)
    wide: dict[int, npt.NDArray[np.bool_]] = {}
    for dy in range(min(math.ceil(reach), len(mask))):
        dx = max(x for x in range(math.ceil(reach)) if math.sqrt(x * x + dy * dy) < reach)
        if dx not in wide:
            wide[dx] = ndimage.maximum_filter1d(mask.view(np.uint8), 2 * dx + 1, axis=1, mode="constant").view(bool)
        grown[dy:] |= wide[dx][: len(mask) - dy]
        grown[: len(mask) - dy] |= wide[dx][dy:]
    return grown


def _fill_holes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Fill the background that is not 4-connected to the border."""
    background, n = ndimage.label(~mask)
    open_ = np.zeros(n + 1, bool)
    for edge in (background[0], background[-1], background[:, 0], background[:, -1]):
        open_[edge] = True
    open_[0] = False
    if open_[1:].all():
        return mask
    return np.asarray(~open_[background])


@dataclass(frozen=True, eq=False)
class SlideHits:
    """The matches of a slide's detections.

    Attributes
    ----------
    has_lesions : bool
        Whether it is a tumour slide.
    false_positives : float64 (k,)
        Confidences of detections outside lesions.
    hits : float64 (n,)
        Highest confidence on each lesion, rounded to float32; 0 where none, or where the lesion is isolated tumour
        cells.
    n_lesions : int
        Lesions that count: without isolated tumour cells.
    ignored : int
        Detections on isolated tumour cells.
    outside : int
        Detections outside the slide; they count as false positives.
    """

    has_lesions: bool
    false_positives: F64
    hits: F64
    n_lesions: int
    ignored: int = 0
    outside: int = 0


def match(
    lesions: Lesions | None,
    confidence: npt.ArrayLike,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    size: tuple[int, int] | None = None,
) -> SlideHits:
    """Match a slide's detections with its lesions.

    Parameters
    ----------
    lesions : Lesions, optional
        None for a normal slide, where every detection is a false positive.
    confidence : (k,)
        From 0 to 1. A lesion hit with confidence 0 counts as missed.
    x, y : (k,)
        Level-0 pixels.
    size : (int, int), optional
        Width and height of the slide in level-0 pixels; detections outside are counted separately.

    Raises
    ------
    ValueError
        Numbers that are not finite, confidences below 0, or lists of different length.

    Examples
    --------
    >>> mask = np.zeros((60, 90), bool)
    >>> mask[10:50, 10:50] = True
    >>> hits = match(find_lesions(mask), [0.75, 0.5, 0.7], [400, 500, 2500], [400, 600, 100])
    >>> hits.hits.tolist(), hits.false_positives.tolist()
    ([0.75], [0.7])
    """
    p, px, py = (np.atleast_1d(np.asarray(v, np.float64)) for v in (confidence, x, y))
    if not (p.shape == px.shape == py.shape and p.ndim == 1):
        raise ValueError(f"confidence, x and y must be lists of one length, got {p.shape}, {px.shape}, {py.shape}")
    if not (np.isfinite(p).all() and np.isfinite(px).all() and np.isfinite(py).all()):
        raise ValueError("detections must be finite numbers")
    if (p < 0).any():
        raise ValueError("confidences must not be negative")
    w, h = size or (math.inf, math.inf)
    outside = int(np.count_nonzero((px < 0) | (py < 0) | (px >= w) | (py >= h)))
    if lesions is None:
        return SlideHits(False, p, np.zeros(0), 0, 0, outside)
    found = lesions.at(px, py)
    hits = np.zeros(len(lesions.itc))
    np.maximum.at(hits, found[found > 0] - 1, p[found > 0].astype(np.float32))
    hits[lesions.itc] = 0
    ignored = int(np.count_nonzero(lesions.itc[found[found > 0] - 1]))
    n_lesions = int(np.count_nonzero(~lesions.itc))
    return SlideHits(True, p[found == 0], hits, n_lesions, ignored, outside)


@dataclass(frozen=True, eq=False)
class Froc:
    """A FROC curve.

    Attributes
    ----------
    per_slide, sensitivity : float64 (k,)
        False positives a slide and sensitivity, by rising threshold, ending at (0, 0).
    at : tuple of float
        Sensitivity at ``PER_SLIDE``; empty where undefined.
    score : Estimate
        Their mean; n is the number of slides.
    n_lesions : int
    """

    per_slide: F64
    sensitivity: F64
    at: tuple[float, ...]
    score: Estimate
    n_lesions: int


def froc(slides: Sequence[SlideHits], *, fp: str = "all", n_bootstrap: int = 0, seed: int = 0) -> Froc:
    """Compute the curve, the sensitivity at the six operating points, and the score.

    Parameters
    ----------
    slides : sequence of SlideHits
        All slides of the set, also those without detections: they count in the denominator.
    fp : {"all", "normal"}
        "all": false positives of all slides per slide (the organisers' script). "normal": those of normal slides per
        normal slide (Ehteshami Bejnordi et al., JAMA 2017).
    n_bootstrap : int
        Draws of slides with their lesions, for a 95 % percentile interval of the score; 0 for none.
    seed : int

    Raises
    ------
    ValueError
        Another `fp`.

    Examples
    --------
    >>> tumour = SlideHits(True, np.array([0.6]), np.array([0.9, 0.0]), 2)
    >>> curve = froc([tumour, SlideHits(False, np.array([0.2]), np.zeros(0), 0)])
    >>> curve.at, round(curve.score.value, 3)
    ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 0.5)
    """
    if fp not in ("all", "normal"):
        raise ValueError(f"fp={fp!r}: 'all' or 'normal'")
    pool = _Pool(slides, fp)
    per_slide, sensitivity = pool.curve(np.ones(len(slides), np.int64))
    n_lesions = sum(slide.n_lesions for slide in slides)
    at = _at(per_slide, sensitivity)
    if at is None:
        nothing = "no lesion that counts" if not n_lesions else "no slide to count false positives on"
        empty = np.zeros(0)
        return Froc(empty, empty, (), Estimate.undefined(nothing, len(slides)), n_lesions)
    score = bootstrap(froc_statistic(slides, fp=fp), range(len(slides)), n_draws=n_bootstrap, seed=seed, unit="slides")
    return Froc(per_slide, sensitivity, at, score, n_lesions)


def froc_statistic(slides: Sequence[SlideHits], *, fp: str = "all") -> Callable[[npt.NDArray[np.intp]], float | None]:
    """Return the score as a function of row indices of `slides`, with repeats: an argument for ``bootstrap``.

    Examples
    --------
    >>> tumour = SlideHits(True, np.array([0.6]), np.array([0.9, 0.0]), 2)
    >>> score = froc_statistic([tumour, SlideHits(False, np.array([0.2]), np.zeros(0), 0)])
    >>> score(np.array([0, 1])), score(np.array([1, 1]))
    (0.5, None)
    """
    pool = _Pool(slides, fp)

    def score(rows: npt.NDArray[np.intp]) -> float | None:
        at = _at(*pool.curve(np.bincount(rows, minlength=len(slides))))
        return None if at is None else float(np.mean(at))

    return score


class _Pool:
    """All confidences of all slides, sorted once, so that the curve of a resample is a weighted sum."""

    def __init__(self, slides: Sequence[SlideHits], fp: str) -> None:
        counted = [slide if fp == "all" or not slide.has_lesions else None for slide in slides]
        self._n = np.array([slide is not None for slide in counted], np.int64)
        self._lesions = np.array([slide.n_lesions for slide in slides], np.int64)
        fps = [slide.false_positives if slide is not None else np.zeros(0) for slide in counted]
        self._fp, self._fp_of = _ordered(fps)
        self._tp, self._tp_of = _ordered([slide.hits for slide in slides])
        self._thresholds = np.unique(np.concatenate([self._fp, self._tp]))
        self._fp_from = np.searchsorted(self._fp, self._thresholds)
        self._tp_from = np.searchsorted(self._tp, self._thresholds)

    def curve(self, times: npt.NDArray[np.int64]) -> tuple[F64, F64]:
        """Points (false positives a slide, sensitivity) with each slide counted `times` times; empty if undefined."""
        n_slides, n_lesions = int(times @ self._n), int(times @ self._lesions)
        if not n_slides or not n_lesions:
            return np.zeros(0), np.zeros(0)
        counts = []
        lowest = len(self._thresholds)
        for of, first in ((self._fp_of, self._fp_from), (self._tp_of, self._tp_from)):
            weight = times[of]
            reached = np.concatenate([np.cumsum(weight[::-1])[::-1], [0]])  # number from here on
            counts.append(reached[first])
            if weight.any():
                lowest = min(lowest, int(np.searchsorted(first, np.argmax(weight > 0), side="right")) - 1)
        # As in the script, the lowest confidence is no threshold: usually it is the 0 of the missed lesions.
        fps, hits = (np.append(count[lowest + 1 :], 0) for count in counts)
        return fps / n_slides, hits / n_lesions


def _ordered(lists: Sequence[F64]) -> tuple[F64, npt.NDArray[np.int64]]:
    """All values in rising order, and the list that each is from."""
    values = np.concatenate([np.zeros(0), *lists])
    of = np.repeat(np.arange(len(lists)), [len(part) for part in lists])
    order = np.argsort(values, kind="stable")
    return values[order], of[order]


def _at(per_slide: F64, sensitivity: F64) -> tuple[float, ...] | None:
    if not len(per_slide):
        return None
    return tuple(np.interp(PER_SLIDE, per_slide[::-1], sensitivity[::-1]).tolist())
