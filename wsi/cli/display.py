"""Progress and lines for people, on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from wsi.archive import Summary


class Watcher:
    """What a run tells the terminal; silent by default."""

    def started(self, i: int, slide_id: str) -> None:
        """A slide begins."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """A stage of it went on."""


@contextmanager
def watching(n_slides: int, *, quiet: bool) -> Iterator[Watcher]:
    """Show a bar for slides and one for the tiles of the present slide; end well on Ctrl-C."""
    try:
        if quiet:
            yield Watcher()
        else:
            with _bars(n_slides) as watcher:
                yield watcher
    except KeyboardInterrupt:
        say("wsi: stopped; the same command goes on from here")
        raise typer.Exit(130) from None


@contextmanager
def _bars(n_slides: int) -> Iterator[Watcher]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    with bars:
        slides = bars.add_task("slides", total=n_slides, stage="")
        tiles = bars.add_task("", total=None, stage="")

        class Live(Watcher):
            def started(self, i: int, slide_id: str) -> None:
                bars.update(slides, completed=i)
                bars.reset(tiles, description=slide_id[:40], total=None, stage="open")

            def progress(self, stage: str, done: int, total: int) -> None:
                bars.update(tiles, completed=done, total=total or None, stage=stage)

        yield Live()


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line for people."""
    if not quiet:
        print(text, file=sys.stderr)


def conclude(summary: Summary, n_slides: int, out: Path, *, as_json: bool, quiet: bool, verb: str) -> None:
    """Tell what became of a run's slides; exit 3 where some failed, 2 where all did."""
    if as_json:
        print(json.dumps({verb: summary.done, "failed": summary.failed}, indent=2))
    for row in summary.failed:
        where = "" if row["slide"] in row["error"] else f"{row['slide']}: "
        say(f"wsi: {where}{row['error']} [{row['stage']}]. {row['remedy']}")
    say(f"{len(summary.done)} of {n_slides} slides {verb}: {out / 'slides.csv'}", quiet=quiet)
    if summary.failed:
        say(f"{len(summary.failed)} failed: {out / 'failures.csv'}", quiet=quiet)
        raise typer.Exit(3 if summary.done else 2)
