"""Reinhard: give tissue the target's mean and spread in each channel of CIELAB.

E. Reinhard et al., "Color transfer between images", IEEE Comput Graph Appl 21 (2001) 34-41; in CIELAB, as usual in
pathology, instead of their l-alpha-beta. CIELAB: CIE 15:2004, from sRGB (IEC 61966-2-1) under D65.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.slide.base import U8
from wsi.stain.config import FitConfig
from wsi.stain.pixels import thinned
from wsi.stain.statistics import F64, MAX_GAIN, MIN_FRACTION, MIN_PIXELS, LabStatistics, Unmeasurable

#: sRGB's primaries in XYZ, each row divided by the white point: (0.95047, 1, 1.08883).
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
TO_XYZ /= TO_XYZ.sum(axis=1, keepdims=True)

#: Tissue is darker than `TISSUE_L`; from there to white the change fades out.
TISSUE_L, WHITE_L = 80.0, 100.0

#: Maximum number of pixels measured, glass included.
MAX_PIXELS = 500_000

_FLAT = 1e-6


def measure(rgb: U8, config: FitConfig) -> LabStatistics:
    """Measure mean and standard deviation of CIELAB over tissue; parameters as in ``wsi.stain.macenko.measure``.

    Tissue has L below 80; the published programs use all pixels.

    Examples
    --------
    >>> tile = np.tile(np.uint8([[200, 100, 150], [180, 90, 140]]), (1000, 1))
    >>> round(measure(tile, FitConfig()).mean[0], 1)
    53.1
    """
    lab = lab_channels(thinned(rgb.reshape(-1, 3), MAX_PIXELS))
    if not config.published:
        n = lab.shape[1]
        lab = lab[:, lab[0] < TISSUE_L]
        if lab.shape[1] == 0:
            raise Unmeasurable("blank")
        if lab.shape[1] < max(MIN_PIXELS, MIN_FRACTION * n):
            raise Unmeasurable("few-pixels")
    mean, std = lab.mean(axis=1), lab.std(axis=1)
    if not (std > _FLAT).all():
        raise Unmeasurable("flat")
    return LabStatistics(tuple(mean.tolist()), tuple(std.tolist()), lab.shape[1])


def lab_channels(rgb: U8) -> F64:
    """Convert sRGB pixels, uint8 (n, 3), to CIELAB under D65, float64 (3, n) with contiguous channels.

    Examples
    --------
    >>> lab_channels(np.uint8([[200, 100, 150]])).round(1).ravel().tolist()
    [55.7, 45.5, -8.8]
    """
    xyz = TO_XYZ @ linear_light(np.arange(256) / 255)[np.ascontiguousarray(rgb.T)]
    fx, fy, fz = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * ((29 / 6) ** 2 / 3) + 4 / 29)
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def linear_light(srgb: F64) -> F64:
    """Linear light of an sRGB value, both 0 to 1."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab_tables(
    source: LabStatistics, target: LabStatistics, *, published: bool
) -> tuple[npt.NDArray[np.float32], U8, npt.NDArray[np.float32]]:
    """Make the arguments of ``native.lab_map``: light of each byte, byte of each step of light, and the map.

    Raises Unmeasurable where the target varies too much more than the source.
    """
    scale = np.array(target.std) / source.std
    if scale.max() > MAX_GAIN:
        raise Unmeasurable("gain")
    shift = target.mean - scale * source.mean
    ramp = [1.0, 0.0] if published else [WHITE_L / (WHITE_L - TISSUE_L), 1 / (WHITE_L - TISSUE_L)]
    values = np.concatenate([TO_XYZ.ravel(), np.linalg.inv(TO_XYZ).ravel(), scale, shift, ramp])
    light = np.arange(native.LAB_CODES) / (native.LAB_CODES - 1)
    codes = np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    return linear_light(np.arange(256) / 255).astype(np.float32), codes.astype(np.uint8), values.astype(np.float32)
