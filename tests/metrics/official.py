"""The official lesion evaluation of CAMELYON16, restated literally and slowly from its definition (specification).

scipy's Euclidean distance, hole filling and scikit-image's labels and regionprops, as the script calls them; loops
where it loops; confidences of hits as float32, as there. Only what the tests of `wsi.metrics.froc` compare with.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage import measure


def evaluation_mask(mask255: np.ndarray, mpp: float = 0.243, level: int = 5) -> np.ndarray:
    distance = ndimage.distance_transform_edt(255 - mask255)
    binary = distance < 75 / (mpp * 2**level * 2)
    return measure.label(ndimage.binary_fill_holes(binary), connectivity=2)


def itc_labels(labels: np.ndarray, mpp: float = 0.243, level: int = 5) -> list[int]:
    limit = 275 / (mpp * 2**level)
    return [int(p.label) for p in measure.regionprops(labels) if p.axis_major_length < limit]


def false_and_true_positives(detections, labels, itc, is_tumour, level: int = 5):
    n = int(labels.max()) if is_tumour else 0
    fps, tps = [], np.zeros(n, np.float32)
    for p, x, y in detections:
        if not is_tumour:
            fps.append(p)
            continue
        height, width = labels.shape
        row, column = int(y // 2**level), int(x // 2**level)
        label = labels[row, column] if 0 <= row < height and 0 <= column < width else 0
        if label == 0:
            fps.append(p)
        elif int(label) not in itc and p > tps[label - 1]:
            tps[label - 1] = p
    return fps, tps.astype(float).tolist(), n - len(itc) if is_tumour else 0


def curve(fps: list[float], tps: list[float], n_lesions: int, n_images: int):
    thresholds = sorted(set(fps + tps))
    x, y = [], []
    for t in thresholds[1:]:
        x.append(sum(p >= t for p in fps) / n_images)
        y.append(sum(p >= t for p in tps) / n_lesions)
    return [*x, 0.0], [*y, 0.0]


def score(fps: list[float], tps: list[float], n_lesions: int, n_images: int) -> float:
    x, y = curve(fps, tps, n_lesions, n_images)
    return float(np.mean(np.interp([0.25, 0.5, 1, 2, 4, 8], x[::-1], y[::-1])))
