"""Published numbers and pictures of other programs, and a literal restatement of Macenko's method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import color
from skimage.filters import threshold_otsu
from skimage.morphology import disk
from sklearn.linear_model import Lasso

from tests.stain.make import TRUE_HE, synthetic
from wsi import native
from wsi.stain import TARGETS, FitConfig, LabStatistics, Stains, StainTransform, fit, macenko
from wsi.stain.macenko import measure
from wsi.stain.pixels import density_of
from wsi.stain.reinhard import lab_channels
from wsi.stain.transform import od_tables
from wsi.stain.vahadane import factor, sparse_amounts

PUBLISHED = FitConfig(published=True, io=240.0)
HE_REF = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
MAX_REF = np.array([1.9705, 1.0308])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def literal_stains(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stain columns (3, 2), 99th percentiles (2,), and amounts (2, n), step by step as published."""
    od = -np.log((rgb.reshape(-1, 3).astype(float) + 1) / 240)
    tissue = od[(od >= 0.15).all(axis=1)]
    axes = np.linalg.eigh(np.cov(tissue.T))[1][:, 1:]
    phi = np.arctan2(*(tissue @ axes).T[::-1])
    low, high = (axes @ [np.cos(q), np.sin(q)] for q in np.percentile(phi, (1, 99)))
    columns = np.array([low, high] if low[0] > high[0] else [high, low]).T
    amounts = np.linalg.lstsq(columns, od.T, rcond=None)[0]
    return columns, np.percentile(amounts, 99, axis=1), amounts


def literal_picture(rgb: np.ndarray, columns: np.ndarray, strength: np.ndarray) -> np.ndarray:
    _, maximum, amounts = literal_stains(rgb)
    scaled = amounts * (strength / maximum)[:, None]
    return np.clip(240 * np.exp(-(columns @ scaled)), 0, 255).T.reshape(rgb.shape)


# --- the synthetic image -----------------------------------------------------------------------------------------


def test_macenko_on_the_synthetic_image():
    image = synthetic()
    transform = fit("macenko", image, config=PUBLISHED)
    assert transform.source.n_px == 10451
    expected = [[0.59938, 0.698864, 0.390298], [0.199061, 0.848722, 0.489945]]
    np.testing.assert_allclose(transform.source.vectors, expected, atol=1e-6)
    np.testing.assert_allclose(transform.source.vectors, TRUE_HE.T, atol=1e-3)
    np.testing.assert_allclose(transform.source.max_amounts, [1.153142, 0.902452], atol=1e-6)
    normalised = transform.apply(image)
    assert np.abs(normalised - literal_picture(image, HE_REF, MAX_REF)).max() <= 0.501
    # Truncation instead of rounding is half a grey level.
    np.testing.assert_allclose(normalised.mean((0, 1)) - 0.5, [168.49524, 122.78491, 152.51672], atol=0.05)


def test_our_own_rule_is_near_staintools_which_also_measures_from_white():
    stains = fit("macenko", synthetic()).source
    np.testing.assert_allclose(stains.vectors[0], (0.597479, 0.700736, 0.389855), atol=1.5e-3)
    np.testing.assert_allclose(stains.vectors[1], (0.2444, 0.84114, 0.482445), atol=1.5e-3)


def test_reinhard_on_the_synthetic_image():
    image = synthetic()
    target = np.ascontiguousarray(np.roll(image, 1, axis=2))
    transform = fit("reinhard", image, target, config=PUBLISHED)
    np.testing.assert_allclose(transform.target.mean, (73.4631, -11.8729, 22.1706), atol=4e-3)
    np.testing.assert_allclose(transform.target.std, (13.069, 11.0009, 11.7915), atol=1e-3)
    truncated = (172.738, 185.3572, 138.8815)
    np.testing.assert_allclose(transform.apply(image).mean((0, 1)) - 0.5, truncated, atol=0.06)


def test_cielab():
    np.testing.assert_allclose(lab_channels(np.uint8([[200, 100, 150]]))[:, 0], (55.6834, 45.5451, -8.8464), atol=3e-3)
    rgb = np.random.default_rng(0).integers(0, 256, (500, 3), np.uint8)
    np.testing.assert_allclose(lab_channels(rgb).T, color.rgb2lab(rgb), atol=0.02)


# --- real pictures ---------------------------------------------------------------------------------------------------


def test_the_pictures_of_the_matlab_reference(data_dir):
    folder = data_dir / "stain" / "henorm_macenko_oracle"
    image, expected = read(folder / "example1.png"), read(folder / "norm1.png").astype(int)
    transform = fit("macenko", image, config=PUBLISHED)
    assert transform.source.n_px == 458534
    columns = [[0.541458, 0.752028, 0.375869], [0.208619, 0.804355, 0.55632]]
    np.testing.assert_allclose(transform.source.vectors, columns, atol=1e-6)
    np.testing.assert_allclose(transform.source.max_amounts, (1.192333, 0.934151), atol=1e-6)
    normalised = transform.apply(image)
    assert np.abs(normalised - expected).max() <= 1
    np.testing.assert_allclose(normalised.mean((0, 1)) - 0.5, (190.471, 143.4771, 168.8254), atol=0.05)


