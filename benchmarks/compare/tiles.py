"""Tiles to work on: real ones where the data is, else drawn."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

U8 = npt.NDArray[np.uint8]

TILE_PX = 256
DATA = Path(os.environ.get("WSI_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
ARCHIVES = [DATA / "stain/camelyon17_lymphnode_tiles_256.zip", DATA / "patches/camelyon16_patches_256.zip"]


def tiles_and_target(n: int) -> tuple[U8, U8, str]:
    """Return `n` tiles, at least half of them tissue, a picture to normalise them to, and what they are."""
    if not all(path.exists() for path in ARCHIVES):
        from slides import tissue_tiles

        drawn = tissue_tiles(TILE_PX, n + 1)
        return drawn[:-1].copy(), drawn[-1].copy(), "drawn: phantom"
    pictures = [tile for path in ARCHIVES for tile in _pictures(path)]
    tiles = [tile for tile in pictures if tile.shape == (TILE_PX, TILE_PX, 3) and (tile.max(axis=2) < 215).mean() > 0.5]
    target = np.array(Image.open(DATA / "stain/torchstain/target.png").convert("RGB"))
    chosen = np.stack([tiles[i % len(tiles)] for i in range(n)])
    return chosen, target, f"real: {min(n, len(tiles))} different ones of CAMELYON16 and 17, torchstain's target"


def _pictures(path: Path) -> list[U8]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".png", ".jpg", ".jpeg", ".tif")))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
