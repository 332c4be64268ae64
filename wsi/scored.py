"""What ``wsi score`` wrote for a slide: exports and evaluation read results through this module only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi.errors import ResultsError
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap
from wsi.store import PatchStore
from wsi.units import Box, Mpp


@dataclass(frozen=True, eq=False)
class ScoredTiles:
    """The n tiles of a slide that have a score."""

    grid: TileGrid
    rows: npt.NDArray[np.int64]  # (n,), their row numbers in the store, which also holds unreadable tiles
    probabilities: npt.NDArray[np.float32]  # (n, k)
    attention: npt.NDArray[np.float32] | None  # (n,), sums to 1; None where no MIL model graded the slide
    alone: npt.NDArray[np.float32] | None = None  # (n, k), probabilities before context; None where none was applied


@dataclass(frozen=True)
class ScoredSlide:
    """A slide that ``wsi score`` has finished: its folder and the content of result.json."""

    slide_id: str
    folder: Path
    numbers: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in level-0 pixels."""
        return int(self.numbers["size_px"][0]), int(self.numbers["size_px"][1])

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel."""
        return float(self.numbers["mpp"])

    @property
    def bounds(self) -> Box:
        """The scanned part of the level-0 plane."""
        return Box(*map(float, self.numbers["bounds_px"]))

    @property
    def origin(self) -> tuple[float, float]:
        """Top left corner of `bounds`, from which QuPath counts."""
        return self.bounds.x, self.bounds.y

    @property
    def tissue_px(self) -> float:
        """Area of the tissue in level-0 pixels."""
        return float(self.numbers["tissue_mm2"]) * 1e6 / Mpp(self.mpp, self.mpp).area_um2(1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the columns of the probabilities."""
        return tuple(self.numbers.get("class_names") or ())

    @property
    def positive(self) -> npt.NDArray[np.bool_]:
        """Which classes are positive, bool (k,)."""
        return np.array([name in self.numbers["positive_classes"] for name in self.class_names], bool)

    def store(self) -> PatchStore:
        """Open the patch store."""
        return PatchStore.open(self.folder / "store.zarr")

    def pixel_size(self, store: PatchStore) -> Mpp:
        """Microns per level-0 pixel along x and y, exactly; result.json rounds their mean to six digits."""
        exact = store.attributes.get("slide", {}).get("mpp")
        return Mpp(*map(float, exact)) if exact else Mpp(self.mpp, self.mpp)

    def tiles(self, store: PatchStore) -> ScoredTiles:
        """Return the tiles that have a score; raises ResultsError for patches without scores (``wsi tile``)."""
        if not self.class_names or "probabilities" not in store.arrays:
            raise ResultsError(self.folder, "holds no scores", "Score the slide: wsi score")
        readable = np.flatnonzero(~store.get("unreadable"))
        attention = store.get("attention")[readable] if "attention" in store.arrays and len(readable) else None
        alone = store.get("probabilities_alone")[readable] if "probabilities_alone" in store.arrays else None
        return ScoredTiles(store.grid.keep(readable), readable, store.get("probabilities")[readable], attention, alone)

    def heatmap(self) -> Heatmap:
        """Return each tile's summed probability of the positive classes; raises ResultsError if none are named."""
        if not self.class_names or not self.numbers["positive_classes"]:
            what = "does not say which classes are positive"
            raise ResultsError(self.folder, what, "Score the slide again, with --positive")
        tiles = self.tiles(self.store())
        return Heatmap.of(tiles.grid, tiles.probabilities, self.positive)

    def regions(self, threshold: float | None = None) -> list[shapely.Polygon]:
        """Return the areas where the heatmap reaches `threshold` (default: that of the run), in level-0 pixels.

        Raises ResultsError like ``heatmap``, or if `threshold` is outside 0 to 1.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ResultsError(f"threshold={threshold:g}", "is no probability", "From 0 to 1")
        heatmap = self.heatmap()
        at_least = float(self.numbers["threshold"]) if threshold is None else threshold
        return heatmap.regions(at_least, self.bounds) if len(heatmap.grid) else []


def scored_slides(folder: Path) -> dict[str, ScoredSlide]:
    """Return the finished slides of a results folder, or of a single slide's folder, by slide id.

    Raises ResultsError if it holds none, or a damaged one.

    Examples
    --------
    >>> scored_slides(Path("results"))["slide_1"].regions(0.5)                                    # doctest: +SKIP
    """
    found = {}
    for path in sorted(folder.glob("*/result.json")) or sorted(folder.glob("result.json")):
        try:
            numbers = json.loads(path.read_text(encoding="utf-8"))
            found[str(numbers["slide_id"])] = ScoredSlide(str(numbers["slide_id"]), path.parent, numbers)
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(path, f"is damaged ({error})", "Score the slide again") from error
    if not found:
        raise ResultsError(folder, "holds no results of wsi score", "Give the folder that -o of wsi score named")
    return found
