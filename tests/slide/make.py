"""Small slides with known pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, uint8 (height, width, 3): no two places alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height) + 60], axis=-1)
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def halved(rgb: np.ndarray) -> np.ndarray:
    """Average of 2 x 2 pixels; an odd last row or column is dropped."""
    h, w = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    cells = rgb[:h, :w].astype(np.float64).reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))
    return np.floor(cells + 0.5).astype(np.uint8)


def write_pyramid(
    path: Path, levels: list[np.ndarray], mpp: float | None = 0.5, *, svs: bool = False, tile: int = 64
) -> None:
    """Write a lossless tiled pyramid: a generic TIFF, or Aperio-like."""
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            arguments: dict = {"tile": (tile, tile), "compression": "deflate", "photometric": "rgb", "metadata": None}
            if svs:
                text = f"Aperio Image Library v12\r\n{level.shape[1]}x{level.shape[0]}"
                arguments["description"] = text + (f"|AppMag = 20|MPP = {mpp}" if mpp else "|AppMag = 20")
            elif mpp:
                arguments |= {"resolution": (10000 / mpp, 10000 / mpp), "resolutionunit": "CENTIMETER"}
            tiff.write(level, subfiletype=0 if i == 0 or svs else 1, **arguments)


def write_jpeg_pyramid(
    path: Path, levels: list[np.ndarray], mpp: float = 0.5, *, tile: int = 128, subsampling: tuple[int, int] = (2, 2)
) -> None:
    """Write a generic pyramid of JPEG tiles, YCbCr, with tables shared by the tiles of a level."""
    levels = [np.asarray(Image.fromarray(level).convert("YCbCr")) for level in levels]  # tifffile takes it as it is
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            tiff.write(
                level,
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"level": 85},
                photometric="ycbcr",
                subsampling=subsampling,
                subfiletype=0 if i == 0 else 1,
                resolution=(10000 / mpp, 10000 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def section(width: int = 900, height: int = 700, seed: int = 0) -> np.ndarray:
    """A pink piece with a purple patch in it, on glass, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.full((height, width, 3), 243.0)
    tissue = ((x - width / 2) / (width * 0.4)) ** 2 + ((y - height / 2) / (height * 0.4)) ** 2 < 1
    rgb[tissue] = (225, 150, 190)
    rgb[tissue & (x > width * 0.55)] = (130, 80, 160)
    return np.clip(rgb + rng.normal(0, 6, rgb.shape), 0, 255).astype(np.uint8)
