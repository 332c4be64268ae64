"""Memory of grading bags of 50,000 and 500,000 tiles at the widths of real encoders, and how exact it is.

    python benchmarks/mil/large_bags.py                        # 1,024 features, as UNI's; --width 1536 as UNI2-h's
    python benchmarks/mil/large_bags.py -a dsmil transmil

Features are float16 in a store, as ``wsi embed`` leaves them, and are read whole before they are graded. Each row is a
process of its own; memory is the peak that grading adds to what the process held with the features read. Networks have
512 hidden units and random weights. The difference is that of the smaller bag from the plain formula, in float64 and
without blocks: the largest of logits, attention and contributions, over 1 or the largest of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi.grid import TileGrid
from wsi.nn.mil import MIL_NETS, dsmil, make_net, pooling, transmil
from wsi.nn.mil import net as net_module
from wsi.store import PatchStore
from wsi.units import Mpp

SIZES, HIDDEN, SIDE = (50_000, 500_000), 512, 256


def mib(what: str) -> float:
    """Resident memory of this process, "VmRSS" now or "VmHWM" its peak (getrusage counts the parent's too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def write_store(path: Path, n: int, width: int) -> None:
    """Write a store of n tiles, 700 a row, with random features."""
    columns, rows = np.arange(n, dtype=np.int32) % 700, np.arange(n, dtype=np.int32) // 700
    grid = TileGrid(columns, rows, (SIDE, SIDE), (SIDE, SIDE), SIDE, 0.5)
    store = PatchStore.create(path, grid, {"features": ((width,), "float16")}, attributes={"slide": {"mpp": Mpp(1, 1)}})
    for shard in store.shards:
        rng = np.random.default_rng(shard)
        tiles = len(store.tiles(shard))
        store.write(shard, {"features": rng.standard_normal((tiles, width), np.float32).astype(np.float16)})


def grade(path: Path, name: str, exact: bool) -> dict[str, float]:
    """Grade a store's features in this process."""
    torch.manual_seed(0)
    store = PatchStore.open(path)
    features, boxes = torch.from_numpy(store.get("features")), torch.from_numpy(store.grid.boxes())
    net = make_net(name, in_features=features.shape[1], hidden=HIDDEN).eval()
    with torch.inference_mode():
        net(features[:100], boxes[:100])
        ctypes.CDLL(None).malloc_trim(0)  # what reading has left
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = mib("VmRSS")
        scores = net(features, boxes)
        found = {"mib": mib("VmHWM") - before}
        if exact:
            own = plain(net, features, boxes)
            pairs = [(a.double(), b) for a, b in zip(scores, own, strict=True) if a is not None]
            found["difference"] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)
    return found


def plain(net: Any, features: torch.Tensor, boxes: torch.Tensor) -> Any:
    """Grade in float64, without blocks: whatever the network would make float32 stays float64."""
    for module in (net_module, dsmil, pooling):
        module.BLOCK = len(features)  # type: ignore[attr-defined]
    transmil._TOKENS = 2 * len(features)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    return net.double().score(features.double(), boxes)


def main() -> None:
    """Print a row an architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--architectures", nargs="+", default=list(MIL_NETS))
    parser.add_argument("--width", type=int, default=1024, help="features a tile")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="tiles")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(grade(Path(arguments.one[0]), arguments.one[1], arguments.exact)))
        return
    print(f"{arguments.width} features, {HIDDEN} hidden: MiB beyond the features\n")
    print(f"| | {' | '.join(f'{n:,} tiles' for n in arguments.sizes)} | difference |")
    print(f"|---{'|---' * len(arguments.sizes)}|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for n in arguments.sizes:
            write_store(Path(folder) / f"{n}.zarr", n, arguments.width)
        for name in arguments.architectures:
            cells, difference = [], ""
            for n in arguments.sizes:
                call = [sys.executable, __file__, "--one", str(Path(folder) / f"{n}.zarr"), name]
                call += ["--exact"] * (n == min(arguments.sizes))
                done = subprocess.run(call, capture_output=True, text=True, check=False)
                if done.returncode:
                    cells.append((done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1])
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                cells.append(f"{found['mib']:.0f}")
                difference = f"{found['difference']:.1g}" if "difference" in found else difference
            print(f"| {name} | {' | '.join(cells)} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
