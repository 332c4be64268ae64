"""``wsi score``: score slides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wsi.cli import archive
from wsi.cli.display import conclude, watching


def score(
    slides: archive.Slides,
    model: Annotated[str, typer.Option("--model", "-m", help="Patch model: a name, a folder, or hf-hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Results folder; the same command again resumes.")],
    mil: Annotated[
        str | None,
        typer.Option(help="MIL head: a name, a folder, or 'none'. Default: the one in the model's folder."),
    ] = None,
    slide_mpp: archive.GivenMpp = None,
    stride: Annotated[
        int | None, typer.Option(help="Distance between tiles in pixels at the model's mpp. Default: side by side.")
    ] = None,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Minimum share of tissue in a tile; 0: all.")] = 0.25,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Probability from which a tile is positive. Default: the model's."),
    ] = None,
    positive: Annotated[
        list[str] | None, typer.Option(help="Positive class (repeatable). Default: the model's.")
    ] = None,
    pixels: Annotated[
        str,
        typer.Option(help="Patches to store: none, zstd (lossless), jpeg, or verbatim (the slide's own JPEG tiles)."),
    ] = "none",
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the tissue that may be unreadable; with more the slide fails.")
    ] = 0.01,
    stain: Annotated[
        str | None, typer.Option(help="Stain normalisation before the model: macenko, vahadane, ruifrok or reinhard.")
    ] = None,
    stain_target: Annotated[
        str, typer.Option(help="Target of stain normalisation: veta, another packaged name, or an image file.")
    ] = "veta",
    context: Annotated[bool, typer.Option(help="Smooth over neighbouring tiles, if the model gives a range.")] = True,
    explain: Annotated[
        bool,
        typer.Option(help="Write explained.png: Grad-CAM of the top tiles, also for slides already scored."),
    ] = False,
    keep_pen: archive.KeepPen = False,
    reader: archive.Reader = "auto",
    decode: archive.Decode = "auto",
    device: archive.Device = "auto",
    precision: archive.Precision = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Patches per forward pass.")] = 64,
    threads: archive.Threads = None,
    torchscript: Annotated[bool, typer.Option(help="Allow TorchScript weights, which can execute code.")] = False,
    workers: archive.Workers = None,
    scheduler: archive.Scheduler = None,
    order: archive.Order = "given",
    slide_timeout: archive.SlideTimeout = None,
    max_memory: archive.MaxMemory = None,
    cache_dir: archive.CacheDir = None,
    cache_size: archive.CacheSize = "100GB",
    log_json: archive.LogJson = None,
    force: Annotated[bool, typer.Option(help="Delete earlier results of these slides and start over.")] = False,
    quiet: archive.Quiet = False,
    as_json: archive.AsJson = False,
) -> None:
    """Score slides: a grade per slide, a probability per tile, QuPath GeoJSON and a heatmap. Research use only.

    Examples:
      wsi score slide.svs --model idc-breast -o results

      wsi score archive/ extra.csv --model idc-breast --slide-mpp 0.25 -o results

      wsi score slide.svs --model hf-hub:OWNER/NAME --positive tumor -o results

      wsi score trichrome.svs --model FOLDER --keep-pen -o results

      wsi score "archive/**/*.svs" --model idc-breast -o results --slide-timeout 3600 --max-memory 8GB
    """
    from wsi.archive import default_threads, find_slides, score_archive
    from wsi.engine import EngineConfig, ScoreConfig
    from wsi.tissue import TissueConfig

    refs = find_slides(slides, slide_mpp)
    engine = EngineConfig(
        model, mil, device=device, precision=precision, torchscript=torchscript, batch_size=batch_size,
        threads=threads or default_threads(),
    )  # fmt: skip
    config = ScoreConfig(
        positive=tuple(positive or ()),
        threshold=threshold,
        stride_px=stride,
        min_tissue=min_tissue,
        pixels=pixels,
        max_unreadable=max_unreadable,
        reader=reader,
        decode=decode,
        tissue=TissueConfig(exclude_pen=not keep_pen),
        stain=stain,
        stain_target=stain_target,
        context=context,
        explain=explain,
    )
    with watching(len(refs), quiet=quiet, log=log_json) as tell:
        summary = score_archive(
            refs, out, engine, config, workers=workers, scheduler=scheduler,
            limits=archive.limits(slide_timeout, max_memory), order=order, cache=archive.cache(cache_dir, cache_size),
            force=force, command=sys.argv, tell=tell,
        )  # fmt: skip
    conclude(summary, len(refs), out, as_json=as_json, quiet=quiet, verb="scored")
