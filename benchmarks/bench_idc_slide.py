"""Tile AUROC of idc-breast on a whole slide whose patient no training saw.

    wsi score ../shared/data/patches/idc_mosaic_slides/idc_14082.tif --model idc-breast -o out
    python benchmarks/bench_idc_slide.py out

The label grid says of each 50 px cell: 0 nothing published, 1 no IDC, 2 IDC. Tiles and cells coincide.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from wsi import PatchStore

DATA = Path(os.environ.get("WSI_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def main() -> None:
    """Print AUROC with a bootstrap interval over 5 x 5 blocks of tiles, which are not independent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    store = PatchStore.open(results / "idc_14082" / "store.zarr")
    cells = np.asarray(Image.open(DATA / "patches/idc_mosaic_slides/idc_14082_grid50_labels.png"))  # (47, 56)
    columns, rows = store.grid.columns, store.grid.rows
    known = cells[rows, columns] > 0
    labels = cells[rows, columns][known] == 2
    scores = store.get("probabilities")[known, 1]
    print(f"{known.sum()} of {(cells > 0).sum()} labelled cells were found to be tissue, {labels.sum()} of them IDC")
    print(f"{len(store) - known.sum()} tiles were scored where no label is")
    everywhere = np.zeros(cells.shape)
    everywhere[rows, columns] = store.get("probabilities")[:, 1]
    blocks = (rows[known] // 5) * 100 + columns[known] // 5
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    draws = []
    for _ in range(2000):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if 0 < labels[chosen].sum() < len(chosen):
            draws.append(roc_auc_score(labels[chosen], scores[chosen]))
    low, high = np.percentile(draws, [2.5, 97.5])
    print(f"tile AUROC {roc_auc_score(labels, scores):.4f} (95 % interval over blocks {low:.4f} to {high:.4f})")
    print(f"counting cells without tissue as 0: {roc_auc_score(cells[cells > 0] == 2, everywhere[cells > 0]):.4f}")
    print(f"average precision {average_precision_score(labels, scores):.4f} at a prevalence of {labels.mean():.3f}")


if __name__ == "__main__":
    main()
