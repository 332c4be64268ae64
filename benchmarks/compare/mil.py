"""Our MIL networks beside those of torchmil: accuracy on the same folds, CPU time of an epoch, a bag of 100,000 tiles.

    .venv-peers/bin/python benchmarks/compare/mil.py                              # large bags, as make bench-peers does
    .venv-peers/bin/python benchmarks/compare/mil.py --data ../shared/data/mil    # and MUSK1

The same widths, optimiser (AdamW), epochs, standardisation, order of bags and folds for both; torchmil's networks in
a plain loop of ours, without its Trainer and loaders, which flatters it. One thread; seconds are the CPU's. Large bags:
one step of training and one grading of 100,000 tiles (`--tiles`) of 384 features, float32 for both, each in a process
of its own; memory is what comes on top of the features. What is not the same: torchmil's networks get standardised
features, ours standardise them and check them; ours give each tile's contribution; torchmil's TransMIL has no places
and no blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, peak_mib, print_table, reason_of, versions

from wsi.nn.mil import Head, Targets, TrainingBag, make_net
from wsi.train.cohort import Split, k_fold
from wsi.train.mil import MilConfig, scale_of, train_member

MODELS = ("gated-attention", "dsmil", "clam-sb", "dtfd", "transmil")
WIDTH, HIDDEN = 384, 128
EPOCHS, LR, DECAY = 50, 5e-4, 5e-3


def classical() -> Any:
    """Load ../mil/classical.py, for its table of bags."""
    path = Path(__file__).resolve().parents[1] / "mil" / "classical.py"
    spec = importlib.util.spec_from_file_location("classical", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(name: str, d: int, hidden: list[int], attention: int, dropout: float) -> torch.nn.Module:
    """Make torchmil's network of that name, behind the embedding that ours has."""
    from torchmil import models

    layers: list[torch.nn.Module] = []
    for a, b in zip([d, *hidden], hidden, strict=False):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
    front: dict[str, Any] = {"in_shape": (d,), "feat_ext": torch.nn.Sequential(*layers)}
    if name == "gated-attention":
        return models.ABMIL(att_dim=attention, gated=True, **front)
    if name == "dsmil":
        return models.DSMIL(att_dim=128, nonlinear_q=True, **front)
    if name == "clam-sb":
        return models.CLAM_SB(att_dim=attention, gated=True, k_sample=8, **front)
    if name == "dtfd":
        return models.DTFDMIL(att_dim=attention, n_groups=4, distill_mode="afs", **front)
    return models.TransMIL(att_dim=hidden[-1], n_heads=8, n_landmarks=256, **front)


def ours(name: str, d: int, hidden: list[int], attention: int, dropout: float) -> Any:
    own = {"attention": attention} if name in ("gated-attention", "clam-sb", "dtfd") else {}
    if name == "transmil":
        return make_net(name, in_features=d, hidden=hidden[-1], dropout=dropout, heads=8, positions="bag")
    return make_net(name, in_features=d, hidden=hidden, dropout=dropout, **own)


def fold(table: Any, name: str, which: str, number: int) -> tuple[list[bool], float]:
    """Train on nine folds of MUSK1: which bags of the tenth are right, and CPU seconds an epoch."""
    division = k_fold(table.cohort, 10, seed=0)[number]
    train, test = division.train + division.validation, division.test
    label = {i: table.cohort.cases[i].label for i in (*train, *test)}
    begun = time.process_time()
    if which == "wsi":
        arguments = {"hidden": [256, 128, 64], "dropout": 0.5} | ({} if name == "dsmil" else {"attention": 64})
        config = MilConfig(name, arguments, epochs=EPOCHS, patience=None, lr=LR, weight_decay=DECAY, seed=number)
        member = train_member(table.cohort, table, Split(train, (), test), config)
        said = {i: int(member.logits[i].argmax()) for i in test}
    else:
        torch.manual_seed(number)
        net: Any = peer(name, table.in_features, [256, 128, 64], 64, 0.5)
        mean, std = scale_of([table.stats[i] for i in train])
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        bags = {i: ((table[i].features - mean) / std)[None] for i in label}
        optimiser = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY, fused=True)
        for epoch in range(EPOCHS):
            net.train()
            for group in optimiser.param_groups:
                group["lr"] = LR * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS))
            for j in np.random.default_rng((number, epoch)).permutation(len(train)):
                _, losses = net.compute_loss(torch.tensor([label[train[j]]]), bags[train[j]])
                optimiser.zero_grad()
                sum(losses.values()).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
                optimiser.step()
        net.eval()
        with torch.inference_mode():
            said = {i: int(float(net(bags[i])) > 0) for i in test}
    seconds = (time.process_time() - begun) / EPOCHS
    return [said[i] == label[i] for i in test], seconds


