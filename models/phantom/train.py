"""Train and measure the patch classifier and the slide classifier for phantoms. Read from top to bottom.

    python models/phantom/train.py --out phantom

No data is needed: the slides are phantoms, drawn here from seeds that training, validation and test do not share.
Output, in --out: weights.safetensors, config.json and figures.json of the patch classifier, which learns from the
outlines of the tumours; in --out/mil: the same of the slide classifier, which learns from the patch classifier's
features and from whether a slide holds a tumour, and sees no outline.
"""

import argparse
import hashlib
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import torch
from safetensors.torch import save as to_bytes
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn import functional

from wsi.grid import TileGrid
from wsi.nn.backbone import TimmNet
from wsi.nn.grade import MilModel, load_mil_model
from wsi.nn.mil.attention import AttentionMil
from wsi.nn.patch import PatchModel, load_patch_model
from wsi.phantom import PhantomConfig, write_phantom
from wsi.slide import open_slide

ARCHITECTURE = "test_byobnet"  # timm's smallest with a place in all versions we support: 0.2 M parameters
MIL = {"in_features": 256, "hidden": 32, "attention": 16, "dropout": 0.25}
TILE_PX, MPP = 64, 2.0  # 128 um: some hundred nuclei where there is a tumour
SEEDS = {"train": range(1000, 1048), "validation": range(2000, 2012), "test": range(3000, 3024)}

SEED = 0
EPOCHS = 12
BATCH = 64
PEAK_LR = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.02
STAIN_SCALE, STAIN_SHIFT, BRIGHTNESS = 0.1, 0.03, 0.03
MIL_EPOCHS = 40
MIL_LR = 1e-3

# Haematoxylin, eosin and residual in optical density, unit rows (Ruifrok & Johnston 2001).
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = STAINS / STAINS.norm(dim=1, keepdim=True)


# --- data -----------------------------------------------------------------------------------------------------


class Bag(NamedTuple):
    """The tiles of one phantom."""

    config: PhantomConfig
    rgb: np.ndarray  # uint8 (n, 64, 64, 3)
    tumour: np.ndarray  # float64 (n,): share of the tile's area inside a tumour
    pen: np.ndarray  # float64 (n,): share under ink


def phantom_of(seed: int) -> PhantomConfig:
    """Which phantom a seed stands for: every other one benign; pen, resolution and JPEG quality vary."""
    rng = np.random.default_rng((SEED, seed))
    tumours = int(rng.integers(1, 7)) if seed % 2 else 0
    mpp = float(rng.choice([0.25, 0.5, 0.5, 0.5, 1.0]))
    side = int(rng.integers(1500, 2200) / mpp)  # 1.5 to 2.2 mm
    pen, quality = bool(rng.random() < 0.5), int(rng.integers(40, 95))
    return PhantomConfig(size=(side, side), mpp=mpp, seed=seed, tumours=tumours, pen=pen, quality=quality)


def share(boxes: np.ndarray, region: shapely.Geometry) -> np.ndarray:
    """Share of each box (n, 4) that lies in a region, float64 (n,)."""
    tiles = shapely.box(boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3])
    return shapely.area(shapely.intersection(tiles, region)) / shapely.area(tiles)


def draw(seed: int) -> Bag:
    """Write a phantom, cut the tiles of which a tenth is tissue or ink, and forget the phantom."""
    config = phantom_of(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom.svs"
        truth = write_phantom(path, config)
        with open_slide(path) as slide:
            grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=MPP, tile_px=TILE_PX)
            boxes = grid.boxes()
            grid = grid.keep(share(boxes, truth.tissue.union(truth.pen)) >= 0.1)
            rgb = np.stack([slide.read(grid.box(i), (TILE_PX, TILE_PX)) for i in range(len(grid))])
    boxes = grid.boxes()
    return Bag(config, rgb, share(boxes, truth.tumours), share(boxes, truth.pen))


# --- augmentation ---------------------------------------------------------------------------------------------


def augment(rgb: Tensor) -> Tensor:
    """uint8 (b, 3, h, w) -> float (b, 3, h, w) in 0..1: turned, mirrored, restained, relit."""
    b = len(rgb)
    x = torch.stack([torch.rot90(patch, int(k), (1, 2)) for patch, k in zip(rgb, torch.randint(4, (b,)), strict=True)])
    x = torch.where(torch.rand(b, 1, 1, 1) < 0.5, x, x.flip(3)).float() / 255

    # Scale and shift the concentrations in optical density (Tellez et al. 2018).
    od = -torch.log(x.clamp(1 / 255, 1))
    scale = torch.exp(STAIN_SCALE * torch.randn(b, 3))
    restain = torch.einsum("js,bs,si->bij", torch.linalg.inv(STAINS), scale, STAINS)  # (b, 3, 3)
    tissue = (od.mean(1, keepdim=True) > 0.1).float()  # (b, 1, h, w)
    shift = (STAIN_SHIFT * torch.randn(b, 3)) @ STAINS  # (b, 3)
    od = torch.einsum("bij,bjhw->bihw", restain, od) + tissue * shift[:, :, None, None]
    x = torch.exp(-od.clamp(0, 5.5))

    gain = 1 + BRIGHTNESS * torch.randn(b, 3, 1, 1)
    gamma = torch.exp(BRIGHTNESS * torch.randn(b, 1, 1, 1))
    return (x * gain).clamp(0, 1) ** gamma


