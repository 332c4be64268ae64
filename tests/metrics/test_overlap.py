"""Overlap against scipy's point sets and literal sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, directed_hausdorff

from wsi.metrics.overlap import dice, hausdorff, iou


@st.composite
def pairs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = tuple(rng.integers(1, 14, 2))
    return tuple(rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])) for _ in range(2))


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels with a neighbour over an edge that is not in the mask, one by one."""
    points = []
    for r, c in np.argwhere(mask):
        near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
        if not all(0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] for y, x in near):
            points.append((r, c))
    return np.array(points)


@given(pairs())
def test_against_sets_of_pixels(pair):
    a, b = ({tuple(p) for p in np.argwhere(mask).tolist()} for mask in pair)
    if not a | b:
        assert dice(*pair).reason == iou(*pair).reason == "both are empty"
    else:
        assert dice(*pair).value == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        assert iou(*pair).value == pytest.approx(len(a & b) / len(a | b))


@given(pairs(), st.sampled_from([(1.0, 1.0), (0.5, 2.0)]))
def test_hausdorff_against_scipy(pair, pixel):
    if not (pair[0].any() and pair[1].any()):
        assert hausdorff(*pair).value is None
        return
    a, b = (outline(mask) * pixel for mask in pair)
    expected = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    assert hausdorff(*pair, pixel=pixel).value == pytest.approx(expected)
    far = cdist(a, b)
    near = max(np.percentile(far.min(axis=1), 95), np.percentile(far.min(axis=0), 95))
    assert hausdorff(*pair, pixel=pixel, percentile=95).value == pytest.approx(near)


def test_masks_that_do_not_fit_are_refused():
    for function in (dice, iou, hausdorff):
        with pytest.raises(ValueError, match="masks"):
            function(np.ones((2, 2), bool), np.ones((2, 3), bool))
        with pytest.raises(ValueError, match="masks"):
            function(np.ones((2, 2), bool), np.full((2, 2), 255, np.uint8))
