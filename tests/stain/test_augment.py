"""Stain augmentation: what changes, what must not, and that a seed says it all."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stain.make import two_stains
from wsi.errors import StainError
from wsi.stain import StainAugment, Stains

TILES = two_stains(6 * 24, 24).reshape(6, 24, 24, 3)


def test_the_seed_and_the_number_of_a_tile_say_it_all():
    augment = StainAugment(0.2)
    whole = augment(TILES, seed=5)
    np.testing.assert_array_equal(augment(TILES, seed=5), whole)
    np.testing.assert_array_equal(
        np.concatenate([augment(TILES[:2], seed=5), augment(TILES[2:], seed=5, first=2)]), whole
    )
    assert (augment(TILES, seed=6) != whole).any()
    same = np.repeat(TILES[:1], 6, axis=0)
    assert len({tile.tobytes() for tile in augment(same, seed=1)}) == 6


def test_glass_stays_white_and_no_strength_is_no_change():
    white = np.full((20, 4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(StainAugment(1.0)(white, seed=0), white)
    np.testing.assert_array_equal(StainAugment(0.0)(TILES, seed=0), TILES)


def test_amounts_are_multiplied_within_the_strength():
    vectors = np.array(StainAugment().stains.vectors)
    amounts = np.random.default_rng(0).uniform(0.2, 0.8, (1, 64, 64, 2))
    tile = np.rint(256 * np.exp(-amounts @ vectors) - 1).astype(np.uint8)
    shaken = StainAugment(0.3)(np.repeat(tile, 50, axis=0), seed=2)
    found = -np.log((shaken + 1.0) / 256) @ np.linalg.pinv(vectors)
    factors = found.mean((1, 2)) / amounts.mean((1, 2))
    assert 0.69 < factors.min() < 0.8 and 1.2 < factors.max() < 1.31
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.4


def test_out_is_written():
    out = np.empty_like(TILES)
    assert StainAugment()(TILES, seed=0, out=out) is out


def test_what_is_refused():
    augment = StainAugment()
    for rgb in (TILES.astype(np.uint16), TILES[0], TILES[:0], TILES[:, ::2], TILES[..., 0]):
        with pytest.raises(StainError):
            augment(rgb, seed=0)
    with pytest.raises(StainError):
        augment(TILES, seed=0, out=TILES)
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(StainError, match="strength"):
            StainAugment(strength)
    for alike in (
        ((0.65, 0.70, 0.29), (0.58, 0.77, 0.29)),
        ((0.56947, 0.61147, 0.54937), (0.568, 0.45109, 0.68839)),  # two factors together amplify more than one alone
    ):
        with pytest.raises(StainError, match="alike"):
            StainAugment(1.0, Stains(alike, (1.0, 1.0)))