# --- training -------------------------------------------------------------------------------------------------


def fit_patches(net: TimmNet, rgb: Tensor, labels: Tensor, mean: Tensor, std: Tensor, epochs: int) -> None:
    """Train in place, on uint8 (n, 3, 64, 64) and int64 (n,); the last weights are kept, validation chooses nothing."""
    optimiser = torch.optim.AdamW(net.parameters(), PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = len(rgb) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LR, total_steps=steps + 1, pct_start=0.15)
    net.train()
    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(rgb)).split(BATCH):
            if len(rows) < BATCH:
                continue
            x = (augment(rgb[rows]) - mean) / std  # (b, 3, 64, 64)
            logits = net(x.contiguous(memory_format=torch.channels_last))  # (b, 2)
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(
            f"  epoch {epoch + 1}  loss {total * epochs / steps:.4f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
    net.eval()


def fit_slides(head: AttentionMil, bags: list[Tensor], labels: Tensor) -> None:
    """Train in place, on one (n, d) table of features a slide and one label a slide."""
    optimiser = torch.optim.AdamW(head.parameters(), MIL_LR, weight_decay=WEIGHT_DECAY)
    head.standardise(torch.cat(bags))
    head.train()
    for _ in range(MIL_EPOCHS):
        for i in torch.randperm(len(bags)):
            # A random part of the tiles: another bag each time, of another size.
            n = len(bags[i])
            part = torch.randperm(n)[: int(n * (0.3 + 0.7 * torch.rand(1)))]  # (m,), 0.3 n <= m <= n
            loss = functional.cross_entropy(head(bags[i][part]).logits[None], labels[i : i + 1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    head.eval()


# --- measurement ----------------------------------------------------------------------------------------------


def predict(model: PatchModel, bag: Bag) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) and probability of tumour (n,) of a bag's tiles, as the engine computes them."""
    batches = [model(bag.rgb[i : i + 256]) for i in range(0, len(bag.rgb), 256)]
    return np.concatenate([b.features for b in batches]), np.concatenate([b.probabilities[:, 1] for b in batches])


def auroc(labels: list[np.ndarray], scores: list[np.ndarray]) -> dict:
    """AUROC with its 95 % interval over slides: slides are drawn, and each brings all of its tiles."""
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(1000):
        rows = rng.integers(0, len(labels), len(labels))
        drawn = np.concatenate([labels[i] for i in rows])
        if 0 < drawn.mean() < 1:
            draws.append(roc_auc_score(drawn, np.concatenate([scores[i] for i in rows])))
    value = roc_auc_score(np.concatenate(labels), np.concatenate(scores))
    return {
        "auroc": round(float(value), 4),
        "ci95": [round(float(v), 4) for v in np.percentile(draws, [2.5, 97.5])],
    }


def measure_patches(bags: list[Bag], scores: list[np.ndarray]) -> dict:
    """All figures of the patch classifier on one part."""
    labels = [bag.tumour >= 0.5 for bag in bags]
    label, score = np.concatenate(labels), np.concatenate(scores)
    tumour, pen = np.concatenate([bag.tumour for bag in bags]), np.concatenate([bag.pen for bag in bags])
    called = score >= 0.5
    clear, inked = (tumour == 0) | (tumour == 1), pen > 0.1
    return {
        "slides": len(bags),
        "tiles": len(label),
        "tumour_tiles": int(label.sum()),
        **auroc(labels, scores),
        "average_precision": round(float(average_precision_score(label, score)), 4),
        "brier": round(float(np.mean((score - label) ** 2)), 4),
        "sensitivity": round(float(called[label].mean()), 4),
        "specificity": round(float((~called[~label]).mean()), 4),
        "tiles_all_or_no_tumour": {
            "tiles": int(clear.sum()),
            "auroc": round(float(roc_auc_score(label[clear], score[clear])), 4),
            "sensitivity": round(float(called[clear & label].mean()), 4),
            "specificity": round(float((~called[clear & ~label]).mean()), 4),
        },
        "tiles_with_ink": {
            "tiles": int(inked.sum()),
            "tumour_tiles": int(label[inked].sum()),
            "sensitivity": round(float(called[inked & label].mean()), 4) if label[inked].any() else None,
            "specificity": round(float((~called[inked & ~label]).mean()), 4),
        },
    }


def measure_slides(head: MilModel, labels: np.ndarray, features: list[np.ndarray]) -> dict:
    """All figures of the slide classifier on one part."""
    score = np.array([head(table).probabilities[1] for table in features])
    called = score >= head.config.threshold
    return {
        "slides": len(labels),
        "with_tumour": int(labels.sum()),
        **auroc(list(labels[:, None]), list(score[:, None])),
        "correct": int((called == labels).sum()),
        "lowest_with_tumour": round(float(score[labels].min()), 4),
        "highest_without": round(float(score[~labels].max()), 4),
    }


# --- all of it ------------------------------------------------------------------------------------------------


def save(folder: Path, net: torch.nn.Module, config: dict) -> dict:
    """Write weights.safetensors and config.json; return the configuration with the hash of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    weights.write_bytes(to_bytes({name: value.contiguous() for name, value in net.state_dict().items()}))
    config = {
        "spec_version": "1.0",
        **config,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the classifiers for phantom slides.")
    parser.add_argument("--out", type=Path, default=Path("phantom"), help="folder for weights, configuration, figures")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the training tiles")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw phantoms")
    args = parser.parse_args()
    # One thread: the same weights on any number of cores, and no waiting for one that other programs keep busy.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()

    bags: dict[str, list[Bag]] = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for part, seeds in SEEDS.items():
            bags[part] = list(pool.map(draw, seeds))
            tiles, tumour = (
                sum(counts) for counts in zip(*((len(b.rgb), (b.tumour >= 0.5).sum()) for b in bags[part]), strict=True)
            )
            print(f"{part:10s} {len(seeds):3d} slides {tiles:6d} tiles {tumour:5d} tumour", flush=True)
    drawn = time.monotonic()

    rgb = torch.from_numpy(np.concatenate([bag.rgb for bag in bags["train"]])).permute(0, 3, 1, 2)  # (n, 3, 64, 64)
    labels = torch.from_numpy(np.concatenate([bag.tumour >= 0.5 for bag in bags["train"]])).long()  # (n,)
    sample = rgb[::8].float() / 255
    mean = [round(float(v), 4) for v in sample.mean((0, 2, 3))]
    std = [round(float(v), 4) for v in sample.std((0, 2, 3))]
    torch.manual_seed(SEED)
    net = TimmNet(ARCHITECTURE, num_classes=2).to(memory_format=torch.channels_last)
    shape = (1, 3, 1, 1)
    fit_patches(net, rgb, labels, torch.tensor(mean).view(shape), torch.tensor(std).view(shape), args.epochs)
    patch_config = save(
        args.out,
        net,
        {
            "task": "patch",
            "architecture": ARCHITECTURE,
            "architecture_args": {},
            "num_classes": 2,
            "class_names": ["benign", "tumour"],
            "patch_size_pixels": TILE_PX,
            "spacing_um_px": MPP,
            "transform": [
                {"name": "ToTensor"},
                {"name": "Normalize", "arguments": {"mean": mean, "std": std}},
            ],
            "positive_classes": ["tumour"],
            "threshold": 0.5,
            "num_features": net.num_features,
        },
    )

    # From here on through the engine's own door, as everybody else will use the files.
    model = load_patch_model(str(args.out.resolve()), device="cpu", precision="float32")
    features, scores = {}, {}
    for part in bags:
        features[part], scores[part] = zip(*(predict(model, bag) for bag in bags[part]), strict=True)
    has_tumour = {part: np.array([bag.config.tumours > 0 for bag in bags[part]]) for part in bags}
    head = AttentionMil(num_classes=2, **MIL)
    fit_slides(head, [torch.from_numpy(f) for f in features["train"]], torch.from_numpy(has_tumour["train"]).long())
    mil_config = save(
        args.out / "mil",
        head,
        {
            "task": "mil",
            "architecture": "gated-attention",
            "architecture_args": MIL,
            "num_classes": 2,
            "class_names": ["no tumour", "tumour"],
            "positive_classes": ["tumour"],
            "threshold": 0.5,
            "encoder_sha256": patch_config["weights_sha256"],
        },
    )
    trained = time.monotonic()

    figures: dict = {part: measure_patches(bags[part], list(scores[part])) for part in bags}
    rounded = load_patch_model(str(args.out.resolve()), device="cpu", precision="bfloat16")
    in_bfloat16 = [predict(rounded, bag) for bag in bags["test"]]
    figures["test_in_bfloat16"] = auroc([bag.tumour >= 0.5 for bag in bags["test"]], [s for _, s in in_bfloat16])
    figures |= {
        "seeds": {part: [seeds.start, seeds.stop - 1] for part, seeds in SEEDS.items()},
        "seconds": {"drawing": round(drawn - started), "training": round(trained - drawn)},
        "workers": args.workers,
        "epochs": args.epochs,
        "weights_sha256": patch_config["weights_sha256"],
    }
    mil = load_mil_model(args.out.resolve() / "mil", model)
    mil_figures: dict = {part: measure_slides(mil, has_tumour[part], list(features[part])) for part in bags}
    mil_figures["test_in_bfloat16"] = measure_slides(mil, has_tumour["test"], [f for f, _ in in_bfloat16])
    mil_figures["weights_sha256"] = mil_config["weights_sha256"]
    for folder, found in ((args.out, figures), (args.out / "mil", mil_figures)):
        (folder / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
