"""Streaming: reader threads fill reused batches ahead of the consumer, and decode each stored tile once.

If the reader gives access to stored tiles (``Slide.tile_px``), patches are cut from decoded tiles, each kept until the
last patch that needs it. Otherwise each patch is one ``Slide.read``. Both give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsi.errors import SlideUnreadable
from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.slide.base import U8
from wsi.tiling.cut import Axis, Cut, bytes_under, fresh, off_32


class Batch(NamedTuple):
    """Patches of n consecutive tiles."""

    tiles: range
    rgb: U8  # (n, tile_px, tile_px, 3), white where `unreadable`; valid until the next batch, which reuses the memory
    unreadable: npt.NDArray[np.bool_]  # (n,), patches that cannot be decoded completely
    problem: str | None  # why the first of them cannot


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
    """Read tiles in batches, in order and ahead of the consumer.

    Order and bytes do not depend on `threads`, `batch_size`, `ahead` or `max_bytes`.

    Parameters
    ----------
    runs : sequence of range
        The tiles to read; no batch spans two runs.
    batch_size : int
        Largest number of patches in a batch.
    threads : int
        Threads that read and decode.
    ahead : int
        Batches begun before they are asked for. The memory of ``ahead + 1`` batches is allocated once and reused.
    max_bytes : int
        Limit on decoded tiles held for patches in progress. Besides these, tiles that the next row of patches needs are
        kept: at most a band across the slide, one stored tile high.
    empty : callable
        Allocates uint8 memory of a given shape for the batches, such as pinned memory.
    """
    batches = _split(runs, batch_size)
    if not batches:
        return
    side = grid.tile_px
    buffers = [off_32((batch_size, side, side, 3), empty) for _ in range(min(ahead + 1, len(batches)))]
    level = slide.level_for(min(grid.tile) / side)
    at_once = batch_size * len(buffers)  # patches in progress
    axes = None
    if (tile_px := slide.tile_px(level)) is not None:
        used = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        across = Axis(slide, level, 0, grid.columns, used, grid, tile_px[0])
        down = Axis(slide, level, 1, grid.rows, used, grid, tile_px[1])
        axes = across, down
        at_once = max(2, max_bytes // bytes_under(across, down))
    step_size = min(batch_size, max(1, at_once // (2 * threads)))  # small enough to keep all threads busy
    steps = _split(batches, step_size)
    batch_of = np.searchsorted([batch.start for batch in batches], [step.start for step in steps], "right") - 1
    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsi-read")
    whole = _Whole(slide, grid, steps, pool)
    reads: Cut | _Whole = Cut(slide, grid, steps, pool, threads, level, *axes) if axes else whole
    waiting: deque[list[Future[Any]]] = deque()
    submitted = finished = 0

    def submit(free_batches: int) -> None:
        """Begin the steps of all batches below `free_batches`, as far as memory allows."""
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
                for job in reversed(waiting.popleft()):  # the last first: waiting for a finished job costs nothing
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


def _split(runs: Sequence[range], size: int) -> list[range]:
    """Divide each run into parts of at most `size`."""
    return [range(start, min(start + size, run.stop)) for run in runs for start in range(run.start, run.stop, size)]


class _Whole:
    """Fills patches step by step, each by one ``Slide.read``; same interface as ``Cut``."""

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
