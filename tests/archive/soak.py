"""Kill runs at random moments, many times, and compare what they leave in the end byte for byte.

    python -m tests.archive.soak --kills 200        # make soak

One to three runs at once work on one results folder; at a random moment one of them, or its worker, or both are killed
(``SIGKILL``), or stopped for a while (``SIGSTOP``: a machine that sleeps). After a few kills a last run is let through.
The folder must then hold what an undisturbed run leaves, with every slide done once in the table, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.archive.make import write_slides
from tests.e2e.conftest import digest, rows

WORDS = ["--mpp", "1", "--tile", "32", "--stride", "12", "--pixels", "zstd", "-q"]


def start(slides: Path, out: Path) -> subprocess.Popen[bytes]:
    """Begin a run in a process group of its own."""
    command = [sys.executable, "-c", "from wsi.cli import main; main()", "tile", str(slides), *WORDS, "-o", str(out)]
    return subprocess.Popen(command, start_new_session=True)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Process numbers of a run's workers."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(rng: random.Random, process: subprocess.Popen[bytes]) -> str:
    """Kill a run, its worker, or all of it; or let it sleep for a moment."""
    how = rng.choice(["run", "worker", "both", "run", "sleep"])
    workers = children(process)
    try:
        if how == "sleep":
            os.killpg(process.pid, signal.SIGSTOP)
            return how
        if how in ("worker", "both"):
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        if how in ("run", "both"):
            os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return "nothing: it had ended"
    return how


def soak(kills: int, seed: int, folder: Path, n_slides: int = 2) -> dict[str, int]:
    """Disturb runs until there were `kills` of them; return how often in which way.

    Raises
    ------
    AssertionError
        Something was lost, double, or other than it should be.
    """
    rng = random.Random(seed)
    slides = folder / "slides"
    write_slides(slides, n_slides)
    begun = time.monotonic()
    assert start(slides, folder / "whole").wait() == 0
    lasts = time.monotonic() - begun
    expected = digest(folder / "whole")
    done: dict[str, int] = {}
    number = 0
    while sum(n for how, n in done.items() if not how.startswith("nothing")) < kills:
        out = folder / f"r{number}"
        number += 1
        for _ in range(rng.randrange(1, 5)):
            runs = [start(slides, out) for _ in range(rng.choice([1, 1, 2, 3]))]
            victim = rng.choice(runs)
            with suppress(subprocess.TimeoutExpired):
                victim.wait(timeout=rng.uniform(0, lasts * 1.2))
            how = disturb(rng, victim)
            done[how] = done.get(how, 0) + 1
            if how == "sleep":
                with suppress(subprocess.TimeoutExpired):
                    victim.wait(timeout=rng.uniform(0, lasts))
                os.killpg(victim.pid, signal.SIGCONT)
            for run in runs:
                run.wait()
        assert start(slides, out).wait() == 0, out
        left = digest(out)
        differ = sorted(name for name in {*left, *expected} if left.get(name) != expected.get(name))
        if differ:  # keep what there is to look at
            shutil.copytree(out, kept := Path(tempfile.mkdtemp()) / "results")
            raise AssertionError(f"{differ[:9]} in {kept}")
        assert not (out / ".claims").exists(), out
        table = [row["slide_id"] for row in rows(out / "slides.csv")]
        assert table == sorted({name.split("/")[0] for name in expected}), out
        assert rows(out / "failures.csv") == [], out
    return done


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        print(soak(chosen.kills, chosen.seed, Path(folder)), f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
