"""Stain normalisation: megapixels a second beside torchstain, TIAToolbox, torch-staintools and memcpy.

    make bench-peers                                             # everything, in .venv-peers
    .venv-peers/bin/python benchmarks/compare/stain.py --tiles 64 --rounds 9 --json

The same tiles of 256 px, uint8 RGB in and out, and the same target picture for all; measuring the target is not timed,
and what a program needs to turn bytes into its own format and back is. "apply": the slide's stains are known. "fit +
apply": each tile is measured. One thread counts CPU seconds, two the wall, each with tiles of its own (no program has
threads inside). Programs take turns and the best of several rounds counts.

The last columns say how far each program's pixels are from the nearest of ours, by our own rule or the published one:
programs that measure or map by another rule do other work, and their speeds are compared with that in mind.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read by NumPy, torch and OpenCV when they are imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import numpy.typing as npt
from measure import machine, print_table, reason_of, versions
from tiles import TILE_PX, tiles_and_target

from wsi.native import twin
from wsi.stain import FitConfig, fit

U8 = npt.NDArray[np.uint8]
Run = Callable[[U8], Sequence[Any]]

LEAST_S = 0.05  # a measurement repeats the work until it takes as long
BATCH = 16
PUBLISHED = FitConfig(published=True, io=240)


@dataclass(frozen=True)
class Program:
    """What is timed: ``run(tiles) -> uint8 tiles``, or `missing`, the reason why there is none."""

    name: str
    method: str
    task: str
    run: Run | None = None
    missing: str = ""


# --- programs --------------------------------------------------------------------------------------------------------


def ours(tiles: U8, target: U8) -> list[Program]:
    """Make memcpy, our kernels by our rule and the published one, and the NumPy twin."""
    room: dict[tuple[int, int], U8] = {}  # memory that is used again, of each thread

    def out_for(rgb: U8) -> U8:
        key = threading.get_ident(), len(rgb)
        if key not in room:
            room[key] = np.empty_like(rgb)
        return room[key]

    def copy(rgb: U8) -> U8:
        out = out_for(rgb)
        np.copyto(out, rgb)
        return out

    programs = [Program("memcpy", "", "copy", copy)]
    for method in ("macenko", "reinhard", "vahadane"):
        for name, config in (("wsi", FitConfig()), ("wsi, published rule", PUBLISHED)):
            wanted = fit(method, target, target, config=config)
            slide = fit(method, tiles, wanted, config=config)

            def refit(rgb: U8, method: str = method, wanted: Any = wanted, config: FitConfig = config) -> list[U8]:
                return [fit(method, tile, wanted, config=config).apply(tile) for tile in rgb]

            if method != "vahadane":  # whose map is of Macenko's kind
                apply = lambda rgb, slide=slide: slide.apply(rgb, out_for(rgb))  # noqa: E731
                programs.append(Program(name, method, "apply", apply))
            if method != "vahadane" or config is not PUBLISHED:
                programs.append(Program(name, method, "fit + apply", refit))
    slide = fit("macenko", tiles, fit("macenko", target, target))

    def by_twin(rgb: U8) -> list[U8]:
        out = out_for(rgb)
        for tile, place in zip(rgb, out, strict=True):
            twin.od_map(tile, *slide.arguments, place)
        return out

    return [*programs, Program("wsi without its native module", "macenko", "apply", by_twin)]


def torchstain(tiles: U8, target: U8) -> list[Program]:
    """Torchstain with NumPy and with torch."""
    import torch
    from torchstain.base.normalizers import MacenkoNormalizer, ReinhardNormalizer

    def tensor(rgb: U8) -> Any:
        return torch.from_numpy(rgb).permute(2, 0, 1)

    def program(method: str, backend: str) -> Program:
        make = MacenkoNormalizer if method == "macenko" else ReinhardNormalizer
        normaliser = make(backend=backend)
        given = tensor if backend == "torch" else (lambda rgb: rgb)
        normaliser.fit(given(target))
        more = {"stains": False} if method == "macenko" else {}

        def one(tile: U8) -> U8:
            got = normaliser.normalize(given(tile), **more)
            got = got[0] if method == "macenko" else got
            return np.asarray(got).astype(np.uint8, copy=False)

        return Program(f"torchstain ({backend})", method, "fit + apply", lambda rgb: [one(tile) for tile in rgb])

    none = [Program("torchstain", m, "apply", missing="measures each tile anew") for m in ("macenko", "reinhard")]
    return [*none, *(program(m, b) for m in ("macenko", "reinhard") for b in ("numpy", "torch"))]


def tiatoolbox(tiles: U8, target: U8) -> list[Program]:
    """Make TIAToolbox's programs; with fixed stains it still measures each tile's amounts."""
    # The packages' own __init__ import all of it, models and transformers included: the normalisers need none of that.
    (root,) = importlib.util.find_spec("tiatoolbox").submodule_search_locations
    for name in ("tools", "utils", "annotation"):
        package = types.ModuleType(f"tiatoolbox.{name}")
        package.__path__ = [f"{root}/{name}"]
        sys.modules[package.__name__] = package
    import cv2
    from tiatoolbox.tools import stainextract, stainnorm

    cv2.setNumThreads(1)
    made = {
        "macenko": stainnorm.MacenkoNormalizer(),
        "reinhard": stainnorm.ReinhardNormalizer(),
        "vahadane": stainnorm.VahadaneNormalizer(),
    }
    for normaliser in made.values():
        normaliser.fit(target)
    known = stainnorm.MacenkoNormalizer()
    known.fit(target)
    known.extractor = stainextract.CustomExtractor(np.array(fit("macenko", tiles).source.vectors))

    def program(method: str, task: str, normaliser: Any) -> Program:
        return Program("tiatoolbox", method, task, lambda rgb: [normaliser.transform(tile) for tile in rgb])

    return [
        program("macenko", "apply", known),
        Program("tiatoolbox", "reinhard", "apply", missing="measures each tile anew"),
        *(program(method, "fit + apply", normaliser) for method, normaliser in made.items()),
    ]


def torch_staintools(tiles: U8, target: U8, *, slow: bool) -> list[Program]:
    """Make those of torch-staintools, in batches; "apply" is with stains from its cache, amounts measured anew."""
    import torch
    from torch_staintools.constants import CONFIG
    from torch_staintools.normalizer.factory import NormalizerBuilder

    CONFIG.ENABLE_COMPILE = False  # makes these no faster on a CPU

    def tensor(rgb: U8) -> Any:
        return torch.from_numpy(rgb).permute(0, 3, 1, 2).to(torch.float32) / 255

    def bytes_of(image: Any) -> U8:
        return np.asarray((image * 255).round().to(torch.uint8).permute(0, 2, 3, 1))

    def program(method: str, batch: int, *, cached: bool = False) -> Program:
        normaliser = NormalizerBuilder.build(method, use_cache=cached)
        normaliser.fit(tensor(target[None]), **({"cache_keys": ["target"]} if cached else {}))
        if cached:  # the stains of all tiles as one picture, under the name that all of them are then given
            normaliser.transform(tensor(tiles.reshape(1, -1, TILE_PX, 3)), cache_keys=["slide"])

        def run(rgb: U8) -> list[U8]:
            out: list[U8] = []
            for start in range(0, len(rgb), batch):
                part = tensor(rgb[start : start + batch])
                keys = {"cache_keys": ["slide"] * len(part)} if cached else {}
                out.extend(bytes_of(normaliser.transform(part, **keys)))  # its call itself hides errors
            return out

        size = "by one" if batch == 1 else f"by {batch}"
        return Program(f"torch-staintools ({size})", method, "apply" if cached else "fit + apply", run)

    too_slow = Program("torch-staintools", "vahadane", "fit + apply", missing="seconds a tile: --slow measures it")
    return [
        *(program("macenko", batch, cached=True) for batch in (1, BATCH)),
        Program("torch-staintools", "reinhard", "apply", missing="measures each tile anew"),
        *(program(method, batch) for method in ("macenko", "reinhard") for batch in (1, BATCH)),
        program("vahadane", 1) if slow else too_slow,
    ]


def programs_of(tiles: U8, target: U8, *, slow: bool) -> list[Program]:
    """Make all programs; of a peer that cannot be used, one that says why."""
    made = ours(tiles, target)
    import wsi.nn.backbone  # noqa: F401  # mends torchvision where its build does not fit torch's, which peers import

    peers = {
        "torchstain": torchstain,
        "tiatoolbox": tiatoolbox,
        "torch-staintools": functools.partial(torch_staintools, slow=slow),
    }
    for name, peer in peers.items():
        try:
            made += peer(tiles, target)
        except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
            made.append(Program(name, "all", "all", missing=reason_of(error)))
    return made


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(run: Run, parts: Sequence[U8], pool: ThreadPoolExecutor, passes: int) -> float:
    """Time `passes` of `run` over the parts, a thread each; CPU time where there is one."""
    clock = time.process_time if len(parts) == 1 else time.perf_counter
    begun = clock()
    for _ in range(passes):
        if len(parts) == 1:
            run(parts[0])
        else:
            list(pool.map(run, parts))
    return (clock() - begun) / passes


def best_speeds(runs: dict[int, Run], tiles: U8, threads: int, rounds: int) -> dict[int, float | str]:
    """Megapixels a second of each program, which take turns; or why it has none."""
    parts = [np.ascontiguousarray(part) for part in np.array_split(tiles, threads)]
    best = dict.fromkeys(runs, float("inf"))
    passes: dict[int, int] = {}
    failed: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for i in [i for _ in range(rounds + 1) for i in runs]:
            try:
                took = seconds(runs[i], parts, pool, passes.get(i, 1))
            except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
                failed[i] = reason_of(error)
                continue
            if i in passes:
                best[i] = min(best[i], took)
            passes.setdefault(i, 1 + int(LEAST_S / max(took, 1e-4)))  # the first time is not counted
    return {i: failed.get(i, tiles.size / 3e6 / s) for i, s in best.items()}


def fallbacks(tiles: U8, target: U8) -> int:
    """Tiles that one of our methods could not measure, which costs less than a fit."""
    wanted = {method: fit(method, target, target) for method in ("macenko", "reinhard", "vahadane")}
    return sum(any(fit(method, tile, wanted[method]).fallback for method in wanted) for tile in tiles)


def how_far(got: Sequence[U8], references: dict[str, Sequence[U8]]) -> dict[str, Any]:
    """Difference to the nearest of ours in grey levels, mean and largest."""
    apart = {name: np.abs(np.stack(got).astype(int) - np.stack(ref)) for name, ref in references.items()}
    nearest = min(apart, key=lambda name: apart[name].mean())
    return {"apart_mean": float(apart[nearest].mean()), "apart_max": int(apart[nearest].max()), "apart_from": nearest}


def main() -> None:
    """Print a row for each program, method and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow", action="store_true", help="also what takes minutes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # else TIAToolbox logs to stdout
    tiles, target, origin = tiles_and_target(options.tiles)
    programs = programs_of(tiles, target, slow=options.slow)

    runs, pixels, rows = {}, {}, []
    for i, program in enumerate(programs):
        row: dict[str, Any] = {"task": program.task, "method": program.method, "program": program.name}
        rows.append(row)
        try:
            if program.run is None:
                raise NotImplementedError(program.missing)
            pixels[i] = [np.array(tile) for tile in program.run(tiles)]
            if program.task != "copy" and np.array_equal(np.stack(pixels[i]), tiles):
                raise NotImplementedError("gave back its input")
            runs[i] = program.run
        except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
            row["reason"] = str(error) if isinstance(error, NotImplementedError) else reason_of(error)
    for threads in (1, 2):
        for i, speed in best_speeds(dict(runs), tiles, threads, options.rounds).items():
            rows[i]["reason" if isinstance(speed, str) else f"mpx_s_{threads}"] = speed
            if isinstance(speed, str):
                runs.pop(i)

    memcpy = next(row["mpx_s_1"] for row in rows if row["task"] == "copy")
    for i in runs:
        same = [j for j in runs if all(rows[j][key] == rows[i][key] for key in ("task", "method"))]
        mine = {programs[j].name: j for j in same if programs[j].name.startswith("wsi")}
        rows[i]["of_memcpy"] = rows[i]["mpx_s_1"] / memcpy
        if "wsi" in mine:
            rows[i]["of_wsi"] = rows[i]["mpx_s_1"] / rows[mine["wsi"]]["mpx_s_1"]
            if i not in mine.values():
                rows[i] |= how_far(pixels[i], {name: pixels[j] for name, j in mine.items()})
    rows.sort(key=lambda row: (row["task"] != "copy", row["task"], row["method"]))

    packages = ["wsi", "numpy", "torch", "torchstain", "tiatoolbox", "torch-staintools"]
    facts = {**machine(), **versions(packages), "tiles": f"{len(tiles)} of {TILE_PX} px, {origin}"}
    facts["of which a fit of ours fell back on"] = str(fallbacks(tiles, target))
    if options.json:
        print(json.dumps({"facts": facts, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = {
        "task": "task", "method": "method", "program": "program", "mpx_s_1": "Mpx/s, 1 thread",
        "mpx_s_2": "2 threads", "of_memcpy": "of memcpy", "of_wsi": "of wsi", "apart_mean": "grey levels apart",
        "apart_max": "at most", "apart_from": "from",
    }  # fmt: skip
    print_table(columns, rows)


if __name__ == "__main__":
    main()
