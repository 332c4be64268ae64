"""Images with known stains."""

from __future__ import annotations

import hashlib

import numpy as np

#: Haematoxylin and eosin of the synthetic image, columns.
TRUE_HE = np.array([[0.60, 0.20], [0.70, 0.85], [0.39, 0.49]])
TRUE_HE /= np.linalg.norm(TRUE_HE, axis=0)


def synthetic() -> np.ndarray:
    """128 x 128 pixels of two stains in waves, no random numbers; its hash is checked."""
    n = 128
    y, x = np.mgrid[0:n, 0:n]
    h = 1.2 * (0.5 + 0.5 * np.sin(2 * np.pi * x / 16)) * (0.5 + 0.5 * np.cos(2 * np.pi * y / 32))
    e = 0.9 * (0.5 + 0.5 * np.sin(2 * np.pi * (x + y) / 24))
    light = np.rint(240 * np.exp(-(TRUE_HE @ [h.ravel(), e.ravel()])) - 1)
    image = np.ascontiguousarray(np.clip(light, 0, 255).astype(np.uint8).T.reshape(n, n, 3))
    expected = "b72a10db83bb6be56589aa88fb3b23c425175d0b48bba68f9993ddb449ac99f6"
    assert hashlib.sha256(image.tobytes()).hexdigest() == expected
    return image


def two_stains(h: int, w: int, seed: int = 0, vectors: np.ndarray = TRUE_HE, strength: float = 0.35) -> np.ndarray:
    """Random amounts of two stains, uint8 (h, w, 3)."""
    amounts = np.random.default_rng(seed).gamma(1.5, strength, (h, w, 2))
    return np.clip(np.rint(256 * np.exp(-amounts @ vectors.T) - 1), 0, 255).astype(np.uint8)
