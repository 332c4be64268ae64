"""Slides scored: `wsi score` beside wsinfer and tiatoolbox, the same tiles by the same network, on the CPU.

    make bench-peers                                             # everything, in .venv-peers
    .venv-peers/bin/python benchmarks/compare/archive.py --slides 8 --size 16384 --rounds 3 --json

Slides are phantoms at 0.25 mpp, the network is one of timm's with random weights, on patches of 224 px at 0.5 mpp. Each
program runs in a process of its own, from its start to its last file, once on the first slide alone and once on all:
the difference is what more slides cost, without start and imports. Programs take turns and the best of several rounds
counts. Memory is that of all the program's processes together, pages they share counted once. Which tiles: those that
wsi finds tissue in; the others are given them and need not look. The last columns say how many each really scored,
how many of those at the same place as wsi, and how far their probabilities are apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import cores, machine, print_table, reason_of, versions, watched
from scorers import CLASSES, MEAN, MPP, PROGRAMS, SLIDE_MPP, STD, TILE_PX, Job, Scores

Result = dict[str, Any]

TILE_LEVEL0_PX = round(TILE_PX * MPP / SLIDE_MPP)
SEED = 7
DIFFERENT = 4  # slides drawn; further ones are the same under other names


def write_slides(folder: Path, n: int, size: int) -> None:
    """Write `n` slides into `folder`/all, and the first of them into `folder`/one."""
    from wsi.phantom import PhantomConfig, write_phantom

    for part in ("drawn", "all", "one"):
        (folder / part).mkdir(parents=True)
    for i in range(min(n, DIFFERENT)):
        write_phantom(folder / "drawn" / f"{i}.svs", PhantomConfig(size=(size, size), mpp=SLIDE_MPP, seed=SEED + i))
    for part, slides in (("all", n), ("one", 1)):  # which hold nothing but slides: drawn ones have their truth beside
        for i in range(slides):
            os.link(folder / "drawn" / f"{i % DIFFERENT}.svs", folder / part / f"p{i:03}.svs")


def write_model(folder: Path, network: str) -> None:
    """Write a folder in the manner of WSInfer's zoo: weights for wsi and tiatoolbox, TorchScript for wsinfer."""
    import torch
    from safetensors.torch import save_file

    from wsi.nn.backbone import TimmNet

    torch.manual_seed(SEED)
    net = TimmNet(network, num_classes=len(CLASSES)).eval()
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "weights.safetensors")
    with torch.inference_mode():
        torch.jit.trace(net, torch.zeros(2, 3, TILE_PX, TILE_PX)).save(folder / "torchscript_model.pt")
    transform = [
        {"name": "Resize", "arguments": {"size": TILE_PX}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": MEAN, "std": STD}},
    ]
    config = {"spec_version": "1.0", "architecture": network, "num_classes": len(CLASSES), "class_names": CLASSES}
    config |= {"name": network, "patch_size_pixels": TILE_PX, "spacing_um_px": MPP, "transform": transform}
    (folder / "config.json").write_text(json.dumps(config))


def write_tiles(folder: Path, slides: Path) -> None:
    """Write which tiles wsi scores in the forms of the others: coordinates for wsinfer, a mask for tiatoolbox."""
    import h5py
    from PIL import Image

    from wsi import ScoreConfig, TileGrid, find_tissue, open_slide

    folder.mkdir()
    for path in sorted(slides.iterdir()):
        with open_slide(str(path)) as slide:
            grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=MPP, tile_px=TILE_PX)
            share = find_tissue(slide).fraction(grid.boxes())
            cells = np.zeros((grid.rows.max() + 1, grid.columns.max() + 1), np.uint8)
        grid = grid.keep(share >= ScoreConfig().min_tissue)
        with h5py.File(folder / f"{path.stem}.h5", "w") as file:
            coords = file.create_dataset("coords", data=grid.boxes()[:, :2].round().astype(np.int64))
            coords.attrs.update({"patch_size": TILE_LEVEL0_PX, "patch_level": 0, "patch_spacing_um_px": MPP})
        (folder / f"{path.stem}.jpg").touch()  # a picture that it would draw
        # A tile is taken where any of its mask is set: only its middle is, so that rounding touches no neighbour.
        cells[grid.rows, grid.columns] = 255
        mask = np.kron(cells, np.pad(np.ones((4, 4), np.uint8), 2))
        Image.fromarray(np.stack([mask] * 3, axis=2)).save(folder / f"{path.stem}.png")


