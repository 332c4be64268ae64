"""MUSK1 and Elephant, every MIL architecture, by a protocol that looks at no test fold.

    python benchmarks/mil/classical.py --data ../shared/data/mil --sets musk1 elephant --out mil-classical.jsonl

Stratified 10-fold cross-validation, repeated 5 times with other folds and seeds; a fixed number of epochs (no early
stopping, nothing chosen); features standardised by the training fold; threshold 0.5. The same settings for every
architecture and both sets, taken from Ilse et al. 2018 where they say (layers 256, 128, 64; attention 64; weight decay
5e-3) and chosen beforehand where they do not. Folds that are in --out already are not run again.

The standard error is over the folds; folds of one repeat share training bags, so it is too small rather than too large.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from wsi.metrics.roc import auroc
from wsi.nn.mil import MIL_NETS, TrainingBag
from wsi.train.cohort import Case, Cohort, Split, k_fold
from wsi.train.mil import BagStats, MilConfig, train_member

EPOCHS, FOLDS, LR, WEIGHT_DECAY = 50, 10, 5e-4, 5e-3
LAYERS = {"hidden": [256, 128, 64], "dropout": 0.5}
#: What differs: a bag here has 2 to 40 instances without places.
OWN = {
    "attention": {"attention": 64}, "gated-attention": {"attention": 64}, "additive": {"attention": 64, "psi": 32},
    "clam-sb": {"attention": 64}, "clam-mb": {"attention": 64}, "dtfd": {"attention": 64, "groups": 2},
    "top-k": {"top": 1}, "transmil": {"hidden": 64, "heads": 8, "positions": "bag"},
}  # fmt: skip


class Table:
    """Bags of a CSV ``label, bag, features...`` in memory, with what training asks of bags."""

    def __init__(self, path: Path) -> None:
        rows = np.loadtxt(path, delimiter=",")
        self.in_features = rows.shape[1] - 2
        self.bags, self.stats, cases = {}, {}, {}
        for bag in np.unique(rows[:, 1]):
            of = rows[rows[:, 1] == bag]
            name, x = f"{bag:g}", of[:, 2:]
            self.bags[name] = TrainingBag(torch.from_numpy(x).float())
            self.stats[name] = BagStats(len(x), x.sum(0), (x * x).sum(0))
            cases[name] = Case(name, name, int(of[:, 0].max() > 0))
        self.cohort = Cohort(cases, ("negative", "positive"))

    def __getitem__(self, name: str) -> TrainingBag:
        return self.bags[name]


def run(table: Table, name: str, repeat: int, fold: int) -> dict[str, float]:
    """Train on nine folds, and score the tenth once."""
    division = k_fold(table.cohort, FOLDS, seed=repeat)[fold]
    split = Split(division.train + division.validation, (), division.test)
    arguments = LAYERS | OWN.get(name, {})
    config = MilConfig(
        name, arguments, epochs=EPOCHS, patience=None, lr=LR, weight_decay=WEIGHT_DECAY, seed=100 * repeat + fold
    )
    member = train_member(table.cohort, table, split, config)
    said = {i: float(torch.from_numpy(member.logits[i]).softmax(0)[1]) for i in split.test}
    return {i: round(p, 6) for i, p in said.items()}


def summary(table: Table, rows: list[dict]) -> str:
    """Accuracy: mean, standard error over folds, deviation over repeats; AUROC: mean over folds with both classes."""
    right, area, by_repeat = [], [], {}
    for row in rows:
        label = np.array([table.cohort.cases[i].label for i in row["said"]])
        score = np.array(list(row["said"].values()))
        right.append(float(((score >= 0.5) == label).mean()))
        by_repeat.setdefault(row["repeat"], []).append(right[-1])
        found = auroc(label, score).value
        area += [] if found is None else [found]
    repeats = [np.mean(values) for values in by_repeat.values() if len(values) == FOLDS]
    spread = f"{np.std(repeats, ddof=1):.3f}" if len(repeats) > 1 else "-"
    error = np.std(right, ddof=1) / len(right) ** 0.5 if len(right) > 1 else float("nan")
    return f"{np.mean(right):.3f} | {error:.3f} | {spread} | {np.mean(area):.3f} | {len(right)}"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with musk1.csv and elephant.csv")
    parser.add_argument("--sets", nargs="+", default=["musk1", "elephant"])
    parser.add_argument("--models", nargs="+", default=list(MIL_NETS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("mil-classical.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.is_file() else []
    known = {(row["set"], row["model"], row["repeat"], row["fold"]) for row in done}
    tables = {name: Table(arguments.data / f"{name}.csv") for name in arguments.sets}
    with arguments.out.open("a") as file:
        for repeat in range(arguments.repeats):
            for name in arguments.sets:
                for model in arguments.models:
                    for fold in range(FOLDS):
                        if (name, model, repeat, fold) not in known:
                            said = run(tables[name], model, repeat, fold)
                            row = {"set": name, "model": model, "repeat": repeat, "fold": fold, "said": said}
                            file.write(json.dumps(row) + "\n")
                            file.flush()
                            done.append(row)
    for name in arguments.sets:
        print(f"\n| {name} | accuracy | standard error | deviation of repeats | AUROC | folds |")
        print("|---|---|---|---|---|---|")
        for model in arguments.models:
            rows = [row for row in done if (row["set"], row["model"]) == (name, model)]
            if rows:
                print(f"| {model} | {summary(tables[name], rows)} |")


if __name__ == "__main__":
    main()
