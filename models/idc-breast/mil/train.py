"""Train and measure the MIL head of the breast IDC model: is there IDC among these tiles, and in which ones?

    python models/idc-breast/mil/train.py --data ../shared/data --out idc-mil

Only the label of a bag is used. A bag stands for a slide: tiles of one patient, all non-IDC (negative) or
with some IDC among them (positive). Bags come in pairs: beside each positive bag there is a negative one of
the same patient and of the same size, so that neither the number of tiles nor the patient's staining gives it
away. The encoder is the shipped patch model, frozen; patients are divided as they were for it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from wsi.nn.mil.attention import AttentionMil
from wsi.nn.p4m import P4MNet

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]

SEED = 0
FRACTIONS = (0.1, 0.2, 0.4, 0.8)  # of the tiles of a positive bag that are IDC, at least one tile
SIZES = (8, 40)  # tiles a bag, both ends included
STEPS = 6000  # bags seen
LR = 5e-4
WEIGHT_DECAY = 1e-2
NET = {"hidden": 32, "attention": 16, "dropout": 0.25}


def patch_training():
    """Load ../train.py, for the one definition of the data, of the split and of the bootstrap."""
    spec = importlib.util.spec_from_file_location("idc_patch_training", HERE.parent / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bag(NamedTuple):
    """Rows of the feature table, and what is known of them; `tiles` is for measuring only."""

    rows: np.ndarray  # int (n,)
    label: int
    tiles: np.ndarray  # int (n,): 1 for IDC
    patient: str
    fraction: float  # asked for; 0 in negative bags


def draw_pair(labels: np.ndarray, of: np.ndarray, patient: str, fraction: float, rng) -> tuple[Bag, Bag] | None:
    """A positive and a negative bag of a patient, equally large, no tile twice; None if tiles are too few."""
    idc, other = of[labels[of] == 1], of[labels[of] == 0]
    largest = min(SIZES[1], len(other))
    if largest < SIZES[0] or not len(idc):
        return None
    n = int(rng.integers(SIZES[0], largest + 1))
    k = max(1, round(fraction * n))
    if k > len(idc):
        return None
    positive = rng.permutation(
        np.concatenate([rng.choice(idc, k, replace=False), rng.choice(other, n - k, replace=False)])
    )
    negative = rng.choice(other, n, replace=False)
    return Bag(positive, 1, labels[positive], patient, fraction), Bag(negative, 0, labels[negative], patient, 0.0)


def draw_bags(labels: np.ndarray, patients: np.ndarray, of: np.ndarray, pairs: int, seed: int) -> list[Bag]:
    """Up to `pairs` pairs for each patient of `of` and each tumour fraction."""
    rng = np.random.default_rng(seed)
    bags: list[Bag] = []
    for patient in np.unique(patients[of]):
        rows = np.flatnonzero(of & (patients == patient))
        for fraction in FRACTIONS:
            for _ in range(pairs):
                bags += draw_pair(labels, rows, patient, fraction, rng) or ()
    return bags


@torch.inference_mode()
def embed(net: P4MNet, rgb: Tensor, transform) -> tuple[Tensor, np.ndarray]:
    """uint8 (n, 3, 50, 50) -> float32 (n, d) the encoder's features, float (n,) its probability of IDC."""
    features = torch.cat([net.embed(transform(patches.float() / 255)) for patches in rgb.split(128)])
    return features, net.classify(features).softmax(1)[:, 1].double().numpy()


