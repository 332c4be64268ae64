"""Patches cut from stored tiles, of which each is decoded once."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.slide.base import U8
from wsi.slide.cells import ONE_PX, Cells, cell_edges, resample, shrunk

#: Most tiles or patches in one job of a thread: enough to make the overhead of a job small.
_RUN = 32
#: Most bytes of decoded tiles in one job, so that they are still in the core's cache when patches are cut from them.
_RUN_BYTES = 2 << 20
#: Memory for decoded tiles is allocated in blocks: page faults of many small allocations cost more than decoding.
_BLOCK_BYTES = 8 << 20

#: A stored tile: (shrink, row, column). A plain tuple, since there are millions.
_Tile = tuple[int, int, int]


def fresh(shape: tuple[int, ...]) -> U8:
    return np.empty(shape, np.uint8)


def off_32(shape: tuple[int, ...], empty: Callable[[tuple[int, ...]], U8] = fresh) -> U8:
    """Allocate memory at an address 16 bytes off a multiple of 32.

    At a multiple of 32 libjpeg-turbo bypasses the caches: decoding is a twentieth slower, and pixels are read at once.
    """
    flat = empty((math.prod(shape) + 32,))
    first = (16 - flat.ctypes.data) % 32
    return flat[first : first + math.prod(shape)].reshape(shape)


class _Span(NamedTuple):
    """Position of a patch along one axis."""

    cells: Cells
    tiles: range  # stored tiles that the patch touches
    parts: list[tuple[slice, slice]]  # for each of them: the patch's pixels, and the tile's pixels that go there
    is_inside: bool  # the patch does not reach beyond the level
    is_tile: bool  # the patch is one stored tile, pixel by pixel


@dataclass(eq=False, slots=True)
class _Patch:
    """A patch to be cut."""

    x: _Span
    y: _Span
    touched: list[_Tile]  # row by row
    out: U8
    pixels: list[U8] = field(default_factory=list)  # of the touched tiles
    awaited: int = 0  # runs that must be decoded first


@dataclass(eq=False, slots=True)
class _Run:
    """Stored tiles that one job decodes, and the patches that wait for them."""

    tiles: list[tuple[_Tile, U8]]  # with the memory that each is decoded into
    patches: list[_Patch] = field(default_factory=list)
    is_done: bool = False


class Cut:
    """Cuts patches, step by step, from stored tiles that are decoded once and kept until their last use.

    The thread that decodes the last tile of a patch also cuts it, so no thread waits for another.
    """

    def __init__(
        self, slide: Slide, grid: TileGrid, steps: list[range], pool: ThreadPoolExecutor, threads: int, level: int,
        across: Axis, down: Axis,
    ) -> None:  # fmt: skip
        self._slide, self._steps, self._pool, self._threads = slide, steps, pool, threads
        self._level, self._across, self._down = level, across, down
        used = np.concatenate([np.arange(step.start, step.stop) for step in steps])
        self._columns, self._rows = grid.columns, grid.rows
        self._shrinks = np.minimum(self._across.shrinks[grid.columns], self._down.shrinks[grid.rows])
        self._last_use, self._alone = self._plan(grid, used)
        self._decoded: dict[_Tile, tuple[U8, _Run]] = {}
        self._free: dict[int, list[U8]] = {1: [], 2: [], 4: [], 8: []}
        self._to_drop: list[list[_Tile]] = [[] for _ in steps]
        self._problems: dict[_Tile, str] = {}
        self._lock = threading.Lock()  # guards `_Run.patches`, `_Run.is_done` and `_Patch.awaited`
        self._local = threading.local()

    def _plan(self, grid: TileGrid, used: npt.NDArray[np.int64]) -> tuple[list[list[int]], npt.NDArray[np.int32]]:
        """Return the last step that touches each stored tile, by row and column; and the stored tile of each patch.

        The latter is (shrink, row, column) if the patch is that tile, pixel by pixel, and no other patch touches it;
        else zeros.
        """
        across, down = self._across, self._down
        last = np.full((down.n_tiles, across.n_tiles), -1, np.int32)
        touches = np.zeros(last.shape, np.int32)
        step_of = np.repeat(np.arange(len(self._steps), dtype=np.int32), [len(step) for step in self._steps])
        columns, rows = grid.columns[used], grid.rows[used]
        first_x, last_x = across.first_tile[columns], across.last_tile[columns]
        first_y, last_y = down.first_tile[rows], down.last_tile[rows]
        for dy in range(int((last_y - first_y).max(initial=-1)) + 1):
            for dx in range(int((last_x - first_x).max(initial=-1)) + 1):
                touched = (first_x + dx <= last_x) & (first_y + dy <= last_y)
                places = first_y[touched] + dy, first_x[touched] + dx
                np.maximum.at(last, places, step_of[touched])
                np.add.at(touches, places, 1)
        same_shrink = across.shrinks[columns] == down.shrinks[rows]
        tiles = np.flatnonzero(across.is_tile[columns] & down.is_tile[rows] & same_shrink)
        tiles = tiles[touches[first_y[tiles], first_x[tiles]] == 1]
        alone = np.zeros((len(grid), 3), np.int32)
        alone[used[tiles]] = np.stack([across.shrinks[columns[tiles]], first_y[tiles], first_x[tiles]], axis=1)
        last_use: list[list[int]] = last.tolist()
        return last_use, alone

    def submit(self, step: int, out: U8) -> list[Future[Any]]:
        """Begin to fill the patches of a step."""
        alone: list[tuple[_Tile, U8]] = []  # decoded directly into the batch
        patches: list[_Patch] = []
        tiles = self._steps[step]
        whole = self._alone[tiles.start : tiles.stop].tolist()
        for tile, (shrink, row, column), patch_out in zip(tiles, whole, out, strict=True):
            if shrink:
                alone.append(((shrink, row, column), patch_out))
            else:
                patches.append(_Patch(*self._find(tile), patch_out))
        needed = sorted({stored for patch in patches for stored in patch.touched} - self._decoded.keys())
        taken = [(stored, self._buffer(stored[0])) for stored in needed]
        runs = self._in_runs(taken, min(_RUN, _RUN_BYTES // taken[0][1].nbytes) if taken else 1)
        for run in runs:
            for stored, pixels in run.tiles:
                self._decoded[stored] = pixels, run
                self._to_drop[self._last_use[stored[1]][stored[2]]].append(stored)
        ready = []
        for patch in patches:
            sources = [self._decoded[stored] for stored in patch.touched]
            patch.pixels = [pixels for pixels, _ in sources]
            with self._lock:
                awaited = {run for _, run in sources if not run.is_done}
                patch.awaited = len(awaited)
                for run in awaited:
                    run.patches.append(patch)
            if not awaited:
                ready.append(patch)
        jobs: list[Future[Any]] = [self._pool.submit(self._decode, run) for run in (*self._in_runs(alone, _RUN), *runs)]
        jobs += [self._pool.submit(self._cut, ready[i : i + _RUN]) for i in range(0, len(ready), _RUN)]
        return jobs

    def finish(self, step: int) -> list[str | None]:
        """Return why each patch of a finished step is unreadable; release tiles that no later step needs."""
        problems: list[str | None] = [None] * len(self._steps[step])
        if self._problems:
            for j, tile in enumerate(self._steps[step]):
                problems[j] = next((self._problems[t] for t in self._find(tile)[2] if t in self._problems), None)
        for dropped in self._to_drop[step]:
            self._free[dropped[0]].append(self._decoded.pop(dropped)[0])
        self._to_drop[step] = []
        return problems

    def _find(self, tile: int) -> tuple[_Span, _Span, list[_Tile]]:
        """Return a patch's position along x and y, and the stored tiles that it touches."""
        shrink = int(self._shrinks[tile])
        x, y = self._across.span(int(self._columns[tile]), shrink), self._down.span(int(self._rows[tile]), shrink)
        return x, y, [(shrink, row, column) for row in y.tiles for column in x.tiles]

    def _in_runs(self, tiles: list[tuple[_Tile, U8]], at_most: int) -> list[_Run]:
        """Divide tiles into runs, so that every thread gets some."""
        length = max(1, min(at_most, -(-len(tiles) // self._threads)))
        return [_Run(tiles[start : start + length]) for start in range(0, len(tiles), length)]

    def _buffer(self, shrink: int) -> U8:
        free = self._free[shrink]
        if not free:
            w, h = (axis.tile_px // shrink for axis in (self._across, self._down))
            free.extend(off_32((-(-_BLOCK_BYTES // (h * w * 3)), h, w, 3)))
        return free.pop()

    def _decode(self, run: _Run) -> None:
        for shrink in sorted({tile[0] for tile, _ in run.tiles}):
            chosen = [(tile, pixels) for tile, pixels in run.tiles if tile[0] == shrink]
            at = [(column, row) for (_, row, column), _ in chosen]
            problems = self._slide.read_tiles(self._level, shrink, at, [pixels for _, pixels in chosen])
            for (tile, _), why in zip(chosen, problems, strict=True):
                if why is not None:
                    self._problems[tile] = why
        with self._lock:
            run.is_done = True
            for patch in run.patches:
                patch.awaited -= 1
            ready = [patch for patch in run.patches if not patch.awaited]
        if ready:
            self._cut(ready)

    def _cut(self, patches: list[_Patch]) -> None:
        with self._slide.spent("cut"):
            for patch in patches:
                x, y = patch.x.cells, patch.y.cells
                is_copy = x.are_pixels and y.are_pixels
                region = patch.out if is_copy else self._scratch(y.last - y.first, x.last - x.first)
                if not (patch.x.is_inside and patch.y.is_inside):
                    region[...] = 255
                places = itertools.product(patch.y.parts, patch.x.parts)
                for ((to_y, from_y), (to_x, from_x)), pixels in zip(places, patch.pixels, strict=True):
                    region[to_y, to_x] = pixels[from_y, from_x]
                if not is_copy:
                    resample(region, x, y, patch.out)

    def _scratch(self, h: int, w: int) -> U8:
        """Return this thread's scratch memory: allocating pages for each patch would cost more than cutting it."""
        flat = getattr(self._local, "flat", None)
        if flat is None or len(flat) < h * w * 3:
            flat = self._local.flat = np.empty(h * w * 3, np.uint8)
        return np.asarray(flat[: h * w * 3].reshape(h, w, 3))


class Axis:
    """One axis of a level: the stored tiles under each lattice position, shared by all patches of that position."""

    def __init__(
        self, slide: Slide, level: int, axis: int, lattice: npt.NDArray[np.int32], used: npt.NDArray[np.int64],
        grid: TileGrid, tile_px: int,
    ) -> None:  # fmt: skip
        self._side, self.tile_px = slide.level_sizes[level][axis], tile_px
        self.n_tiles = -(-self._side // tile_px)
        positions = int(lattice.max(initial=-1)) + 1
        self.shrinks = np.ones(positions, np.int64)  # by how much the decoder may reduce
        # Stored tiles touched, both inclusive; none where last < first.
        self.first_tile, self.last_tile = np.zeros(positions, np.int64), np.full(positions, -1, np.int64)
        self.is_tile = np.zeros(positions, np.bool_)  # reduced by `shrinks`, the patch is one stored tile
        self._edges: dict[int, npt.NDArray[np.int64]] = {}
        self._spans: dict[tuple[int, int], _Span] = {}
        there = np.unique(lattice[used])
        starts, scale = there[:, None] * grid.stride[axis], slide.scale(level)[axis]
        edges = cell_edges(starts, grid.tile[axis], grid.tile_px, scale)
        self.first_tile[there] = np.maximum(edges[:, 0] // ONE_PX, 0) // tile_px
        self.last_tile[there] = (np.minimum(-(edges[:, -1] // -ONE_PX), self._side) - 1) // tile_px
        for i, of_position in zip(there.tolist(), edges, strict=True):
            self._edges[i] = of_position
            shrink = self.shrinks[i] = slide.shrink_along(level, axis, of_position)
            self.is_tile[i] = self.span(i, shrink).is_tile
        self.most_tiles = int((self.last_tile[there] - self.first_tile[there]).max(initial=0)) + 1
        self.least_shrink = int(self.shrinks[there].min(initial=8))

    def span(self, position: int, shrink: int) -> _Span:
        """Return where the patches of a lattice position lie on the level reduced by `shrink`."""
        key = position, shrink
        if key not in self._spans:
            cells = shrunk(self._edges[position], shrink)
            tiles = range(int(self.first_tile[position]), int(self.last_tile[position]) + 1)
            side, tile_px = self._side // shrink, self.tile_px // shrink
            parts = []
            for left in range(tiles.start * tile_px, tiles.stop * tile_px, tile_px):
                # Beyond the level's border a stored tile is padding, and a patch is white.
                start = max(cells.first, left)
                stop = max(start, min(cells.last, left + tile_px, side))
                parts.append((slice(start - cells.first, stop - cells.first), slice(start - left, stop - left)))
            is_inside = cells.first >= 0 and cells.last <= side
            is_tile = cells.are_pixels and is_inside and parts == [(slice(0, tile_px), slice(0, tile_px))]
            self._spans[key] = _Span(cells, tiles, parts, is_inside, is_tile)
        return self._spans[key]


def bytes_under(across: Axis, down: Axis) -> int:
    """Return the most bytes of decoded tiles that any patch touches."""
    shrink = min(across.least_shrink, down.least_shrink)
    w, h = (axis.most_tiles * (axis.tile_px // shrink) for axis in (across, down))
    return w * h * 3
