"""Patches read a second: wsi beside OpenSlide, tiffslide, cuCIM and others, and the JPEG decoder's own limit.

    make bench-peers                                             # everything, in .venv-peers
    .venv-peers/bin/python benchmarks/compare/read.py --boxes 5000 --rounds 5 --json

Each program reads the same boxes of tissue, in order, from a warm page cache, in processes of its own: one bound to
one core (patches per second of CPU time), then one for each core (by the wall; wsi: one process, a thread a core).
Programs take turns and the best of several rounds counts, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from measure import bind, cores, machine, peak_mib, print_table, reason_of, versions
from readers import PROGRAMS, Job

Result = dict[str, Any]

PATIENCE_S = 300  # for the others of a program to come as far
SAMPLES = 8  # patches compared
_barrier: Barrier


def boxes(side_px: int, box_px: int, at_most: int) -> tuple[tuple[int, int], ...]:
    """Lay a lattice of boxes and return the corners of those whose centre is tissue, `at_most` from 30 % down."""
    from slides import in_tissue

    corner = np.arange(side_px // box_px) * box_px
    ys, xs = np.nonzero(in_tissue(side_px, corner[None, :] + box_px / 2, corner[:, None] + box_px / 2))
    chosen = np.flatnonzero(corner[ys] >= 0.3 * side_px)[:at_most]
    return tuple(zip((xs[chosen] * box_px).tolist(), (ys[chosen] * box_px).tolist(), strict=True))


def work(name: str, job: Job, share: int, of: int) -> Result | None:
    """Do a share of a job in this process; together with the others, of whom each has another share."""
    program = PROGRAMS[name]
    threads = of if program.threads else 1
    if program.threads and share > 0:
        return None  # the first one does it all
    if threads == 1:
        bind(cores()[share])
    part = np.array_split(np.arange(len(job.corners)), 1 if program.threads else of)[share]
    mine = dataclasses.replace(job, corners=tuple(job.corners[i] for i in part))
    result: Result = {}
    try:
        few = program.prepare(dataclasses.replace(mine, corners=mine.corners[:SAMPLES]), threads)
        result["samples"] = np.stack([patch.copy() for patch in few()])  # and what is done once is done
        run = program.prepare(mine, threads)
    except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
        result["reason"] = reason_of(error)
    if not program.threads:
        _barrier.wait(PATIENCE_S)  # whatever happened: the others wait too
    if "reason" not in result:
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in run():
                pass
            result |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        except Exception as error:  # noqa: BLE001  # likewise
            result["reason"] = reason_of(error)
    return result | {"peak_mib": peak_mib()}


def start(barrier: Barrier) -> None:
    """Remember where the processes of a program wait for each other."""
    global _barrier
    _barrier = barrier


def measured(name: str, job: Job, n: int) -> Result:
    """Let `n` new processes do a job, and add up what they say."""
    context = multiprocessing.get_context("spawn")  # nothing of one program is in the memory of another
    barrier = context.Barrier(n)
    try:
        with ProcessPoolExecutor(n, context, start, (barrier,)) as pool:
            futures = [pool.submit(work, name, job, share, n) for share in range(n)]
            parts = [part for part in (future.result() for future in futures) if part]
    except Exception as error:  # noqa: BLE001  # such as a process that died
        return {"reason": reason_of(error)}
    failed = [{"reason": part["reason"]} for part in parts if "reason" in part]
    return (failed or [parts[0]])[0] | {
        "cpu_s": sum(part.get("cpu_s", 0) for part in parts),
        "wall_s": max(part.get("wall_s", 0) for part in parts),
    }


def row_of(name: str, job: Job, rounds: list[tuple[Result, Result]], reference: Any) -> Result:
    """Make the table's row of a program and a job."""
    row: Result = {"slide": job.slide, "patch": f"{job.side_px} to {job.out_px} px", "program": name}
    fine = [(one, many) for one, many in rounds if "reason" not in one and "reason" not in many]
    if not fine:
        return row | {"reason": next(r["reason"] for pair in rounds for r in pair if "reason" in r)}
    row["per_cpu_second"] = len(job.corners) / min(one["cpu_s"] for one, _ in fine)
    row["per_second_all_cores"] = len(job.corners) / min(many["wall_s"] for _, many in fine)
    row["peak_mib"] = fine[0][0]["peak_mib"]
    samples = fine[0][0]["samples"]
    if PROGRAMS[name].patches and reference is not None:
        apart = np.abs(samples.astype(int) - reference) if samples.shape == reference.shape else np.array([255])
        row |= {"grey_levels_from_wsi_mean": float(apart.mean()), "grey_levels_from_wsi_max": int(apart.max())}
    return row


def main() -> None:
    """Make the slides, let the programs take turns, print a row for each program and job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "wsi-bench")
    parser.add_argument("--side", type=int, default=40_000, help="side of the slides in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 512], help="side of their tiles in pixels")
    parser.add_argument("--chroma", nargs="+", default=["420", "444"])
    parser.add_argument(
        "--boxes", type=int, default=300, help="boxes of 448 px at most, 3 times as many of 256 (and as much of tiles)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()

    from slides import SlideKind, cached  # not above: what the processes import is part of their memory

    jobs = []
    for tile_px in options.tiles:
        for chroma in options.chroma:
            kind = SlideKind(options.side, tile_px, chroma)
            path = cached(options.cache, kind)
            with path.open("rb") as file:  # into the page cache
                while file.read(1 << 20):
                    pass
            whole = () if tile_px == 256 else ((tile_px, tile_px, 3 * options.boxes * 256**2 // tile_px**2),)
            for side, out, n_boxes in (*whole, (256, 256, 3 * options.boxes), (448, 224, options.boxes)):  # one area
                jobs.append(Job(str(path), kind.name, boxes(options.side, side, n_boxes), side, out))

    n = len(cores())
    rounds: dict[str, list[list[tuple[Result, Result]]]] = {name: [] for name in options.programs}
    for i in range(options.rounds):
        for name, of_rounds in rounds.items():
            print(f"round {i + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            of_rounds.append([])
            for job in jobs:  # in processes of its own: the next one reads the same tissue, and some keep all they saw
                one = measured(name, job, 1)
                of_rounds[-1].append((one, measured(name, job, n) if n > 1 else one))

    rows = []
    for j, job in enumerate(jobs):
        reference = rounds["wsi"][0][j][0].get("samples") if "wsi" in rounds else None
        for name, of_rounds in rounds.items():
            if job.side_px >= PROGRAMS[name].reduces * job.out_px:
                rows.append(row_of(name, job, [results[j] for results in of_rounds], reference))
    facts = {
        **machine(),
        **versions(p.package for p in PROGRAMS.values()),
        "boxes": f"{options.boxes} of 448 px, {3 * options.boxes} of 256",
    }
    if options.json:
        print(json.dumps({"facts": facts, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = {
        "slide": "slide", "patch": "patch", "program": "program", "per_cpu_second": "per CPU s",
        "per_second_all_cores": f"per s, {n} cores", "peak_mib": "peak MiB",
        "grey_levels_from_wsi_mean": "from wsi, mean", "grey_levels_from_wsi_max": "max",
    }  # fmt: skip
    print_table(columns, rows)


if __name__ == "__main__":
    main()