def one_run(name: str, part: str, folder: Path, batch: int, workers: int) -> Result:
    """Run a program on one slide or all, and read what it wrote; its home is empty and it has no network."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        inputs = (str(folder / kind) for kind in (f"slides/{part}", "model", "tiles"))
        job = Job(*inputs, out=f"{scratch}/out", batch=batch, workers=workers)
        environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HOME": scratch}
        script, log = Path(__file__).with_name("scorers.py"), Path(scratch) / "log.txt"
        command = [sys.executable, str(script), name, json.dumps(dataclasses.asdict(job))]
        result = watched(command, environment, log)
        if result.pop("code"):
            lines = log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "ended without a word")
        scores = dict(PROGRAMS[name].read(job))
    if not scores:
        raise RuntimeError("scored nothing")
    return result | {"scores": scores}


def row_of(name: str, rounds: list[tuple[Result, Result]], reference: Scores | None) -> Result:
    """Make a program's row from its rounds: on one slide, on all."""
    scores = rounds[0][1]["scores"]
    wall, cpu = (min(every[key] for _, every in rounds) for key in ("wall_s", "cpu_s"))
    further = len(scores) - len(rounds[0][0]["scores"])
    further_s = wall - min(first["wall_s"] for first, _ in rounds)
    row: Result = {
        "program": name,
        "tiles": len(scores),
        "wall_s": wall,
        "cpu_s": cpu,
        "per_second": len(scores) / wall,
    }
    row["further_per_second"] = further / further_s if further and further_s > 0 else None
    row["peak_mib"] = rounds[0][1]["peak_mib"]
    if reference is not None:
        same = sorted(reference.keys() & scores.keys())
        apart = np.array([abs(reference[tile] - scores[tile]) for tile in same])
        row["same_tiles"] = len(same)
        row |= {"apart_mean": float(apart.mean()), "apart_max": float(apart.max())} if same else {}
    return row


def main() -> None:
    """Make slides, model and tiles, let the programs take turns, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--size", type=int, default=8192, help="side in pixels; made a whole number of tiles")
    parser.add_argument("--network", default="resnet18", help="any of timm's")
    parser.add_argument("--batch", type=int, default=64, help="patches a forward pass, of all programs")
    parser.add_argument("--workers", type=int, default=len(cores()), help="DataLoader processes of those that have any")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--scratch", type=Path, help="a folder to write in; default: the system's temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()

    size = options.size // TILE_LEVEL0_PX * TILE_LEVEL0_PX  # no tile over the edge, which programs fill differently
    rounds: dict[str, list[tuple[Result, Result]]] = {name: [] for name in options.programs}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="archive-") as name:
        folder = Path(name)
        write_slides(folder / "slides", options.slides, size)
        write_model(folder / "model", options.network)
        write_tiles(folder / "tiles", folder / "slides" / "all")
        for i in range(options.rounds):
            for program in [name for name in options.programs if name not in reasons]:
                print(f"round {i + 1} of {options.rounds}: {program}", file=sys.stderr, flush=True)
                try:
                    one, every = (
                        one_run(program, part, folder, options.batch, options.workers) for part in ("one", "all")
                    )
                    rounds[program].append((one, every))
                except Exception as error:  # noqa: BLE001  # a peer may raise anything: it goes into the table
                    reasons[program] = reason_of(error)

    of_ours = next((r[0][1]["scores"] for name, r in rounds.items() if r and name.startswith("wsi,")), None)
    rows = [
        {"program": name, "reason": reasons[name]} if name in reasons else row_of(name, rounds[name], of_ours)
        for name in options.programs
    ]
    facts = {
        **machine(),
        **versions([*(p.package for p in PROGRAMS.values()), "torch"]),
        "slides": f"{options.slides} of {size} px",
        "network": f"{options.network}, batches of {options.batch}, {options.workers} workers",
    }
    if of_ours:
        values = np.array(list(of_ours.values()))
        facts["probabilities"] = f"{values.mean():.3g}, deviation over tiles {values.std():.2g}"
    if options.json:
        print(json.dumps({"facts": facts, "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    columns = {
        "program": "program", "wall_s": "wall s", "cpu_s": "CPU s", "per_second": "tiles per s",
        "further_per_second": "per s, further slides", "peak_mib": "peak MiB", "tiles": "tiles",
        "same_tiles": "same place", "apart_mean": "apart, mean", "apart_max": "max",
    }  # fmt: skip
    print_table(columns, rows)


if __name__ == "__main__":
    main()
