"""Progress and lines for people, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


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
