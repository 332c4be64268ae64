"""Periodic textures of tissue."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage
from scipy.spatial import KDTree

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Periods of the textures in pixels: coprime, so that no two repeat together, and with small factors for the FFT.
PERIODS = {"stroma": 1125, "fat": 1024, "cells": 1331, "tumour": 1183}


def draw_textures(rng: np.random.Generator, mpp: float, tile_px: int) -> dict[str, list[F32]]:
    """Draw the periodic textures, float32 (period + tile_px, period + tile_px), so that any tile is a slice."""
    p = PERIODS["stroma"]
    directions = []
    for _ in range(2):
        fibre = _noise(rng, p, (1.2 / mpp, 14 / mpp)) + 0.7 * _noise(rng, p, (0.6 / mpp, 9 / mpp))
        rows, columns = np.mgrid[:p, :p] + 12 / mpp * _noise(rng, p, (25 / mpp, 25 / mpp)) * [[[1]], [[0]]]  # wavy
        fibre = ndimage.map_coordinates(fibre, (rows, columns), order=1, mode="grid-wrap")
        directions.append(fibre / fibre.std())
    cells = _nuclei(rng, PERIODS["cells"], mpp, spacing=15, radius=(2.4, 3.6), stretch=2.2, amount=1.5)
    crowd = _nuclei(rng, PERIODS["tumour"], mpp, spacing=11.5, radius=(3.6, 5.8), stretch=1.5, amount=1.4)
    textures = {
        "stroma": [directions[0], directions[1].T, _noise(rng, p, (0.8, 0.8))],
        "cells": cells,
        "tumour": [*crowd, 0.34 + 0.07 * _noise(rng, PERIODS["tumour"], (3 / mpp, 3 / mpp))],
        "fat": [_foam(rng, PERIODS["fat"], spacing=55 / mpp, wall=1.6 / mpp)],
    }
    return {
        name: [np.pad(plane, (0, tile_px), mode="wrap").astype(np.float32) for plane in planes]
        for name, planes in textures.items()
    }


def _noise(rng: np.random.Generator, period: int, sigma: tuple[float, float]) -> F32:
    """Gaussian-filtered periodic noise of unit variance, float32 (period, period)."""
    spectrum = fft.rfft2(rng.standard_normal((period, period), np.float32))
    noise = fft.irfft2(ndimage.fourier_gaussian(spectrum, sigma, n=period), s=(period, period))
    return np.asarray(noise / noise.std(), np.float32)


def _scatter(rng: np.random.Generator, period: int, spacing: float) -> F64:
    """Points (n, 2) about `spacing` pixels apart on a torus: a jittered hexagonal lattice."""
    n = max(2, round(period / spacing))
    row, column = np.divmod(np.arange(n * n), n)
    lattice = np.stack([column + 0.5 * (row % 2), row], 1) + rng.uniform(-0.4, 0.4, (n * n, 2))
    return np.asarray(lattice * (period / n) % period)


def _nuclei(
    rng: np.random.Generator,
    period: int,
    mpp: float,
    *,
    spacing: float,
    radius: tuple[float, float],
    stretch: float,
    amount: float,
) -> list[F32]:
    """Draw nuclei (lengths in microns): their haematoxylin, and for each pixel the rank, 0 to 1, of its nucleus."""
    stain, ranks = np.zeros((period, period), np.float32), np.ones((period, period), np.float32)
    for x, y in _scatter(rng, period, spacing / mpp):
        r, long, turn = rng.uniform(*radius) / mpp, rng.uniform(1, stretch), rng.uniform(0, np.pi)
        box = np.arange(-int(r * long) - 2, int(r * long) + 3)
        u, v = box[None, :] - x % 1, box[:, None] - y % 1
        a, b = (u * np.cos(turn) + v * np.sin(turn)) / long, v * np.cos(turn) - u * np.sin(turn)
        inside = r - np.hypot(a, b)  # px from the membrane, where chromatin is densest
        shade = rng.uniform(0.75, 1.15) * (0.7 + 0.3 * np.exp(-np.maximum(inside, 0) / (r / 4)))
        shape = shade * np.clip(inside + 0.5, 0, 1)
        at = np.ix_((int(y) + box) % period, (int(x) + box) % period)
        ranks[at] = np.where(shape > 0, np.minimum(ranks[at], rng.random()), ranks[at])
        stain[at] = np.maximum(stain[at], shape)
    return [amount * stain * (1 + 0.15 * _noise(rng, period, (0.7 / mpp, 0.7 / mpp))), ranks]


def _foam(rng: np.random.Generator, period: int, *, spacing: float, wall: float) -> F32:
    """Thin walls between rounded cells, float32 (period, period): 1 on a wall, 0 in a vacuole."""
    half = np.arange(0, period + 2, 2)  # every other pixel suffices for smooth walls
    tree = KDTree(_scatter(rng, period, spacing), boxsize=period)
    d, _ = tree.query(np.stack(np.meshgrid(half % period, half % period), -1), k=3)
    d2, d3 = d[..., 1] - d[..., 0], d[..., 2] - d[..., 0]
    walls = np.clip(1.5 - d2 * d3 / (d2 + d3 + 1e-6) / wall, 0, 1)  # thicker where three cells meet
    return np.asarray(ndimage.map_coordinates(walls, np.mgrid[:period, :period] / 2, order=1), np.float32)
