"""A contact sheet: the tiles that spoke most for a class, and those that spoke most against it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from wsi.files import replacing
from wsi.grid import TileGrid
from wsi.slide import Slide

_SIDE, _GAP, _CAPTION, _LABEL = 112, 8, 34, 22


def save_sheet(
    path: str | os.PathLike[str],
    slide: Slide,
    grid: TileGrid,
    evidence: Mapping[str, npt.NDArray[np.floating]],
    *,
    columns: int = 8,
) -> None:
    """Write a PNG with two rows of tiles for each kind of evidence: the highest values, and the lowest.

    Tiles are as scanned. Under each stand its value and its top left corner in level-0 pixels. The same input gives
    the same bytes.

    Parameters
    ----------
    path : path
        Written beside and renamed, so it is whole or not there.
    slide : Slide
    grid : TileGrid
        n >= 1 tiles.
    evidence : mapping of name to (n,)
        A number a tile, as ``MilModel.evidence`` gives it; ties in the order of the tiles.
    columns : int
        Tiles in a row; fewer where there are fewer.

    Examples
    --------
    >>> save_sheet("tiles.png", slide, grid, model.evidence(grade))                     # doctest: +SKIP
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns, len(grid))
    row_h = _LABEL + _SIDE + _CAPTION
    width, height = _GAP + columns * (_SIDE + _GAP), _GAP + 2 * len(evidence) * row_h + _LABEL
    sheet = Image.new("RGB", (max(width, 360), height), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    y = _GAP
    for name, values in evidence.items():
        order = np.argsort(-values, kind="stable")
        for words, tiles in ((f"most: {name}", order[:columns]), (f"least: {name}", order[::-1][:columns])):
            draw.text((_GAP, y), words, "black", large)
            for i, tile in enumerate(tiles.tolist()):
                x, box = _GAP + i * (_SIDE + _GAP), grid.box(tile)
                rgb = slide.read(box, (_SIDE, _SIDE), damage=[])
                sheet.paste(Image.fromarray(rgb), (x, y + _LABEL))
                caption = f"{values[tile]:.3g}\n{box.x:.0f}, {box.y:.0f}"
                draw.multiline_text((x, y + _LABEL + _SIDE + 2), caption, "#404040", small, spacing=1)
            y += row_h
    draw.text((_GAP, y), "Research use only", "#606060", small)
    with replacing(path) as file:
        sheet.save(file, format="PNG")
