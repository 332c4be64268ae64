"""What resampling by little costs in sharpness: patches at an mpp beside the slide's own pixels at the same place.

    python benchmarks/bench_sharpness.py ../shared/data/wsi/aperio/CMU-1-Small-Region.svs --mpp 0.5

Printed is the variance of the Laplacian of tissue patches of 256 px over that of the level-0 pixels there, to the
nearest pixel: median, least and largest.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.ndimage import laplace

from wsi import Box, TileGrid, find_tissue, open_slide

SIDE = 256


def sharpness(rgb: np.ndarray) -> float:
    """Variance of the Laplacian of the grey picture."""
    return float(laplace(rgb.astype(float).mean(2)).var())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--mpp", type=float, required=True)
    chosen = parser.parse_args()
    with open_slide(chosen.slide) as slide:
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=chosen.mpp, tile_px=SIDE)
        grid = grid.keep((find_tissue(slide).fraction(grid.boxes()) >= 0.5) & grid.inside(slide.size))
        ratios = []
        for x, y, w, h in grid.boxes().tolist():
            own = Box(round(x), round(y), SIDE, SIDE)
            patches = [slide.read(box, (SIDE, SIDE)) for box in (Box(x, y, w, h), own)]
            ratios.append(sharpness(patches[0]) / sharpness(patches[1]))
    print(f"{len(ratios)} patches: median {np.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
