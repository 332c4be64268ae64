"""Fitting: what is found, what it falls back to, and targets of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.array_slide import ArraySlide
from tests.slide.make import section
from tests.stain.make import TRUE_HE, synthetic, two_stains
from wsi.errors import SlideUnreadable, StainError
from wsi.stain import FALLBACKS, METHODS, TARGETS, FitConfig, StainTransform, fit, pixels
from wsi.stain.macenko import directions, measure
from wsi.stain.pixels import sample_slide
from wsi.tissue import TissueMask, find_tissue
from wsi.units import Box, Mpp


def slide_of(rgb: np.ndarray, mpp: float = 1.0) -> ArraySlide:
    """An image in the middle of a white slide."""
    h, w, _ = rgb.shape
    plane = np.full((2 * h, 2 * w, 3), 255, np.uint8)
    plane[h // 2 : h // 2 + h, w // 2 : w // 2 + w] = rgb
    return ArraySlide(plane, mpp)


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["macenko", "vahadane"])
def test_true_stains_are_found_in_an_image_and_on_a_slide(method):
    image = two_stains(512, 512, strength=0.4)
    for source in (image, slide_of(image)):
        transform = fit(method, source)
        assert transform.fallback is None
        np.testing.assert_allclose(transform.source.vectors, TRUE_HE.T, atol=0.06)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_tissue_that_varies_by_stain_more_than_by_amount(monkeypatch, signs):
    """Its mean lies along the second axis, whichever way the eigenvectors point, and no angle wraps around."""
    rng = np.random.default_rng(0)
    stains = np.array([[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    share = rng.beta(0.5, 0.5, 4096)
    amounts = np.stack([share, 1 - share]) * (1 + 0.1 * rng.normal(size=4096)).clip(0.5, 2)
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (eigh(matrix)[0], eigh(matrix)[1] * [1, *signs]))
    found, _ = directions(stains.T @ amounts, 1.0)
    assert np.degrees(np.arccos((found * stains).sum(1).clip(-1, 1))).max() < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("image", [synthetic(), two_stains(64, 64)], ids=["waves", "random"])
def test_a_source_that_is_the_target_stays(method, image):
    transform = fit(method, image, image)
    assert transform.fallback is None
    np.testing.assert_array_equal(transform.apply(image), image)


def test_with_the_published_rule_a_source_that_is_the_target_stays_but_for_what_is_no_stain():
    image = two_stains(64, 64)
    back = fit("macenko", image, image, config=FitConfig(published=True)).apply(image)
    # It also gives back the one that was added to every level.
    assert np.abs(back.astype(int) - np.minimum(image.astype(int) + 1, 255)).max() <= 2


@pytest.mark.parametrize("method", METHODS)
def test_normalised_twice_is_normalised_once(method):
    image = two_stains(128, 128, strength=0.4)
    target = two_stains(128, 128, seed=1, vectors=np.array([[0.55, 0.3], [0.75, 0.8], [0.36, 0.5]]), strength=0.45)
    once = fit(method, image, target).apply(image)
    twice = fit(method, once, target).apply(once)
    assert np.abs(twice.astype(int) - once).mean() < 2


@pytest.mark.parametrize("method", METHODS)
def test_it_brings_two_laboratories_together(method):
    ours = two_stains(128, 128, seed=1, strength=0.4)
    theirs = two_stains(128, 128, seed=2, strength=0.3, vectors=np.array([[0.52, 0.25], [0.75, 0.85], [0.41, 0.45]]))
    before = np.abs(ours.mean((0, 1)) - theirs.mean((0, 1))).mean()
    after = np.abs(fit(method, theirs, ours).apply(theirs).mean((0, 1)) - ours.mean((0, 1))).mean()
    assert after < (0.9 if method == "ruifrok" else 0.35) * before  # whose colours are fixed


def test_the_same_slide_gives_the_same_transform_and_a_mask_may_be_given():
    slide = slide_of(section(512, 512), mpp=4.0)
    first = fit("macenko", slide)
    assert fit("macenko", slide) == first == fit("macenko", slide, tissue=find_tissue(slide))


def test_a_slide_is_sampled_evenly_and_on_tissue_alone():
    plane = np.full((1200, 2400, 3), 255, np.uint8)
    plane[300:900, 300:2100] = two_stains(600, 1800)
    plane[300:900, 300:2100, 0] //= 2
    tiles = sample_slide(ArraySlide(plane, 1.0), FitConfig(tile_px=100, n_tiles=12))
    assert tiles.shape == (12, 100, 100, 3)
    assert (tiles.max(axis=-1) < 255).mean() > 0.9


def test_reader_threads_change_no_byte(monkeypatch):
    slide = slide_of(two_stains(512, 512, strength=0.4))
    tiles = sample_slide(slide, FitConfig(tile_px=50))
    monkeypatch.setattr(pixels, "READERS", 1)
    np.testing.assert_array_equal(sample_slide(slide, FitConfig(tile_px=50)), tiles)
    assert len(tiles) > 50


def test_what_cannot_be_read_is_no_stain(monkeypatch):
    slide = slide_of(two_stains(512, 512, strength=0.4))
    tissue = find_tissue(slide)

    def broken(*_):
        raise SlideUnreadable("array", "a tile is damaged")

    monkeypatch.setattr(slide, "_read_level", broken)
    assert fit("macenko", slide, tissue=tissue).fallback == "blank"


@pytest.mark.parametrize(("mpp", "tile_px"), [(0.5, 64), (8.0, 128)])
def test_slides_of_any_size_and_resolution_are_sampled(mpp, tile_px):
    slide = ArraySlide(two_stains(120, 90), mpp)
    tiles = sample_slide(slide, FitConfig(tile_px=tile_px))
    assert tiles.shape[1] <= min(tile_px, 90) and tiles.size


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.06, 15), st.integers(1, 200))
def test_no_slide_is_too_small_to_be_sampled(h, w, mpp, tile_px):
    tissue = TissueMask(np.ones((1, 1), bool), np.zeros((1, 1), bool), Box(0, 0, w, h), Mpp(mpp, mpp))
    slide = ArraySlide(np.zeros((h, w, 3), np.uint8), mpp)
    assert len(sample_slide(slide, FitConfig(tile_px=tile_px), tissue)) >= 1


# --- where statistics fail -------------------------------------------------------------------------------------------


def _with_tissue(n_px: int) -> np.ndarray:
    image = np.full((100, 100, 3), 255, np.uint8)
    image.reshape(-1, 3)[:n_px] = two_stains(1, 100)[0, :n_px] // 2
    return image


WHITE = np.full((64, 64, 3), 255, np.uint8)
TWO_SHADES = np.where(np.arange(64)[:, None, None] % 2, np.uint8([[[150, 90, 140]]]), np.uint8([[[90, 40, 80]]]))
EDGE_CASES = {
    "white": (WHITE, {"blank"}),
    "glass": (np.full((64, 64, 3), 240, np.uint8), {"blank"}),
    "one pixel": (_with_tissue(1), {"few-pixels"}),
    "two pixels": (_with_tissue(2), {"few-pixels"}),
    "ninety pixels": (_with_tissue(90), {"few-pixels"}),
    "black": (np.zeros((64, 64, 3), np.uint8), {"one-colour", "flat"}),
    "one colour": (np.full((64, 64, 3), (150, 90, 140), np.uint8), {"one-colour", "flat"}),
    "two shades": (np.ascontiguousarray(np.broadcast_to(TWO_SHADES, (64, 64, 3))), {"one-colour", "small-angle"}),
    "grey ramp": (np.repeat(np.arange(64 * 64) % 200, 3).reshape(64, 64, 3).astype(np.uint8), {"one-colour", "gain"}),
}


@pytest.mark.parametrize("name", EDGE_CASES)
@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_tiles_that_say_nothing_fall_back(method, name):
    image, reasons = EDGE_CASES[name]
    transform = fit(method, image)
    if method == "reinhard" and name in ("two shades", "grey ramp"):  # these it can measure
        return
    assert transform.fallback in reasons and transform.fallback in FALLBACKS
    np.testing.assert_array_equal(transform.apply(image), image)
    slide = fit(method, two_stains(64, 64))
    marked = fit(method, image, fallback=slide)
    assert marked.fallback == transform.fallback and marked.source == slide.source
    np.testing.assert_array_equal(marked.apply(image), slide.apply(image))
    assert StainTransform.from_json(marked.to_json()) == marked


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EDGE_CASES)
def test_no_tile_gives_glass_a_cast(method, name):
    transform = fit(method, EDGE_CASES[name][0])
    np.testing.assert_array_equal(transform.apply(WHITE), WHITE)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_slide_falls_back(method):
    transform = fit(method, ArraySlide(np.full((300, 300, 3), 245, np.uint8), 4.0))
    assert transform.fallback == "blank" and transform.source is None


def test_a_source_much_paler_than_the_target_is_not_blown_up():
    pale = 255 - (255 - two_stains(64, 64)) // 6
    assert fit("macenko", pale).fallback is not None
    assert fit("macenko", pale, config=FitConfig(beta=0.01)).fallback == "gain"


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TARGETS)
def test_packaged_targets(method, name):
    transform = fit(method, two_stains(64, 64, strength=0.5), name)
    assert transform.fallback is None
    assert transform.apply(two_stains(8, 8)).shape == (8, 8, 3)


def test_packaged_numbers_are_the_pictures(data_dir):
    for path in sorted((data_dir / "stain" / "camelyon17_centres").glob("*.jpeg")):
        named = TARGETS[f"camelyon17-centre-{path.name[7]}"]
        image = np.asarray(Image.open(path))
        stains = fit("macenko", image, image).target
        np.testing.assert_allclose(stains.vectors, named.stains.vectors, atol=1e-3)
        np.testing.assert_allclose(stains.max_amounts, named.stains.max_amounts, atol=1e-3)
        np.testing.assert_allclose(fit("reinhard", image, image).target.mean, named.lab.mean, atol=0.02)
    example = np.asarray(Image.open(data_dir / "stain" / "henorm_macenko_oracle" / "example1.png"))
    lab = fit("reinhard", example, fit("macenko", example).apply(example)).target
    np.testing.assert_allclose((lab.mean, lab.std), (TARGETS["veta"].lab.mean, TARGETS["veta"].lab.std), atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_is_the_same_as_array_file_slide_and_saved_transform(method, tmp_path):
    source, target = two_stains(64, 64, strength=0.5), two_stains(96, 96, seed=4, strength=0.6)
    expected = fit(method, source, target)
    Image.fromarray(target).save(tmp_path / "target.png")
    (tmp_path / "saved.json").write_text(expected.to_json())
    for other in (tmp_path / "target.png", str(tmp_path / "saved.json"), expected):
        assert fit(method, source, other) == expected
    of_slide = fit(method, source, slide_of(two_stains(512, 512, seed=4, strength=0.6))).target
    assert type(of_slide) is type(expected.target)


def test_targets_that_are_none(tmp_path):
    source = two_stains(64, 64)
    Image.fromarray(source[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([source, source[..., :1]])).save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bad.json").write_text("{}")
    cases = [
        ("vetta", "no such target"),
        (tmp_path / "grey.png", "mode L"),
        (tmp_path / "alpha.png", "mode RGBA"),
        (tmp_path / "text.png", "not an image"),
        (tmp_path / "bad.json", "to_json"),
        (WHITE, "no pixel is tissue"),
        (EDGE_CASES["black"][0], "one colour"),
        (ArraySlide(np.full((300, 300, 3), 245, np.uint8), 4.0), "no pixel is tissue"),
        (source.astype(np.uint16), "uint16"),
        (source[:0], "no pixel"),
        (StainTransform("macenko"), "nothing that macenko"),
        (fit("reinhard", source), "nothing that macenko"),
    ]
    for target, match in cases:
        with pytest.raises(StainError, match=match):
            fit("macenko", source, target)
    with pytest.raises(StainError, match="no such stain normalisation"):
        fit("magic", source)


def test_ruifrok_changes_amounts_and_no_colour():
    image = two_stains(64, 64, strength=0.5)
    transform = fit("ruifrok", image, "veta")
    assert transform.source.vectors == transform.target.vectors
    only_h = np.clip(256 * np.exp(-np.array([[0.5], [1.0]]) * transform.source.vectors[0]) - 1, 0, 255)
    mapped = transform.apply(np.rint(only_h).astype(np.uint8))
    densities = -np.log((mapped + 1.0) / 256)
    np.testing.assert_allclose(densities[1] / densities[0], 2, atol=0.06)


@pytest.mark.parametrize("field", ["alpha", "beta", "sparsity", "mpp", "tile_px", "n_tiles"])
def test_configurations_that_cannot_be(field):
    with pytest.raises(StainError, match=field):
        FitConfig(**{field: -1})


def test_macenko_pools_all_tiles():
    tiles = two_stains(4 * 50, 50).reshape(4, 50, 50, 3)
    assert measure(tiles, FitConfig()) == measure(tiles.reshape(-1, 3), FitConfig())
