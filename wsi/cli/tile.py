"""``wsi tile``: patch stores alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.archive import (
    CacheDir,
    CacheSize,
    LogJson,
    MaxMemory,
    Order,
    Scheduler,
    Slides,
    SlideTimeout,
    Workers,
    cache,
    limits,
)  # fmt: skip
from wsi.cli.display import conclude, watching


def tile(
    slides: Slides,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the stores; the same command again resumes.")],
    mpp: Annotated[
        float | None,
        typer.Option(help="Microns per pixel of the patches. Default: 0.5, or the level's own."),
    ] = None,
    level: Annotated[
        int | None,
        typer.Option(min=0, help="Patches are pixels of this pyramid level, not resampled. Default with verbatim: 0."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch in pixels. Default: 256, or that of the level's tiles.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Distance between patches in their pixels. Default: side by side.")
    ] = None,
    min_tissue: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a patch that is tissue; 0 keeps all.")
    ] = 0.25,
    pixels: Annotated[
        str,
        typer.Option(
            help="verbatim (the slide's own JPEG tiles, copied), jpeg (quality 90), zstd (lossless), or none (the grid "
            "alone)."
        ),
    ] = "jpeg",
    slide_mpp: Annotated[
        float | None,
        typer.Option(min=0.05, max=20, help="Microns per level-0 pixel of all these slides, overriding what they say."),
    ] = None,
    reader: Annotated[str, typer.Option(help="auto, tiff, openslide or tiffslide.")] = "auto",
    decode: Annotated[
        str, typer.Option(help="JPEG at half resolution and below: auto, full (slow), or fast (less exact).")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Reader threads. Default: one a core.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    order: Order = "given",
    slide_timeout: SlideTimeout = None,
    max_memory: MaxMemory = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = "100GB",
    log_json: LogJson = None,
    force: Annotated[bool, typer.Option(help="Throw away earlier stores of these slides and start over.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")] = False,
) -> None:
    """Cut slides into patch stores, one a slide: Zarr groups for training and for other programs.

    Examples:
      wsi tile slides/ --mpp 0.5 --tile 256 -o stores

      wsi tile slides/ --pixels verbatim -o stores

      wsi tile slide.svs --level 1 --min-tissue 0.5 --pixels zstd -o stores
    """
    from wsi.archive import find_slides, tile_archive
    from wsi.tile import TileConfig

    refs = find_slides(slides, slide_mpp)
    config = TileConfig(
        mpp=mpp,
        level=level,
        tile_px=tile,
        stride_px=stride,
        min_tissue=min_tissue,
        pixels=pixels,
        reader=reader,
        decode=decode,
    )
    with watching(len(refs), quiet=quiet, log=log_json) as tell:
        summary = tile_archive(
            refs, out, config, threads=threads, workers=workers, scheduler=scheduler,
            limits=limits(slide_timeout, max_memory), order=order, cache=cache(cache_dir, cache_size),
            force=force, command=sys.argv, tell=tell,
        )  # fmt: skip
    conclude(summary, len(refs), out, as_json=as_json, quiet=quiet, verb="tiled")
