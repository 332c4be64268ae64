"""Progress and messages on stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wsi.errors import OutputError, WsiError

if TYPE_CHECKING:
    from wsi.archive import Event, Summary
    from wsi.archive.workers import Tell


@contextmanager
def watching(n_slides: int, *, quiet: bool, log: Path | None = None) -> Iterator[Tell]:
    """Show progress bars of the run and its slides, write the log, and exit cleanly on Ctrl-C and SIGTERM."""
    with ExitStack() as stack:
        listeners: list[Tell] = []
        if log is not None:
            listeners.append(stack.enter_context(_logging(log, n_slides)))
        if not quiet:
            listeners.append(stack.enter_context(_bars(n_slides)))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        then = signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # clusters end jobs with SIGTERM; handle it like Ctrl-C
        try:
            yield tell
        except KeyboardInterrupt:
            stack.close()
            say("wsi: stopped; the same command goes on from here")
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, then)


@contextmanager
def _logging(path: Path, n_slides: int) -> Iterator[Tell]:
    with ExitStack() as stack:
        with writing(path):
            file = sys.stdout.buffer if str(path) == "-" else stack.enter_context(path.open("ab", buffering=0))

        def tell(event: Event) -> None:
            line: dict[str, Any] = {"time": round(time.time(), 3), "slides": n_slides}
            line |= {key: value for key, value in asdict(event).items() if value}
            with writing(path):  # so that an error names the log, not the results folder
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()

        yield tell


@contextmanager
def _bars(n_slides: int) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False),  # a slide's name may contain [brackets]
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # no bars in a log file
    )
    slides = bars.add_task("slides", total=n_slides, stage="loading")
    running: dict[str, TaskID] = {}
    pace = Pace(n_slides)

    def tell(event: Event) -> None:
        name = event.slide_id
        if event.kind in ("begin", "stage"):
            if name not in running:
                running[name] = bars.add_task(name[:40], total=None, stage="open")
            if event.stage:
                bars.update(running[name], stage=event.stage)
            if event.total:
                bars.update(running[name], completed=event.done, total=event.total)
        elif name in running:
            bars.remove_task(running.pop(name))
        bars.update(slides, stage=pace.tell(event), completed=pace.ended)

    with bars:
        yield tell


class Pace:
    """Speed and remaining time of a run, measured since its first slide began.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds.
    """

    def __init__(self, n_slides: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._left, self._clock = n_slides, clock
        self._begun: float | None = None
        self._tiles = self._worked = self._failed = self.ended = 0
        self._running: dict[str, tuple[int, int, int]] = {}  # tiles done by an earlier run, done now, in all

    def tell(self, event: Event) -> str:
        """Record an event; return speed, failures and remaining time as text."""
        if event.kind == "begin" and self._begun is None:
            self._begun = self._clock()
        if event.total:
            first = self._running.get(event.slide_id, (event.done,))[0]
            self._running[event.slide_id] = first, event.done, event.total
        if event.kind not in ("begin", "stage"):
            first, done, _ = self._running.pop(event.slide_id, (0, 0, 0))
            self._tiles += done - first
        if event.kind in ("done", "failed"):
            self.ended += 1
            self._left -= 1
            self._failed += event.kind == "failed"
            self._worked += self._begun is not None
        passed = 0.0 if self._begun is None else self._clock() - self._begun
        rate = (self._tiles + sum(done - first for first, done, _ in self._running.values())) / max(passed, 1e-9)
        parts = sum((done - first) / total for first, done, total in self._running.values())
        words = [f"{rate:,.0f} tiles/s"] if passed and rate >= 1 else []
        words += [f"{self._failed} failed"] if self._failed else []
        if passed and self._worked + parts >= 0.1 and self._left:
            left = timedelta(seconds=round(passed / (self._worked + parts) * max(0.0, self._left - parts)))
            words.append(f"{left} left")
        return ", ".join(words)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an ``OSError`` into an error that names `out`."""
    try:
        yield
    except WsiError:
        raise
    except OSError as error:
        raise OutputError.of(error, out) from error


def say(text: str, *, quiet: bool = False) -> None:
    """Print a message on stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def conclude(summary: Summary, n_slides: int, out: Path, *, as_json: bool, quiet: bool, verb: str) -> None:
    """Print the outcome of a run; exit 3 if some slides failed, 2 if all did."""
    if as_json:
        print(json.dumps({verb: summary.done, "failed": summary.failed}, indent=2))
    for row in summary.failed:
        where = "" if Path(row["slide"]).name in row["error"] else f"{row['slide']}: "
        say(f"wsi: {where}{row['error']} [{row['stage']}]. {row['remedy']}")
    say(f"{len(summary.done)} of {n_slides} slides {verb}: {out / 'slides.csv'}", quiet=quiet)
    if flagged := [row["slide_id"] for row in summary.done if row["flags"]]:
        say(f"{len(flagged)} of them flagged, see column flags in that table: {', '.join(flagged[:3])}", quiet=quiet)
    if shares := _shares(summary.done):
        say(f"time: {shares}", quiet=quiet)
    if summary.failed:
        say(f"{len(summary.failed)} failed: {out / 'failures.csv'}", quiet=quiet)
        raise typer.Exit(3 if summary.done else 2)


def _shares(rows: list[dict[str, Any]]) -> str:
    """The shares of the workers' time by stage, and within the stage of tiles by what it waited for.

    Examples
    --------
    >>> _shares([{"seconds_tissue": 1.0, "seconds_tiles": 3.0, "seconds_tiles_waiting": 2.0}])
    'tiles 75 % (waiting for patches 50 %), tissue 25 %'
    """
    spent: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds_") and not name.startswith("seconds_threads_"):
                spent[name.removeprefix("seconds_")] += value or 0.0
    total = sum(value for name, value in spent.items() if not name.startswith("tiles_"))
    if not total:
        return ""
    words = {"tiles_waiting": "waiting for patches"}
    inside = sorted((name for name in spent if name.startswith("tiles_")), key=lambda name: -spent[name])
    shown = [name for name in inside if spent[name] >= 0.005 * total]
    parts = [f"{words.get(name, name[6:])} {spent[name] / total:.0%}" for name in shown]
    shares = []
    for name in sorted((name for name in spent if not name.startswith("tiles_")), key=lambda name: -spent[name]):
        if spent[name] >= 0.01 * total:
            details = f" ({', '.join(parts)})" if name == "tiles" and parts else ""
            shares.append(f"{name} {spent[name] / total:.0%}{details}")
    return ", ".join(shares).replace("%", " %")
