"""What happens to patches on their way into a training; the training itself is in test_patches."""

from __future__ import annotations

import numpy as np

from wsi.train.classifier import PatchConfig, augmented


def test_augmentation_moves_pixels_and_keeps_what_they_show() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 16, 16, 3), np.uint8)
    assert np.array_equal(augmented(rgb, PatchConfig(stain=0, turn=False), [0, 0]), rgb)
    turned = augmented(rgb, PatchConfig(stain=0), [0, 0])
    assert not np.array_equal(turned, rgb)
    for before, after in zip(rgb, turned, strict=True):
        eight = [np.rot90(side, k) for side in (before, before[:, ::-1]) for k in range(4)]
        assert any(np.array_equal(after, one) for one in eight)
    white = np.full((6, 16, 16, 3), 255, np.uint8)
    assert np.array_equal(augmented(white, PatchConfig(stain=0.5), [0, 1]), white)  # glass stays glass
    smooth = np.linspace(60, 200, 16).astype(np.uint8)[None, None, :, None].repeat(40, 0).repeat(16, 1).repeat(3, 3)
    coded = augmented(smooth.copy(), PatchConfig(stain=0, turn=False, jpeg=0.5), [0, 2])
    changed = np.array([not np.array_equal(a, b) for a, b in zip(coded, smooth, strict=True)])
    assert 5 < changed.sum() < 35 and np.abs(coded.astype(int) - smooth).max() < 30
    assert np.array_equal(coded, augmented(smooth.copy(), PatchConfig(stain=0, turn=False, jpeg=0.5), [0, 2]))
