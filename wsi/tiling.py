"""Streaming: threads fill reused batches ahead of whoever takes them, and decode each stored tile once.

Where the slide gives its stored tiles (``Slide.tile_px``), patches are cut from decoded tiles that are kept for as long
as a later patch needs them and no longer; otherwise each patch is one ``Slide.read``. Both give the same bytes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wsi.errors import SlideUnreadable
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.slide.base import Cells, put, resample, shrunk

U8 = npt.NDArray[np.uint8]

#: Tiles or patches a thread takes at once: enough that handing them out costs little.
_RUN = 32


class Batch(NamedTuple):
    """Patches of consecutive tiles.

    Attributes
    ----------
    tiles : range
    rgb : uint8 (n, tile_px, tile_px, 3)
        Valid until the next batch is taken: the memory is used again. White where `unreadable`.
    unreadable : bool (n,)
        Patches of which a part cannot be decoded.
    problem : str, optional
        Why, of the first of them.
    """

    tiles: range
    rgb: U8
    unreadable: npt.NDArray[np.bool_]
    problem: str | None


class _Reads(Protocol):
    """A way to fill patches, in steps of consecutive tiles."""

    def submit(self, step: int, out: U8) -> list[Future[Any]]:
        """Begin to fill the patches of a step."""

    def finish(self, step: int) -> list[str | None]:
        """Say why a patch of a finished step is unreadable, and let go of what no later one needs."""


def _empty(shape: tuple[int, ...]) -> U8:
    return np.empty(shape, np.uint8)


def stream(
    slide: Slide,
    grid: TileGrid,
    runs: Sequence[range],
    *,
    batch_size: int,
    threads: int,
    ahead: int = 2,
    max_bytes: int = 256 << 20,
    empty: Callable[[tuple[int, ...]], U8] = _empty,
) -> Generator[Batch, None, None]:
    """Read tiles in batches, in order, before they are asked for.

    The order and the bytes do not depend on `threads`, `batch_size`, `ahead` or `max_bytes`.

    Parameters
    ----------
    slide : Slide
    grid : TileGrid
    runs : sequence of range
        Tiles wanted; no batch spans two runs.
    batch_size : int
        Patches a batch at most.
    threads : int
        Threads that read and decode.
    ahead : int
        Batches begun before they are asked for: memory for one more than that is taken once and used again.
    max_bytes : int
        Of decoded stored tiles under the patches begun. Besides, those that the next row of patches needs are kept: at
        most a band across the slide, one stored tile high.
    empty : callable
        Gives uint8 memory of a shape for the batches, such as pages that a GPU can fetch by itself.

    Yields
    ------
    Batch
    """
    batches = [
        range(start, min(start + batch_size, run.stop))
        for run in runs
        for start in range(run.start, run.stop, batch_size)
    ]
    if not batches:
        return
    side = grid.tile_px
    buffers = [empty((batch_size, side, side, 3)) for _ in range(min(ahead + 1, len(batches)))]
    level = slide.level_for(max(min(grid.tile) / side, 1e-9))
    tile_px = slide.tile_px(level)
    at_once = batch_size * len(buffers) if tile_px is None else max(2, max_bytes // _bytes_under(slide, grid, level))
    step_size = min(batch_size, -(-at_once // 2))
    steps = [
        range(start, min(start + step_size, batch.stop))
        for batch in batches
        for start in range(batch.start, batch.stop, step_size)
    ]
    batch_of = np.searchsorted([batch.start for batch in batches], [step.start for step in steps], "right") - 1
    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsi-read")
    reads: _Reads
    reads = _Whole(slide, grid, steps, pool) if tile_px is None else _Cut(slide, grid, steps, pool, level, tile_px)
    waiting: deque[list[Future[Any]]] = deque()
    submitted = finished = 0

    def submit(free_batches: int) -> None:
        """Begin steps of batches below `free_batches`, as many as there is memory for."""
        nonlocal submitted
        while submitted < len(steps) and batch_of[submitted] < free_batches:
            if waiting and (len(waiting) + 1) * step_size > at_once:
                break
            i, step = int(batch_of[submitted]), steps[submitted]
            first = step.start - batches[i].start
            waiting.append(reads.submit(submitted, buffers[i % len(buffers)][first : first + len(step)]))
            submitted += 1

    try:
        for i, batch in enumerate(batches):
            submit(i + len(buffers))
            problems: list[str | None] = []
            while len(problems) < len(batch):
                for job in waiting.popleft():
                    job.result()
                problems += reads.finish(finished)
                finished += 1
                submit(i + len(buffers))
            unreadable = np.array([problem is not None for problem in problems])
            why = next((problem for problem in problems if problem is not None), None)
            rgb = buffers[i % len(buffers)][: len(batch)]
            rgb[unreadable] = 255
            yield Batch(batch, rgb, unreadable, why)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _bytes_under(slide: Slide, grid: TileGrid, level: int) -> int:
    """Bytes of the decoded stored tiles under one patch, at most."""
    tile_px, scale = slide.tile_px(level) or (1, 1), slide.scale(level)
    across, down = (math.ceil(grid.tile[i] * scale[i] / tile_px[i]) + 1 for i in (0, 1))
    return across * down * tile_px[0] * tile_px[1] * 3


class _Whole:
    """Each patch is a read of its own."""

    def __init__(self, slide: Slide, grid: TileGrid, steps: list[range], pool: ThreadPoolExecutor) -> None:
        self._slide, self._grid, self._steps, self._pool = slide, grid, steps, pool
        self._problems: dict[int, str] = {}

    def submit(self, step: int, out: U8) -> list[Future[Any]]:
        return [self._pool.submit(self._read, tile, out[j]) for j, tile in enumerate(self._steps[step])]

    def _read(self, tile: int, out: U8) -> None:
        side = self._grid.tile_px
        try:
            with self._slide.spent("decode"):
                self._slide.read(self._grid.box(tile), (side, side), out)
        except SlideUnreadable as error:
            out[...] = 255
            self._problems[tile] = error.what

    def finish(self, step: int) -> list[str | None]:
        return [self._problems.pop(tile, None) for tile in self._steps[step]]


#: A stored tile: by how much it is reduced, its row and its column. A bare tuple: there are millions.
_Tile = tuple[int, int, int]


class _Span(NamedTuple):
    """Where a patch lies along one axis."""

    cells: Cells
    tiles: range  # stored tiles that it touches
    is_tile: bool  # it is one stored tile, pixel by pixel


class _Patch(NamedTuple):
    x: _Span
    y: _Span
    touched: list[_Tile]


class _Cut:
    """Patches are cut from stored tiles, which are decoded once and kept while a patch to come needs them."""

    def __init__(
        self,
        slide: Slide,
        grid: TileGrid,
        steps: list[range],
        pool: ThreadPoolExecutor,
        level: int,
        tile_px: tuple[int, int],
    ) -> None:
        self._slide, self._steps, self._pool = slide, steps, pool
        self._level, self._tile_px = level, tile_px
        self._across = _Axis(slide, level, 0, grid.columns, grid, tile_px[0])
        self._down = _Axis(slide, level, 1, grid.rows, grid, tile_px[1])
        self._columns, self._rows = grid.columns.tolist(), grid.rows.tolist()
        self._shrinks = np.minimum(self._across.shrinks[grid.columns], self._down.shrinks[grid.rows]).tolist()
        self._last_use = self._find_last_use(grid)
        self._decoded: dict[_Tile, tuple[U8, Future[Any]]] = {}
        self._free: dict[int, list[U8]] = {1: [], 2: [], 4: [], 8: []}
        self._to_drop: list[list[_Tile]] = [[] for _ in steps]
        self._problems: dict[_Tile, str] = {}
        self._local = threading.local()

    def _find_last_use(self, grid: TileGrid) -> list[list[int]]:
        """Find the last step that touches each stored tile, by row and column."""
        across, down = self._across, self._down
        last = np.full((down.n_tiles, across.n_tiles), -1, np.int32)
        step_of = np.full(len(grid), -1, np.int32)
        for step, tiles in enumerate(self._steps):
            step_of[tiles.start : tiles.stop] = step
        used = np.flatnonzero(step_of >= 0)
        first_x, last_x = across.first_tile[grid.columns[used]], across.last_tile[grid.columns[used]]
        first_y, last_y = down.first_tile[grid.rows[used]], down.last_tile[grid.rows[used]]
        for dy in range(int((last_y - first_y).max(initial=-1)) + 1):
            for dx in range(int((last_x - first_x).max(initial=-1)) + 1):
                touched = (first_x + dx <= last_x) & (first_y + dy <= last_y)
                np.maximum.at(last, (first_y[touched] + dy, first_x[touched] + dx), step_of[used][touched])
        found: list[list[int]] = last.tolist()
        return found

    def submit(self, step: int, out: U8) -> list[Future[Any]]:
        patches = [self._patch(tile) for tile in self._steps[step]]
        needed = sorted({tile for patch in patches for tile in patch.touched} - self._decoded.keys())
        # A patch that is one stored tile, which no later step needs, is decoded where it belongs.
        in_place: dict[_Tile, int] = {}
        for j, patch in enumerate(patches):
            if patch.x.is_tile and patch.y.is_tile:
                tile = patch.touched[0]
                if self._last_use[tile[1]][tile[2]] <= step and tile not in self._decoded:
                    in_place[tile] = j
        jobs = []
        for start in range(0, len(needed), _RUN):
            run = needed[start : start + _RUN]
            targets = [out[in_place[tile]] if tile in in_place else self._buffer(tile[0]) for tile in run]
            job = self._pool.submit(self._decode, run, targets)
            jobs.append(job)
            for tile, target in zip(run, targets, strict=True):
                self._decoded[tile] = target, job
                self._to_drop[self._last_use[tile[1]][tile[2]]].append(tile)
        there = set(in_place.values())
        to_cut = [j for j in range(len(patches)) if j not in there]
        for start in range(0, len(to_cut), _RUN):
            part = [
                (patches[j], [self._decoded[tile] for tile in patches[j].touched], out[j])
                for j in to_cut[start : start + _RUN]
            ]
            jobs.append(self._pool.submit(self._cut_all, part))
        return jobs

    def finish(self, step: int) -> list[str | None]:
        problems: list[str | None] = [None] * len(self._steps[step])
        if self._problems:
            for j, tile in enumerate(self._steps[step]):
                problems[j] = next((self._problems[t] for t in self._patch(tile).touched if t in self._problems), None)
        for dropped in self._to_drop[step]:
            buffer, _ = self._decoded.pop(dropped)
            if buffer.base is None:  # not a part of a batch
                self._free[dropped[0]].append(buffer)
        self._to_drop[step] = []
        return problems

    def _patch(self, tile: int) -> _Patch:
        shrink = self._shrinks[tile]
        x, y = self._across.span(self._columns[tile], shrink), self._down.span(self._rows[tile], shrink)
        return _Patch(x, y, [(shrink, row, column) for row in y.tiles for column in x.tiles])

    def _buffer(self, shrink: int) -> U8:
        free = self._free[shrink]
        w, h = self._tile_px
        return free.pop() if free else np.empty((h // shrink, w // shrink, 3), np.uint8)

    def _decode(self, tiles: list[_Tile], targets: list[U8]) -> None:
        for shrink in sorted({tile[0] for tile in tiles}):
            chosen = [i for i, tile in enumerate(tiles) if tile[0] == shrink]
            at = [(tiles[i][2], tiles[i][1]) for i in chosen]
            problems = self._slide.read_tiles(self._level, shrink, at, [targets[i] for i in chosen])
            self._problems.update({tiles[i]: why for i, why in zip(chosen, problems, strict=True) if why is not None})

    def _cut_all(self, patches: list[tuple[_Patch, list[tuple[U8, Future[Any]]], U8]]) -> None:
        for _, decoded, _ in patches:
            for _, job in decoded:
                job.result()  # handed out before this one, so some thread is at it or has done it
        with self._slide.spent("cut"):
            self._cut([(patch, [pixels for pixels, _ in decoded], out) for patch, decoded, out in patches])

    def _cut(self, patches: list[tuple[_Patch, list[U8], U8]]) -> None:
        for patch, decoded, out in patches:
            x, y = patch.x.cells, patch.y.cells
            is_copy = x.are_pixels and y.are_pixels
            region = out if is_copy else self._scratch(y.last - y.first, x.last - x.first)
            level_w, level_h = (side // x.shrink for side in self._slide.level_sizes[self._level])
            if x.first < 0 or y.first < 0 or x.last > level_w or y.last > level_h:
                region[...] = 255
            for (_, row, column), pixels in zip(patch.touched, decoded, strict=True):
                h, w, _ = pixels.shape
                left, top = column * w, row * h
                put(pixels[: level_h - top, : level_w - left], left, top, region, x.first, y.first)
            if not is_copy:
                resample(region, x, y, out)

    def _scratch(self, h: int, w: int) -> U8:
        """Memory of this thread: fresh pages for each patch cost more than cutting it."""
        flat = getattr(self._local, "flat", None)
        if flat is None or len(flat) < h * w * 3:
            flat = self._local.flat = np.empty(h * w * 3, np.uint8)
        return np.asarray(flat[: h * w * 3].reshape(h, w, 3))


class _Axis:
    """Along one axis: where the patches of each lattice position lie, found once for all that share it.

    Attributes
    ----------
    n_tiles : int
        Stored tiles.
    shrinks : int64 (positions,)
        By how much the decoder may reduce.
    first_tile, last_tile : int64 (positions,)
        Stored tiles touched, inclusive; none where last < first.
    """

    def __init__(
        self, slide: Slide, level: int, axis: int, lattice: npt.NDArray[np.int32], grid: TileGrid, tile_px: int
    ) -> None:
        self._side, self._tile_px = slide.level_sizes[level][axis], tile_px
        self.n_tiles = -(-self._side // tile_px)
        positions = int(lattice.max(initial=-1)) + 1
        self.shrinks = np.ones(positions, np.int64)
        self.first_tile, self.last_tile = np.zeros(positions, np.int64), np.full(positions, -1, np.int64)
        self._edges: dict[int, npt.NDArray[np.int64]] = {}
        self._spans: dict[tuple[int, int], _Span] = {}
        for i in np.unique(lattice).tolist():
            edges = slide.cells_along(level, axis, i * grid.stride[axis], grid.tile[axis], grid.tile_px)
            self._edges[i] = edges
            self.shrinks[i] = slide.shrink_along(level, axis, edges)
            full = Cells.of(edges)
            self.first_tile[i] = max(full.first, 0) // tile_px
            self.last_tile[i] = (min(full.last, self._side) - 1) // tile_px

    def span(self, position: int, shrink: int) -> _Span:
        """Where the patches of a lattice position lie on the level, reduced."""
        key = position, shrink
        if key not in self._spans:
            cells = shrunk(self._edges[position], shrink)
            tiles = range(int(self.first_tile[position]), int(self.last_tile[position]) + 1)
            side, tile_px = self._side // shrink, self._tile_px // shrink
            # Beyond the level's border a stored tile holds anything, and a patch is white.
            whole = tiles.start * tile_px, min((tiles.start + 1) * tile_px, side)
            is_tile = cells.are_pixels and (cells.first, cells.last) == whole and cells.last - cells.first == tile_px
            self._spans[key] = _Span(cells, tiles, is_tile)
        return self._spans[key]
