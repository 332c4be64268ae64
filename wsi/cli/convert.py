"""``wsi convert``: convert bags of features between the layouts of programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.display import say, writing
from wsi.cli.export import AsJson, Key, read_key, say_rows
from wsi.errors import TrainError, WsiError


def convert(
    bags: Annotated[list[Path], typer.Argument(help="Folders or files of features; `wsi check` identifies them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; must be new or empty.")],
    to: Annotated[str, typer.Option(help="clam, trident, stamp, torchmil or anndata.")],
    encoder: Annotated[
        str | None, typer.Option(help="Encoder of the features, if the files do not say; for stores: which to use.")
    ] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per level-0 pixel, if unknown.")] = None,
    tile_px: Annotated[int | None, typer.Option("--tile-px", help="Side of a tile in its own pixels.")] = None,
    tile_level0: Annotated[float | None, typer.Option(help="Side of a tile in level-0 pixels.")] = None,
    stride_level0: Annotated[
        float | None, typer.Option(help="Distance of tiles in level-0 pixels. Default: from the coordinates.")
    ] = None,
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Convert features of CLAM, TRIDENT, STAMP, torchmil, AnnData or our stores to the layout of another of these.

    If the new layout needs something the files do not contain, an error names the option to give. Of WSInfer's results
    only the coordinates are written, for CLAM and TRIDENT, to compute features at.

    Examples:
      wsi convert job --to torchmil -o bags

      wsi convert clam_results --to stamp --encoder uni --slide-mpp 0.25 --tile-px 256 -o for_stamp

      wsi convert bags --to clam --tile-level0 512 -o for_clam

      wsi convert job --to clam --pseudonymise key -o to_share
    """
    from wsi.export.convert import Given, convert_bags

    with writing(out):
        try:
            given = Given(encoder, slide_mpp, tile_px, tile_level0, stride_level0)
            rows = convert_bags(bags, out, to, given, key=read_key(pseudonymise))
        except WsiError:
            raise
        except ValueError as error:
            raise TrainError("wsi convert", str(error)) from error
    say_rows(rows, as_json)
    say(f"{len(rows)} slides: {out}")
