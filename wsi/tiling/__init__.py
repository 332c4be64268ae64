"""Streaming: threads fill reused batches ahead of whoever takes them, and decode each stored tile once.

Where the slide gives its stored tiles (``Slide.tile_px``), patches are cut from decoded tiles that are kept for as long
as a later patch needs them and no longer; otherwise each patch is one ``Slide.read``. Both give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wsi.errors import SlideUnreadable
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.slide.base import U8
from wsi.tiling.cut import Axis, Cut, bytes_under, fresh, off_32


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


def stream(
    slide: Slide,
    grid: TileGrid,
    runs: Sequence[range],
    *,
    batch_size: int,
    threads: int,
    ahead: int = 2,
    max_bytes: int = 256 << 20,
    empty: Callable[[tuple[int, ...]], U8] = fresh,
) -> Generator[Batch, None, None]:
    """Read tiles in batches, in order, before they are asked for.

    The order and the bytes do not depend on `threads`, `batch_size`, `ahead` or `max_bytes`.

    Parameters
    ----------
    runs : sequence of range
        Tiles wanted; no batch spans two runs.
    batch_size : int
        Patches a batch at most.
    threads : int
        Threads that read and decode.
    ahead : int
        Batches begun before they are asked for: memory for one more than that is taken once and used again.
    max_bytes : int
        Limit on decoded stored tiles held for patches in progress. Stored tiles that the next row of patches needs are
        kept as well: at most a band across the slide, one stored tile high.
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
    buffers = [off_32((batch_size, side, side, 3), empty) for _ in range(min(ahead + 1, len(batches)))]
    level = slide.level_for(max(min(grid.tile) / side, 1e-9))
    tile_px = slide.tile_px(level)
    at_once = batch_size * len(buffers)
    if tile_px is not None:
        used = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        across = Axis(slide, level, 0, grid.columns, used, grid, tile_px[0])
        down = Axis(slide, level, 1, grid.rows, used, grid, tile_px[1])
        at_once = max(2, max_bytes // bytes_under(across, down))
    step_size = min(batch_size, max(1, at_once // (2 * threads)))  # enough of them at once to keep all threads busy
    steps = [
        range(start, min(start + step_size, batch.stop))
        for batch in batches
        for start in range(batch.start, batch.stop, step_size)
    ]
    batch_of = np.searchsorted([batch.start for batch in batches], [step.start for step in steps], "right") - 1
    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsi-read")
    reads: _Reads
    if tile_px is None:
        reads = _Whole(slide, grid, steps, pool)
    else:
        reads = Cut(slide, grid, steps, pool, threads, level, across, down)
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
                for job in reversed(waiting.popleft()):  # one that is done wakes nobody
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
