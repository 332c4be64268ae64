"""Stain normalisation: megapixels a second, beside memcpy and the NumPy twin measured in the same run.

    python benchmarks/bench_stain.py --repeats 7

A thread takes its own tiles; the best of several repeats counts. One thread is timed by the CPU seconds it used, so
that other programs disturb less; several threads by the wall.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wsi import native
from wsi.native import twin
from wsi.stain import METHODS, FitConfig, fit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Work = Callable[[slice], object]


def stained(n: int, tile_px: int) -> np.ndarray:
    """Tiles of two stains in noise, uint8 (n, tile_px, tile_px, 3)."""
    rng = np.random.default_rng(0)
    amounts = rng.gamma(1.5, 0.35, (n, tile_px, tile_px, 2)).astype(np.float32)
    vectors = np.float32([[0.65, 0.70, 0.29], [0.2, 0.85, 0.48]])
    return np.clip(np.rint(256 * np.exp(-amounts @ vectors) - 1), 0, 255).astype(np.uint8)


def seconds(work: Work, n: int, threads: int, repeats: int) -> float:
    """Best time of `work` over all n tiles, cut among the threads."""
    edges = np.linspace(0, n, threads + 1).astype(int)
    parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    clock = time.process_time if threads == 1 else time.perf_counter
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first one touches the memory
            begun = clock()
            if threads == 1:
                work(parts[0])
            else:
                list(pool.map(work, parts))
            best = min(best, clock() - begun)
    return best


def main() -> None:
    """Print a row for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--tile-px", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rgb = stained(options.tiles, options.tile_px)
    out = np.empty_like(rgb)
    shape = (len(rgb), 3, options.tile_px, options.tile_px)
    f32, last32, last16 = np.empty(shape, np.float32), np.empty(rgb.shape, np.float32), np.empty(rgb.shape, np.uint16)
    last32, last16 = last32.transpose(0, 3, 1, 2), last16.transpose(0, 3, 1, 2)
    macenko, reinhard = fit("macenko", rgb), fit("reinhard", rgb)
    sparse = fit("vahadane", rgb, config=FitConfig(published=True, io=255.0))
    each = [slice(i, i + 1) for i in range(options.tiles)]

    def tile_by_tile(work: Work) -> Work:
        return lambda part: [work(tile) for tile in each[part]]

    def refit(method: str, config: FitConfig | None = None) -> Work:
        return lambda s: fit(method, rgb[s], "veta", config=config).apply(rgb[s], out[s])

    rows: dict[str, Work] = {
        "memcpy": lambda s: np.copyto(out[s], rgb[s]),
        "macenko apply": lambda s: macenko.apply(rgb[s], out[s]),
        "reinhard apply": lambda s: reinhard.apply(rgb[s], out[s]),
        "vahadane apply, as published": lambda s: sparse.apply(rgb[s], out[s]),
        "macenko to float32": lambda s: macenko.tensor(rgb[s], MEAN, STD, f32[s]),
        "macenko to float32, channels last": lambda s: macenko.tensor(rgb[s], MEAN, STD, last32[s]),
        "macenko to bfloat16, channels last": lambda s: macenko.tensor(rgb[s], MEAN, STD, last16[s], dtype="bfloat16"),
        "vahadane to float32, channels last": lambda s: sparse.tensor(rgb[s], MEAN, STD, last32[s]),
        "reinhard to float32, channels last": lambda s: reinhard.tensor(rgb[s], MEAN, STD, last32[s]),
        "macenko fit + apply, each tile": tile_by_tile(refit("macenko")),
        "vahadane fit + apply, each tile": tile_by_tile(refit("vahadane")),
        "reinhard fit + apply, each tile": tile_by_tile(refit("reinhard")),
        "NumPy twin, macenko apply": tile_by_tile(lambda s: twin.od_map(rgb[s], *macenko.arguments, out[s])),
        "NumPy twin, vahadane apply": tile_by_tile(lambda s: twin.sparse_map(rgb[s], *sparse.arguments, out[s])),
        "NumPy twin, reinhard apply": tile_by_tile(lambda s: twin.lab_map(rgb[s], *reinhard.arguments, out[s])),
    }
    speeds = {
        name: [rgb.size / 3e6 / seconds(work, options.tiles, threads, options.repeats) for threads in (1, 2)]
        for name, work in rows.items()
    }
    sample = stained(FitConfig().n_tiles, FitConfig().tile_px)
    fits = {method: seconds(lambda _, m=method: fit(m, sample), 1, 1, options.repeats) for method in METHODS}
    if options.json:
        found = {"machine": platform.processor(), "compiled": native.HAVE_CPU, "Mpx/s": speeds, "fit seconds": fits}
        print(json.dumps(found, indent=2))
        return
    print(f"{options.tiles} tiles of {options.tile_px} px; kernels {'compiled' if native.HAVE_CPU else 'NumPy twins'}")
    print(f"{'Mpx/s':34} {'1 thread':>9} {'2 threads':>9} {'2 over 1':>8} {'of memcpy':>9} {'of twin':>8}")
    for name, (one, two) in speeds.items():
        kind = next((kind for kind in ("vahadane", "reinhard") if kind in name), "macenko")
        peer = speeds[f"NumPy twin, {kind} apply"][0]
        memcpy = speeds["memcpy"][0]
        print(f"{name:34} {one:9.0f} {two:9.0f} {two / one:8.2f} {one / memcpy:9.3f} {one / peer:8.1f}")
    print("\nSeconds to fit what is sampled of a slide, once it is read:", end=" ")
    print(", ".join(f"{method} {value:.3f}" for method, value in fits.items()))


if __name__ == "__main__":
    main()
