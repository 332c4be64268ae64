"""``wsi tile``: cut slides into patch stores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wsi.cli import archive
from wsi.cli.display import conclude, watching


def tile(
    slides: archive.Slides,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the stores; the same command again resumes.")],
    mpp: Annotated[float | None, typer.Option(help="Microns per patch pixel. Default: 0.5, or the level's.")] = None,
    level: Annotated[
        int | None,
        typer.Option(min=0, help="Cut the pixels of this pyramid level, without resampling. Default with verbatim: 0."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch in pixels. Default: 256, or that of the level's tiles.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Distance of patches in pixels. Default: --tile.")] = None,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Minimum share of tissue in a patch; 0: all.")] = 0.25,
    pixels: Annotated[
        str,
        typer.Option(
            help="verbatim (the slide's own JPEG tiles, copied), jpeg (quality 90), zstd (lossless), or none (the grid "
            "alone)."
        ),
    ] = "jpeg",
    slide_mpp: archive.GivenMpp = None,
    keep_pen: archive.KeepPen = False,
    reader: archive.Reader = "auto",
    decode: archive.Decode = "auto",
    threads: archive.Threads = None,
    workers: archive.Workers = None,
    scheduler: archive.Scheduler = None,
    order: archive.Order = "given",
    slide_timeout: archive.SlideTimeout = None,
    max_memory: archive.MaxMemory = None,
    cache_dir: archive.CacheDir = None,
    cache_size: archive.CacheSize = "100GB",
    log_json: archive.LogJson = None,
    force: Annotated[bool, typer.Option(help="Delete earlier stores of these slides and start over.")] = False,
    quiet: archive.Quiet = False,
    as_json: archive.AsJson = False,
) -> None:
    """Cut slides into patch stores, one Zarr group per slide, for training and for other programs.

    Examples:
      wsi tile slides/ --mpp 0.5 --tile 256 -o stores

      wsi tile slides/ --pixels verbatim -o stores

      wsi tile slide.svs --level 1 --min-tissue 0.5 --pixels zstd -o stores

      wsi tile trichrome/ --keep-pen -o stores
    """
    from wsi.archive import find_slides, tile_archive
    from wsi.tile import TileConfig
    from wsi.tissue import TissueConfig

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
        tissue=TissueConfig(exclude_pen=not keep_pen),
    )
    with watching(len(refs), quiet=quiet, log=log_json) as tell:
        summary = tile_archive(
            refs, out, config, threads=threads, workers=workers, scheduler=scheduler,
            limits=archive.limits(slide_timeout, max_memory), order=order, cache=archive.cache(cache_dir, cache_size),
            force=force, command=sys.argv, tell=tell,
        )  # fmt: skip
    conclude(summary, len(refs), out, as_json=as_json, quiet=quiet, verb="tiled")
