"""Patch stores: writing, and reading single patches in random order, beside HDF5, .npy, Zarr and TensorStore.

    make bench-peers                                             # everything, in .venv-peers
    .venv-peers/bin/python benchmarks/compare/stores.py --patches 4096 --rounds 5 --cache /fast/disk --json

All are given the same decoded patches, 256 at a time, and asked for the same ones again, one by one; files stay in the
page cache. Patches a second of CPU time, which other programs disturb little, and by the wall. Programs take turns and
the best of several rounds counts. The last columns say what a patch takes on disk and how far what was read is from
what was written. (Copying a slide's own JPEG tiles decodes nothing and so is not here: see ``bench_store.py``.)
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import machine, print_table, reason_of, versions
from tiles import TILE_PX, tiles_and_target

from wsi.grid import TileGrid
from wsi.store import PatchStore

U8 = npt.NDArray[np.uint8]
ReadOne = Callable[[int], U8]
Program = tuple[Callable[[Path, U8], None], Callable[[Path], ReadOne]]

SHARD = 256


def npy() -> Program:
    """One .npy file, mapped into memory."""

    def write(path: Path, patches: U8) -> None:
        file = np.lib.format.open_memmap(path, "w+", np.uint8, patches.shape)
        for part in _parts(patches):
            file[part] = patches[part]
        file.flush()

    def reader(path: Path) -> ReadOne:
        file = np.load(path, mmap_mode="r")
        return lambda row: np.array(file[row])

    return write, reader


def hdf5() -> Program:
    """One contiguous dataset."""
    import h5py

    def write(path: Path, patches: U8) -> None:
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("pixels", patches.shape, np.uint8)
            for part in _parts(patches):
                dataset[part] = patches[part]

    def reader(path: Path) -> ReadOne:
        dataset = h5py.File(path)["pixels"]
        return lambda row: dataset[row]

    return write, reader


def zarr_(*, sharded: bool, zstd: bool, pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline") -> Program:
    """Zarr v3, a patch a chunk."""
    import zarr

    if pipeline.startswith("zarrs"):
        import zarrs  # noqa: F401  # registers itself

    def write(path: Path, patches: U8) -> None:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.create_array(
                store=str(path),
                shape=patches.shape,
                dtype=np.uint8,
                chunks=(1, *patches.shape[1:]),
                shards=(SHARD, *patches.shape[1:]) if sharded else None,
                compressors=zarr.codecs.ZstdCodec(level=1) if zstd else None,
            )
            for part in _parts(patches):
                array[part] = patches[part]

    def reader(path: Path) -> ReadOne:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.open_array(str(path), mode="r")
        return lambda row: np.asarray(array[row])

    return write, reader


def tensorstore() -> Program:
    """TensorStore, shards of Zarr v3 without compression."""
    import tensorstore as ts

    def spec(path: Path) -> dict[str, Any]:
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}

    def write(path: Path, patches: U8) -> None:
        chunk = (1, *patches.shape[1:])
        layout = ts.ChunkLayout(write_chunk_shape=(SHARD, *patches.shape[1:]), read_chunk_shape=chunk)
        made = ts.open(spec(path), create=True, dtype=ts.uint8, shape=patches.shape, chunk_layout=layout).result()
        for part in _parts(patches):
            made[part].write(patches[part]).result()

    def reader(path: Path) -> ReadOne:
        array = ts.open(spec(path)).result()
        return lambda row: array[row].read().result()

    return write, reader


def ours(kind: str) -> Program:
    """Make a program of ``wsi.PatchStore`` that keeps pixels as `kind`."""

    def reader(path: Path) -> ReadOne:
        store = PatchStore.open(path)
        return lambda row: store.read([row])[0]

    def write(path: Path, patches: U8) -> None:
        numbers = np.arange(len(patches), dtype=np.int32)
        side = (float(TILE_PX), float(TILE_PX))
        grid = TileGrid(numbers, np.zeros_like(numbers), side, side, TILE_PX, 0.5)
        store = PatchStore.create(path, grid, {}, pixels=kind)
        for shard, part in enumerate(_parts(patches)):
            store.write(shard, {"pixels": patches[part]})

    return write, reader


def _parts(patches: U8) -> list[slice]:
    return [slice(start, min(start + SHARD, len(patches))) for start in range(0, len(patches), SHARD)]


ZARRS = "zarrs.ZarrsCodecPipeline"
PROGRAMS: dict[str, Callable[[], Program]] = {
    "wsi, zstd": lambda: ours("zstd"),
    "wsi, jpeg": lambda: ours("jpeg"),
    ".npy": npy,
    "HDF5, contiguous": hdf5,
    "Zarr, a patch a file": lambda: zarr_(sharded=False, zstd=False),
    "Zarr, shards": lambda: zarr_(sharded=True, zstd=False),
    "Zarr, shards, zstd": lambda: zarr_(sharded=True, zstd=True),
    "Zarr by zarrs, shards": lambda: zarr_(sharded=True, zstd=False, pipeline=ZARRS),
    "Zarr by zarrs, shards, zstd": lambda: zarr_(sharded=True, zstd=True, pipeline=ZARRS),
    "TensorStore, shards": tensorstore,
}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU and by the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def one_round(program: Program, path: Path, patches: U8, order: npt.NDArray[np.integer]) -> dict[str, float]:
    """Write a store and read it again; what is written stays there to be looked at."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    write, reader = program
    times = dict(zip(("write_cpu_s", "write_wall_s"), timed(lambda: write(path, patches)), strict=True))
    read = reader(path)
    read(0)
    rows = order.tolist()

    def read_all() -> None:
        for row in rows:
            read(row)  # and forget it: memory that is kept costs more than the reading

    several = timed(read_all)
    return times | dict(zip(("read_cpu_s", "read_wall_s"), several, strict=True))


