"""Many small slides: what the archive adds to scoring them one by one, and whether its memory grows.

    python benchmarks/bench_archive.py --slides 1000
    python benchmarks/bench_archive.py --slides 3 --size 8192 --network resnet18 --pure --rounds 4

Slides are phantoms: a few different ones under many names. Printed are the seconds that slides took inside (the sum of
their stages) and outside (between them: claims, hand-over, tables) a slide, resident memory of run and worker over the
slides, and with `--pure` the wall against the forward passes of as many tiles, held in memory ready for the network, in
batches as full: by turns, `--rounds` times, since the machine's own pace moves by more than what is measured.
`--network` is any of timm's, with random weights; default is the model `phantom`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from wsi import EngineConfig, ScoreConfig, find_slides, score_archive
from wsi.archive import Event
from wsi.memory import keep_freed_memory
from wsi.phantom import PhantomConfig, write_phantom

DIFFERENT = 10


def write_slides(folder: Path, n: int, size: int) -> None:
    """Write `n` slides of which `DIFFERENT` are different."""
    folder.mkdir()
    for i in range(n):
        path = folder / f"s{i:04}.tif"
        if i < DIFFERENT:
            write_phantom(path, PhantomConfig(size=(size, size), seed=i))
        else:
            os.link(folder / f"s{i % DIFFERENT:04}.tif", path)


def write_model(folder: Path, network: str) -> None:
    """Write a model folder with random weights."""
    import torch
    from safetensors.torch import save_file

    from wsi.nn.backbone import TimmNet

    torch.manual_seed(0)
    folder.mkdir()
    net = TimmNet(network, num_classes=2)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "weights.safetensors")
    transform = [{"name": "ToTensor"}, {"name": "Normalize", "arguments": {"mean": [0.5] * 3, "std": [0.25] * 3}}]
    config = {"spec_version": "1.0", "architecture": network, "num_classes": 2, "class_names": ["no", "yes"]}
    config |= {"name": network, "patch_size_pixels": 224, "spacing_um_px": 0.5, "transform": transform}
    (folder / "config.json").write_text(json.dumps(config))


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return float("nan")


def child() -> str:
    """Our worker's process number."""
    return (Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() or ["0"])[0]


def pure_seconds(engine: EngineConfig, results: Path) -> float:
    """Forward passes alone, over as many tiles as the results hold."""
    from wsi.store import PatchStore

    model = engine.load().model
    n = sum(len(PatchStore.open(path)) for path in results.glob("*/store.zarr"))
    rgb = np.random.default_rng(0).integers(0, 256, (64, model.config.tile_px, model.config.tile_px, 3), np.uint8)
    x = model.normalised(rgb)
    model.score(x)
    begun = time.perf_counter()
    for _ in range(n // 64):
        model.score(x)
    if n % 64:
        model.score(x[: n % 64])
    return time.perf_counter() - begun


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--network")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="of --pure")
    chosen = parser.parse_args()
    # As workers do, for the passes that they are compared with.
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder / "slides", chosen.slides, chosen.size)
        model = "phantom"
        if chosen.network:
            write_model(folder / "model", chosen.network)
            model = str(folder / "model")
        engine = EngineConfig(model, precision=chosen.precision, threads=2)
        at: list[float] = []
        memory: list[tuple[float, float]] = []
        ratios: list[float] = []

        def tell(event: Event) -> None:
            if event.kind == "begin" and not at:
                at.append(time.perf_counter())
            if event.kind in ("done", "failed"):
                at.append(time.perf_counter())
                memory.append((resident_mib("self"), resident_mib(child())))

        refs = find_slides([str(folder / "slides")])
        summary = score_archive(refs, folder / "results", engine, ScoreConfig(), tell=tell)
        assert not summary.failed, summary.failed[0]
        wall = at[-1] - at[0]
        parts = [name for name in summary.done[0] if name.startswith("seconds_") and "_tiles_" not in name]
        stages = [sum(row[name] for name in parts if "threads" not in name) for row in summary.done]
        tiles = sum(row["n_tiles"] for row in summary.done)
        shares = {name.removeprefix("seconds_"): sum(row[name] for row in summary.done) for name in summary.done[0]
                  if name.startswith("seconds_")}  # fmt: skip
        gaps = np.diff(at) - np.array(stages)
        print(f"{len(refs)} slides of {chosen.size} px, {tiles} tiles, model {chosen.network or model}")
        print(f"wall {wall:.1f} s, {wall / len(refs) * 1000:.1f} ms a slide, {tiles / wall:.0f} tiles/s")
        print(f"outside slides: mean {gaps.mean() * 1000:.1f} ms, median {np.median(gaps) * 1000:.1f} ms a slide")
        print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in shares.items() if seconds >= 0.05))
        for i, who in enumerate(("run", "worker")):
            seen = np.array([pair[i] for pair in memory])[len(memory) // 5 :]
            slope = np.polyfit(np.arange(len(seen)), seen, 1)[0] * 100 if len(seen) > 2 else float("nan")
            print(f"memory of the {who}: last {seen[-1]:.0f} MiB, spread {seen.std():.2f}", end="; ")
            print(f"slope over the last 80 %: {slope:+.2f} MiB per 100 slides")
        for i in range(chosen.rounds if chosen.pure else 0):
            if i:
                at.clear()
                score_archive(refs, folder / f"results{i}", engine, ScoreConfig(), tell=tell)
                wall = at[-1] - at[0]
            pure = pure_seconds(engine, folder / "results")
            ratios.append(wall / pure)
            print(f"archive {wall:.1f} s, forward passes alone {pure:.1f} s: {ratios[-1]:.3f}")
        if ratios:
            print(f"median {np.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
