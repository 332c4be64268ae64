"""Progress and tables on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Watcher:
    """What a run tells the terminal; silent by default."""

    def started(self, i: int, slide_id: str) -> None:
        """A slide begins."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """A stage of it went on."""


@contextmanager
def watching(n_slides: int, *, quiet: bool) -> Iterator[Watcher]:
    """Show a bar for slides and one for the tiles of the present slide."""
    if quiet:
        yield Watcher()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
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
