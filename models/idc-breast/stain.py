"""Measure the stains of the training patients, and look which others lie outside their range.

    python models/idc-breast/stain.py --data ../shared/data --out models/idc-breast

Output: stain.json in --out, and a table on stdout. What the network says is not looked at, nor any label.
"""

import argparse
import importlib.util
import os
from functools import partial
from pathlib import Path

import numpy as np

from wsi.grid import TileGrid
from wsi.slide import open_slide
from wsi.stain.range import StainCheck, StainRange, sample_tiles
from wsi.tissue import find_tissue
from wsi.train.cohort import Split
from wsi.train.stains import learn_stains

HERE = Path(__file__).resolve().parent
SLIDES = (
    "patches/idc_mosaic_slides/idc_14082.tif",
    "wsi/aperio/CMU-1-Small-Region.svs",
    "wsi/generic_tiff/CMU-0-small.tiff",
    "wsi/hamamatsu_ndpi/test3-DAPI-2-(387).ndpi",
)


def load_program(path: Path):
    """Import a program that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fit_range(data: Path) -> tuple[StainRange, dict]:
    """Learn the range from the training patients' patches, and count who of the others lies outside."""
    training = load_program(HERE / "train.py")
    images, _, patients, _ = training.load_patches(data)
    names = np.unique(patients).tolist()
    tiles = {name: partial(lambda of: np.ascontiguousarray(images[of]), patients == name) for name in names}
    parts = [tuple(n for n in names if training.part_of(n) == part) for part in ("train", "validation", "test")]
    return learn_stains(tiles, {name: name for name in names}, [Split(*parts)])


def check_slide(known: StainRange, path: Path) -> StainCheck:
    """As `wsi score` does, with all tiles that hold a quarter of tissue."""
    with open_slide(str(path)) as slide:
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=4.0, tile_px=50)
        return known.check(sample_tiles(slide, grid.keep(find_tissue(slide).fraction(grid.boxes()) >= 0.25)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the range of stains of the breast IDC classifier.")
    default_data = Path(os.environ.get("WSI_TEST_DATA") or HERE.parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default_data, help="folder with patches/, stain/ and wsi/")
    parser.add_argument("--out", type=Path, default=Path("idc-breast"), help="folder for stain.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known, unlike = fit_range(args.data)
    known.write(args.out)
    print(f"{known.patients} training patients, limit {known.limit:g}\n{unlike}\n")
    centres = load_program(HERE / "shift.py").load_centres(args.data)
    checks = {f"CAMELYON17, centre {name}": known.check(tiles) for name, tiles in centres.items()}
    checks |= {Path(path).name: check_slide(known, args.data / path) for path in SLIDES}
    for name, found in checks.items():
        said = found.undefined or found.outside or "inside"
        print(f"{name}: {'' if found.distance is None else f'{found.distance:.1f}, '}{said}")


if __name__ == "__main__":
    main()
