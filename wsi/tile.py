"""One slide into a patch store: which patches, and how they are kept. No model is involved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsi import __version__
from wsi.errors import GridError
from wsi.export.objects import tissue_regions
from wsi.export.qupath import write_regions
from wsi.files import sha256_of
from wsi.grid import TileGrid
from wsi.heatmap import overlay_bytes, save_overlay
from wsi.result import Clock, Laps, Progress, SlideResult, rounded, write_result
from wsi.slide import Slide, absolute, check_reading, facts_of, identity_of, open_slide, resolution_warnings
from wsi.store import PatchStore, check_kind, copy_tiles, pixel_bytes, stored_tiles
from wsi.tiling import stream
from wsi.tissue import TissueConfig, TissueMask, tissue_of

#: Used where neither a resolution nor a level is asked for, and the slide has no stored tiles to match.
DEFAULT_MPP, DEFAULT_TILE_PX = 0.5, 256


@dataclass(frozen=True)
class TileConfig:
    """What decides the patches: the same values on the same slide give the same bytes.

    Attributes
    ----------
    mpp : float, optional
        Microns per pixel of the patches; None for the level's own, or 0.5 where no level is named.
    level : int, optional
        Pyramid level whose pixels are taken without resampling; None is 0 with verbatim pixels and no `mpp`.
    tile_px : int, optional
        Side of a patch; None for that of the level's stored tiles where it is known, else 256.
    stride_px : int, optional
        Distance between patches in their own pixels; None for side by side.
    min_tissue : float
        Share of a patch's area that must be tissue; 0 keeps every patch.
    pixels : str
        "none", "zstd", "jpeg" or "verbatim" (see ``PatchStore.create``).
    reader, decode : str
        As for ``open_slide``.
    tissue : TissueConfig
    """

    mpp: float | None = None
    level: int | None = None
    tile_px: int | None = None
    stride_px: int | None = None
    min_tissue: float = 0.25
    pixels: str = "jpeg"
    reader: str = "auto"
    decode: str = "auto"
    tissue: TissueConfig = field(default_factory=TissueConfig)

    def check(self) -> None:
        """Raise ``GridError``, ``StoreError`` or ``SlideError`` for values that suit no slide."""
        check_reading(self.reader, self.decode)
        check_kind(self.pixels)
        if self.mpp is not None and self.level is not None:
            raise GridError("mpp and level", "only one of them can be asked for", "Leave one out")
        if self.mpp is not None and not (math.isfinite(self.mpp) and self.mpp > 0):
            raise GridError(f"mpp={self.mpp:g}", "the resolution must be positive microns per pixel")
        if self.level is not None and self.level < 0:
            raise GridError(f"level={self.level}", "levels are numbered from 0, the finest")
        for name, value in (("tile", self.tile_px), ("stride", self.stride_px)):
            if value is not None and value < 1:
                raise GridError(f"{name}={value}", "must be at least 1 px")
        if not 0 <= self.min_tissue <= 1:
            raise GridError(f"min_tissue={self.min_tissue:g}", "must be from 0 to 1")


def tile_slide(
    path: str,
    folder: str | os.PathLike[str],
    config: TileConfig | None = None,
    *,
    threads: int = 4,
    mpp: float | None = None,
    mpp_source: str = "user",
    mask: str | None = None,
    local: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> SlideResult:
    """Cut one slide into ``folder/store.zarr``, or resume a run that was stopped.

    Parameters
    ----------
    path : str
        The slide.
    folder : path
        Receives store.zarr, the tissue's outlines (regions.geojson), a picture of outlines and tiles (overlay.png), and
        last result.json. Its name is the slide's id.
    config : TileConfig, optional
    threads : int
        Threads that read, decode and encode.
    mpp, mpp_source, mask, local, progress
        As for ``score_slide``, which also lists the errors.
    """
    config = config or TileConfig()
    config.check()
    folder = Path(folder)
    clock = Clock(progress)
    folder.mkdir(parents=True, exist_ok=True)
    with clock.stage("open"):
        opened = open_slide(path, config.reader, mpp=mpp, mpp_source=mpp_source, decode=config.decode, local=local)
    with opened as slide:
        with clock.stage("grid"):
            grid = lay_grid(slide, config)
        with clock.stage("tissue"):
            tissue = tissue_of(slide, config.tissue, mask)
            grid = grid.keep(tissue.fraction(grid.boxes()) >= config.min_tissue)
        with clock.stage("tiles") as report:
            identity = {**identity_of(slide), "wsi_version": __version__}
            store = PatchStore.resume(folder / "store.zarr", grid, {}, pixels=config.pixels, attributes=identity)
            keep_tiles(slide, store, threads=threads, progress=lambda n: report(n, len(grid)), spent=clock.seconds)
            clock.seconds |= {f"threads_{name}": value for name, value in slide.spent.seconds.items()}
        with clock.stage("export"):
            outlines = tissue.outlines()
            regions, use = tissue_regions(outlines, slide.mpp), {"use": "research only"}
            write_regions(folder / "regions.geojson", regions, bounds=slide.bounds, slide_id=folder.name, metadata=use)
            save_overlay(folder / "overlay.png", slide, None, tissue_outlines=outlines, tiles=grid)
        numbers = _numbers(slide, folder.name, tissue, store, mpp, mask)
    result = SlideResult(numbers, clock.seconds)
    progress("finish", 0, 0)  # the last chance to stop
    write_result(folder, result)
    return result


def estimate_tiled_bytes(path: str, config: TileConfig, *, mpp: float | None = None, mask: str | None = None) -> int:
    """Estimate how many bytes `tile_slide` will write for a slide; raises the same errors."""
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode) as slide:
        tissue = tissue_of(slide, config.tissue, mask)
        grid = lay_grid(slide, config)
        n = int((tissue.fraction(grid.boxes()) >= config.min_tissue).sum())
        return overlay_bytes(slide) + pixel_bytes(config.pixels, n, grid.tile_px) + 10 * n


def lay_grid(slide: Slide, config: TileConfig) -> TileGrid:
    """Lay the patches that `config` asks for over the whole slide, tissue or not.

    With verbatim pixels, patches that reach over the slide's edge are left out: stored tiles are padded there. Raises
    GridError if there is no such level or grid, or, with verbatim pixels, if patches are not the slide's stored tiles.
    """
    verbatim = config.pixels == "verbatim"
    level = 0 if verbatim and config.level is None and config.mpp is None else config.level
    if level is None:
        mpp, tile_px = config.mpp or DEFAULT_MPP, config.tile_px or DEFAULT_TILE_PX
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=mpp, tile_px=tile_px, stride_px=config.stride_px)
    elif level < len(slide.level_sizes):
        own = slide.tile_px(level)
        tile_px, level_size = config.tile_px or (own[0] if own else DEFAULT_TILE_PX), slide.level_sizes[level]
        grid = TileGrid.of_level(
            slide.size, level_size, slide_mpp=slide.mpp, tile_px=tile_px, stride_px=config.stride_px
        )
    else:
        raise GridError(slide.path, f"has no level {level}", f"Its levels: 0 to {len(slide.level_sizes) - 1}")
    if verbatim:
        grid = grid.keep(grid.inside(slide.size))
        stored_tiles(slide, grid)  # raises before anything is written
    return grid


def keep_tiles(
    slide: Slide, store: PatchStore, *, threads: int, progress: Callable[[int], None] = lambda done: None,
    spent: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Fill the missing pixels of a store for a grid of this slide: copied if it is verbatim, else read and encoded.

    The bytes do not depend on `threads`. `progress` is called with the number of tiles done so far. To `spent`, this
    thread's seconds are added as ``tiles_waiting`` (for patches), ``tiles_encode`` and ``tiles_write``. Raises
    GridError (see ``stored_tiles``), and OSError if the store cannot be written to.
    """
    if store.pixels == "verbatim":
        copy_tiles(slide, store, threads=threads, progress=progress)
        return
    missing = store.missing("pixels") if store.pixels != "none" else []
    done = len(store) - sum(len(store.tiles(shard)) for shard in missing)
    progress(done)
    chunks: list[bytes | None] = []
    runs = [store.tiles(shard) for shard in missing]
    lap = Laps({} if spent is None else spent)
    with closing(stream(slide, store.grid, runs, batch_size=64, threads=threads)) as batches:
        for tiles, rgb, unreadable, _ in batches:
            lap("tiles_waiting")
            encoded = store.encode(rgb, threads)
            lap("tiles_encode")
            chunks += [None if bad else chunk for bad, chunk in zip(unreadable, encoded, strict=True)]
            if tiles.stop == store.tiles(missing[0]).stop:
                shard = missing.pop(0)
                store.write(shard, {"unreadable": np.array([chunk is None for chunk in chunks])})
                store.keep(shard, chunks)
                chunks = []
                lap("tiles_write")
            done += len(tiles)
            progress(done)


