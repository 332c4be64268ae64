"""Real H&E bags, every MIL architecture: is there carcinoma among these tiles, and which tiles say so?

    python benchmarks/mil/real_bags.py --data ../shared/data --cache FOLDER             # validation, some of an hour
    python benchmarks/mil/real_bags.py --data ../shared/data --cache FOLDER --test      # once, when all is decided

Bags of breast tiles (`idc_breast_dev_*.zip`), drawn as for the head of models/idc-breast: 8 to 40 tiles of one patient,
with IDC in 10, 20, 40 or 80 % of them or in none, in pairs of the same patient and size. Patients are divided as for
that model. Training sees the bags' labels alone; validation patients stop it; test patients are scored by --test.
The same settings for all, taken from the shipped head; three seeds, whose mean is scored, as `wsi train mil` ships it.

Features, computed once: those of models/idc-breast, whose network learnt from the *tiles'* labels of the training
patients; and 39 colour and edge statistics, which learnt from nothing.

`--pcam`: the ten bags of `mil_pcam_bags.zip` (no tile has a label), each left out once. Ten bags rank nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from wsi.nn.encoder import load_encoder
from wsi.nn.mil import MIL_NETS, TrainingBag
from wsi.train.cohort import Case, Cohort, Split
from wsi.train.mil import MilConfig, stats_of, train_member

SEEDS, FEATURES = 3, ("idc-breast", "hand-made")
CONFIG = {"epochs": 30, "patience": 6, "lr": 5e-4, "weight_decay": 1e-2}
WIDTH = {"hidden": 32, "dropout": 0.25}
OWN = {
    "attention": {"attention": 16}, "gated-attention": {"attention": 16}, "additive": {"attention": 16},
    "clam-sb": {"attention": 16}, "clam-mb": {"attention": 16}, "dtfd": {"attention": 16}, "top-k": {"top": 3},
    "transmil": {"positions": "bag"},
}  # fmt: skip


def program(path: Path) -> Any:
    """Load a training program of models/, for its one definition of data, division and bags."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = Path(__file__).resolve().parents[2] / "models" / "idc-breast"
patch, head = program(MODELS / "train.py"), program(MODELS / "mil" / "train.py")


class Table:
    """Bags in memory, with what training asks of bags."""

    def __init__(self, bags: dict[str, np.ndarray]) -> None:
        self._bags = {name: TrainingBag(torch.from_numpy(np.float32(x))) for name, x in bags.items()}
        self.stats = {name: stats_of(x) for name, x in bags.items()}
        self.in_features = next(iter(bags.values())).shape[1]

    def __getitem__(self, name: str) -> TrainingBag:
        return self._bags[name]


def features_of(images: np.ndarray, kind: str, cache: Path) -> np.ndarray:
    """Features of tiles (n, 50, 50, 3), from the cache where they are there."""
    path = cache / f"{kind}-{len(images)}.npy"
    if not path.is_file():
        if kind == "hand-made":
            found = patch.hand_made_features(images)
        else:
            encoder = load_encoder(kind, precision="float32")
            found = np.concatenate([encoder(images[i : i + 128]).features for i in range(0, len(images), 128)])
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, found.astype(np.float32))
    return np.load(path)


def scored(nets: list[Any], bag: TrainingBag) -> tuple[float, np.ndarray, np.ndarray | None]:
    """Mean over seeds: probability, attention, and contributions to the positive over the negative logit."""
    with torch.inference_mode():
        scores = [net(*bag) for net in nets]
    p = float(np.mean([float(score.logits.softmax(0)[1]) for score in scores]))
    parts = [score.contributions for score in scores if score.contributions is not None]
    towards = torch.stack(parts).mean(0) if parts else None
    return (
        p,
        torch.stack([score.attention for score in scores]).mean(0).numpy(),
        None if towards is None else (towards[:, 1] - towards[:, 0]).numpy(),
    )


def measure(bags: list[Any], said: list[tuple[float, np.ndarray, np.ndarray | None]]) -> dict[str, Any]:
    """AUROC of bags, in all and by tumour fraction; and of tiles inside positive bags, averaged over bags."""
    label, p = np.array([bag.label for bag in bags]), np.array([score[0] for score in said])
    patients, fraction = np.array([bag.patient for bag in bags]), np.array([bag.fraction for bag in bags])
    row = {"bags": len(bags), "patients": len(np.unique(patients)), **patch.auroc(label, p, patients)}
    for f in head.FRACTIONS:
        of = (fraction == 0) | (fraction == f)
        row[f"auroc at {f:.0%}"] = round(float(roc_auc_score(label[of], p[of])), 4)
    mixed = [i for i, bag in enumerate(bags) if 0 < bag.tiles.sum() < len(bag.tiles)]
    for column, name in ((1, "attention"), (2, "contributions")):
        there = said[0][column] is not None
        of_tiles = [roc_auc_score(bags[i].tiles, said[i][column]) for i in mixed] if there else []
        row[name] = round(float(np.mean(of_tiles)), 4) if there else None
    return row


