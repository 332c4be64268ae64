"""Progress and lines for people, on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wsi.errors import OutputError

if TYPE_CHECKING:
    from wsi.archive import Event, Summary
    from wsi.archive.workers import Tell


@contextmanager
def watching(n_slides: int, *, quiet: bool, log: Path | None = None) -> Iterator[Tell]:
    """Show a bar for slides and one for each that is worked on, and log; end well on Ctrl-C."""
    with ExitStack() as stack:
        told: list[Tell] = []
        if log is not None:
            told.append(stack.enter_context(_logging(log, n_slides)))
        if not quiet:
            told.append(stack.enter_context(_bars(n_slides)))

        def tell(event: Event) -> None:
            for each in told:
                each(event)

        try:
            yield tell
        except KeyboardInterrupt:
            stack.close()
            say("wsi: stopped; the same command goes on from here")
            raise typer.Exit(130) from None


@contextmanager
def _logging(path: Path, n_slides: int) -> Iterator[Tell]:
    try:
        file = sys.stdout if str(path) == "-" else path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError.of(error, path) from error

    def tell(event: Event) -> None:
        said: dict[str, Any] = {"time": round(time.time(), 3), "slides": n_slides}
        print(json.dumps(said | {key: value for key, value in asdict(event).items() if value}), file=file, flush=True)

    with ExitStack() as stack:
        if file is not sys.stdout:
            stack.enter_context(file)
        yield tell


@contextmanager
def _bars(n_slides: int) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log file has no use for bars
    )
    slides = bars.add_task("slides", total=n_slides, stage="")
    running: dict[str, TaskID] = {}
    first: dict[str, int] = {}  # tiles that an earlier run had done
    tiles: dict[str, int] = {}
    failed, begun = 0, time.monotonic()

    def tell(event: Event) -> None:
        nonlocal failed
        name = event.slide_id
        if event.kind in ("begin", "stage"):
            if name not in running:
                running[name] = bars.add_task(name[:40], total=None, stage="open")
            if event.kind == "stage":
                bars.update(running[name], completed=event.done, total=event.total or None, stage=event.stage)
            if event.stage == "tiles":
                tiles[name] = event.done - first.setdefault(name, event.done)
        else:
            if name in running:
                bars.remove_task(running.pop(name))
            failed += event.kind == "failed"
            bars.advance(slides, event.kind != "lost")
        rate = sum(tiles.values()) / max(time.monotonic() - begun, 1e-9)
        said = [f"{rate:,.0f} tiles/s"] if rate >= 1 else []
        bars.update(slides, stage=", ".join([*said, *([f"{failed} failed"] if failed else [])]))

    with bars:
        yield tell


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line for people."""
    if not quiet:
        print(text, file=sys.stderr)


def conclude(summary: Summary, n_slides: int, out: Path, *, as_json: bool, quiet: bool, verb: str) -> None:
    """Tell what became of a run's slides; exit 3 where some failed, 2 where all did."""
    if as_json:
        print(json.dumps({verb: summary.done, "failed": summary.failed}, indent=2))
    for row in summary.failed:
        where = "" if Path(row["slide"]).name in row["error"] else f"{row['slide']}: "
        say(f"wsi: {where}{row['error']} [{row['stage']}]. {row['remedy']}")
    say(f"{len(summary.done)} of {n_slides} slides {verb}: {out / 'slides.csv'}", quiet=quiet)
    if flagged := [row["slide_id"] for row in summary.done if row["flags"]]:
        say(f"{len(flagged)} of them flagged, see its column flags: {', '.join(flagged[:3])}", quiet=quiet)
    if shares := _shares(summary.done):
        say(f"time: {shares}", quiet=quiet)
    if summary.failed:
        say(f"{len(summary.failed)} failed: {out / 'failures.csv'}", quiet=quiet)
        raise typer.Exit(3 if summary.done else 2)


def _shares(rows: list[dict[str, Any]]) -> str:
    """What the workers' time went into; of the tiles, what they waited for.

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
    parts = [
        f"{words.get(name, name[6:])} {spent[name] / total:.0%}" for name in inside if spent[name] >= 0.005 * total
    ]
    said = []
    for name in sorted((name for name in spent if not name.startswith("tiles_")), key=lambda name: -spent[name]):
        if spent[name] >= 0.01 * total:
            said.append(
                f"{name} {spent[name] / total:.0%}" + (f" ({', '.join(parts)})" if name == "tiles" and parts else "")
            )
    return ", ".join(said).replace("%", " %")
