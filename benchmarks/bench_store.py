"""Patch stores: from slide to store in megapixels a second, and back in patches a second, beside peers in the same run.

    python benchmarks/bench_store.py --folder /fast/disk --repeats 5
    python benchmarks/bench_store.py --slide slide.svs

Without a slide, a phantom (JPEG 4:2:0, 256 px tiles) is drawn once. Its whole tiles that hold tissue are used. The
peers decode with our decoder straight from the slide's own streams: what they are measured for is the store. One
thread; the best of several repeats by the wall and, after the slash, by CPU seconds, which other programs disturb
less. Files stay in the page cache, for all alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from wsi.grid import TileGrid
from wsi.phantom import PhantomConfig, write_phantom
from wsi.slide import Slide, open_slide
from wsi.store import SHARD_TILES, PatchStore, copy_tiles, stored_tiles
from wsi.store.codec import JpegCodec, decode_jpeg
from wsi.tile import keep_tiles
from wsi.tissue import find_tissue

Work = Callable[[], object]
Row = tuple[float, float]


def best(work: Work, repeats: int, before: Work = lambda: None) -> Row:
    """Least seconds of `work`, by the wall and by the CPU."""
    walls, cpus = [], []
    for _ in range(repeats):
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def decoded(slide: Slide, grid: TileGrid) -> Iterator[np.ndarray]:
    """Decode a shard's worth of tiles at a time, into memory that is used again."""
    level, columns, rows = stored_tiles(slide, grid)
    out = np.empty((SHARD_TILES, grid.tile_px, grid.tile_px, 3), np.uint8)
    for start in range(0, len(grid), SHARD_TILES):
        part = slice(start, start + SHARD_TILES)
        streams = slide.jpeg_tiles(level, list(zip(columns[part].tolist(), rows[part].tolist(), strict=True)))
        for stream, patch in zip(streams, out, strict=False):
            decode_jpeg(stream or b"", patch)
        yield out[: len(streams)]


def into_npy(slide: Slide, grid: TileGrid, path: Path) -> None:
    shape = (len(grid), grid.tile_px, grid.tile_px, 3)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    for i, patches in enumerate(decoded(slide, grid)):
        array[i * SHARD_TILES : i * SHARD_TILES + len(patches)] = patches
    array.flush()