def _numbers(
    slide: Slide, slide_id: str, tissue: TissueMask, store: PatchStore, mpp_given: float | None, mask: str | None
) -> dict[str, Any]:
    """Assemble result.json."""
    flagged: dict[str, str] = {}  # warnings by flag
    n_unreadable = int(store.get("unreadable").sum())
    if not len(store):
        advice = "no tile holds enough tissue; lower --min-tissue if there is some"
        flagged["no-tile" if tissue.mask.any() else "no-tissue"] = tissue.dark_field or advice
    if n_unreadable:
        flagged["unreadable-tiles"] = (
            f"{n_unreadable} tiles are damaged in the slide: they read as white, and are marked; "
            "with a better copy of it use --force"
        )
    flagged |= resolution_warnings(slide, store.grid.mpp, f"{store.grid.mpp:g} was asked for")
    nearly = _nearly_stored(slide, store.grid)
    return {
        "slide_id": slide_id,
        "slide": absolute(slide.path),
        "mpp_given": mpp_given,
        "use": "research only",
        "n_tiles": len(store),
        "n_unreadable": n_unreadable,
        "tile_px": store.grid.tile_px,
        "tile_mpp": rounded(store.grid.mpp),
        "pixels": store.pixels,
        "tissue_mm2": rounded(tissue.area_mm2),
        **facts_of(slide, "level-0 pixels"),
        "flags": list(flagged),
        "warnings": [*flagged.values(), *([nearly] if nearly else [])],
        "provenance": {"wsi": __version__},
        "mask": mask and absolute(mask),
        "mask_sha256": mask and sha256_of(mask),
    }


def _nearly_stored(slide: Slide, grid: TileGrid) -> str | None:
    """Return advice where a level's own pixels are within 2 % of the grid's size and were resampled nevertheless."""
    steps = [side / grid.tile_px for side in grid.tile]  # level-0 pixels per patch pixel
    level = slide.level_for(min(steps))
    own = [full / stored for full, stored in zip(slide.size, slide.level_sizes[level], strict=True)]
    off = [step / stored for step, stored in zip(steps, own, strict=True)]
    if not 1e-6 < max(abs(ratio - 1) for ratio in off) <= 0.02:
        return None
    return (
        f"resampled by {max(off, key=lambda ratio: abs(ratio - 1)):.4g} from pixels of {own[0] * slide.mpp.x:.4g} um: "
        f"--level {level} keeps the slide's own pixels, which are sharper"
    )