@pytest.mark.parametrize("turned", [False, True])
def test_torchstains_pair_by_the_literal_method(data_dir, turned):
    folder = data_dir / "stain" / "torchstain"
    source, target = (read(folder / name) for name in ("source.png", "target.png")[:: -1 if turned else 1])
    transform = fit("macenko", source, target, config=PUBLISHED)
    columns, strength, _ = literal_stains(target)
    np.testing.assert_allclose(transform.target.vectors, columns.T, atol=1e-9)
    np.testing.assert_allclose(transform.target.max_amounts, strength, atol=1e-9)
    expected = literal_picture(source, columns, strength)
    assert np.abs(transform.apply(source) - expected).max() <= 0.51


def histolab_mask(rgb: np.ndarray) -> np.ndarray:
    """Tissue as histolab finds it in a tile: on a white border, Otsu on grey, dilated, filled."""
    grey = np.asarray(Image.fromarray(np.pad(rgb, ((10, 10), (10, 10), (0, 0)), constant_values=255)).convert("L"))
    dark = ndimage.binary_dilation(grey < threshold_otsu(grey), disk(2))
    return ndimage.binary_fill_holes(dark, structure=np.ones((20, 20)))[10:-10, 10:-10]


@pytest.fixture
def histolab(data_dir):
    """Target, source, and the folder of expected pictures."""
    tiles = data_dir / "stain" / "histolab_tiles"
    names = "tissue-level0-7352-11762-7864-12274.png", "low-nuclei-score-level0.png"
    expected = data_dir / "oracles" / "histolab_stain"
    return *(read(tiles / name) for name in names), expected, f"{names[0][:-4]}--{names[1][:-4]}"


