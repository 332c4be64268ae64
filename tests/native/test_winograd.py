"""The compiled 3 x 3 convolution against its specification, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from wsi import native
from wsi.native import twin

needs_kernel = pytest.mark.skipif(not native.winograd_instructions(), reason="no compiler, or a processor without AVX2")


def operands(shape, c_in, c_out, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape, c_in), np.float32)
    filters = rng.standard_normal((36, c_out // 32, c_in, 32), np.float32)
    return x, filters, rng.standard_normal(c_out, np.float32), np.full((*shape, c_out), np.nan, np.float32)


def test_the_twin_convolves():
    """Against the definition, with a filter of which the transform is known: the middle tap is 1."""
    p, q = 0.5**0.5, 2**0.5
    rows = [[1, 0, 0], [-1, -p, -0.5], [-1, p, -0.5], [1, q, 2], [1, -q, 2], [0, 0, 1]]
    g = np.array(rows) / np.array([[1], [1.5], [1.5], [6], [6], [1]])
    x, _, bias, out = operands((1, 5, 9), 16, 32)
    taps = np.zeros((3, 3, 16, 32))
    taps[1, 1, :, :16] = np.eye(16)
    taps[0, 2, :, 16:] = np.eye(16)  # the pixel above to the right
    filters = np.einsum("ai,ijco,bj->abco", g, taps, g).reshape(36, 1, 16, 32).astype(np.float32)
    twin.winograd(x, filters, bias, out, 1, "any")
    np.testing.assert_allclose(out[..., :16], x + bias[:16], atol=1e-5)
    above_right = np.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))[:, :-1, 1:]
    np.testing.assert_allclose(out[..., 16:], above_right + bias[16:], atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("instructions", native.winograd_instructions())
@pytest.mark.parametrize(
    ("shape", "c_in", "c_out"),
    [((2, 8, 8), 16, 32), ((1, 1, 1), 16, 32), ((3, 7, 5), 48, 96), ((1, 2, 13), 32, 64), ((5, 14, 14), 64, 64)],
)
def test_the_kernel_is_its_twin_but_for_rounding(shape, c_in, c_out, instructions):
    x, filters, bias, out = operands(shape, c_in, c_out)
    expected = out.copy()
    twin.winograd(x, filters, bias, expected, 1, instructions)
    native.winograd(x, filters, bias, out, 2, instructions)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 * expected.std())


@needs_kernel
@pytest.mark.parametrize("instructions", native.winograd_instructions())
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_bytes_do_not_depend_on_threads_batch_or_instructions(threads, instructions):
    """With 16 threads several share the same tiles, each for some of the output channels."""
    x, filters, bias, whole = operands((9, 11, 6), 32, 160)
    native.winograd(x, filters, bias, whole, 1, native.winograd_instructions()[0])
    out = np.full_like(whole, np.nan)
    native.winograd(x, filters, bias, out, threads, instructions)
    np.testing.assert_array_equal(out, whole)
    native.winograd(x[4:6], filters, bias, out[4:6], threads, instructions)
    np.testing.assert_array_equal(out, whole)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": np.zeros((1, 4, 4, 8), np.float32)}, "multiples of 16 and 32"),
        ({"out": np.zeros((1, 4, 4, 16), np.float32)}, "multiples of 16 and 32"),
        ({"filters": np.zeros((36, 1, 32, 32), np.float32)}, "filters"),
        ({"bias": np.zeros(31, np.float32)}, "bias"),
        ({"out": np.zeros((1, 4, 5, 32), np.float32)}, "out: must have"),
        ({"threads": 0}, "threads"),
        ({"instructions": "mmx"}, "has no mmx"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    x, filters, bias, out = operands((1, 4, 4), 16, 32)
    arguments = {"x": x, "filters": filters, "bias": bias, "out": out, "threads": 1}
    arguments["instructions"] = native.winograd_instructions()[0]
    with pytest.raises(ValueError, match=said):
        native.winograd(**(arguments | change))


@needs_kernel
def test_no_images_are_no_work():
    x, filters, bias, out = operands((0, 4, 4), 16, 32)
    native.winograd(x, filters, bias, out, 4, native.winograd_instructions()[0])


def matrices(points):
    """Make A^T, G and B^T of F(4, 3) for four finite points beside 0, from the definition that they convolve."""
    points = [0.0, *points]
    a_t = np.array([[x**i for x in points] + [float(i == 3)] for i in range(4)])
    others = [np.prod([x - y for y in points if y != x]) for x in points]
    g = np.array([[x**k / other for k in range(3)] for x, other in zip(points, others, strict=True)] + [[0, 0, 1.0]])
    # y[i] = sum over k of d[i + k] g[k], whatever d and g: linear equations for each column of B^T.
    products = np.array([a_t[i] * g[:, k] for i in range(4) for k in range(3)])
    wanted = np.array([np.eye(6)[i + k] for i in range(4) for k in range(3)])
    b_t = np.linalg.lstsq(products, wanted, rcond=None)[0]
    assert np.abs(products @ b_t - wanted).max() < 1e-12
    return a_t, g, b_t


def largest_error(points, d, taps):
    """Return the largest error of one row of tiles in float32, in standard deviations of the true sums."""
    a_t, g, b_t = matrices(points)
    filters = (g @ taps).astype(np.float32)
    a_t, b_t = a_t.astype(np.float32), b_t.astype(np.float32)
    products = np.zeros((len(d), 6), np.float32)
    for c in range(d.shape[2]):
        products += (d[:, :, c] @ b_t.T) * filters[:, c]
    true = sum(d[:, k : k + 4].astype(float) @ taps[k] for k in range(3))
    return np.abs(products @ a_t.T - true).max() / true.std()


def test_the_points_round_better_than_whole_numbers():
    """One-dimensional: in two dimensions both errors enter twice."""
    rng = np.random.default_rng(0)
    d, taps = rng.standard_normal((20000, 6, 64)).astype(np.float32), rng.standard_normal((3, 64))
    ours = largest_error([0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)], d, taps)
    assert ours < 0.6 * largest_error([1, -1, 2, -2], d, taps)


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_threads_that_cannot_start_are_done_without():
    """Room for the buffers of 64 threads, and not for their stacks: the process once ended here."""
    import resource

    x, filters, bias, expected = operands((1, 224, 224), 16, 32)
    out, instructions = np.full_like(expected, np.nan), native.winograd_instructions()[0]
    native.winograd(x, filters, bias, expected, 1, instructions)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        native.winograd(x, filters, bias, out, 64, instructions)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    np.testing.assert_array_equal(out, expected)
