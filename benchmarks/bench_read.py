"""Patches read a second beside the JPEG decoder alone, by turns in one process: how near reading comes to its limit.

    python benchmarks/bench_read.py
    python benchmarks/bench_read.py --tiles 512 --chroma 420 --rounds 15

Both decode the same stored tiles of the same slides; the decoder (simplejpeg, as we call it) has them in memory, one by
one, and decodes each into an array that stays. "Half" is patches of 224 px at twice the slide's mpp beside the decoder
at half scale. One thread by its CPU seconds, two by the wall. A round gives ratios; printed are their median and, in
brackets, the least and the largest. Freed memory is kept, as in the processes of `wsi tile` and `wsi score`, where a
second slide finds the first one's. ``compare/read.py`` has other readers beside, in processes of their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg

sys.path.insert(0, str(Path(__file__).parent / "compare"))

from measure import machine
from read import boxes
from readers import Job, ours, stored
from slides import SlideKind, cached

from wsi.memory import keep_freed_memory

#: Patches: side on level 0, and to how many pixels. 0 is the stored tile's.
PATCHES = {"stored tile": (0, 0), "256 px": (256, 256), "half": (448, 224)}
AREA_PX = 900 * 448**2  # of level 0, in a round


def decoding(streams: list[bytes], side: int, threads: int) -> None:
    """Decode each stream, reduced to `side`."""

    def share(first: int) -> None:
        out = np.empty((side, side, 3), np.uint8)
        for jpeg in streams[first::threads]:
            simplejpeg.decode_jpeg(jpeg, min_height=side, min_width=side, min_factor=1, buffer=out)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time a piece of work."""
    begun = clock()
    work()
    return clock() - begun


def measure(path: Path, kind: SlideKind, patch: str, rounds: int) -> list[str]:
    """Let both take turns; return a row of the table."""
    side, out = (px or kind.tile_px for px in PATCHES[patch])
    corners = boxes(kind.side_px, side, AREA_PX // side**2)
    job = Job(str(path), kind.name, corners, side, out)
    streams, _ = stored(job)
    reduced = kind.tile_px * out // side
    runs = {threads: ours(job, threads) for threads in (1, 2)}
    found: dict[str, list[float]] = {"speed": [], "limit": [], "ratio": [], "two": [], "limit two": []}
    for i in range(rounds + 1):
        cpu, wall = time.process_time, time.perf_counter
        one = [seconds(lambda: sum(1 for _ in runs[1]()), cpu), seconds(lambda: decoding(streams, reduced, 1), cpu)]
        walls = [
            seconds(work, wall)
            for threads in (1, 2)
            for work in (lambda t=threads: sum(1 for _ in runs[t]()), lambda t=threads: decoding(streams, reduced, t))
        ]
        if i == 0:  # memory is touched, and the file read
            continue
        found["speed"].append(len(corners) / one[0])
        found["limit"].append(len(corners) / one[1])
        found["ratio"].append(one[1] / one[0])
        found["two"].append(walls[0] / walls[2])
        found["limit two"].append(walls[1] / walls[3])
    cells = [f"{kind.tile_px} px, {kind.chroma}", patch]
    cells += [f"{np.median(found[name]):,.0f}" for name in ("speed", "limit")]
    for name in ("ratio", "two", "limit two"):
        cells.append(f"{np.median(found[name]):.2f} ({min(found[name]):.2f} to {max(found[name]):.2f})")
    return cells


def main() -> None:
    """Print a row for each kind of slide and patch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "wsi-bench")
    parser.add_argument("--side", type=int, default=40_000, help="side of the slides in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512], help="side of their tiles in pixels")
    parser.add_argument("--chroma", nargs="+", default=["420", "444"])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    keep_freed_memory()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("| stored tiles | patch | per CPU s | decoder | ratio | two threads over one | decoder's two over one |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for tile_px in asked.tiles:
        for chroma in asked.chroma:
            kind = SlideKind(asked.side, tile_px, chroma)
            path = cached(asked.cache, kind)
            for patch in PATCHES:
                if patch != "256 px" or tile_px != 256:
                    print("| " + " | ".join(measure(path, kind, patch, asked.rounds)) + " |", flush=True)


if __name__ == "__main__":
    main()
