"""A contact sheet: the tiles with the most evidence for and against each class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wsi.files import replacing
from wsi.grid import TileGrid
from wsi.slide import Slide

U8 = npt.NDArray[np.uint8]
#: From patches as scanned, uint8 (b, px, px, 3), to a caption and a Grad-CAM map of each, float (b, px, px), >= 0.
Look = Callable[[U8], tuple[list[str], npt.NDArray[np.floating]]]

_SIDE, _GAP, _CAPTION, _LABEL = 112, 8, 34, 22


def save_sheet(
    path: str | os.PathLike[str],
    slide: Slide,
    grid: TileGrid,
    evidence: Mapping[str, npt.NDArray[np.floating]],
    *,
    columns: int = 8,
    look: Look | None = None,
) -> None:
    """Write a PNG with two rows of tiles for each kind of evidence: the highest values, and the lowest.

    Tiles are shown as scanned, with their value and their top left corner in level-0 pixels. With `look`, a further row
    shows the highest tiles under Grad-CAM, each on its own colour scale. The same input gives the same bytes.

    Parameters
    ----------
    path : path
        Written to a temporary file and renamed, so that it is complete or absent.
    grid : TileGrid
        n >= 1 tiles.
    evidence : mapping of name to (n,)
        A number a tile, as from ``MilModel.evidence``; ties keep the order of the tiles.
    columns : int
        Maximum number of tiles in a row.
    look : callable, optional
        See ``Look``.

    Examples
    --------
    >>> save_sheet("tiles.png", slide, grid, model.evidence(grade))                     # doctest: +SKIP
    """
    columns = min(columns, len(grid))
    row_h = _LABEL + _SIDE + _CAPTION
    rows = (2 if look is None else 3) * len(evidence)
    width, height = _GAP + columns * (_SIDE + _GAP), _GAP + rows * row_h + _LABEL
    sheet = Image.new("RGB", (max(width, 420), height), "white")
    draw, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    y = _GAP

    def add_row(title: str, tiles: list[int], captions: list[str], cams: Any = None) -> None:
        nonlocal y
        draw.text((_GAP, y), title, "black", large)
        for i, tile in enumerate(tiles):
            x = _GAP + i * (_SIDE + _GAP)
            picture = Image.fromarray(slide.read(grid.box(tile), (_SIDE, _SIDE), damage=[]))
            sheet.paste(picture if cams is None else _lit(picture, cams[i]), (x, y + _LABEL))
            draw.multiline_text((x, y + _LABEL + _SIDE + 2), captions[i], "#404040", small, spacing=1)
        y += row_h

    for name, values in evidence.items():
        order = np.argsort(-values, kind="stable")
        most, least = order[:columns].tolist(), order[::-1][:columns].tolist()
        add_row(f"most: {name}", most, _captions(grid, values, most))
        if look is not None:
            side = (grid.tile_px, grid.tile_px)
            captions, cams = look(np.stack([slide.read(grid.box(tile), side, damage=[]) for tile in most]))
            add_row(f"most: {name}, where the tile model looked (Grad-CAM)", most, captions, cams)
        add_row(f"least: {name}", least, _captions(grid, values, least))
    draw.text((_GAP, y), "below each tile: evidence; left, top in level-0 pixels. Research use only", "#606060", small)
    with replacing(path) as file:
        sheet.save(file, format="PNG")


def _captions(grid: TileGrid, values: npt.NDArray[np.floating], tiles: list[int]) -> list[str]:
    boxes = [grid.box(tile) for tile in tiles]
    return [f"{values[tile]:.3g}\n{box.x:.0f}, {box.y:.0f}" for tile, box in zip(tiles, boxes, strict=True)]


def _lit(picture: Image.Image, cam: npt.NDArray[np.floating]) -> Image.Image:
    """Overlay a non-negative map on a tile in viridis: transparent at 0, 60 % opaque at its maximum."""
    from matplotlib import colormaps

    scaled = Image.fromarray((cam / max(float(cam.max()), 1e-30)).astype(np.float32)).resize(picture.size)
    share = np.asarray(scaled).clip(0, 1)
    colour = np.array(colormaps["viridis"](share))[..., :3] * 255
    opacity = 0.6 * share[..., None]
    return Image.fromarray((np.asarray(picture) * (1 - opacity) + colour * opacity).round().astype(np.uint8))