def into_hdf5(slide: Slide, grid: TileGrid, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        array = file.create_dataset("pixels", (len(grid), grid.tile_px, grid.tile_px, 3), np.uint8)
        for i, patches in enumerate(decoded(slide, grid)):
            array[i * SHARD_TILES : i * SHARD_TILES + len(patches)] = patches


def into_zarr(slide: Slide, grid: TileGrid, path: Path, **codecs: object) -> None:
    side = grid.tile_px
    array = zarr.create_array(
        path, shape=(len(grid), side, side, 3), dtype="uint8", chunks=(1, side, side, 3),
        shards=(SHARD_TILES, side, side, 3), **codecs,
    )  # fmt: skip
    for i, patches in enumerate(decoded(slide, grid)):
        array[i * SHARD_TILES : i * SHARD_TILES + len(patches)] = patches


def ours(slide: Slide, grid: TileGrid, path: Path, pixels: str, threads: int = 1) -> None:
    store = PatchStore.create(path, grid, {}, pixels=pixels)
    if pixels == "verbatim":
        copy_tiles(slide, store, threads=threads)
    else:
        keep_tiles(slide, store, threads=threads)


def main() -> None:
    """Print writes, then reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", help="a tiled JPEG slide; default: a phantom of 16,384 x 8,192 px")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reads", type=int, default=2000, help="shuffled single patches a repeat")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.folder))
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, options: argparse.Namespace) -> None:
    path = options.slide
    if path is None:
        path = str(folder / "phantom.tif")
        write_phantom(path, PhantomConfig(size=(16384, 8192), seed=1))
    slide = open_slide(path)
    tile = slide.tile_px(0)
    assert tile is not None
    grid = TileGrid.of_level(slide.size, slide.level_sizes[0], slide_mpp=slide.mpp, tile_px=tile[0])
    grid = grid.keep(grid.inside(slide.size))
    grid = grid.keep(find_tissue(slide).fraction(grid.boxes()) >= 0.25)
    n, side, megapixels = len(grid), grid.tile_px, len(grid) * grid.tile_px**2 / 1e6

    zstd, jpeg = {"compressors": ZstdCodec(level=1)}, {"serializer": JpegCodec(90), "compressors": None}
    writers: dict[str, Callable[[Path], object]] = {
        "verbatim": lambda to: ours(slide, grid, to, "verbatim"),
        "verbatim, 2 threads": lambda to: ours(slide, grid, to, "verbatim", 2),
        "jpeg": lambda to: ours(slide, grid, to, "jpeg"),
        "zstd": lambda to: ours(slide, grid, to, "zstd"),
        "peer: .npy": lambda to: into_npy(slide, grid, to),
        "peer: plain Zarr, zstd": lambda to: into_zarr(slide, grid, to, **zstd),
        "peer: plain Zarr, JPEG": lambda to: into_zarr(slide, grid, to, **jpeg),
    }
    try:
        import h5py  # noqa: F401

        writers["peer: HDF5"] = lambda to: into_hdf5(slide, grid, to)
    except ImportError:
        pass
    writes: dict[str, Row] = {}
    sizes: dict[str, float] = {}
    places = {name: folder / f"{i}" for i, name in enumerate(writers)}
    for name, write in writers.items():

        def clear(to: Path = places[name]) -> None:
            shutil.rmtree(to, ignore_errors=True)
            to.unlink(missing_ok=True)

        writes[name] = best(lambda to=places[name], write=write: write(to), options.repeats, clear)
        files = [places[name], *places[name].rglob("*")]
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file()) / (megapixels * 1e6)

    order = np.random.default_rng(0).integers(0, n, options.reads).tolist()
    out, batch = np.empty((1, side, side, 3), np.uint8), np.empty((64, side, side, 3), np.uint8)
    level, columns, rows = stored_tiles(slide, grid)
    streams = [
        stream or b"" for stream in slide.jpeg_tiles(level, list(zip(columns.tolist(), rows.tolist(), strict=True)))
    ]
    npy = np.load(places["peer: .npy"], mmap_mode="r")
    stores = {kind: PatchStore.open(places[kind]) for kind in ("verbatim", "jpeg", "zstd")}
    arrays = {kind: zarr.open_array(places[kind] / "pixels", mode="r") for kind in stores}
    few = order[: max(64, options.reads // 10)]  # oindex would take minutes

    singles: dict[str, tuple[int, Work]] = {
        "the decoder alone": (len(order), lambda: [decode_jpeg(streams[i], out[0]) for i in order]),
        **{
            kind: (len(order), lambda store=store: [store.read([i], out) for i in order])
            for kind, store in stores.items()
        },
        "peer: .npy": (len(order), lambda: [np.copyto(out[0], npy[i]) for i in order]),
        "peer: Zarr [i], verbatim": (len(few), lambda: [arrays["verbatim"][i] for i in few]),
        "peer: Zarr [i], zstd": (len(few), lambda: [arrays["zstd"][i] for i in few]),
        "peer: Zarr oindex of 64, verbatim": (64, lambda: arrays["verbatim"].oindex[few[:64]]),
    }
    spans = [range(start, min(start + 64, n)) for start in range(0, n, 64)]
    batches: dict[str, tuple[int, Work]] = {
        "the decoder alone": (n, lambda: [decode_jpeg(stream, batch[i % 64]) for i, stream in enumerate(streams)]),
        **{
            kind: (n, lambda store=store: [store.read(span, batch[: len(span)]) for span in spans])
            for kind, store in stores.items()
        },
        "verbatim, batches()": (n, lambda: [None for _ in stores["verbatim"].batches(64)]),
        "peer: .npy": (n, lambda: [np.copyto(batch[: len(s)], npy[s.start : s.stop]) for s in spans]),
        "peer: Zarr slices, verbatim": (n, lambda: [arrays["verbatim"][s.start : s.stop] for s in spans]),
    }
    reads = {
        title: {name: (count, best(work, options.repeats)) for name, (count, work) in table.items()}
        for title, table in (("shuffled, one by one", singles), ("in order, 64 a time", batches))
    }
    report(slide, n, side, megapixels, writes, sizes, reads, as_json=options.json)


def report(
    slide: Slide,
    n: int,
    side: int,
    megapixels: float,
    writes: dict[str, Row],
    sizes: dict[str, float],
    reads: dict[str, dict[str, tuple[int, Row]]],
    *,
    as_json: bool,
) -> None:
    """Print what was measured: by the wall / by CPU seconds."""
    if as_json:
        speeds = {name: [megapixels / seconds for seconds in row] for name, row in writes.items()}
        rates = {
            title: {name: [count / seconds for seconds in row] for name, (count, row) in table.items()}
            for title, table in reads.items()
        }
        print(json.dumps({"patches": n, "side": side, "write Mpx/s": speeds, "read patches/s": rates}, indent=2))
        return
    print(f"{n} patches of {side} px, {megapixels:.0f} Mpx, by the {slide.reader} reader; wall / CPU")
    print(f"\n{'from slide to store':36} {'Mpx/s':>15} {'bytes/px':>9} {'verbatim over it':>17}")
    for name, (wall, cpu) in writes.items():
        ratio = f"{wall / writes['verbatim'][0]:.1f} / {cpu / writes['verbatim'][1]:.1f}"
        print(f"{name:36} {megapixels / wall:7.0f} / {megapixels / cpu:5.0f} {sizes[name]:9.3f} {ratio:>17}")
    for title, table in reads.items():
        print(f"\n{title:36} {'patches/s':>15} {'of the decoder':>15}")
        count, limit = table["the decoder alone"]
        for name, (m, (wall, cpu)) in table.items():
            share = f"{m / wall * limit[0] / count:.2f} / {m / cpu * limit[1] / count:.2f}"
            print(f"{name:36} {m / wall:7.0f} / {m / cpu:5.0f} {share:>15}")


if __name__ == "__main__":
    main()
