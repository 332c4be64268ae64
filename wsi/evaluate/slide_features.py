"""One score per slide: geometric features of a heatmap, and a random forest on them.

Features of Wang et al. 2016 (arXiv 1606.05718): the share of tissue above five thresholds, and shape and probability of
the two largest regions. The paper counts 28 features; listed one by one they are 30, as in the tables published by
DIDSR/DeepLearningCamelyon_II, whose names are used here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage import measure

from wsi.errors import EvaluationError
from wsi.evaluate.inputs import lines_of, read_rows, slide_name, unique
from wsi.files import replacing, write_csv, write_json
from wsi.heatmap import Heatmap
from wsi.metrics.estimate import F64, Estimate
from wsi.metrics.roc import auroc
from wsi.scored import scored_slides

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_LOCAL = (
    "{}_area", "eccentricity_{}", "extend_{}", "area_bbox_{}", "major_axis_length_{}", "maxprob_{}", "minprob_{}",
    "aveprob_{}", "aspect_ratio_bbox_{}", "solidity_{}",
)  # fmt: skip
#: Names of the 30 features, in order.
FEATURES = (
    *(f"ratio_cancer_tissue{round(100 * t)}" for t in _THRESHOLDS),
    *(f"ratio_sum_tissue{round(100 * t)}" for t in _THRESHOLDS),
    *(name.format(which) for which in ("largest", "second_largest") for name in _LOCAL),
)


def slide_features(heatmap: Heatmap, tissue_px: float, *, threshold: float = 0.5) -> F64:
    """Return the 30 features of a heatmap, float64 (30,), named in ``FEATURES``.

    Lengths and areas are in cells of the heatmap; the features of a missing region are 0.

    Parameters
    ----------
    heatmap : Heatmap
    tissue_px : float
        Area of the tissue in level-0 pixels.
    threshold : float
        Cells of a higher probability belong to a region.

    Examples
    --------
    >>> from wsi.grid import TileGrid
    >>> from wsi.units import Mpp
    >>> grid = TileGrid.cover((400, 100), slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=100)
    >>> features = slide_features(Heatmap(grid, np.array([0.75, 0.25, 0, 1], np.float32)), 40_000)
    >>> dict(zip(FEATURES, features.tolist()))["ratio_cancer_tissue50"]
    0.5
    """
    raster = np.nan_to_num(heatmap.raster(), nan=0.0).astype(np.float64)
    cell_px = heatmap.grid.stride[0] * heatmap.grid.stride[1]
    tissue = max(tissue_px / cell_px, 1.0)
    over = [np.count_nonzero(raster > t) / tissue for t in _THRESHOLDS]
    beyond = [float(np.maximum(raster - t, 0).sum()) / tissue for t in _THRESHOLDS]
    labels = measure.label(raster > threshold, connectivity=2)  # type: ignore[no-untyped-call]
    regions = measure.regionprops(labels, raster) if raster.size else []  # type: ignore[no-untyped-call]
    regions = sorted(regions, key=lambda region: (-region.area, region.label))
    local = [_local(regions[i]) if i < len(regions) else [0.0] * len(_LOCAL) for i in range(2)]
    return np.array([*over, *beyond, *local[0], *local[1]], np.float64)


def _local(region: Any) -> list[float]:
    top, left, bottom, right = region.bbox
    # A region one cell wide has a hull without area; its solidity is 1.
    thin = min(bottom - top, right - left) < 2
    return [
        float(region.area),
        float(region.eccentricity),
        float(region.extent),
        float(region.area_bbox),
        float(region.axis_major_length),
        float(region.intensity_max),
        float(region.intensity_min),
        float(region.intensity_mean),
        (right - left) / (bottom - top),
        1.0 if thin else float(region.solidity),
    ]


@dataclass(frozen=True, eq=False)
class Forest:
    """A random forest as plain arrays: no class is unpickled, and scikit-learn's version does not matter.

    Attributes
    ----------
    features : tuple of str
        Names of the input columns.
    threshold : float
        The threshold of regions with which the features were measured.
    starts : int64 (n_trees,)
        Index of each tree's first node in the arrays below.
    left, right, column : int64 (n_nodes,)
        Children, relative to the tree's first node, -1 at a leaf; the column to compare.
    cut, value : float64 (n_nodes,)
        A case goes left if its feature is at most the cut; share of positives at the node.
    facts : mapping
        How it was trained.
    """

    features: tuple[str, ...]
    threshold: float
    starts: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    cut: F64
    value: F64
    facts: Mapping[str, Any]

    def __call__(self, rows: npt.ArrayLike) -> F64:
        """Return the probability of the positive class, float64 (n,), for features (n, k).

        Raises
        ------
        ValueError
            The number of columns is wrong, or a feature is not finite.
        """
        x = np.asarray(rows, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.features) or not np.isfinite(x).all():
            raise ValueError(f"a forest over {len(self.features)} features needs as many finite columns, got {x.shape}")
        x = x.astype(np.float32)  # the precision in which scikit-learn compares
        node = np.tile(self.starts, (len(x), 1))
        start = self.starts[None, :]
        while (inner := self.left[node] >= 0).any():
            goes_left = np.take_along_axis(x, np.maximum(self.column[node], 0), axis=1) <= self.cut[node]
            node = np.where(inner, start + np.where(goes_left, self.left[node], self.right[node]), node)
        return np.asarray(self.value[node].mean(axis=1))

    def save(self, folder: Path) -> None:
        """Write ``forest.npz`` and ``config.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("starts", "left", "right", "column", "cut", "value")
        with replacing(folder / "forest.npz") as file:
            np.savez_compressed(file, **{name: getattr(self, name) for name in names})
        config = {"kind": "slide-features", "features": list(self.features), "threshold": self.threshold}
        write_json(folder / "config.json", {**config, "facts": dict(self.facts)})


