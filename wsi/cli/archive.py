"""Options shared by the commands that process many slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsi.errors import WsiError

if TYPE_CHECKING:
    from wsi.archive import Cache, Limits

Slides = Annotated[
    list[str],
    typer.Argument(
        help="Slides, folders, URLs, quoted patterns, CSV manifests (columns slide[,mpp,mask,label,patient])."
    ),
]
GivenMpp = Annotated[
    float | None,
    typer.Option(min=0.05, max=20, help="Microns per level-0 pixel of all these slides; overrides the files' values."),
]
Reader = Annotated[str, typer.Option(help="auto, tiff, openslide or tiffslide.")]
Decode = Annotated[str, typer.Option(help="JPEG at half resolution and below: auto, full (slow), fast (less exact).")]
KeepPen = Annotated[
    bool,
    typer.Option("--keep-pen", help="Do not exclude marker ink from the tissue: for blue or green stains (trichrome)."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Reader threads. Default: one per core.")]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Worker processes. Default: one per GPU, or one. 0: none; a crash then ends the run."),
]
Scheduler = Annotated[str | None, typer.Option(help="Use Dask: tcp://host:8786, or local (needs wsi's extra cluster).")]
Order = Annotated[str, typer.Option(help="given; size: largest first; triage (wsi score): likely positive first.")]
SlideTimeout = Annotated[float | None, typer.Option(min=1, help="Seconds per slide; one that takes longer fails.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory limit per worker, such as 8GB; a slide that needs more fails."),
]
CacheDir = Annotated[Path | None, typer.Option(help="Copy slides here before processing, two ahead: for slow storage.")]
CacheSize = Annotated[str, typer.Option(help="Total size of the copies in --cache-dir, such as 100GB.")]
LogJson = Annotated[Path | None, typer.Option(help="Append events to this file, a JSON object per line; - is stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")]


def limits(seconds: float | None, memory: str | None) -> Limits:
    """Return the limits of time and memory per slide."""
    from wsi.archive import Limits

    return Limits(seconds, None if memory is None else bytes_of(memory, "--max-memory"))


def cache(folder: Path | None, size: str) -> Cache | None:
    """Return the cache that slides are copied to."""
    from wsi.archive import Cache

    return None if folder is None else Cache(folder, bytes_of(size, "--cache-size"))


def bytes_of(text: str, option: str) -> int:
    """Read an option's number of bytes such as 8GB, 500M or 2GiB.

    Examples
    --------
    >>> [bytes_of(text, "--max-memory") for text in ("8GB", "1.5 GiB", "100")]
    [8000000000, 1610612736, 100]
    """
    from dask.utils import parse_bytes

    try:
        n = int(parse_bytes(text))
    except (ValueError, OverflowError):
        n = -1
    if n < 0:
        raise WsiError(f"{option}={text!r}", "is no number of bytes", "Write for example 8GB or 500MB")
    return n