def breast(data: Path, cache: Path, models: list[str], kinds: list[str], out: Path, *, test: bool) -> None:
    """Train what is not yet trained, and score validation bags, or with `test` the test patients' too."""
    images, labels, patients, _ = patch.load_patches(data)
    parts = np.array([patch.part_of(patient) for patient in patients])
    drawn = {
        "train": head.draw_bags(labels, patients, parts == "train", pairs=2, seed=0),
        "validation": head.draw_bags(labels, patients, parts == "validation", pairs=8, seed=1),
        "test": head.draw_bags(labels, patients, parts == "test", pairs=8, seed=1),
    }
    ids = {part: tuple(f"{part}-{i}" for i in range(len(bags))) for part, bags in drawn.items()}
    cases = {
        name: Case(name, bag.patient, bag.label)
        for part, bags in drawn.items()
        for name, bag in zip(ids[part], bags, strict=True)
    }
    cohort, split = Cohort(cases, ("no idc", "idc")), Split(ids["train"], ids["validation"], ())
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    part = "test" if test else "validation"
    for kind in kinds:
        x = features_of(images, kind, cache)
        table = Table({name: x[bag.rows] for p, bags in drawn.items() for name, bag in zip(ids[p], bags, strict=True)})
        for model in models:
            if any((row["features"], row["model"], row["part"]) == (kind, model, part) for row in done):
                continue
            arguments = WIDTH | OWN.get(model, {})
            states = [cache / f"{kind}-{model}-{seed}.safetensors" for seed in range(SEEDS)]
            members = [
                train_member(cohort, table, split, MilConfig(model, arguments, **CONFIG, seed=seed), state=state)
                for seed, state in enumerate(states)
            ]
            said = [scored([member.net for member in members], table[name]) for name in ids[part]]
            row = {"features": kind, "model": model, "part": part, **measure(drawn[part], said)}
            row["epochs"] = [member.best_epoch for member in members]
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done.append(row)
    for kind in kinds:
        print(f"\n| {kind}, {part} | bags | 10 % | 20 % | 40 % | 80 % | attention | contributions |\n|{'---|' * 8}")
        for row in done:
            if (row["features"], row["part"]) == (kind, part):
                low, high = row["ci95"]
                by = " | ".join(f"{row[f'auroc at {f:.0%}']:.3f}" for f in head.FRACTIONS)
                tiles = " | ".join("-" if row[n] is None else f"{row[n]:.3f}" for n in ("attention", "contributions"))
                print(f"| {row['model']} | {row['auroc']:.3f} ({low:.3f} to {high:.3f}) | {by} | {tiles} |")


def pcam(data: Path, cache: Path, models: list[str]) -> None:
    """Leave each of the ten bags out once; 30 epochs, nothing chosen."""
    tiles, owner, label = [], [], {}
    with zipfile.ZipFile(data / "patches" / "mil_pcam_bags.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("labels.csv"):
                rows = archive.read(name).decode().split()[1:]
                label |= {bag: int(value) for bag, value in (row.split(",") for row in rows)}
            elif name.endswith(".png"):
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((50, 50), Image.Resampling.BOX)
                tiles.append(np.asarray(image))
                owner.append(name.split("/")[2])
    x = features_of(np.stack(tiles), "idc-breast", cache)
    table = Table({bag: x[np.array(owner) == bag] for bag in label})
    cohort = Cohort({bag: Case(bag, bag, value) for bag, value in label.items()}, ("no tumour", "tumour"))
    print(f"\n| {len(label)} PCam bags, {sum(label.values())} positive, each left out once | bag AUROC |\n|---|---|")
    for model in models:
        said = []
        for left in label:
            split = Split(tuple(bag for bag in label if bag != left), (), ())
            config = MilConfig(model, WIDTH | OWN.get(model, {}), **CONFIG | {"patience": None})
            said.append(scored([train_member(cohort, table, split, config).net], table[left])[0])
        print(f"| {model} | {roc_auc_score(list(label.values()), said):.2f} |", flush=True)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with patches/")
    parser.add_argument("--cache", type=Path, required=True, help="folder for features and the state of trainings")
    parser.add_argument("--out", type=Path, default=Path("real-bags.jsonl"))
    parser.add_argument("--models", nargs="+", default=list(MIL_NETS))
    parser.add_argument("--features", nargs="+", default=list(FEATURES))
    parser.add_argument("--test", action="store_true", help="score the test patients: once, when all is decided")
    parser.add_argument("--pcam", action="store_true", help="the ten PCam bags instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.pcam:
        pcam(arguments.data, arguments.cache, arguments.models)
    else:
        breast(*(vars(arguments)[name] for name in ("data", "cache", "models", "features", "out")), test=arguments.test)


if __name__ == "__main__":
    main()