def load_forest(folder: Path) -> Forest:
    """Read what ``Forest.save`` wrote.

    Raises
    ------
    EvaluationError
        The folder is missing, or holds no valid forest.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with np.load(folder / "forest.npz", allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("starts", "left", "right", "column", "cut", "value")}
        features, threshold, facts = tuple(config["features"]), float(config["threshold"]), config["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Make one with wsi train slide-features"
        raise EvaluationError(folder, f"is no slide-feature model ({error})", remedy) from error
    forest = Forest(features, threshold, facts=facts, **found)
    if not _is_sound(forest):
        raise EvaluationError(folder, "holds no trees that can be walked", "Train it again")
    return forest


def _is_sound(forest: Forest) -> bool:
    """Whether the arrays fit together, and children come after their parent, so that every traversal ends."""
    n, starts = forest.value.size, forest.starts
    kinds = {"left": "i", "right": "i", "column": "i", "cut": "f", "value": "f"}
    nodes = [getattr(forest, name) for name in kinds]
    if any(each.shape != (n,) or each.dtype.kind != kind for each, kind in zip(nodes, kinds.values(), strict=True)):
        return False
    if starts.dtype.kind != "i" or starts.ndim != 1 or not starts.size or starts[0] != 0:
        return False
    inner = forest.left >= 0
    if not (np.diff(starts, append=n) > 0).all() or not np.isfinite([forest.cut, forest.value]).all():
        return False
    if (forest.column[inner] < 0).any() or forest.column.max() >= len(forest.features):
        return False
    own = np.searchsorted(starts, np.arange(n), side="right") - 1
    first = starts[own] + np.where(inner, np.minimum(forest.left, forest.right), 0)
    last = starts[own] + np.where(inner, np.maximum(forest.left, forest.right), 0)
    return bool((first[inner] > np.flatnonzero(inner)).all() and (last < n).all())


def train_forest(
    rows: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    features: tuple[str, ...] = FEATURES,
    threshold: float = 0.5,
    n_trees: int = 500,
    max_depth: int = 10,
    seed: int = 0,
) -> Forest:
    """Train a random forest with scikit-learn and return it as arrays.

    Parameters
    ----------
    rows : float (n, k)
    labels : (n,)
        0 or 1.
    features : tuple of str
        Names of the k columns.
    threshold : float
        The threshold of regions with which `rows` were measured.
    n_trees, max_depth, seed : int

    Raises
    ------
    EvaluationError
        There is only one class, or a feature is not finite.

    Examples
    --------
    >>> rows, labels = np.arange(40.0).reshape(40, 1), np.arange(40) >= 20
    >>> forest = train_forest(rows, labels, features=("x",), n_trees=20)
    >>> (forest(rows) > 0.5).tolist() == labels.tolist()
    True
    """
    from sklearn.ensemble import RandomForestClassifier

    x, y = np.asarray(rows, np.float64), np.asarray(labels).astype(int)
    if len(np.unique(y)) != 2 or not np.isfinite(x).all():
        raise EvaluationError("training", "needs slides of both classes and finite features", "Check the reference")
    columns = max(1, round(2 * math.sqrt(x.shape[1])))
    model = RandomForestClassifier(
        n_trees, max_depth=max_depth, max_features=columns, random_state=seed, n_jobs=1, class_weight="balanced"
    ).fit(x, y)
    trees = [tree.tree_ for tree in model.estimators_]
    sizes = [tree.node_count for tree in trees]
    positive = [tree.value[:, 0, 1] / tree.value[:, 0].sum(axis=1) for tree in trees]
    facts = {
        "n_slides": len(y), "n_positive": int(y.sum()), "n_trees": n_trees, "max_depth": max_depth,
        "max_features": columns, "seed": seed, "class_weight": "balanced",
    }  # fmt: skip
    return Forest(
        features,
        threshold,
        np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
        np.concatenate([tree.children_left for tree in trees]).astype(np.int64),
        np.concatenate([tree.children_right for tree in trees]).astype(np.int64),
        np.concatenate([tree.feature for tree in trees]).astype(np.int64),
        np.concatenate([tree.threshold for tree in trees]).astype(np.float64),
        np.concatenate(positive).astype(np.float64),
        facts,
    )


def cross_validated(rows: npt.ArrayLike, labels: npt.ArrayLike, *, folds: int = 5, **options: Any) -> F64:
    """Return each case's probability from a forest trained without it, float64 (n,); folds are stratified by label.

    Examples
    --------
    >>> rows, labels = np.arange(40.0).reshape(40, 1), np.arange(40) >= 20
    >>> float(((cross_validated(rows, labels, features=("x",), n_trees=20) > 0.5) == labels).mean()) > 0.9
    True
    """
    x, y = np.asarray(rows, np.float64), np.asarray(labels).astype(int)
    rng = np.random.default_rng(options.get("seed", 0))
    fold = np.zeros(len(y), np.int64)
    for label in (0, 1):
        members = rng.permutation(np.flatnonzero(y == label))
        fold[members] = np.arange(len(members)) % folds
    out = np.zeros(len(y))
    for i in range(folds):
        if (fold == i).any():
            out[fold == i] = train_forest(x[fold != i], y[fold != i], **options)(x[fold == i])
    return out


def train_slide_features(
    results: Path,
    reference: Path,
    out: Path,
    *,
    threshold: float = 0.5,
    n_trees: int = 500,
    max_depth: int = 10,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the features of scored slides, train a forest on them, and write both.

    Parameters
    ----------
    results : Path
        A results folder of ``wsi score``.
    reference : Path
        The official ``reference.csv`` (slide, Tumor or Normal, ...; no header), or a CSV with the columns slide_id and
        label, 1 or 0.
    out : Path
        config.json, forest.npz, and features.csv with each slide's cross-validated probability (empty if a class has
        only one slide).
    threshold, n_trees, max_depth, folds, seed

    Returns
    -------
    dict
        n_slides, n_positive, and the cross-validated AUROC as an ``Estimate``.

    Raises
    ------
    EvaluationError
        A slide of the reference has no results, or there is only one class.
    """
    labels = _labels(reference)
    slides = {slide_id.lower(): slide for slide_id, slide in scored_slides(results).items()}
    missing = sorted(set(labels) - set(slides))
    if missing:
        raise EvaluationError(
            results, f"holds no results of {len(missing)} slides of the reference, {missing[0]} for one", "Score them"
        )
    found = [slides[name] for name in labels]
    rows = np.array([slide_features(each.heatmap(), each.tissue_px, threshold=threshold) for each in found])
    y = np.array(list(labels.values()), np.intp)
    options: dict[str, Any] = {"threshold": threshold, "n_trees": n_trees, "max_depth": max_depth, "seed": seed}
    forest = train_forest(rows, y, **options)
    fewest = int(min(y.sum(), len(y) - y.sum()))
    if fewest >= 2:
        held = cross_validated(rows, y, folds=min(folds, fewest), **options)
        area = auroc(y, held)
    else:
        held = np.full(len(y), np.nan)
        area = Estimate.undefined("fewer than two slides of a class: nothing to cross-validate on", len(y))
    facts = {**forest.facts, "folds": folds, "cross_validated_auroc": area.json()}
    replace(forest, facts=facts).save(out)
    table = [
        {"slide_id": name, "label": int(label), "cross_validated": p if fewest >= 2 else None}
        | dict(zip(FEATURES, row, strict=True))
        for name, label, p, row in zip(labels, y, held.tolist(), rows.tolist(), strict=True)
    ]
    write_csv(out / "features.csv", list(table[0]), table)
    return {"n_slides": len(y), "n_positive": int(y.sum()), "auroc": area}


def _labels(path: Path) -> dict[str, int]:
    """Labels, 1 or 0, by lower-case slide id."""
    first = next((cells for _, cells in lines_of(path)), [])
    header, slide, label, known = None, "slide_id", "label", {"1": 1, "0": 0}
    if not {slide, label} <= set(first):
        slide, label, known = "column 0", "column 1", {"Tumor": 1, "Normal": 0}
        header = [f"column {i}" for i in range(len(first))]
    rows = read_rows(path, header=header)
    found = {name: row.get(label, "") for name, row in unique(rows, slide, path, slide_name).items()}
    wrong = [each for each in found.values() if each not in known]
    if wrong:
        raise EvaluationError(path, f"labels a slide {wrong[0]!r}", f"Known: {', '.join(known)}")
    return {name: known[each] for name, each in found.items()}