def main() -> None:
    """Let the programs take turns, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "wsi-bench")
    parser.add_argument("--patches", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    tiles, _, origin = tiles_and_target(64)
    patches = np.concatenate([tiles] * -(-options.patches // len(tiles)))[: options.patches]
    order = np.random.default_rng(0).permutation(len(patches))
    options.cache.mkdir(parents=True, exist_ok=True)

    rows: dict[str, dict[str, Any]] = {name: {"program": name} for name in PROGRAMS}
    with tempfile.TemporaryDirectory(dir=options.cache, prefix="stores-") as folder:
        paths = {name: Path(folder) / str(i) for i, name in enumerate(PROGRAMS)}
        for name in [name for _ in range(options.rounds) for name in PROGRAMS if "reason" not in rows[name]]:
            try:
                for key, value in one_round(PROGRAMS[name](), paths[name], patches, order).items():
                    rows[name][key] = min(rows[name].get(key, float("inf")), value)
            except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
                rows[name]["reason"] = reason_of(error)
        for name, row in rows.items():
            if "reason" in row:
                continue
            _, reader = PROGRAMS[name]()
            read = reader(paths[name])
            apart = np.stack([np.abs(read(row).astype(int) - patches[row]) for row in order[:64].tolist()])
            files = [file for file in [paths[name], *paths[name].rglob("*")] if file.is_file()]
            row |= {
                "write_per_cpu_second": len(patches) / row.pop("write_cpu_s"),
                "write_per_second": len(patches) / row.pop("write_wall_s"),
                "read_per_cpu_second": len(order) / row.pop("read_cpu_s"),
                "read_per_second": len(order) / row.pop("read_wall_s"),
                "bytes_per_px": sum(file.stat().st_size for file in files) / (patches.size / 3),
                "files": len(files),
                "apart_mean": float(apart.mean()),
                "apart_max": int(apart.max()),
            }

    packages = ["wsi", "numpy", "h5py", "zarr", "zarrs", "tensorstore"]
    facts = {**machine(), **versions(packages), "patches": f"{len(patches)} of {TILE_PX} px, {origin}"}
    if options.json:
        print(json.dumps({"facts": facts, "rows": list(rows.values())}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = {
        "program": "program", "write_per_cpu_second": "written per CPU s", "write_per_second": "per s",
        "read_per_cpu_second": "read per CPU s", "read_per_second": "per s", "bytes_per_px": "bytes a px",
        "files": "files", "apart_mean": "grey levels apart", "apart_max": "at most",
    }  # fmt: skip
    print_table(columns, list(rows.values()))


if __name__ == "__main__":
    main()