def large(name: str, which: str, tiles: int) -> dict[str, float]:
    """One step and one grading of a large bag, in this process."""
    torch.manual_seed(0)
    features = torch.randn(tiles, WIDTH)
    make = ours if which == "wsi" else peer
    small = torch.randn(50, WIDTH)
    net: Any = make(name, WIDTH, [HIDDEN], 64, 0.25)

    def step(x: torch.Tensor) -> None:
        if which == "wsi":
            loss = net.loss([TrainingBag(x)], Targets(torch.tensor([1])), Head("softmax", 2).loss)
        else:
            loss = sum(net.compute_loss(torch.tensor([1]), x[None])[1].values())
        loss.backward()

    def grade(x: torch.Tensor) -> None:
        with torch.inference_mode():
            # torchmil's TransMIL gives attention only as a table of all tiles by all tiles: 300 GiB here
            _ = net(x) if which == "wsi" else net.predict(x[None], **{"return_inst_pred": name != "transmil"})

    found = {}
    step(small)
    before = peak_mib() or 0
    for what, work in (("grade", grade), ("step", step)):  # peaks only rise: the smaller first
        net.train(what == "step")
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            work(features)
            seconds.append(time.process_time() - begun)
        found |= {f"{what}_s": min(seconds), f"{what}_mib": float((peak_mib() or 0) - before)}
    return found


def in_own_process(name: str, which: str, tiles: int) -> dict[str, Any]:
    """Run ``large`` where nothing else has taken memory; a reason where it failed."""
    call = [sys.executable, __file__, "--large", name, which, "--tiles", str(tiles)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"reason": f"stopped: {lines[-1] if lines else f'signal {-done.returncode}'}"[:100]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with musk1.csv; without it large bags alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--folds", type=int, default=10, help="of the ten, how many")
    parser.add_argument("--tiles", type=int, default=100_000, help="of the large bag")
    parser.add_argument("--large", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.large:
        print(json.dumps(large(*arguments.large, arguments.tiles)))
        return
    print(json.dumps(machine() | versions(["wsi", "torch", "torchmil"])))
    if arguments.data:
        table = classical().Table(arguments.data / "musk1.csv")
        rows: list[dict[str, Any]] = []
        for name in [name for name in arguments.models if name != "transmil"]:
            for which in ("wsi", "torchmil"):
                row: dict[str, Any] = {"model": name, "program": which}
                try:
                    runs = [fold(table, name, which, number) for number in range(arguments.folds)]
                    right = [float(np.mean(hits)) for hits, _ in runs]
                    row |= {"accuracy": f"{np.mean(right):.3f}", "epoch": min(seconds for _, seconds in runs)}
                    row["error"] = f"{np.std(right, ddof=1) / len(right) ** 0.5:.3f}"
                except Exception as error:  # noqa: BLE001  a peer that fails is a row
                    row["reason"] = reason_of(error)
                rows.append(row)
        print_table(
            {"model": "MUSK1", "program": "", "accuracy": "accuracy", "error": "s.e.", "epoch": "CPU s an epoch"}, rows
        )
    both = [(name, which) for name in arguments.models for which in ("wsi", "torchmil")]
    rows = [{"model": n, "program": w, **in_own_process(n, w, arguments.tiles)} for n, w in both]
    columns = {"step_s": "step, CPU s", "step_mib": "step, MiB", "grade_s": "grade, CPU s", "grade_mib": "grade, MiB"}
    print_table({"model": f"{arguments.tiles:,} tiles", "program": "", **columns}, rows)


if __name__ == "__main__":
    main()
