"""NumPy twins of the native kernels: slow, literal, and the specification of every build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

#: Steps of linear light that the way from CIELAB back to bytes tells apart.
LAB_CODES = 16384

#: Cell edges are given in 1/4096 of a source pixel, so that every sum below is an exact integer.
FIXED_POINT_BITS = 12

#: A cell spans at most so many source pixels, for sums to stay exact.
MAX_CELL_PX = 1024


def area_average(
    source: npt.NDArray[np.uint8],
    edges_y: npt.NDArray[np.int64],
    edges_x: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint8],
) -> None:
    """Average `source` over the cells of a grid, each pixel weighted by the area the cell covers.

    Parameters
    ----------
    source : uint8 (h, w, 3)
    edges_y : int64 (out_h + 1,)
        Strictly increasing cell edges in 1/4096 source pixel, within [0, 4096 * h]; a cell spans at most
        1024 pixels.
    edges_x : int64 (out_w + 1,)
        Likewise along x, within [0, 4096 * w].
    out : uint8 (out_h, out_w, 3)
        Written in place: ``floor(sum(area * value) / cell_area + 1/2)``.

    Notes
    -----
    Coverages are integers and all sums stay below 2**52, so float64 holds them exactly and neither
    the order of summation nor the instruction set can change a bit.

    Examples
    --------
    >>> source = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    >>> out = np.empty((1, 1, 3), np.uint8)
    >>> area_average(source, np.array([0, 4096]), np.array([2048, 8192]), out)
    >>> out.tolist()
    [[[170, 170, 170]]]
    """
    height, width, _ = source.shape
    cover_y = _coverage(edges_y, height)  # (out_h, h)
    cover_x = _coverage(edges_x, width)  # (out_w, w)
    sums = np.einsum("yhc,xh->yxc", np.tensordot(cover_y, source.astype(np.float64), (1, 0)), cover_x, optimize=True)
    cell = np.diff(edges_y)[:, None].astype(np.float64) * np.diff(edges_x)[None, :]
    out[...] = np.floor(sums * (1.0 / cell)[..., None] + 0.5)


def _coverage(edges: npt.NDArray[np.int64], n_px: int) -> npt.NDArray[np.float64]:
    """Length of each source pixel within each cell, float64 (cells, n_px), in 1/4096 px."""
    start = np.arange(n_px, dtype=np.int64) << FIXED_POINT_BITS
    overlap = np.minimum(edges[1:, None], start + (1 << FIXED_POINT_BITS)) - np.maximum(edges[:-1, None], start)
    return np.asarray(np.maximum(overlap, 0), np.float64)


def od_map(rgb: U8, tables: F32, bias: float, out: U8) -> None:
    """Map pixels by a product of three table rows: any fixed 3x3 map in optical density, without an exponential.

    ``out_c = floor(clamp((T[0, r, c] * T[1, g, c]) * T[2, b, c] + bias, 0, 255))``, because
    ``exp(-sum_k M[c, k] OD(v_k))`` is a product of one factor for each input channel.

    Parameters
    ----------
    rgb : uint8 (..., 3)
    tables : float32 (3, 256, 4)
        For each input channel and each of its values, the factors of red, green, blue; the fourth is not used.
        Not negative, and all products finite.
    bias : float
        Above -1 and at most 1; 0.5 rounds to the nearest level.
    out : uint8 (..., 3)
        Written in place; must not overlap `rgb`.

    Notes
    -----
    float32 products in the order written and one sum, nothing contracted: every build gives the same bits.

    Examples
    --------
    >>> darker = np.ones((3, 256, 4), np.float32)
    >>> darker[0] = 100
    >>> out = np.empty((1, 3), np.uint8)
    >>> od_map(np.array([[7, 8, 9]], np.uint8), darker, 0.5, out)
    >>> out.tolist()
    [[100, 100, 100]]
    """
    red, green, blue = (tables[k][rgb[..., k], :3] for k in range(3))
    out[...] = np.clip(red * green * blue + np.float32(bias), 0, 255).astype(np.uint8)


def sparse_map(rgb: U8, density: F32, values: F32, out: U8) -> None:
    """Show the non-negative amounts of two stains in other colours.

    Parameters
    ----------
    rgb : uint8 (..., 3)
    density : float32 (256,)
        Optical density of each byte.
    values : float32 (24,)
        For each of the two stains its amount where it is alone and where it is beside the other, four numbers each: by
        red, green and blue density, and a constant. The smaller of both, if positive, is its amount. Then by which
        power of two in red, green and blue an amount of one changes the light (3 for each stain), the light of glass,
        and the bias (as in ``od_map``).
    out : uint8 (..., 3)
        Written in place; must not overlap `rgb`.

    Notes
    -----
    With stains of unit length whose angle is not obtuse these are the amounts that minimise
    ``1/2 |v - W h|^2 + sparsity * sum(h)`` over h >= 0: alone ``w . v - sparsity``, and beside the other the solution
    of the two equations without bounds. The power of two is taken apart into its whole part, which becomes an exponent,
    and the rest, which goes through a polynomial (Chebyshev interpolation on -1/2 to 1/2, 1e-7 off at most), so that
    only + - * in a fixed order are used and every build gives the same bits.
    """
    od = [density[rgb[..., k]] for k in range(3)]
    first, second = (
        np.maximum(np.minimum(_row(m, *od) + m[3], _row(m[4:], *od) + m[7]), 0) for m in (values[:8], values[8:16])
    )
    for k in range(3):
        light = values[22] * _power_of_two(first * values[16 + k] + second * values[19 + k]) + values[23]
        out[..., k] = np.clip(light, 0, 255).astype(np.uint8)


def lab_map(rgb: U8, linear: F32, codes: U8, values: F32, out: U8) -> None:
    """Scale and shift each channel of CIELAB (Reinhard's colour transfer), in float32.

    Parameters
    ----------
    rgb : uint8 (..., 3)
    linear : float32 (256,)
        Linear light of each byte, 0 to 1.
    codes : uint8 (16384,)
        The byte of each step of linear light.
    values : float32 (26,)
        Linear light to XYZ with white at 1 (3x3 by rows), its inverse, scales (3), shifts (3), and the ramp
        ``weight = clamp(values[24] - L * values[25], 0, 1)`` by which the change is weighted.
    out : uint8 (..., 3)
        Written in place; must not overlap `rgb`.

    Notes
    -----
    CIE 15:2004. The cube root is two steps of Halley's iteration from the exponent divided by three, so that only
    + - * / in a fixed order are used and every build gives the same bits.
    """
    r, g, b = (linear[rgb[..., k]] for k in range(3))
    fx, fy, fz = (_response(_row(values[3 * k :], r, g, b)) for k in range(3))
    lab = [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]
    weight = np.clip(values[24] - lab[0] * values[25], 0, 1)
    light, a, b = (c + weight * ((c * values[18 + k] + values[21 + k]) - c) for k, c in enumerate(lab))
    fy = (light + 16) * np.float32(0.00862069)
    xyz = [_inverse_response(f) for f in (fy + a * np.float32(0.002), fy, fy - b * np.float32(0.005))]
    for k in range(3):
        step = _row(values[9 + 3 * k :], *xyz) * np.float32(LAB_CODES - 1) + np.float32(0.5)
        out[..., k] = codes[np.clip(step, 0, LAB_CODES - 1).astype(np.int32)]


def _to_tensor(kernel: Callable[..., None]) -> Callable[..., None]:
    """Make of a map one that goes on to what a network eats: ``(rgb, ..., levels, out)``.

    Parameters of what is returned, others as in `kernel`
    ----------
    rgb : uint8 (n, h, w, 3)
    levels : (3, 256), any dtype of 2 or 4 bytes
        What each mapped value becomes, by channel: ``(value / 255 - mean) / std`` rounded once.
    out : (n, 3, h, w), dtype of `levels`
        Written in place. Contiguous, or channels-last: the transposed of a contiguous (n, h, w, 3).
    """

    def on_to_tensor(rgb: U8, *arguments: Any) -> None:
        *own, levels, out = arguments
        mapped = np.empty_like(rgb)
        kernel(rgb, *own, mapped)
        for channel in range(3):
            out[:, channel] = levels[channel][mapped[..., channel]]

    return on_to_tensor


od_map_tensor = _to_tensor(od_map)
sparse_map_tensor = _to_tensor(sparse_map)
lab_map_tensor = _to_tensor(lab_map)


def _row(m: F32, a: F32, b: F32, c: F32) -> F32:
    return np.asarray(m[0] * a + m[1] * b + m[2] * c)


def _response(x: F32) -> F32:
    threshold = np.float32(0.008856452)
    line = np.float32(7.787037) * x + np.float32(0.13793103)
    return np.where(x > threshold, _cube_root(np.maximum(x, threshold)), line)


def _inverse_response(f: F32) -> F32:
    return np.where(f > np.float32(0.20689656), f * f * f, (f - np.float32(0.13793103)) * np.float32(0.12841855))


def _cube_root(x: F32) -> F32:
    y: F32 = (np.ascontiguousarray(x).view(np.int32) // 3 + np.int32(709921077)).view(np.float32)
    for _ in range(2):
        cube = y * y * y
        y = np.asarray(y * ((cube + (x + x)) / ((cube + cube) + x)))
    return y


#: 2**f for f of -1/2 to 1/2, from the highest power down.
_POWERS = np.array([0.00015461445, 0.0013400428, 0.009618057, 0.05550327, 0.2402265, 0.6931472, 1.0], np.float32)


def _power_of_two(x: F32) -> F32:
    x = np.clip(x, np.float32(-24), np.float32(16))
    whole = (x + np.float32(64.5)).astype(np.int32) - 64
    f = x - whole.astype(np.float32)
    p = np.full_like(x, _POWERS[0])
    for power in _POWERS[1:]:
        p = p * f + power
    return np.asarray(p * ((whole + 127) << 23).view(np.float32))


def winograd_instructions() -> list[str]:
    """Return the instruction sets that ``winograd`` can use here, the best first; empty without the compiled kernel.

    Examples
    --------
    >>> winograd_instructions()
    []
    """
    return []


def winograd(x: F32, filters: F32, bias: F32, out: F32, threads: int, instructions: str) -> None:
    """Convolve images with filters of 3 x 3, stride 1, a margin of zeros of 1 px, by F(4 x 4, 3 x 3).

    Parameters
    ----------
    x : float32 (n, h, w, c_in)
        c_in a multiple of 16.
    filters : float32 (36, c_out / 32, c_in, 32)
        Transformed: ``G g G^T`` of each filter ``g``; c_out a multiple of 32.
    bias : float32 (c_out,)
    out : float32 (n, h, w, c_out)
        Written in place.
    threads : int
        Decide no bit.
    instructions : str
        One of ``winograd_instructions()``; decides no bit.

    Notes
    -----
    ``Y = A^T [sum over channels of (G g G^T) * (B^T d B)] A`` for each tile of 4 x 4 pixels, where ``d`` are the 6 x 6
    input pixels about it. The points of interpolation are 0, ``+-1/sqrt(2)``, ``+-sqrt(2)`` and infinity, since whole
    numbers round worse (Barabasz et al.). The compiled kernel computes in float32 with fused multiply-adds, this in
    float64.

    References
    ----------
    A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308, section 4.
    B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks",
    ACM Transactions on Mathematical Software 2020, arXiv:1803.10986.
    """
    p, q = 0.5**0.5, 2**0.5
    b_t = [[1, 0, -2.5, 0, 1, 0], [0, -2 * p, -2, p, 1, 0], [0, 2 * p, -2, -p, 1, 0],
           [0, -q / 2, -0.5, q, 1, 0], [0, q / 2, -0.5, -q, 1, 0], [0, 1, 0, -2.5, 0, 1]]  # fmt: skip
    a_t = [
        [1, 1, 1, 1, 1, 0],
        [0, p, -p, q, -q, 0],
        [0, p**2, p**2, q**2, q**2, 0],
        [0, p**3, -(p**3), q**3, -(q**3), 1],
    ]
    _, h, w, c_in = x.shape
    g = filters.transpose(0, 2, 1, 3).reshape(6, 6, c_in, -1).astype(np.float64)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 4 - h % 4 + 1), (1, 4 - w % 4 + 1), (0, 0)))
    for top in range(0, h, 4):
        for left in range(0, w, 4):
            d = padded[:, top : top + 6, left : left + 6]
            v = np.einsum("ai,nijc,bj->nabc", b_t, d, b_t)
            y = np.einsum("ia,nabo,jb->nijo", a_t, np.einsum("nabc,abco->nabo", v, g), a_t) + bias
            out[:, top : top + 4, left : left + 4] = y[:, : h - top, : w - left]
