"""The compiled area average against its NumPy twin, and the twin against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi import native
from wsi.native import twin

needs_compiled = pytest.mark.skipif(
    not native.HAVE_CPU,
    reason="no C++ compiler: the twin has no kernel to agree with",
)


def literal(source: np.ndarray, edges_y: list[int], edges_x: list[int]) -> np.ndarray:
    """Area average by exact rational arithmetic, pixel by pixel."""
    out = np.empty((len(edges_y) - 1, len(edges_x) - 1, 3), np.uint8)
    for oy in range(out.shape[0]):
        for ox in range(out.shape[1]):
            y0, y1 = Fraction(edges_y[oy], 4096), Fraction(edges_y[oy + 1], 4096)
            x0, x1 = Fraction(edges_x[ox], 4096), Fraction(edges_x[ox + 1], 4096)
            for c in range(3):
                total = Fraction(0)
                for y in range(source.shape[0]):
                    for x in range(source.shape[1]):
                        cover_y = max(Fraction(0), min(y1, y + 1) - max(y0, y))
                        cover_x = max(Fraction(0), min(x1, x + 1) - max(x0, x))
                        total += cover_y * cover_x * int(source[y, x, c])
                out[oy, ox, c] = int(total / ((y1 - y0) * (x1 - x0)) + Fraction(1, 2))
    return out


def edges(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size * 4096), min_size=2, max_size=6, unique=True).map(sorted)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_twin_is_exact(data: st.DataObject, h: int, w: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    edges_y, edges_x = data.draw(edges(h)), data.draw(edges(w))
    out = np.empty((len(edges_y) - 1, len(edges_x) - 1, 3), np.uint8)
    twin.area_average(source, np.array(edges_y), np.array(edges_x), out)
    # float64 rounds the reciprocal of the cell: a tie may fall on either side, nothing else may differ.
    np.testing.assert_allclose(out.astype(int), literal(source, edges_y, edges_x).astype(int), atol=1)
    assert (out != literal(source, edges_y, edges_x)).mean() < 0.2


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_compiled_gives_the_twins_bytes(data: st.DataObject, h: int, w: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    edges_y, edges_x = np.array(data.draw(edges(h))), np.array(data.draw(edges(w)))
    ours = np.zeros((len(edges_y) - 1, len(edges_x) - 1, 3), np.uint8)
    theirs = ours.copy()
    native.area_average(source, edges_y, edges_x, ours)
    twin.area_average(source, edges_y, edges_x, theirs)
    np.testing.assert_array_equal(ours, theirs)


@needs_compiled
def test_writes_into_a_slice_of_a_batch() -> None:
    source = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    batch = np.zeros((2, 40, 40, 3), np.uint8)
    steps = np.arange(33, dtype=np.int64) * 8192
    native.area_average(source, steps, steps, batch[1, 4:36, 4:36])
    expected = np.empty((32, 32, 3), np.uint8)
    twin.area_average(source, steps, steps, expected)
    np.testing.assert_array_equal(batch[1, 4:36, 4:36], expected)
    assert batch[0].max() == 0 and batch[1, :4].max() == 0 and batch[1, :, 36:].max() == 0


@needs_compiled
@pytest.mark.parametrize(
    ("source", "ys", "xs", "out", "error"),
    [
        (np.zeros((4, 4, 3), np.uint16), [0, 4096], [0, 4096], np.zeros((1, 1, 3), np.uint8), TypeError),
        (np.zeros((4, 4, 4), np.uint8), [0, 4096], [0, 4096], np.zeros((1, 1, 3), np.uint8), TypeError),
        (np.zeros((4, 8, 3), np.uint8)[:, ::2], [0, 4096], [0, 4096], np.zeros((1, 1, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.uint8), [0, 4096], [0, 4096], np.zeros((1, 1, 3), np.float32), TypeError),
        (np.zeros((4, 4, 3), np.uint8), [0, 4096, 8192], [0, 4096], np.zeros((1, 1, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.uint8), [0, 5 * 4096], [0, 4096], np.zeros((1, 1, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.uint8), [-1, 4096], [0, 4096], np.zeros((1, 1, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.uint8), [9, 9], [0, 4096], np.zeros((1, 1, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.uint8), [0], [0, 4096], np.zeros((0, 1, 3), np.uint8), ValueError),
    ],
)
def test_refuses_rather_than_copies(source, ys, xs, out, error) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error):
        native.area_average(source, np.array(ys, np.int64), np.array(xs, np.int64), out)


@needs_compiled
def test_refuses_a_read_only_output() -> None:
    out = np.zeros((1, 1, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        native.area_average(np.zeros((4, 4, 3), np.uint8), np.array([0, 4096]), np.array([0, 4096]), out)


@needs_compiled
def test_one_column_of_a_wider_image() -> None:
    source = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)[:, 4:5]
    out = np.zeros((1, 1, 3), np.uint8)
    native.area_average(source, np.array([0, 9 * 4096]), np.array([0, 4096]), out)
    assert out[0, 0].tolist() == np.floor(source.mean(axis=(0, 1)) + 0.5).tolist()
