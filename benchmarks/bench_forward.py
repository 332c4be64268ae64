"""Patch networks on this CPU: tiles a second, and how near they come to what the CPU can do.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/bench_forward.py resnet18 idc-breast --precision float32

(threads wait as in the workers of `wsi score`)

Batches go through ``PatchModel.score``; the best of the rounds counts. Timed between them: the product of two
square matrices, and the network before ``for_inference``. The column "of matmul" has the network's multiply-adds a
second (as it is written down) over those of the product, "of plain" how many times as fast it has become. The process
keeps freed memory, as `wsi score` does; `--default-memory` shows what the C library's default costs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from wsi.memory import keep_freed_memory
from wsi.nn.checkpoint import ModelConfig, known_models
from wsi.nn.fold import for_inference
from wsi.nn.patch import PatchModel, load_patch_model, make_net

NAMES = ("resnet18", "mobilenetv3_small_050", "efficientnet_b0", "vit_tiny_patch16_224", "idc-breast", "phantom")
MATRIX = 3072


def load(name: str, precision: str, *, fold: bool) -> PatchModel:
    """Load a model of ours, or make a network of timm's with random weights, as it would be loaded."""
    if name in known_models():
        return load_patch_model(name, device="cpu", precision=precision, fold=fold)
    config = ModelConfig(Path(name), "patch", name, ("a", "b"), 2, tile_px=224, mpp=0.5)
    torch.manual_seed(0)
    net = make_net(config).eval()
    if fold:
        for_inference(net, "cpu", precision)
    return PatchModel(
        config, net, name=name, num_features=net.num_features, sha256="", device="cpu", precision=precision
    )


def multiply_adds(model: PatchModel) -> float:
    """Count the multiply-adds of one tile, in convolutions and matrix products."""
    side = model.config.tile_px
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.net.classify(model.net.embed(torch.zeros(1, 3, side, side)))
    return counter.get_total_flops() / 2


def main() -> None:
    """Print a row for each network and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--precision", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--default-memory", action="store_true", help="as torch runs elsewhere")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    if not asked.default_memory:
        keep_freed_memory()
    precisions = asked.precision or ["float32", "bfloat16"]
    rows: list[dict[str, Any]] = []
    for name in asked.names:
        for precision in precisions:
            rows.append(measure(name, precision, asked.batch, asked.rounds))
            if not asked.json:
                print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    if asked.json:
        print(json.dumps(rows, indent=2))


def measure(name: str, precision: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time one network: a row of the table in RESULTS.md."""
    model, plain = (load(name, precision, fold=fold) for fold in (True, False))
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    square = torch.rand(MATRIX, MATRIX).to(kind)
    rgb = np.random.default_rng(0).integers(0, 256, (batch, *(model.config.tile_px,) * 2, 3), np.uint8)
    x = model.normalised(rgb)
    jobs: dict[str, Callable[[], Any]] = {
        "matmul": lambda: square @ square,
        "score": lambda: model.score(x),
        "plain": lambda: plain.score(x),
    }
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds + 1):  # the first one touches the memory
        for job, work in jobs.items():
            begun = time.perf_counter()
            work()
            best[job] = min(best[job], time.perf_counter() - begun)
    limit, speed = MATRIX**3 / best["matmul"], batch / best["score"]
    return {
        "network": name,
        "precision": precision,
        "tiles/s": round(speed, 1),
        "matmul G/s": round(limit / 1e9),
        "of matmul": round(speed * multiply_adds(plain) / limit, 2),
        "of plain": round(best["plain"] / best["score"], 2),
    }


if __name__ == "__main__":
    main()
