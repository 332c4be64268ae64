"""``wsi convert``: bags of features from one program's layout to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.display import say, writing
from wsi.cli.export import AsJson, Key, read_key, say_rows
from wsi.errors import TrainError, WsiError


def convert(
    bags: Annotated[list[Path], typer.Argument(help="Folders or files of features; `wsi check` says what they are.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; made, and must hold nothing.")],
    to: Annotated[str, typer.Option(help="clam, trident, stamp, torchmil or anndata.")],
    encoder: Annotated[
        str | None, typer.Option(help="What made the features, where the files do not say; of stores: which.")
    ] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per level-0 pixel, where unknown.")] = None,
    tile_px: Annotated[int | None, typer.Option("--tile-px", help="Pixels that a tile was cut with.")] = None,
    tile_level0: Annotated[float | None, typer.Option(help="Side of a tile in level-0 pixels.")] = None,
    stride_level0: Annotated[
        float | None, typer.Option(help="Distance of tiles in level-0 pixels. Default: as they lie.")
    ] = None,
    pseudonymise: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write features of CLAM, TRIDENT, STAMP, torchmil, AnnData or our stores in the layout of another of these.

    What the files do not say and the other layout needs is asked for. Of WSInfer's results CLAM and TRIDENT get the
    coordinates, to compute features at.

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
