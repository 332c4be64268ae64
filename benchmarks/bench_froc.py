"""FROC of a whole CAMELYON16: 129 slides, a million detections; ours beside MONAI's on the same inputs.

    python benchmarks/bench_froc.py make FOLDER
    python benchmarks/bench_froc.py wsi FOLDER
    MONAI/bin/python benchmarks/bench_froc.py monai FOLDER      (a venv of its own: pip install monai scikit-image)

49 of the slides hold tumours, on masks of 6,000 x 3,000 px (level 5 of a large slide). Times are CPU time of the
computation, without reading the inputs. MONAI's parts are those that ``LesionFROC`` strings together, given the
detections: its own suppression is left out, and normal slides skip its distance transform, which is undefined on an
empty mask. Confidences are multiples of 1/4096, since its curve takes time by distinct confidence; ours does not.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

SLIDES, TUMOUR, DETECTIONS, SHAPE = 129, 49, 1_000_000, (3000, 6000)


def make(folder: Path) -> None:
    """Write a packed mask a tumour slide, and the detections of every slide."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(16)
    counts = rng.multinomial(DETECTIONS, np.full(SLIDES, 1 / SLIDES))
    for i, k in enumerate(counts):
        arrays = {"p": rng.integers(1, 4097, k) / 4096, "x": rng.integers(0, SHAPE[1] * 32, k)}
        arrays["y"] = rng.integers(0, SHAPE[0] * 32, k)
        if i < TUMOUR:
            mask = np.zeros(SHAPE, bool)
            for _ in range(int(rng.integers(1, 30))):
                radius = float(rng.choice([4, 15, 60, 250]) * rng.uniform(0.5, 1.5))
                y, x = rng.uniform(0, SHAPE[0]), rng.uniform(0, SHAPE[1])
                top, left = int(max(y - radius, 0)), int(max(x - radius, 0))
                part = mask[top : int(y + radius) + 1, left : int(x + radius) + 1]
                rows, columns = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
                part |= np.hypot(rows - y, columns - x) < radius
            arrays["mask"] = np.packbits(mask)
        np.savez_compressed(folder / f"{i:03}.npz", **arrays)


def load(path: Path) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
    """Return mask, confidences, x and y of a slide."""
    with np.load(path) as data:
        mask = None
        if "mask" in data:
            mask = np.unpackbits(data["mask"], count=SHAPE[0] * SHAPE[1]).reshape(SHAPE).astype(bool)
        return mask, data["p"], data["x"], data["y"]


def run_wsi(paths: list[Path]) -> tuple[float, float]:
    """Return score and seconds of ours."""
    from wsi.metrics.froc import find_lesions, froc, match

    hits, seconds = [], 0.0
    for path in paths:
        mask, p, x, y = load(path)
        begun = time.process_time()
        hits.append(match(find_lesions(mask) if mask is not None else None, p, x, y))
        seconds += time.process_time() - begun
    begun = time.process_time()
    score = froc(hits).score.value
    return score, seconds + time.process_time() - begun


def run_monai(paths: list[Path]) -> tuple[float, float]:
    """Return score and seconds of MONAI's."""
    from monai.apps.pathology.utils import compute_isolated_tumor_cells, compute_multi_instance_mask
    from monai.metrics import compute_fp_tp_probs, compute_froc_curve_data, compute_froc_score

    spacing = 0.243 * 2**5
    fps, tps, targets, seconds = [], [], 0, 0.0
    for path in paths:
        mask, p, x, y = load(path)
        begun = time.process_time()
        if mask is None:
            fps.extend(p)
        else:
            labels = compute_multi_instance_mask(mask.astype(np.uint8), 75 / (spacing * 2))
            itc = compute_isolated_tumor_cells(labels, 275 / spacing)
            fp, tp, n = compute_fp_tp_probs(p, y, x, labels, itc, 5)
            fps.extend(fp)
            tps.extend(tp)
            targets += n
        seconds += time.process_time() - begun
        print(f"{path.stem} {seconds:.1f} s", flush=True)
    begun = time.process_time()
    curve = compute_froc_curve_data(np.array(fps), np.array(tps), targets, len(paths))
    score = compute_froc_score(*curve, (0.25, 0.5, 1, 2, 4, 8))
    return float(score), seconds + time.process_time() - begun


def main() -> None:
    """Make the inputs, or time one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "wsi", "monai"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=SLIDES, help="only so many, tumour slides first")
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.folder)
        return
    paths = sorted(arguments.folder.glob("*.npz"))[: arguments.slides]
    score, seconds = (run_wsi if arguments.what == "wsi" else run_monai)(paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.what}: score {score!r}, {seconds:.1f} s CPU, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
