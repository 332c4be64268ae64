"""Does stain normalisation, or colour augmentation, help this classifier under the colours of other centres?

    python models/idc-breast/shift.py --data ../shared/data --out idc-shift

Read from top to bottom. Networks that differ in nothing but colour (augmented or not, normalised or not) are trained
on the training patients, then scored on patients they did not see, in those patients' own colours and in those of
four CAMELYON17 centres. Output, in --out: the networks and shift.json. Networks that lie there already are not trained
again. Without --open-test only the validation patients are scored.
"""

import argparse
import importlib.util
import io
import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wsi.nn.p4m import P4MNet
from wsi.stain import StainTransform, fit

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

EPOCHS = 8  # of all arms; the shipped network had 18 and 22
SEEDS = (0, 1)  # networks an arm: figures are means over them
DRAWS = 2000

MPP_FACTOR = 16  # CAMELYON17 is scanned at about 0.25 um/px, the patches are at 4
CELL_RICH = 0.05  # share of the training patches that the centres' lymph nodes are compared with
CENTRE_4_SHARE = 1 / 3  # share of centre 4's small tiles that are as rich in cells as the others' large ones
KINDS = ("macenko", "reinhard")  # of shift
JPEG = (75, 2)  # quality and chroma subsampling of all patches scored


def load_program(path: Path):
    """Import a program that lies in no package."""
    spec = importlib.util.spec_from_file_location("idc_breast_training", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training = load_program(HERE / "train.py")


class Row(NamedTuple):
    """A row of the table: how what the networks see is normalised, and which networks."""

    method: str | None = None
    target: str = "training"  # or a name in wsi.stain.TARGETS
    colour: float = 0.0  # of an arm: strength of the colour augmentation that it is trained with
    member: int | None = None  # of the shipped network: that member alone


# Each arm is trained as it is tested. The target of their normalisation is how the training patients look as a whole.
ARMS = {
    "plain": Row(),
    "augmented": Row(colour=1.0),
    "augmented-3x": Row(colour=3.0),
    "macenko": Row("macenko"),
    "macenko-augmented": Row("macenko", colour=1.0),
    "reinhard": Row("reinhard"),
    "reinhard-augmented": Row("reinhard", colour=1.0),
}
# The shipped network, trained without normalisation: as it is, its members alone, as `wsi score --stain METHOD` runs
# it, and normalised to its training colours.
SHIPPED = {
    "shipped": Row(),
    "shipped, augmented member": Row(member=0),
    "shipped, plain member": Row(member=1),
    "shipped --stain macenko": Row("macenko", "veta"),
    "shipped --stain reinhard": Row("reinhard", "veta"),
    "shipped, macenko to training": Row("macenko"),
    "shipped, reinhard to training": Row("reinhard"),
}
ROWS = ARMS | SHIPPED


# --- colours ------------------------------------------------------------------------------------------


def reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of factor x factor px: uint8 (h, w, 3) -> uint8 (h // factor, w // factor, 3)."""
    h, w = image.shape[0] // factor, image.shape[1] // factor
    cells = image[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    return np.rint(cells.mean((1, 3))).astype(np.uint8)


def cell_rich(images: np.ndarray, share: float) -> np.ndarray:
    """The share of images uint8 (n, h, w, 3) that absorbs most red, as nuclei do and eosin hardly does."""
    density = -np.log((images[..., 0].mean((1, 2)) + 1) / 256)
    return np.ascontiguousarray(images[np.argsort(-density, kind="stable")[: max(1, int(share * len(images)))]])


def load_centres(data: Path) -> dict[str, np.ndarray]:
    """Tiles of lymph node at the patches' resolution: centre -> uint8 (n, h, w, 3). Of centre 3 there are none.

    Centres 0 to 2 are a tile of 2048 px each, dense in cells; of centre 4, 25 small tiles of 11 patients, the third
    that is dense.
    """
    centres = {}
    for path in sorted((data / "stain" / "camelyon17_centres").glob("centre_*.jpeg")):
        centres[path.name[len("centre_")]] = reduced(np.asarray(Image.open(path).convert("RGB")), MPP_FACTOR)[None]
    with zipfile.ZipFile(data / "stain" / "camelyon17_lymphnode_tiles_256.zip") as archive:
        names = sorted(name for name in archive.namelist() if 80 <= int(name[:3]) < 100)  # patients of centre 4
        tiles = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    centres["4"] = cell_rich(np.stack([reduced(tile, MPP_FACTOR) for tile in tiles]), CENTRE_4_SHARE)
    return centres


def fit_shifts(train: np.ndarray, centres: dict[str, np.ndarray]) -> dict[str, StainTransform]:
    """One map for each kind and centre, from the training patients' colours to the centre's: "macenko 0" and so on.

    One for all patients, so that they keep differing among themselves as they do: a map for each patient would be a
    normalisation. Like is compared with like: lymph node with the patches richest in cells.
    """
    source = cell_rich(train, CELL_RICH)
    shifts = {f"{kind} {centre}": fit(kind, source, tiles) for kind in KINDS for centre, tiles in centres.items()}
    assert not any(shift.fallback for shift in shifts.values())
    return shifts


def as_jpeg(images: np.ndarray) -> np.ndarray:
    return np.stack([training.through_jpeg(image, *JPEG) for image in images])


def normalised(
    images: np.ndarray, patients: np.ndarray, method: str, target: str | StainTransform
) -> tuple[np.ndarray, Counter]:
    """Normalise patches uint8 (n, h, w, 3), fitted on all of a patient's pixels, and count patients that fell back."""
    out, fallbacks = np.empty_like(images), Counter()
    for patient in np.unique(patients):
        of = patients == patient
        pixels = np.ascontiguousarray(images[of])
        transform = fit(method, pixels, target)
        fallbacks.update([transform.fallback] if transform.fallback else [])
        out[of] = transform.apply(pixels)
    return out, fallbacks


# --- networks -----------------------------------------------------------------------------------------


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def arm_networks(name: str, images: np.ndarray, labels: np.ndarray, out: Path) -> list[P4MNet]:
    """Train an arm's networks on patches uint8 (n, 50, 50, 3), or load those that lie in `out`."""
    pixels = images.reshape(-1, 3) / 255
    mean, std = [round(float(v), 4) for v in pixels.mean(0)], [round(float(v), 4) for v in pixels.std(0)]
    nets = []
    for seed in SEEDS:
        weights = out / f"{name}-{seed}.safetensors"
        if not weights.exists():
            print(f"{name}, seed {seed}", flush=True)
            fitted = training.fit(
                seed, planes(images).numpy(), labels, mean, std, epochs=EPOCHS, augmented=True, colour=ARMS[name].colour
            )
            save_file({key: torch.from_numpy(value.copy()) for key, value in fitted.items()}, weights)
        nets.append(loaded({**training.NET, "members": 1, "mean": mean, "std": std}, load_file(weights)))
    return nets


def shipped_network(member: int | None) -> P4MNet:
    """The network that ships, or one of its members."""
    arguments = json.loads((HERE / "config.json").read_text(encoding="utf-8"))["architecture_args"]
    weights = load_file(HERE / "weights.safetensors")
    if member is None:
        return loaded(arguments, weights)
    parts = [(name.split(".", 2), value) for name, value in weights.items()]  # "trunks.1.stem.weight"
    alone = {f"{kind}.0.{rest}": value for (kind, i, rest), value in parts if int(i) == member}
    return loaded({**arguments, "members": 1}, alone)


def loaded(arguments: dict, weights: dict[str, torch.Tensor]) -> P4MNet:
    net = P4MNet(**arguments).eval()
    net.load_state_dict(weights)
    net.transform = training.Normalise(arguments["mean"], arguments["std"])
    return net.to(memory_format=torch.channels_last)


# --- measurement --------------------------------------------------------------------------------------


def aurocs(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """AUROC of all patients, then of bootstrap samples of patients: float64 (1 + DRAWS,).

    The samples are the same for all scores (and those of train.py), so that means and differences of AUROCs can be
    taken sample by sample.
    """
    names = np.unique(patients)
    idc = [scores[(patients == name) & (labels == 1)] for name in names]
    other = [scores[(patients == name) & (labels == 0)] for name in names]
    # Pairs (patch with IDC of patient i, patch without of patient j) in the right order, ties half; and pairs in all.
    won = np.array([[(a[:, None] > b).sum() + 0.5 * (a[:, None] == b).sum() for b in other] for a in idc])
    pairs = np.outer([len(a) for a in idc], [len(b) for b in other])
    rng = np.random.default_rng(training.SEED)
    drawn = [np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(DRAWS)]
    times = np.array([np.ones(len(names)), *drawn])  # how often each patient is in each sample
    return ((times @ won) * times).sum(1) / ((times @ pairs) * times).sum(1)


def with_interval(samples: np.ndarray) -> list[float]:
    """Value and 95 % interval of what `aurocs` returns."""
    return [round(float(v), 4) for v in (samples[0], *np.percentile(samples[1:], [2.5, 97.5]))]


def columns(shifts: dict[str, StainTransform], images: np.ndarray) -> dict[str, np.ndarray]:
    """The patches in their own colours and in each shift's, all as JPEG."""
    images = np.ascontiguousarray(images)
    return {"own": as_jpeg(images)} | {name: as_jpeg(shift.apply(images)) for name, shift in shifts.items()}


def measure(
    rows: dict[str, list[P4MNet]],
    columns: dict[str, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    targets: dict[str, StainTransform],
    thresholds: dict[str, list[float]],
) -> dict:
    """Score each row's networks in each column. `thresholds` is filled where it lacks a row, from its own colours."""
    figures: dict = {"patients": len(np.unique(patients)), "patches": len(labels), "idc_patches": int(labels.sum())}
    samples, figures["rows"] = {}, {}
    for name, nets in rows.items():
        row, cells, called, fallbacks = ROWS[name], {}, {}, {}
        for column, images in columns.items():
            if row.method:
                target = targets[row.method] if row.target == "training" else row.target
                images, fell_back = normalised(images, patients, row.method, target)
                fallbacks |= {column: dict(fell_back)} if fell_back else {}
            scores = [training.predict(net, planes(images), net.transform, bf16=True) for net in nets]
            if name not in thresholds:
                thresholds[name] = [training.best_threshold(labels, score) for score in scores]
            cells[column] = np.array([aurocs(labels, score, patients) for score in scores])  # (nets, 1 + DRAWS)
            pairs = zip(scores, thresholds[name], strict=True)
            called[column] = float(np.mean([training.balanced_accuracy(labels, s >= t) for s, t in pairs]))
        for kind in KINDS:
            of = [column for column in columns if column.startswith(kind)]
            worst = min(of, key=lambda column: cells[column][:, 0].mean())
            cells |= {f"{kind} mean": np.mean([cells[column] for column in of], axis=0), f"{kind} worst": cells[worst]}
            called[f"{kind} mean"] = float(np.mean([called[column] for column in of]))
        samples[name] = {column: values.mean(0) for column, values in cells.items()}
        reference = samples["shipped" if name in SHIPPED else "plain"]
        summaries = ["own", *(f"{kind} mean" for kind in KINDS)]
        figures["rows"][name] = {
            "auroc": {column: with_interval(values) for column, values in samples[name].items()},
            "gain": {column: with_interval(samples[name][column] - reference[column]) for column in summaries},
            "networks": {column: [round(float(v), 4) for v in cells[column][:, 0]] for column in summaries},
            "balanced_accuracy": {column: round(called[column], 4) for column in summaries},
            "fallbacks": fallbacks,
        }
        print(name, json.dumps(figures["rows"][name]["auroc"]), json.dumps(fallbacks), flush=True)
    return figures


# --- the tables of CARD.md ----------------------------------------------------------------------------


def tables(figures: dict) -> str:
    """Two tables in Markdown for one part: the summary with intervals, and centre by centre, the worst in bold."""

    def cell(interval: list[float], sign: str = "") -> str:
        value, low, high = (f"{v:{sign}.3f}" for v in interval)
        return f"{value} ({low} to {high})"

    by_kind = "".join(f" {kind.capitalize()} shifts | gain |" for kind in KINDS)
    summary = [f"| | own colours |{by_kind}", "|---" * (2 + 2 * len(KINDS)) + "|"]
    centre_by_centre: list[str] = []
    for name, row in figures["rows"].items():
        values = [cell(row["auroc"]["own"])]
        for kind in KINDS:
            itself = name in ("plain", "shipped")
            values += [cell(row["auroc"][f"{kind} mean"]), "" if itself else cell(row["gain"][f"{kind} mean"], "+")]
        summary.append(f"| {name} | {' | '.join(values)} |")

        shown = [column for column in row["auroc"] if column.split()[-1].isdigit()]
        if not centre_by_centre:
            header = " | ".join(column.capitalize() for column in shown)
            centre_by_centre += [f"| | {header} |", "|---" * (1 + len(shown)) + "|"]
        worst = [row["auroc"][f"{kind} worst"] for kind in KINDS]
        cells = [f"{'**' * (row['auroc'][c] in worst)}{row['auroc'][c][0]:.3f}" for c in shown]
        cells = [text + "**" * text.startswith("*") for text in cells]
        centre_by_centre.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*summary, "", *centre_by_centre])


def compact(value: dict, depth: int = 3) -> str:
    """JSON with what lies deeper than `depth` on one line."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    indent = "  " * (4 - depth)
    inside = ",\n".join(f"{indent}{json.dumps(key)}: {compact(v, depth - 1)}" for key, v in value.items())
    return "{\n" + inside + "\n" + indent[2:] + "}"


# --- all of it ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the breast IDC classifier under other centres' colours.")
    default_data = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default_data, help="folder with patches/ and stain/")
    parser.add_argument("--out", type=Path, default=Path("idc-shift"), help="folder for what is written")
    parser.add_argument("--open-test", action="store_true", help="score the test patients too: once, at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    images, labels, patients, _ = training.load_patches(args.data)
    parts = np.array([training.part_of(patient) for patient in patients])
    train = np.ascontiguousarray(images[parts == "train"])
    shifts = fit_shifts(train, load_centres(args.data))
    targets = {method: fit(method, train, train) for method in KINDS}

    figures: dict = {"training": {"epochs": EPOCHS, "seeds": len(SEEDS), "fallbacks": {}}}
    rows: dict[str, list[P4MNet]] = {}
    for name, arm in ARMS.items():
        seen = train
        if arm.method:
            seen, fallbacks = normalised(train, patients[parts == "train"], arm.method, targets[arm.method])
            figures["training"]["fallbacks"][arm.method] = dict(fallbacks)
        rows[name] = arm_networks(name, seen, labels[parts == "train"], args.out)
    rows |= {name: [shipped_network(row.member)] for name, row in SHIPPED.items()}

    threshold = json.loads((HERE / "config.json").read_text(encoding="utf-8"))["threshold"]
    thresholds = {name: [threshold] for name, row in SHIPPED.items() if row.member is None}
    for part in ("validation", "test") if args.open_test else ("validation",):
        of = parts == part
        figures[part] = measure(rows, columns(shifts, images[of]), labels[of], patients[of], targets, thresholds)
        print(f"\n{part}\n\n{tables(figures[part])}\n", flush=True)
    (args.out / "shift.json").write_text(compact(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
