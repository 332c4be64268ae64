"""The stain kernels against their NumPy twins, and the twins against exponentials and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import color

from wsi import native
from wsi.errors import StainError
from wsi.native import twin
from wsi.stain.reinhard import lab_tables
from wsi.stain.statistics import LabStatistics, Stains
from wsi.stain.transform import od_tables, sparse_tables
from wsi.stain.vahadane import sparse_amounts

needs_compiled = pytest.mark.skipif(
    not native.HAVE_CPU,
    reason="no C++ compiler: the twin has no kernel to agree with",
)
IDENTITY = LabStatistics((60.0, 20.0, -10.0), (10.0, 6.0, 7.0))
KERNELS = ["od_map", "sparse_map", "lab_map"]


def od_arguments(seed: int) -> tuple[np.ndarray, float]:
    """The tables of a random map that stays within what a fit may give."""
    rng = np.random.default_rng(seed)
    return od_tables(np.eye(3) + rng.uniform(-1.2, 1.2, (3, 3)), 256.0, published=bool(seed % 2))


def lab_arguments(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = LabStatistics(tuple(rng.uniform(-20, 80, 3)), tuple(rng.uniform(1, 20, 3)))
    return lab_tables(IDENTITY, target, published=bool(seed % 2))


def sparse_arguments(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)

    def stains() -> Stains:
        h, e = np.array([[0.6, 0.7, 0.35], [0.2, 0.85, 0.45]]) + rng.uniform(-0.1, 0.1, (2, 3))
        return Stains((tuple(h), tuple(e)), tuple(rng.uniform(0.8, 1.6, 2)))

    try:
        published = bool(seed % 2)
        return sparse_tables(
            stains(), stains(), 255.0 if published else 256.0, rng.uniform(0, 0.2), published=published
        )
    except StainError:  # amplifies too much
        return sparse_arguments(seed + 1)


def arguments_of(kernel: str, seed: int) -> tuple:
    maps = {"od_map": od_arguments, "sparse_map": sparse_arguments, "lab_map": lab_arguments}
    return maps[kernel.removesuffix("_portable").removesuffix("_tensor")](seed)


def images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def run(kernel, rgb: np.ndarray, *arguments) -> np.ndarray:
    out = np.full_like(rgb, 77)
    kernel(rgb, *arguments, out)
    return out


# --- what the twins say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_product_of_rows_is_the_map_in_optical_density(seed):
    matrix = np.eye(3) + np.random.default_rng(seed).uniform(-0.5, 0.5, (3, 3))
    rgb = images(seed, 500)
    expected = 256 * np.exp(np.log((rgb + 1.0) / 256) @ matrix.T) - 1
    got = run(twin.od_map, rgb, *od_tables(matrix, 256.0)).astype(float)
    assert np.abs(got - np.clip(expected, 0, 255)).max() < 0.501  # rounding, and the last digit of float32


def test_every_colour_and_identity():
    r, g, b = np.meshgrid(np.arange(256), np.arange(256), np.arange(0, 256, 5), indexing="ij")
    rgb = np.ascontiguousarray(np.stack([r, g, b], axis=-1).astype(np.uint8))
    np.testing.assert_array_equal(run(native.od_map, rgb, *od_tables(np.eye(3), 256.0)), rgb)
    np.testing.assert_array_equal(run(native.lab_map, rgb, *lab_tables(IDENTITY, IDENTITY, published=False)), rgb)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1])
def test_the_sparse_twin_is_its_amounts_shown_in_other_colours(published, sparsity):
    # The amounts are tested against scikit-learn's Lasso; vectors need not have unit length.
    source = Stains(((1.3, 1.4, 0.8), (0.1, 0.4, 0.25)), (0.7, 1.6))
    target = Stains(((0.56, 0.72, 0.41), (0.22, 0.80, 0.56)), (1.4, 0.9))
    rgb, io = images(4, 3000), 240.0 if published else 256.0
    density = -np.log((rgb + 1.0) / io).T
    if not published:
        density = np.maximum(density, 0)
    lengths = np.linalg.norm(source.vectors, axis=1, keepdims=True)
    amounts = sparse_amounts(density, np.array(source.vectors) / lengths, sparsity) / lengths
    assert 0.05 < (amounts == 0).mean() < 0.95
    scaled = amounts * (np.array(target.max_amounts) / source.max_amounts)[:, None]
    light = np.exp(-(np.array(target.vectors).T @ scaled)).T
    expected = 240 * light if published else 256 * light - 1
    got = run(twin.sparse_map, rgb, *sparse_tables(source, target, io, sparsity, published=published))
    assert np.abs(got - np.clip(expected, 0, 255)).max() < 0.501  # rounding, and the last digits of float32


def test_powers_of_two():
    x = np.linspace(-30, 18, 100_001).astype(np.float32)
    np.testing.assert_allclose(twin._power_of_two(x), 2.0 ** np.clip(x.astype(float), -24, 16), rtol=1.2e-7)


@pytest.mark.parametrize("published", [False, True])
def test_the_lab_twin_is_scikit_image(published):
    rgb = images(3, 40, 40)
    target = LabStatistics((55.0, 25.0, -15.0), (12.0, 5.0, 9.0))
    scale = np.array(target.std) / IDENTITY.std
    lab = color.rgb2lab(rgb)
    moved = (lab - IDENTITY.mean) * scale + target.mean
    weight = 1.0 if published else np.clip((100 - lab[..., :1]) / 20, 0, 1)
    expected = 255 * color.lab2rgb(lab + weight * (moved - lab))
    got = run(twin.lab_map, rgb, *lab_tables(IDENTITY, target, published=published))
    inside = (np.abs(expected - 127.5) < 127).all(axis=-1)  # scikit-image clips out of gamut in another place
    assert inside.mean() > 0.2
    assert np.abs(got - expected)[inside].max() < 0.7


# --- the compiled ones give the twins' bytes -------------------------------------------------------------------------


@needs_compiled
@pytest.mark.parametrize("build", ["", "_portable"])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_pixels(kernel, build, seed, n):
    arguments = arguments_of(kernel, seed)
    rgb = images(seed, n)
    ours = run(getattr(native._cpu, kernel + build), rgb, *arguments)
    np.testing.assert_array_equal(ours, run(getattr(twin, kernel), rgb, *arguments))


@needs_compiled
@pytest.mark.parametrize("kernel", ["od_map", "od_map_portable"])
@pytest.mark.parametrize("largest", [255.4, 1e5, 2.0**31 - 128, 2.0**31, 1e38])
def test_products_beyond_integers_are_clamped(kernel, largest):
    rng = np.random.default_rng(0)
    tables = rng.uniform(0, 1, (3, 256, 4)).astype(np.float32)
    tables[0] *= np.float32(largest)
    tables[:, 7] = [[largest], [1], [1]]
    rgb = images(1, 500)
    rgb[::3] = 7
    ours = run(getattr(native._cpu, kernel), rgb, tables, 0.5)
    np.testing.assert_array_equal(ours, run(twin.od_map, rgb, tables, 0.5))
    assert (ours[::3] == 255).all()


@needs_compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("build", ["", "_portable"])
def test_every_colour(kernel, build):
    grey = np.arange(256, dtype=np.uint8)
    r, g, b = np.meshgrid(grey, grey[::3], grey, indexing="ij")
    rgb = np.ascontiguousarray(np.stack([r, g, b], axis=-1))
    arguments = arguments_of(kernel, 3)
    ours = run(getattr(native._cpu, kernel + build), rgb, *arguments)
    np.testing.assert_array_equal(ours, run(getattr(twin, kernel), rgb, *arguments))


def empty(layout: str, n: int, h: int, w: int, dtype) -> np.ndarray:
    """A tensor (n, 3, h, w) of zeros that lies in memory by planes or by pixels."""
    return np.zeros((n, 3, h, w), dtype) if layout == "planes" else np.zeros((n, h, w, 3), dtype).transpose(0, 3, 1, 2)


@needs_compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (2, 7, 5), (3, 33, 47)])
def test_tensors(kernel, layout, dtype, shape):
    arguments = arguments_of(kernel, 5)
    table = native.levels((0.48, 0.45, 0.40), (0.22, 0.23, 0.26), dtype)
    rgb = images(9, *shape)
    ours, theirs = (empty(layout, *shape, table.dtype) for _ in range(2))
    getattr(native, kernel + "_tensor")(rgb, *arguments, table, ours)
    getattr(twin, kernel + "_tensor")(rgb, *arguments, table, theirs)
    np.testing.assert_array_equal(ours, theirs)


@needs_compiled
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_arrays_come_by_dlpack_and_bfloat16_takes_its_bits(layout):
    torch = pytest.importorskip("torch")
    table = native.levels((0.48, 0.45, 0.40), (0.22, 0.23, 0.26), "bfloat16")
    rgb = images(9, 2, 7, 5)
    expected = np.zeros((2, 3, 7, 5), np.uint16)
    native.od_map_tensor(rgb, *od_arguments(5), table, expected)
    out = torch.zeros(2, 3, 7, 5, dtype=torch.bfloat16).to(memory_format=getattr(torch, layout))
    native.od_map_tensor(torch.from_numpy(rgb), *od_arguments(5), table, out)
    assert torch.equal(out, torch.from_numpy(expected).view(torch.bfloat16))


@needs_compiled
def test_nothing_is_written_beyond_the_end():
    for n in range(1, 40):
        for kernel in KERNELS:
            batch = np.full((n + 2, 3), 7, np.uint8)
            getattr(native, kernel)(images(n, n), *arguments_of(kernel, 1), batch[1 : n + 1])
            assert (batch[0] == 7).all() and (batch[-1] == 7).all()


# --- what is refused -------------------------------------------------------------------------------------------------

GOOD = np.zeros((4, 4, 3), np.uint8)


@needs_compiled
@pytest.mark.parametrize(
    ("rgb", "out", "error"),
    [
        (GOOD.astype(np.uint16), GOOD.copy(), TypeError),
        (GOOD, GOOD.astype(np.float32), TypeError),
        (np.zeros((4, 8, 3), np.uint8)[:, ::2], GOOD.copy(), TypeError),
        (GOOD, np.zeros((4, 8, 3), np.uint8)[:, ::2], TypeError),
        (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), ValueError),
        (GOOD, np.zeros((4, 5, 3), np.uint8), ValueError),
        (GOOD, np.zeros((1, 4, 4, 3), np.uint8), ValueError),
        (GOOD, GOOD, ValueError),
    ],
)
def test_pixels_that_do_not_fit_are_refused_and_never_copied(rgb, out, error):
    for kernel in KERNELS:
        with pytest.raises(error):
            getattr(native, kernel)(rgb, *arguments_of(kernel, 0), out)


@needs_compiled
def test_read_only_outputs_wrong_tables_and_wrong_tensors_are_refused():
    frozen = GOOD.copy()
    frozen.flags.writeable = False
    tables, bias = od_arguments(0)
    with pytest.raises(TypeError):
        native.od_map(GOOD, tables, bias, frozen)
    with pytest.raises(TypeError):
        native.od_map(GOOD, tables.astype(np.float64), bias, GOOD.copy())
    with pytest.raises(TypeError):
        native.od_map(GOOD, tables[:, :, :3], bias, GOOD.copy())
    for wrong in (-1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="bias"):
            native.od_map(GOOD, tables, wrong, GOOD.copy())
    table = native.levels((0.5,) * 3, (0.5,) * 3)
    tiles = GOOD[None]
    for out, error in [
        (np.zeros((1, 3, 4, 5), np.float32), ValueError),
        (np.zeros((1, 3, 4, 4), np.float16), ValueError),
        (np.zeros((1, 3, 4, 4), np.float64), ValueError),
        (np.zeros((1, 4, 4, 3), np.float32), (TypeError, ValueError)),
        (np.zeros((1, 3, 8, 4), np.float32)[:, :, ::2], ValueError),
        (np.zeros((1, 4, 8, 3), np.float32)[:, :, ::2].transpose(0, 3, 1, 2), ValueError),
        (np.zeros((1, 3, 4, 4), np.float32).transpose(0, 1, 3, 2), ValueError),
        (np.zeros((3, 1, 4, 4), np.float32).transpose(1, 0, 2, 3)[:, ::-1], ValueError),
    ]:
        with pytest.raises(error):
            native.od_map_tensor(tiles, tables, bias, table, out)
