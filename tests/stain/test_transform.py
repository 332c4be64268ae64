"""Transforms: what they do to pixels, what they refuse, and their way through JSON."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stain.make import two_stains
from wsi import native
from wsi.errors import StainError
from wsi.stain import METHODS, TARGETS, FitConfig, LabStatistics, Stains, StainTransform, fit
from wsi.stain.transform import od_tables

VETA = TARGETS["veta"].stains
WHITE = np.full((3, 3, 3), 255, np.uint8)


@pytest.fixture(params=[*METHODS, "vahadane, sparse"])
def transform(request) -> StainTransform:
    method, *sparse = request.param.split(", ")
    found = fit(method, two_stains(64, 64))
    if sparse:
        found = dataclasses.replace(found, sparsity=0.02)
    assert found.fallback is None and found.source != found.target
    return found


def test_white_stays_white_and_nothing_else_turns_white(transform):
    np.testing.assert_array_equal(transform.apply(WHITE), WHITE)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    assert transform.apply(grey)[:200].max() < 255


def test_batches_and_order_change_no_byte(transform):
    tiles = two_stains(5 * 40, 40).reshape(5, 40, 40, 3)
    whole = transform.apply(tiles)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(transform.apply(tiles[order]), whole[order])
    for tile, expected in zip(tiles, whole, strict=True):
        np.testing.assert_array_equal(transform.apply(tile), expected)
    np.testing.assert_array_equal(transform.apply(tiles.reshape(-1, 3)), whole.reshape(-1, 3))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_tensor_is_apply_and_normalisation(transform, channels_last):
    tiles = two_stains(3 * 20, 30).reshape(3, 20, 30, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = ((transform.apply(tiles) / 255 - mean) / std).transpose(0, 3, 1, 2)
    x = transform.tensor(tiles, mean, std, channels_last=channels_last)
    np.testing.assert_array_equal(x, expected.astype(np.float32))
    assert (x if not channels_last else x.transpose(0, 2, 3, 1)).flags.c_contiguous
    half = transform.tensor(tiles, mean, std, dtype="float16", channels_last=channels_last)
    np.testing.assert_array_equal(half, expected.astype(np.float16))
    bits = transform.tensor(tiles, mean, std, dtype="bfloat16", channels_last=channels_last)
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(expected.astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), theirs)
    out = np.empty_like(x)  # of the same strides
    assert transform.tensor(tiles, mean, std, out) is out
    np.testing.assert_array_equal(out, x)


def test_json_gives_back_the_same_transform(transform):
    again = StainTransform.from_json(transform.to_json())
    assert again == transform and hash(again) == hash(transform)
    tile = two_stains(30, 30, seed=3)
    np.testing.assert_array_equal(again.apply(tile), transform.apply(tile))


def test_out_is_written_and_returned(transform):
    tile = two_stains(30, 30)
    out = np.zeros((2, 30, 30, 3), np.uint8)
    assert transform.apply(tile, out[1]).base is out
    np.testing.assert_array_equal(out[1], transform.apply(tile))
    assert out[0].max() == 0


def test_without_statistics_every_byte_stays():
    rgb = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    np.testing.assert_array_equal(StainTransform("macenko").apply(rgb), rgb)
    np.testing.assert_array_equal(StainTransform("macenko", VETA, VETA).apply(rgb), rgb)
    lab = TARGETS["veta"].lab
    np.testing.assert_array_equal(StainTransform("reinhard", lab, lab).apply(rgb), rgb)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_no_map_makes_a_cast_on_glass_or_runs_over(seed):
    rng = np.random.default_rng(seed)

    def stains() -> Stains:
        h = np.array([0.6, 0.7, 0.35]) + rng.uniform(-0.1, 0.1, 3)
        e = np.array([0.2, 0.85, 0.45]) + rng.uniform(-0.1, 0.1, 3)
        return Stains((tuple(h), tuple(e)), tuple(rng.uniform(0.5, 2.5, 2)))

    try:
        transform = StainTransform("macenko", stains(), stains())
    except StainError as error:
        assert "4.8" in str(error)
        return
    tables, _ = transform.arguments
    extremes = np.float64(tables.max(axis=1)).prod(axis=0), np.float64(tables[:, :, :3].min(axis=1)).prod(axis=0)
    assert np.isfinite(tables).all() and extremes[0].max() < 3e38 and extremes[1].min() >= 0
    np.testing.assert_array_equal(transform.apply(WHITE), WHITE)


# --- bad input -------------------------------------------------------------------------------------------------------

RGB = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("rgb", "match"),
    [
        (RGB.astype(np.uint16), "uint16"),
        (RGB.astype(np.float32), "float32"),
        (RGB.astype(bool), "bool"),
        (RGB[..., 0], "grey"),
        (RGB[..., :1], "grey"),
        (np.zeros((8, 8, 4), np.uint8), "four channels"),
        (RGB[:0], "no pixel"),
        (RGB[0, 0], "grey or not an image"),
        ([[0, 0, 0]], "list"),
        (np.zeros((8, 16, 3), np.uint8)[:, ::2], "strided"),
        (RGB.transpose(1, 0, 2), "strided"),
    ],
)
def test_pixels_that_are_not_8_bit_rgb_in_one_piece_are_refused(transform, rgb, match):
    with pytest.raises(StainError, match=match):
        transform.apply(rgb)
    batch = rgb[None] if match == "strided" else rgb
    with pytest.raises(StainError, match=match):
        transform.tensor(batch, (0.5,) * 3, (0.5,) * 3)
    if match != "strided":  # a fit may gather them
        with pytest.raises(StainError, match=match):
            fit(transform.method, rgb)


def test_outputs_that_do_not_fit_are_refused(transform):
    frozen = RGB.copy()
    frozen.flags.writeable = False
    for out in (RGB, RGB[:4], RGB.astype(np.int8), frozen, np.zeros((8, 16, 3), np.uint8)[:, ::2]):
        with pytest.raises(StainError, match="out"):
            transform.apply(RGB, out)
    frozen = np.zeros((1, 8, 8, 3), np.float32).transpose(0, 3, 1, 2)
    frozen.flags.writeable = False
    strided = np.zeros((1, 3, 8, 16), np.float32)[..., ::2]
    for out in (np.zeros((1, 3, 8, 8)), np.zeros((1, 8, 8, 3), np.float32), frozen, strided):
        with pytest.raises(StainError, match="out"):
            transform.tensor(RGB[None], (0.5,) * 3, (0.5,) * 3, out)
    with pytest.raises(StainError, match="batch"):
        transform.tensor(RGB, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(StainError, match="finite"):
        Stains(((bad, 0.7, 0.4), (0.2, 0.8, 0.5)), (1.0, 1.0))
    with pytest.raises(StainError, match="finite"):
        Stains(VETA.vectors, (1.0, bad))
    with pytest.raises(StainError, match="finite"):
        LabStatistics((bad, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(StainError, match="finite"):
        od_tables(np.full((3, 3), bad), 256.0)
    with pytest.raises(StainError, match="glass"):
        StainTransform("macenko", VETA, VETA, io=bad)
    with pytest.raises(StainError, match="finite"):
        native.levels((bad, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("io", [0, -1, 0.5, 1000, float("nan")])
def test_glass_without_light_is_refused(io):
    with pytest.raises(StainError, match="glass"):
        FitConfig(io=io)
    with pytest.raises(StainError, match="glass"):
        StainTransform("macenko", VETA, VETA, io=io)


def test_statistics_that_cannot_be_are_refused():
    with pytest.raises(StainError, match="degrees"):
        Stains((VETA.vectors[0], VETA.vectors[0]), (1.0, 1.0))
    with pytest.raises(StainError, match="positive"):
        Stains(VETA.vectors, (1.0, 0.0))
    with pytest.raises(StainError, match="three"):
        Stains(VETA.vectors[:1], (1.0, 1.0))
    with pytest.raises(StainError, match="positive"):
        LabStatistics((50.0, 0.0, 0.0), (1.0, 0.0, 1.0))
    with pytest.raises(StainError, match="one kind"):
        StainTransform("macenko", VETA, TARGETS["veta"].lab)
    with pytest.raises(StainError, match="one kind"):
        StainTransform("macenko", VETA)
    with pytest.raises(StainError, match=r"4\.8"):
        StainTransform("macenko", dataclasses.replace(VETA, max_amounts=(0.1, 0.1)), VETA)
    with pytest.raises(StainError, match=r"4\.8"):
        StainTransform("reinhard", LabStatistics((50.0, 0.0, 0.0), (0.1, 1.0, 1.0)), TARGETS["veta"].lab)
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(StainError, match="sparsity"):
            StainTransform("vahadane", VETA, VETA, sparsity=sparsity)
    with pytest.raises(StainError, match="sparsity"):
        StainTransform("reinhard", TARGETS["veta"].lab, TARGETS["veta"].lab, sparsity=0.1)
    opposed = Stains(((0.9, 0.1, -0.4), (-0.3, 0.9, 0.3)), (1.0, 1.0))
    with pytest.raises(StainError, match="right angle"):
        StainTransform("vahadane", opposed, VETA, sparsity=0.1)
    with pytest.raises(StainError, match="float64"):
        native.levels((0.0,) * 3, (1.0,) * 3, "float64")
    with pytest.raises(StainError, match="std"):
        native.levels((0.0,) * 3, (1.0, 0.0, 1.0))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}',
     '{"format": 1, "method": "macenko", "source": 3, "target": null}',
     '{"format": 1, "method": "macenko", "source": {"mean": [1]}, "target": null}',
     '{"format": 1, "method": "x", "source": null, "target": null, "surprise": 1}'],
)  # fmt: skip
def test_json_of_something_else_is_refused(text):
    with pytest.raises(StainError, match="stain transform"):
        StainTransform.from_json(text)
