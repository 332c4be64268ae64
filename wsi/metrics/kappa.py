"""Agreement of ordered grades: quadratic weighted kappa, and the grades of CAMELYON17 and PANDA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsi.metrics.estimate import Estimate

#: Stages of a patient, in the order of the official ``evaluate.py`` of CAMELYON17.
PN_STAGES = ("pN0", "pN0(i+)", "pN1mi", "pN1", "pN2")
#: Stages of a lymph node slide, by the size of its largest metastasis.
NODE_STAGES = ("negative", "itc", "micro", "macro")


def confusion(truth: npt.ArrayLike, predicted: npt.ArrayLike, n_classes: int) -> npt.NDArray[np.int64]:
    """Count pairs of grades, int64 (n_classes, n_classes): rows are the truth.

    Raises ValueError for grades outside 0 to ``n_classes - 1``, and for lists of different length.

    Examples
    --------
    >>> confusion([0, 1, 1], [0, 1, 0], 2).tolist()
    [[1, 0], [1, 1]]
    """
    a, b = np.asarray(truth), np.asarray(predicted)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"grades must be lists of one length, got {a.shape} and {b.shape}")
    both = np.concatenate([a, b])
    if len(both) and (both.dtype.kind not in "iu" or both.min() < 0 or both.max() >= n_classes):
        raise ValueError(f"grades must be whole numbers from 0 to {n_classes - 1}")
    pairs = a.astype(np.int64) * n_classes + b.astype(np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def quadratic_kappa(truth: npt.ArrayLike, predicted: npt.ArrayLike, n_classes: int) -> Estimate:
    """Return Cohen's kappa with quadratic weights.

    ``1 - sum(w O) / sum(w E)`` with ``w = (i - j)^2``, O the counts and E those expected from the margins
    (Cohen 1968); as computed by the official ``evaluate.py`` of CAMELYON17 and by PANDA's metric.

    Parameters
    ----------
    truth, predicted : int (n,)
        Grades, 0 to ``n_classes - 1``.
    n_classes : int

    Returns
    -------
    Estimate
        Undefined where all grades, true and predicted, are the same.

    Examples
    --------
    >>> round(quadratic_kappa([0, 1, 2, 2], [0, 1, 1, 2], 3).value, 3)
    0.8
    >>> print(quadratic_kappa([1, 1], [1, 1], 3))
    undefined: all grades are the same: no agreement beyond chance can be measured
    """
    counts = confusion(truth, predicted, n_classes)
    n = int(counts.sum())
    if not n:
        return Estimate.undefined("no cases")
    grade = np.arange(n_classes)
    weights = (grade[:, None] - grade) ** 2
    by_chance = float((weights * np.outer(counts.sum(axis=1), counts.sum(axis=0))).sum()) / n
    if not by_chance:
        return Estimate.undefined("all grades are the same: no agreement beyond chance can be measured", n)
    return Estimate(1 - float((weights * counts).sum()) / by_chance, n=n)


def node_stage(major_axis_mm: float, n_cells: int | None = None) -> str:
    """Return a slide's stage by its largest metastasis (AJCC; the rules of CAMELYON17).

    Parameters
    ----------
    major_axis_mm : float
        Longest diameter; 0 for no metastasis. ValueError where it is negative or not finite.
    n_cells : int, optional
        Tumour cells in it: more than 200 are a micrometastasis even below 0.2 mm.

    Examples
    --------
    >>> [node_stage(mm) for mm in (0, 0.2, 2.0, 2.1)]
    ['negative', 'itc', 'micro', 'macro']
    """
    if not (np.isfinite(major_axis_mm) and major_axis_mm >= 0):
        raise ValueError(f"a size must be 0 or more millimetres, got {major_axis_mm}")
    if major_axis_mm == 0:
        return "negative"
    if major_axis_mm > 2.0:
        return "macro"
    return "micro" if major_axis_mm > 0.2 or (n_cells or 0) > 200 else "itc"


def patient_stage(nodes: Sequence[str]) -> str:
    """Return a patient's pN stage from the stages of the lymph node slides (the rules of CAMELYON17).

    Raises ValueError for no node, or for a name that is not in ``NODE_STAGES``.

    Examples
    --------
    >>> patient_stage(["negative", "itc"]), patient_stage(["micro", "itc"]), patient_stage(["macro", "micro"])
    ('pN0(i+)', 'pN1mi', 'pN1')
    """
    unknown = sorted(set(nodes) - set(NODE_STAGES))
    if unknown or not nodes:
        raise ValueError(f"nodes must be one or more of {', '.join(NODE_STAGES)}, got {', '.join(unknown) or 'none'}")
    macro, positive = nodes.count("macro"), nodes.count("macro") + nodes.count("micro")
    if not positive:
        return "pN0(i+)" if "itc" in nodes else "pN0"
    if not macro:
        return "pN1mi"
    return "pN1" if positive <= 3 else "pN2"


def isup_grade(gleason: str) -> int:
    """Return the ISUP grade group, 0 to 5, of a Gleason score as PANDA writes it.

    Raises ValueError for anything but a score of two patterns, ``0+0`` or ``negative``.

    Examples
    --------
    >>> [isup_grade(score) for score in ("negative", "3+3", "3+4", "4+3", "4+4", "5+4")]
    [0, 1, 2, 3, 4, 5]
    """
    groups = {"0+0": 0, "negative": 0, "3+3": 1, "3+4": 2, "4+3": 3, "4+4": 4, "3+5": 4, "5+3": 4}
    groups |= {"4+5": 5, "5+4": 5, "5+5": 5}
    score = gleason.strip().lower().replace(" ", "")
    if score not in groups:
        raise ValueError(f"{gleason!r} is no Gleason score; known: {', '.join(groups)}")
    return groups[score]