def fit(head: AttentionMil, features: Tensor, bags: list[Bag]) -> None:
    """Cross-entropy of the bag label, one bag a step; the mean of the weights over the last half is kept."""
    torch.manual_seed(SEED)
    head.standardise(features[np.unique(np.concatenate([bag.rows for bag in bags]))])
    optimiser = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    average = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    rng = np.random.default_rng(SEED)
    head.train()
    total = 0.0
    for step in range(STEPS):
        bag = bags[rng.integers(len(bags))]
        grade = head(features[bag.rows])  # features (n, d) -> logits (2,)
        loss = functional.cross_entropy(grade.logits[None], torch.tensor([bag.label]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item()
        if step >= STEPS // 2:
            for name, value in head.state_dict().items():
                average[name] += value / (STEPS - STEPS // 2)
        if (step + 1) % 1000 == 0:
            print(f"  step {step + 1:5d}  loss {total / 1000:.4f}", flush=True)
            total = 0.0
    head.load_state_dict(average)
    head.eval()


@torch.inference_mode()
def measure(
    head: AttentionMil,
    features: Tensor,
    tile_scores: np.ndarray,
    bags: list[Bag],
    auroc,
    threshold: float | None,
) -> dict:
    """Bag AUROC in all and by tumour fraction, and attention against the tiles' labels in positive bags."""
    grades = [head(features[bag.rows]) for bag in bags]
    scores = np.array([float(grade.logits.softmax(0)[1]) for grade in grades])
    labels = np.array([bag.label for bag in bags])
    patients = np.array([bag.patient for bag in bags])
    largest = np.array([float(grade.attention.max()) for grade in grades])
    out: dict = {
        "patients": len(np.unique(patients)),
        "bags": len(bags),
        "bag": auroc(labels, scores, patients),
    }
    # For comparison: what a rule on the supervised tile probabilities does, without any MIL head.
    for name, pool in (("mean", np.mean), ("maximum", np.max)):
        pooled = np.array([pool(tile_scores[bag.rows]) for bag in bags])
        out[f"bag_by_{name}_tile_probability"] = auroc(labels, pooled, patients)
    # Each fraction against the negative bags of all.
    out["bag_by_tumour_fraction"] = {}
    for fraction in FRACTIONS:
        of = np.array([bag.fraction in (0.0, fraction) for bag in bags])
        out["bag_by_tumour_fraction"][str(fraction)] = auroc(labels[of], scores[of], patients[of])
    # Attention is compared inside a bag only, as its scale depends on the bag; then averaged over the bags.
    mixed = [i for i, bag in enumerate(bags) if bag.label == 1 and 0 < bag.tiles.sum() < len(bag.tiles)]
    inside = np.array([roc_auc_score(bags[i].tiles, grades[i].attention.numpy()) for i in mixed])
    rng = np.random.default_rng(SEED)
    by_patient = [inside[patients[mixed] == patient] for patient in np.unique(patients[mixed])]
    draws = [
        np.concatenate([by_patient[j] for j in rng.integers(0, len(by_patient), len(by_patient))]).mean()
        for _ in range(2000)
    ]
    out["attention_in_positive_bags"] = {
        "bags": len(mixed),
        "auroc": round(float(inside.mean()), 4),
        "ci95": [round(float(v), 4) for v in np.percentile(draws, [2.5, 97.5])],
    }
    out["mean_largest_attention"] = {
        "positive": round(float(largest[labels == 1].mean()), 3),
        "negative": round(float(largest[labels == 0].mean()), 3),
    }
    if threshold is None:
        candidates = np.linspace(0.05, 0.95, 181)
        correct = [(scores[labels == 1] >= t).mean() + (scores[labels == 0] < t).mean() for t in candidates]
        threshold = round(float(candidates[int(np.argmax(correct))]), 3)
    out["at_threshold"] = {
        "threshold": threshold,
        "sensitivity": round(float((scores[labels == 1] >= threshold).mean()), 4),
        "specificity": round(float((scores[labels == 0] < threshold).mean()), 4),
    }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the MIL head of the breast IDC model.")
    default_data = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default_data, help="folder with patches/idc_breast_dev_*.zip")
    parser.add_argument("--encoder", type=Path, default=HERE.parent, help="the patch model's folder")
    parser.add_argument("--out", type=Path, default=Path("idc-mil"), help="folder for weights and figures")
    parser.add_argument("--test-closed", action="store_true", help="design mode: leave test patients unscored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    patch = patch_training()

    images, labels, patients, _ = patch.load_patches(args.data)
    parts = np.array([patch.part_of(patient) for patient in patients])
    encoder_config = json.loads((args.encoder / "config.json").read_text(encoding="utf-8"))
    net = P4MNet(**encoder_config["architecture_args"]).eval()
    net.load_state_dict(load_file(args.encoder / "weights.safetensors"))
    net.to(memory_format=torch.channels_last)
    normalise = encoder_config["transform"][1]["arguments"]
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    features, tile_scores = embed(net, rgb, patch.Normalise(normalise["mean"], normalise["std"]))

    started = time.monotonic()
    arguments = {"in_features": net.num_features, "num_classes": 2, **NET}
    torch.manual_seed(SEED)
    head = AttentionMil(**arguments)
    fit(head, features.clone(), draw_bags(labels, patients, parts == "train", pairs=8, seed=SEED))
    minutes = (time.monotonic() - started) / 60

    figures: dict = {}
    threshold = None
    for part in ["validation"] if args.test_closed else ["validation", "test"]:
        bags = draw_bags(labels, patients, parts == part, pairs=8, seed=SEED + 1)
        figures[part] = measure(head, features, tile_scores, bags, patch.auroc, threshold)
        threshold = figures[part]["at_threshold"]["threshold"]

    weights = args.out / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    figures |= {"train_minutes": round(minutes, 1), "weights_sha256": sha256}
    config = {
        "spec_version": "1.0",
        "task": "mil",
        "architecture": "gated-attention",
        "architecture_args": arguments,
        "num_classes": 2,
        "class_names": ["no idc", "idc"],
        "positive_classes": ["idc"],
        "threshold": threshold,
        "bag_tiles": list(SIZES),
        "encoder_sha256": encoder_config["weights_sha256"],
        "weights_sha256": sha256,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
