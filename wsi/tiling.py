"""Streaming: reader threads fill reused batches ahead of whoever takes them, such as a store that keeps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import numpy.typing as npt

from wsi.grid import TileGrid
from wsi.slide import Slide
from wsi.store import PatchStore, copy_tiles

U8 = npt.NDArray[np.uint8]


def stream(
    slide: Slide, grid: TileGrid, runs: Sequence[range], *, batch_size: int, threads: int, ahead: int = 2
) -> Generator[tuple[range, U8], None, None]:
    """Read tiles in batches, in order, `ahead` batches before they are asked for.

    Memory is bounded by ``(ahead + 1) * batch_size`` patches, whatever the slide's size; the order
    and the bytes do not depend on `threads`, `batch_size` or `ahead`.

    Parameters
    ----------
    slide : Slide
    grid : TileGrid
    runs : sequence of range
        Tiles wanted; no batch spans two runs.
    batch_size : int
        Patches a batch at most.
    threads : int
        Reader threads.

    Yields
    ------
    tiles : range
    rgb : uint8 (len(tiles), tile_px, tile_px, 3)
        Valid until the next batch is taken: the memory is used again.

    Raises
    ------
    SlideUnreadable
        From the batch that met it.
    """
    batches = [
        range(start, min(start + batch_size, run.stop))
        for run in runs
        for start in range(run.start, run.stop, batch_size)
    ]
    side = grid.tile_px
    buffers = [np.empty((batch_size, side, side, 3), np.uint8) for _ in range(min(ahead + 1, len(batches)))]

    def read(tile: int, out: U8) -> None:
        slide.read(grid.box(tile), (side, side), out)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="wsi-read")
    waiting: deque[tuple[range, U8, list[Future[None]]]] = deque()

    def submit(i: int) -> None:
        out = buffers[i % len(buffers)][: len(batches[i])]
        waiting.append((batches[i], out, [pool.submit(read, tile, out[j]) for j, tile in enumerate(batches[i])]))

    try:
        for i in range(len(buffers)):
            submit(i)
        for i in range(len(batches)):
            tiles, out, reads = waiting.popleft()
            for done in reads:
                done.result()
            yield tiles, out
            if i + len(buffers) < len(batches):
                submit(i + len(buffers))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def keep_tiles(slide: Slide, store: PatchStore, *, threads: int, progress: Callable[[int], None] | None = None) -> None:
    """Fill the missing pixels of a store, shard by shard: copied where it is verbatim, else read and encoded.

    Parameters
    ----------
    slide : Slide
    store : PatchStore
        Made for a grid of this slide; one that keeps no pixels is left as it is.
    threads : int
        The bytes written do not depend on it.
    progress : callable, optional
        Called with the number of tiles done in all.

    Raises
    ------
    SlideUnreadable
        From the shard that met it; the shards before it are kept.
    GridError
        A verbatim store whose patches are not the slide's own tiles.
    OSError
        The store cannot be written to.
    """
    if store.pixels == "verbatim":
        copy_tiles(slide, store, threads=threads, progress=progress)
        return
    missing = store.missing("pixels") if store.pixels != "none" else []
    done = len(store) - sum(len(store.tiles(shard)) for shard in missing)
    if progress is not None:
        progress(done)
    chunks: list[bytes] = []
    runs = [store.tiles(shard) for shard in missing]
    with closing(stream(slide, store.grid, runs, batch_size=64, threads=threads)) as batches:
        for tiles, rgb in batches:
            chunks += store.encode(rgb, threads)
            if tiles.stop == store.tiles(missing[0]).stop:
                store.keep(missing.pop(0), chunks)
                chunks = []
            done += len(tiles)
            if progress is not None:
                progress(done)