def test_histolabs_macenko(histolab):
    # It scales what is no stain like a third stain: its map, made here of our stains, through our kernel.
    target, source, folder, name = histolab

    def parts(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h, e = measure(rgb[histolab_mask(rgb)], PUBLISHED).vectors
        third = np.cross(h, e)
        columns = np.stack([h, e, third / np.linalg.norm(third)], axis=1)
        amounts = np.linalg.inv(columns) @ -np.log((rgb.reshape(-1, 3).T + 1.0) / 240)
        return columns, np.percentile(amounts, 99, axis=1)

    (seen, maximum), (wanted, strength) = parts(source), parts(target)
    matrix = (wanted * (strength / maximum)) @ np.linalg.inv(seen)
    got = np.empty_like(source)
    native.od_map(source, *od_tables(matrix, 240.0, published=True), got)
    expected = read(folder / f"{name}--macenko.png").astype(int)
    assert np.abs(got - expected).max() <= 1


def test_histolabs_reinhard(histolab):
    # Its tissue is a mask, outside of which nothing changes: statistics and comparison within it.
    target, source, folder, name = histolab

    def statistics(rgb: np.ndarray) -> LabStatistics:
        lab = lab_channels(rgb[histolab_mask(rgb)]).T
        return LabStatistics(tuple(lab.mean(0).tolist()), tuple(lab.std(0).tolist()))

    got = StainTransform("reinhard", statistics(source), statistics(target), published=True).apply(source)
    expected = read(folder / f"{name}--reinhard.png").astype(int)
    inside = histolab_mask(source)
    assert inside.mean() > 0.2
    assert np.abs(got - expected)[inside].max() <= 1


@pytest.fixture(scope="module")
def monai(data_dir):
    """MONAI's own test cases of stain vectors and normalised pictures: of six pixels, black or nearly so."""
    return json.loads((data_dir / "oracles" / "monai_froc_and_stain_vectors.json").read_text())["he_stain"]


BLACK = np.zeros((3, 2, 3), np.uint8)
#: MONAI truncates and we round: half a grey level either way.
TRUNCATED = 0.5


@pytest.mark.parametrize("case", [0, 1])
def test_monais_vectors(monai, monkeypatch, case):
    # Not on purpose the same: one colour, or two, are not two stains, and we refuse what MONAI measures there.
    image = np.uint8(monai["extract"][case]["image"]) if case else BLACK
    assert fit("macenko", image, config=PUBLISHED).fallback == "few-pixels"
    assert fit("macenko", np.tile(image, (20, 20, 1)), config=PUBLISHED).fallback == "one-colour"
    # The rule itself is the same. A millionth of green, and two of blue, decide which of the axes that vary equally
    # little span the plane, as MONAI's LAPACK happens to.
    density = density_of(image, PUBLISHED)
    density[1] += np.array([0, 1, -1, 1, -1, 0]) * 1e-6
    density[2] += np.array([0, 1, 1, -1, -1, 0]) * 2e-6
    monkeypatch.setattr(macenko, "MIN_VARIANCE_RATIO", 0.0)
    vectors, _ = macenko.directions(density, PUBLISHED.alpha)
    np.testing.assert_allclose(vectors.T, monai["extract"][case]["he"], atol=1e-3)


def test_monais_transparent_picture_is_blank_here(monai):
    assert "all pixels 240 (transparent) -> ValueError" in monai["errors"]
    assert fit("macenko", np.full((3, 2, 3), 240, np.uint8), config=PUBLISHED).fallback == "blank"


def test_monais_darkest_pixel_gets_the_targets_full_strength(monai):
    case = monai["normalize"][1]
    assert (case["image"], case["target_he"], case["out"]) == ("zeros(3,2,3)", "default", "all pixels [63,25,60]")
    target = TARGETS["veta"].stains
    np.testing.assert_array_equal(np.transpose(target.vectors), monai["params"]["target_he_default"])
    np.testing.assert_array_equal(target.max_amounts, monai["params"]["max_cref"])
    # Its stains of a black picture coincide, which ours may not; whatever they are, black has all there is of both.
    vectors = np.array(target.vectors)
    strength = macenko.full_strength(vectors, density_of(BLACK, PUBLISHED), BLACK, PUBLISHED)
    black = StainTransform("macenko", Stains(target.vectors, tuple(strength)), target, io=240, published=True)
    np.testing.assert_allclose(black.apply(BLACK)[0, 0], np.array([63, 25, 60]) + TRUNCATED, atol=0.5)


def test_monais_picture_of_two_colours(monai):
    case = monai["normalize"][2]
    assert case["target_he"] == "ones(3,2)"  # two equal stains, which ours may not be: its map through our kernel
    image, columns = np.uint8(case["image"]), np.array(monai["extract"][1]["he"])
    strength = macenko.full_strength(columns.T, density_of(image, PUBLISHED), image, PUBLISHED)
    matrix = (np.ones((3, 2)) * (monai["params"]["max_cref"] / strength)) @ np.linalg.pinv(columns)
    got = np.empty_like(image)
    native.od_map(image, *od_tables(matrix, 240.0, published=True), got)
    np.testing.assert_allclose(got, np.array(case["out"]) + TRUNCATED, atol=0.5)


# --- sparse factors --------------------------------------------------------------------------------------------------


def test_sparse_amounts_are_the_lassos():
    rng = np.random.default_rng(0)
    stains = np.array([[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    density = np.abs(rng.normal(0.4, 0.4, (60, 3)))
    lasso = Lasso(alpha=0.1 / 3, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)  # mean over 3 rows
    expected = [lasso.fit(stains.T, pixel).coef_.copy() for pixel in density]
    np.testing.assert_allclose(sparse_amounts(density.T, stains, 0.1).T, expected, atol=1e-6)


def test_vahadanes_picture_by_the_lasso():
    # The published program: V = ln 255 - ln(I + 1), H by the lasso over all pixels, 99th percentiles, 255 exp(-W H).
    rng = np.random.default_rng(3)
    density = TRUE_HE @ rng.gamma(0.7, 0.6, (2, 1200))
    levels = np.clip(np.rint(255 * np.exp(-density) - 1), 0, 255).astype(np.uint8)
    image = np.ascontiguousarray(levels.T).reshape(30, 40, 3)
    image[:3] = 255
    transform = fit("vahadane", image, config=FitConfig(published=True, io=255.0))
    stains = np.array(transform.source.vectors)
    lasso = Lasso(alpha=0.02 / 3, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
    pixels = -np.log((image.reshape(-1, 3) + 1.0) / 255)
    amounts = np.array([lasso.fit(stains.T, pixel).coef_.copy() for pixel in pixels])
    np.testing.assert_allclose(transform.source.max_amounts, np.percentile(amounts, 99, axis=0), atol=1e-5)
    scaled = amounts * (MAX_REF / transform.source.max_amounts)
    expected = np.clip(255 * np.exp(-scaled @ HE_REF.T), 0, 255).reshape(image.shape)
    assert np.abs(transform.apply(image) - expected).max() <= 0.501
    assert ((amounts == 0).any(axis=1)).mean() > 0.1


def test_factors_are_found_from_a_poor_start_and_never_get_worse():
    rng = np.random.default_rng(0)
    amounts = rng.gamma(0.5, 0.8, (5000, 2))  # most pixels have little of one of them
    density = TRUE_HE @ amounts.T
    found = factor(density, np.array([[0.8, 0.5, 0.3], [0.1, 0.7, 0.7]]), 0.01)
    np.testing.assert_allclose(found, TRUE_HE.T, atol=0.03)

    def objective(stains: np.ndarray) -> float:
        h = sparse_amounts(density, stains, 0.01)
        return 0.5 * ((density - stains.T @ h) ** 2).sum() + 0.01 * h.sum()

    assert objective(found) <= objective(TRUE_HE.T.copy())
