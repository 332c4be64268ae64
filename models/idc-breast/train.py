"""Train and measure the breast IDC patch classifier. Read from top to bottom; it is all here.

    python models/idc-breast/train.py --data ../shared/data --out idc-breast-new

Input: 50 x 50 px H&E patches at about 4 um/px in two zips. Output, in --out: weights.safetensors, config.json
and figures.json. Patients, never patches, are divided into train, validation and test by a hash of their
number. Design with --test-closed; when all is decided, --measure opens the test patients for those weights.
"""

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import logit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn import functional

from wsi.context import in_context
from wsi.grid import TileGrid
from wsi.nn.checkpoint import Context
from wsi.nn.p4m import P4MNet

REPOSITORY = Path(__file__).resolve().parents[2]
ZIPS = ("idc_breast_dev_a.zip", "idc_breast_dev_b.zip")
SIDE, MPP = 50, 4.0
EXTERNAL = "14082"  # this patient's slide is the end-to-end test: never trained on, never selected on

SEED = 0
BATCH = 32
PEAK_LR = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA = 0.995
NET = {"widths": [8, 16, 24], "depths": [1, 1, 1], "stem": 4, "head": 64, "members": 2}

# Two members that err differently: one sees its patches moved, restained and through a JPEG codec, the other
# as they are. On the validation patients this pair was better than two members of either kind.
MEMBERS = ({"epochs": 22, "augmented": True}, {"epochs": 18, "augmented": False})
MOVED = 0.7  # share of patches turned, zoomed and shifted
STAIN_SCALE, STAIN_SHIFT, BRIGHTNESS = 0.15, 0.05, 0.10  # twice these cost 0.02 of validation AUROC

# How a slide's tiles inform each other. Chosen on the validation patients among ranges of 1.2 to 2 mm, nuggets of 0.5
# to 1.5 and means of -2 to 0, all of which gave an AUROC of 0.933 to 0.943; slope and intercept are fitted on them.
CONTEXT = {"range_um": 1600.0, "nugget": 1.0, "mean": -1.0}

# Haematoxylin, eosin and residual in optical density, unit rows (Ruifrok & Johnston 2001).
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = STAINS / STAINS.norm(dim=1, keepdim=True)


# --- data ---------------------------------------------------------------------------------------------


def part_of(patient: str) -> str:
    """Which part a patient belongs to: 70 % train, 15 % validation, 15 % test, whatever else there is."""
    if patient == EXTERNAL:
        return "external"
    u = int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if u < 0.70 else "validation" if u < 0.85 else "test"


