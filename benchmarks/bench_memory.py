"""Peak memory of scoring, and of reading alone, slides of growing size.

    python benchmarks/bench_memory.py --sizes 10000 20000 40000
    python benchmarks/bench_memory.py --read slide-40000.svs slide-100000.svs

Each run is a process of its own: `wsi score` on a phantom, or all patches of a slide once through `wsi.tiling.stream`.
Peak resident memory is what the kernel says; of reading alone, above what the process had before the slide was opened.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wsi.phantom import PhantomConfig, write_phantom

CODE = """
import json, resource, sys
from wsi.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""

READ = """
import json, resource, sys
from wsi.grid import TileGrid
from wsi.slide import open_slide, tiff, tiffcheck
from wsi.tiling import stream

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, times, tile_px, threads, decode = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), 2, sys.argv[4]
with open_slide(path, "tiff", decode=decode) as slide:
    grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=times * slide.mpp.x, tile_px=tile_px)
    for _ in stream(slide, grid, [range(len(grid))], batch_size=64, threads=threads):
        pass
print(json.dumps([len(grid), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))
"""


def read(slides: list[str]) -> None:
    """Print a row a slide and a way to cut it."""
    print(f"{'slide':28} {'patches':>16} {'n':>8} {'MiB more':>9}")
    for slide in slides:
        for times, tile_px, decode in ((1, 256, "auto"), (2, 224, "auto"), (2, 224, "full"), (2.057, 224, "auto")):
            command = [sys.executable, "-c", READ, slide, str(times), str(tile_px), decode]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            n, more = json.loads(done.stdout)
            what = f"{tile_px} px x{times:g} {decode}"
            print(f"{Path(slide).name:28} {what:>16} {n:8} {more / 2**20:9.0f}", flush=True)


def main() -> None:
    """Print a row a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 20_000, 40_000])
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--read", nargs="+", metavar="SLIDE", help="reading alone, of these tiled TIFFs")
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
        return
    print(f"{'side px':>8} {'tiles':>7} {'peak MiB':>9} {'seconds':>8}  of which")
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            slide = Path(folder) / f"phantom-{size}.svs"
            write_phantom(slide, PhantomConfig(size=(size, size), seed=7))
            out = Path(folder) / f"results-{size}"
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CODE, "score", str(slide), "-m", arguments.model, "-o", str(out), "-q"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            seconds = time.perf_counter() - begun
            with (out / "slides.csv").open(newline="") as file:
                row = next(csv.DictReader(file))
            stages = ", ".join(f"{k[8:]} {float(v):.1f}" for k, v in row.items() if k.startswith("seconds_"))
            peak = json.loads(done.stdout.splitlines()[-1]) / 2**20
            print(f"{size:8} {row['n_tiles']:>7} {peak:9.0f} {seconds:8.1f}  {stages}", flush=True)


if __name__ == "__main__":
    main()
