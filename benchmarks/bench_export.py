"""A million tiles to GeoJSON for QuPath: seconds and peak memory, beside geopandas' writer and WSInfer's way.

    python benchmarks/bench_export.py [--tiles 1000000] [--peers 100000]

Tiles with a class and three measurements, in files of at most 200,000, gzipped, and once more plain. Peers write as
many rows as --peers says, plain as they do it, in the same run.
geopandas stands for itself (``GeoDataFrame.to_file``, through pyogrio) where it is installed, as in .venv-readers.
The last column is how many times the seconds of our packed files a program takes for as many rows. "WSInfer's way" is
written from the description of its output: a dictionary a tile with an identifier of ``uuid.uuid4``, all of them in a
list, and one ``json.dump``. Peak memory is that of a process of its own, above what the arrays and imports took before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wsi.export.project import MAX_TILES, shards
from wsi.export.qupath import PathClass, write_tiles
from wsi.grid import TileGrid
from wsi.units import Box, Mpp


def tiles(n: int) -> tuple[TileGrid, np.ndarray]:
    """A grid of n tiles of 256 px at 0.5 mpp on a slide of 0.2431 mpp, and their probabilities."""
    columns = int(np.ceil(np.sqrt(n)))
    side = int(columns * 256 * 0.5 / 0.2431)
    grid = TileGrid.cover((side, side), slide_mpp=Mpp(0.2431, 0.2431), mpp=0.5, tile_px=256)
    return grid.keep(np.arange(n)), np.random.default_rng(0).random(n, np.float32)


def plain(folder: Path, grid: TileGrid, p: np.ndarray) -> None:
    ours(folder, grid, p, ".geojson")


def ours(folder: Path, grid: TileGrid, p: np.ndarray, suffix: str = ".geojson.gz") -> None:
    boxes = grid.boxes()
    classes = [PathClass("Other", (255, 200, 0)), PathClass("Tumor", (200, 0, 0))]
    values = {"prob_other": 1 - p, "prob_tumor": p, "attention_percentile": p * 100}
    for i, part in enumerate(shards(grid.rows, MAX_TILES)):
        write_tiles(
            folder / f"tiles-{i}{suffix}", boxes[part], classes, (p[part] > 0.5).astype(int),
            {key: each[part] for key, each in values.items()},
            bounds=Box(0, 0, 1e6, 1e6), slide_id="slide", first=part.start,
        )  # fmt: skip


def geopandas(folder: Path, grid: TileGrid, p: np.ndarray) -> None:
    import geopandas
    import shapely

    x, y, w, h = grid.boxes().T
    columns = {"objectType": "tile", "prob_other": 1 - p, "prob_tumor": p, "attention_percentile": p * 100}
    columns["id"] = [str(uuid.uuid4()) for _ in p]
    frame = geopandas.GeoDataFrame(columns, geometry=shapely.box(x, y, x + w, y + h))
    frame.to_file(folder / "tiles.geojson", driver="GeoJSON")


def wsinfers_way(folder: Path, grid: TileGrid, p: np.ndarray) -> None:
    features = []
    for (x, y, w, h), value in zip(grid.boxes().tolist(), p.tolist(), strict=True):
        ring = [[x + w, y], [x + w, y + h], [x, y + h], [x, y], [x + w, y]]
        numbers = {"prob_other": 1 - value, "prob_tumor": value, "attention_percentile": value * 100}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid4()),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"isLocked": True, "measurements": numbers, "objectType": "tile"},
            }
        )
    with (folder / "tiles.geojson").open("w") as file:
        json.dump({"type": "FeatureCollection", "features": features}, file)


def measure(work: Callable[[Path, TileGrid, np.ndarray], None], n: int, answers: multiprocessing.Queue) -> None:
    """In a process of its own: seconds, peak memory in MiB above the start, MB written."""
    grid, p = tiles(n)
    work_ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        try:
            work(Path(folder), grid, p)
        except ImportError as error:
            answers.put(str(error))
            return
        seconds = time.perf_counter() - begun
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - work_ready) / 1024
        answers.put((seconds, peak, sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1_000_000)
    parser.add_argument("--peers", type=int, default=100_000, help="rows that peers write")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"{'':14} {'tiles':>10} {'seconds':>9} {'s per 1M':>9} {'peak MiB':>9} {'MB':>8} {'x ours':>7}")
    first = None
    for work, n in (
        (ours, arguments.tiles),
        (plain, arguments.tiles),
        (geopandas, arguments.peers),
        (wsinfers_way, arguments.peers),
    ):
        answers = spawn.Queue()
        process = spawn.Process(target=measure, args=(work, n, answers))
        process.start()
        found = answers.get()
        process.join()
        if isinstance(found, str):
            print(f"{work.__name__:14} {found}")
            continue
        seconds, peak, size = found
        each = seconds * 1e6 / n
        first = first or each
        print(f"{work.__name__:14} {n:10,} {seconds:9.2f} {each:9.1f} {peak:9.0f} {size:8.1f} {each / first:7.1f}")


if __name__ == "__main__":
    main()
