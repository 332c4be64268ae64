"""Bags on disk in every layout, with a signal that a few tiles carry."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from wsi.grid import TileGrid
from wsi.store import PatchStore
from wsi.train.cohort import Case, Cohort
from wsi.units import Mpp

WIDTH = 5


def features_of(label: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Noise; `label` of the tiles' first feature is raised by 4 in one of 5."""
    x = rng.normal(size=(n, WIDTH)).astype(np.float16)
    x[: max(1, n // 5), 0] += np.float16(4 * label)
    return rng.permutation(x)


def write_bags(folder: Path, labels: dict[str, float], *, layout: str = "h5", seed: int = 0, **attributes: Any) -> Path:
    """Write a bag a slide: layout "h5" (CLAM), "pt", "trident" or "store"."""
    rng = np.random.default_rng(seed)
    for slide_id, label in labels.items():
        n = int(rng.integers(5, 15))
        x = features_of(label, n, rng)
        coords = np.stack([np.arange(n) % 4 * 256, np.arange(n) // 4 * 256], 1)
        if layout == "store":
            grid = TileGrid.cover((1000, 1000), slide_mpp=Mpp(1, 1), mpp=1.0, tile_px=100).keep(np.arange(100) < n)
            arrays = {"features": ((WIDTH,), "float16")}
            store = PatchStore.create(
                folder / slide_id / "store.zarr", grid, arrays, attributes={"model_sha256": "a" * 64}
            )
            store.put("features", x)
            continue
        sub = {"h5": "h5_files", "pt": "pt_files", "trident": "20x_256px_0px_overlap/features_uni_v1"}[layout]
        path = folder / sub / f"{slide_id}.{'pt' if layout == 'pt' else 'h5'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "pt":
            torch.save(torch.from_numpy(x).float(), path)
            continue
        with h5py.File(path, "w") as file:
            file["features"] = x
            file["coords"] = coords
            if layout == "trident":
                file["features"].attrs["encoder"] = "uni_v1"
                file["coords"].attrs["patch_size_level0"] = 256
            for name, value in attributes.items():
                file["features"].attrs[name] = value
    return folder


def cohort_of(labels: dict[str, int], patients: int = 0) -> Cohort:
    """A cohort of two or more classes, `patients` of them (default: one a slide)."""
    cases = {
        name: Case(name, f"p{i % patients}" if patients else f"p{i}", label)
        for i, (name, label) in enumerate(labels.items())
    }
    return Cohort(cases, tuple(f"class {i}" for i in range(max(labels.values()) + 1)))


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_patches(
    folder: Path,
    n: int = 60,
    *,
    patients: int = 12,
    side: int = 32,
    seed: int = 0,
    classes: tuple[str, str] = ("a", "b"),
) -> Path:
    """Write n images of two classes, in turn: noise on grey, in which those of the second class hold a purple blob."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(n):
        rgb = rng.normal(200, 15, (side, side, 3))
        if i % 2:
            y, x = rng.integers(4, side - 12, 2)
            rgb[y : y + 8, x : x + 8] = [110, 50, 140]
        path = folder / classes[i % 2] / f"p{i // 2 % patients:02d}_{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(path)
    return folder