def load_patches(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the zips: uint8 (n, 50, 50, 3) RGB, int64 (n,) 1 for IDC, str (n,) patient, int64 (n, 2) column and row.

    The 65 patches cut by their slide's border are smaller than 50 x 50; they are left out.
    """
    rgb, labels, patients, cells = [], [], [], []
    for name in ZIPS:
        with zipfile.ZipFile(data / "patches" / name) as archive:
            for member in sorted(archive.namelist()):
                match = re.search(r"(\d+)_idx5_x(\d+)_y(\d+)_class([01])\.png$", member)
                if not match:
                    continue
                patch = np.asarray(Image.open(io.BytesIO(archive.read(member))).convert("RGB"))
                if patch.shape == (SIDE, SIDE, 3):
                    rgb.append(patch)
                    labels.append(int(match[4]))
                    patients.append(match[1])
                    cells.append((int(match[2]) // SIDE, int(match[3]) // SIDE))
    return np.stack(rgb), np.array(labels), np.array(patients), np.array(cells)


def load_mosaic(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the external patient's slide, rebuilt and stored as JPEG, into its cells: (n, 50, 50, 3), (n,), (n, 2)."""
    folder = data / "patches" / "idc_mosaic_slides"
    slide = np.asarray(Image.open(folder / f"idc_{EXTERNAL}.tif").convert("RGB"))
    grid = np.asarray(Image.open(folder / f"idc_{EXTERNAL}_grid50_labels.png"))  # 0 none, 1 non-IDC, 2 IDC
    rows, columns = grid.shape
    cells = slide[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2)
    return cells[grid > 0], (grid[grid > 0] == 2).astype(int), np.argwhere(grid > 0)[:, ::-1]


# --- augmentation -------------------------------------------------------------------------------------


def uniform(n: int, low: float, high: float) -> Tensor:
    return torch.rand(n) * (high - low) + low


def augment(rgb: Tensor, colour: float = 1.0) -> Tensor:
    """uint8 (b, 3, h, w) -> float (b, 3, h, w) in 0..1, each patch moved and restained by its own draw.

    No quarter turns and no mirroring: the network is blind to them. `colour` multiplies how far stains and scanner
    are shaken; 0 leaves colours as they are (for shift.py).
    """
    b = len(rgb)
    x = rgb.float() / 255

    # Most of the patches: turn up to 45 degrees, zoom, stretch and shift, mirrored at the borders.
    moved = (torch.rand(b) < MOVED).float()
    angle, zoom, stretch = uniform(b, -math.pi / 4, math.pi / 4), uniform(b, -0.2, 0.2), uniform(b, -0.1, 0.1)
    angle, zoom, stretch = angle * moved, torch.exp(zoom * moved), torch.exp(stretch * moved)
    cos, sin, shift = torch.cos(angle) * zoom, torch.sin(angle) * zoom, uniform(2 * b, -0.2, 0.2).view(b, 2)
    rows = [cos * stretch, -sin, shift[:, 0] * moved, sin, cos / stretch, shift[:, 1] * moved]
    grid = functional.affine_grid(torch.stack(rows, 1).view(b, 2, 3), list(x.shape), align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    # Stain: scale and shift the three concentrations in optical density (Tellez et al. 2018), not on glass.
    od = -torch.log(x.clamp(1 / 255, 1))
    scale = torch.exp(colour * STAIN_SCALE * torch.randn(b, 3))
    restain = torch.einsum("js,bs,si->bij", torch.linalg.inv(STAINS), scale, STAINS)  # (b, 3, 3)
    tissue = (od.mean(1, keepdim=True) > 0.1).float()  # (b, 1, h, w)
    offset = (colour * STAIN_SHIFT * torch.randn(b, 3)) @ STAINS  # (b, 3)
    od = torch.einsum("bij,bjhw->bihw", restain, od) + tissue * offset[:, :, None, None]
    x = torch.exp(-od.clamp(0, 5.5))

    # Scanner: white balance, brightness, gamma.
    gain = 1 + colour * BRIGHTNESS / 2 * (torch.randn(b, 3, 1, 1) + torch.randn(b, 1, 1, 1))
    gamma = torch.exp(colour * BRIGHTNESS * torch.randn(b, 1, 1, 1))
    return (x * gain).clamp(0, 1) ** gamma


def through_jpeg(image: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    """uint8 (h, w, 3), as it comes out of a JPEG file; subsampling 0, 1, 2 for 4:4:4, 4:2:2, 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


def recompress(x: Tensor) -> Tensor:
    """Pass half of the patches, float (b, 3, h, w) in 0..1, through a JPEG codec: slides are stored as JPEG.

    Without this the augmented member learns that what is sharp was not moved, and codecs mislead it.
    """
    images = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (b, h, w, 3)
    patches = []
    for image, chosen, quality, subsampling in zip(
        images,
        torch.rand(len(x)) < 0.5,
        torch.randint(60, 96, [len(x)]),
        torch.randint(3, [len(x)]),
        strict=True,
    ):
        if chosen:
            image = through_jpeg(image, int(quality), int(subsampling))
        patches.append(image)
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).float() / 255


class Normalise:
    """The configuration's Normalize: (x - mean) / std, channels last in memory."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


# --- training -----------------------------------------------------------------------------------------


def fit(
    seed: int,
    images: np.ndarray,
    targets: np.ndarray,
    mean: list[float],
    std: list[float],
    *,
    epochs: int,
    augmented: bool,
    colour: float = 1.0,
) -> dict[str, np.ndarray]:
    """Train one member on one core, and return the moving average of its weights.

    There is no early stopping: the last average of the schedule is what is kept.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rgb, labels, transform = torch.from_numpy(images), torch.from_numpy(targets), Normalise(mean, std)
    net = P4MNet(**{**NET, "members": 1}, mean=mean, std=std).to(memory_format=torch.channels_last)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LR)
    steps = len(rgb) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_LR, total_steps=steps + 1, pct_start=0.15, div_factor=10, final_div_factor=100
    )
    average = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    step, started = 0, time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(rgb)).split(BATCH):
            if len(rows) < BATCH:
                continue
            x = recompress(augment(rgb[rows], colour)) if augmented else rgb[rows].float() / 255
            x = transform(x)  # (b, 3, 50, 50)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)  # (b, 2)
            loss = functional.cross_entropy(logits.float(), labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimiser.step()
            schedule.step()
            step += 1
            total += loss.item()
            keep = min(EMA, (1 + step) / (10 + step))
            for name, value in net.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - keep)
        loss_a_step, seconds = total * epochs / steps, time.monotonic() - started
        print(f"  member {seed} epoch {epoch + 1:2d} loss {loss_a_step:.4f} {seconds:.0f} s", flush=True)
    return {name: value.numpy() for name, value in average.items()}


def train_members(images: np.ndarray, labels: np.ndarray, mean: list[float], std: list[float], workers: int) -> P4MNet:
    """Train the members side by side, a process each, and put them into one network."""
    net = P4MNet(**NET, mean=mean, std=std)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        fits = [pool.submit(fit, SEED + i, images, labels, mean, std, **member) for i, member in enumerate(MEMBERS)]
        for i, member in enumerate(fits):
            for name, value in member.result().items():
                kind, _, rest = name.split(".", 2)  # "trunks.0.stem.weight": a member was the only one there
                net.state_dict()[f"{kind}.{i}.{rest}"].copy_(torch.from_numpy(value))
    return net.eval().to(memory_format=torch.channels_last)


# --- measurement --------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(net: P4MNet, rgb: Tensor, transform: Normalise, *, bf16: bool = False) -> np.ndarray:
    """Probability of IDC of each patch, float64 (n,)."""
    out = []
    for patches in rgb.split(128):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out.append(net(transform(patches.float() / 255)).float().softmax(1)[:, 1])
    return torch.cat(out).double().numpy()


def together(alone: np.ndarray, cells: np.ndarray, patients: np.ndarray, context: Context) -> np.ndarray:
    """What `wsi score` makes of it: the tiles of a slide inform each other; here those of a patient that there are."""
    out = np.empty_like(alone)
    for patient in np.unique(patients):
        of = patients == patient
        columns, rows = cells[of].T.astype(np.int32)
        grid = TileGrid(columns, rows, (SIDE, SIDE), (SIDE, SIDE), SIDE, MPP)
        out[of] = in_context(np.stack([1 - alone[of], alone[of]], axis=1), grid, context)[:, 1]
    return out


def auroc(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> dict[str, float | list[float]]:
    """AUROC with its 95 % interval: 2,000 bootstrap samples of patients, each with all of its patches.

    Of a single patient the patches are drawn: that interval tells nothing of other patients.
    """
    rng = np.random.default_rng(SEED)
    if len(np.unique(patients)) == 1:
        patients = np.arange(len(labels))
    of = [np.flatnonzero(patients == patient) for patient in np.unique(patients)]
    draws = []
    for _ in range(2000):
        rows = np.concatenate([of[i] for i in rng.integers(0, len(of), len(of))])
        if 0 < labels[rows].mean() < 1:
            draws.append(roc_auc_score(labels[rows], scores[rows]))
    low, high = (round(float(v), 4) for v in np.percentile(draws, [2.5, 97.5]))
    return {"auroc": round(float(roc_auc_score(labels, scores)), 4), "ci95": [low, high]}


def calibration_error(labels: np.ndarray, scores: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over equally wide bins."""
    which = np.minimum((scores * bins).astype(int), bins - 1)
    inside = [which == b for b in np.unique(which)]
    return float(sum(abs(labels[i].mean() - scores[i].mean()) * i.mean() for i in inside))


def balanced_accuracy(labels: np.ndarray, called: np.ndarray) -> float:
    return float((called[labels == 1].mean() + (~called[labels == 0]).mean()) / 2)


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """Threshold of the highest balanced accuracy."""
    candidates = np.linspace(0.05, 0.95, 181)
    return round(float(max(candidates, key=lambda t: balanced_accuracy(labels, scores >= t))), 3)


def measure(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, threshold: float) -> dict:
    """All figures of one part."""
    called = scores >= threshold
    true_positives = float((called & (labels == 1)).sum())
    mixed = [p for p in np.unique(patients) if 0 < labels[patients == p].mean() < 1]
    within = [roc_auc_score(labels[patients == p], scores[patients == p]) for p in mixed]
    return {
        "patients": len(np.unique(patients)),
        "patches": len(labels),
        "idc_patches": int(labels.sum()),
        **auroc(labels, scores, patients),
        "median_auroc_within_a_patient": round(float(np.median(within)), 4),
        "average_precision": round(float(average_precision_score(labels, scores)), 4),
        "brier": round(float(np.mean((scores - labels) ** 2)), 4),
        "ece": round(calibration_error(labels, scores), 4),
        "at_threshold": {
            "threshold": threshold,
            "sensitivity": round(float(called[labels == 1].mean()), 4),
            "specificity": round(float((~called[labels == 0]).mean()), 4),
            "balanced_accuracy": round(balanced_accuracy(labels, called), 4),
            "f1": round(2 * true_positives / float(called.sum() + labels.sum()), 4),
        },
    }


def hand_made_features(rgb: np.ndarray) -> np.ndarray:
    """For the baseline: (n, 50, 50, 3) -> (n, 39), colour statistics and edges at three scales."""
    density = -np.log(np.maximum(rgb / 255, 1 / 255))
    stain = density @ np.linalg.inv(STAINS.double().numpy())  # (n, 50, 50, 3) haematoxylin, eosin, residual
    maps = np.concatenate([density, stain], axis=3)
    columns = [maps.mean((1, 2)), maps.std((1, 2)), *np.percentile(maps, [10, 50, 90], axis=(1, 2))]
    for _ in range(3):
        columns.append(np.abs(np.diff(stain, axis=1)).mean((1, 2)) + np.abs(np.diff(stain, axis=2)).mean((1, 2)))
        n, h, w, c = stain.shape
        stain = stain[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return np.concatenate(columns, axis=1)


# --- all of it ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the breast IDC patch classifier.")
    default_data = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default_data, help="folder with patches/idc_breast_dev_*.zip")
    parser.add_argument("--out", type=Path, default=Path("idc-breast"), help="folder for what is written")
    parser.add_argument("--workers", type=int, default=2, help="members trained at once, one core each")
    parser.add_argument("--test-closed", action="store_true", help="design mode: score validation patients only")
    parser.add_argument("--measure", action="store_true", help="do not train: measure the weights in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    args.out.mkdir(parents=True, exist_ok=True)

    images, labels, patients, cells = load_patches(args.data)
    parts = np.array([part_of(patient) for patient in patients])
    for part in ("train", "validation", "test", "external"):
        of = parts == part
        print(f"{part}: {len(np.unique(patients[of]))} patients, {of.sum()} patches, {labels[of].sum()} IDC")
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # (n, 3, 50, 50)
    train = parts == "train"
    pixels = images[train].reshape(-1, 3) / 255
    mean, std = [round(float(v), 4) for v in pixels.mean(0)], [round(float(v), 4) for v in pixels.std(0)]
    transform = Normalise(mean, std)

    weights = args.out / "weights.safetensors"
    if args.measure:
        net = P4MNet(**NET, mean=mean, std=std).eval()
        net.load_state_dict(load_file(weights))
        net.to(memory_format=torch.channels_last)
        minutes = json.loads((args.out / "figures.json").read_text(encoding="utf-8"))["train_minutes"]
    else:
        started = time.monotonic()
        net = train_members(rgb.numpy()[train], labels[train], mean, std, args.workers)
        minutes = round((time.monotonic() - started) / 60, 1)
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()

    opened = ["validation"] if args.test_closed else ["validation", "test", "external"]
    alone = {part: predict(net, rgb[parts == part], transform) for part in opened}
    chosen = parts == "validation"
    expected = together(alone["validation"], cells[chosen], patients[chosen], Context(1, **CONTEXT))
    platt = LogisticRegression(C=1e6).fit(logit(expected)[:, None], labels[chosen])
    fitted = {**CONTEXT, "slope": round(float(platt.coef_[0, 0]), 3), "intercept": round(float(platt.intercept_[0]), 3)}
    context = Context(1, **fitted)
    threshold = best_threshold(labels[chosen], together(alone["validation"], cells[chosen], patients[chosen], context))
    threshold_alone = best_threshold(labels[chosen], alone["validation"])
    figures: dict = {"train": {"patients": len(np.unique(patients[train])), "patches": int(train.sum())}}

    def note(name: str, alone: np.ndarray, labels: np.ndarray, cells: np.ndarray, patients: np.ndarray) -> None:
        figures[name] = measure(labels, together(alone, cells, patients, context), patients, threshold)
        figures[f"{name}_alone"] = measure(labels, alone, patients, threshold_alone)

    for part in opened:
        of = parts == part
        note(part, alone[part], labels[of], cells[of], patients[of])
    for part in opened[:2]:
        of = parts == part
        stored = torch.from_numpy(np.stack([through_jpeg(image, 75, 2) for image in images[of]])).permute(0, 3, 1, 2)
        note(f"{part}_as_jpeg_75", predict(net, stored, transform), labels[of], cells[of], patients[of])
    if not args.test_closed:
        tiles, tile_labels, tile_cells = load_mosaic(args.data)
        score = predict(net, torch.from_numpy(tiles).permute(0, 3, 1, 2), transform)
        note("external_as_jpeg_slide", score, tile_labels, tile_cells, np.zeros(len(tiles)))

    hand_made = hand_made_features(images)
    baseline = HistGradientBoostingClassifier(max_iter=200, learning_rate=0.05, random_state=SEED)
    baseline.fit(hand_made[train], labels[train])
    figures["baseline_hand_made"] = {}
    for part in opened:
        of = parts == part
        score = baseline.predict_proba(hand_made[of])[:, 1]
        figures["baseline_hand_made"][part] = auroc(labels[of], score, patients[of])

    # CPU time of one core, which other work on the computer does not change much.
    torch.set_num_threads(1)
    timed = parts == ("validation" if args.test_closed else "test")
    figures["patches_per_core_second"] = {}
    for name, bf16 in (("float32", False), ("bfloat16", True)):
        begun = time.process_time()
        score = predict(net, rgb[timed], transform, bf16=bf16)
        figures["patches_per_core_second"][name] = round(int(timed.sum()) / (time.process_time() - begun))
    figures["auroc_under_bf16_autocast"] = round(float(roc_auc_score(labels[timed], score)), 4)
    figures |= {"workers": args.workers, "train_minutes": minutes, "weights_sha256": sha256}

    config = {
        "spec_version": "1.0",
        "task": "patch",
        "architecture": "wsi-p4m",
        "architecture_args": {**NET, "mean": mean, "std": std},
        "num_classes": 2,
        "class_names": ["non-idc", "idc"],
        "patch_size_pixels": SIDE,
        "spacing_um_px": MPP,
        "transform": [{"name": "ToTensor"}, {"name": "Normalize", "arguments": {"mean": mean, "std": std}}],
        "positive_classes": ["idc"],
        "context": fitted,
        "threshold": threshold,
        "num_features": net.num_features,
        "weights_sha256": sha256,
    }
    for name, content in (("config.json", config), ("figures.json", figures)):
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
