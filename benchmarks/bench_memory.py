"""Peak memory of scoring slides of growing size: must not grow with the slide.

    python benchmarks/bench_memory.py --sizes 10000 20000 40000

Each run is `wsi score` on a phantom in a process of its own; its peak resident memory is what the kernel says.
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


def main() -> None:
    """Print a row a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 20_000, 40_000])
    parser.add_argument("--model", default="phantom")
    arguments = parser.parse_args()
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
