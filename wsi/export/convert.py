"""Convert bags of features between the layouts of other programs.

Whatever ``wsi.train.bags`` reads can be written as ``wsi.export.bags`` writes. If the new layout needs something that a
file does not contain, an error names the option that supplies it; nothing is guessed. WSInfer's results hold no
features; for CLAM and TRIDENT their coordinates are written, to compute features at.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.errors import TrainError
from wsi.export.bags import LAYOUTS, folder_name
from wsi.export.pseudonym import pseudonym
from wsi.export.table import TileTable
from wsi.result import read_result
from wsi.train.bags import SCORING_MODEL, Bag, BagInfo, find_bags, read_bag
from wsi.units import Mpp

Json = dict[str, Any]

#: What each layout needs besides coordinates.
_NEEDS = {
    "clam": (),
    "trident": ("encoder", "stride", "tile_px", "mpp"),
    "stamp": ("features", "encoder", "tile_px", "mpp"),
    "torchmil": ("features", "stride"),
    "anndata": ("features",),
}
#: The message and the remedy if it is missing.
_MISSING = {
    "features": ("holds no features", "compute them first (clam and trident take coordinates alone)"),
    "encoder": ("does not say what made the features", "name it with --encoder"),
    "tile": ("does not say how large a tile is", "give its side in level-0 pixels with --tile-level0"),
    "stride": ("does not lie on a lattice that can be told", "give the distance of tiles with --stride-level0"),
    "tile_px": ("does not say in how many pixels a tile was cut", "give them with --tile-px"),
    "mpp": ("does not say how many microns a level-0 pixel measures", "give them with --slide-mpp"),
}


@dataclass(frozen=True)
class Given:
    """What the user states about all slides, because the files may not contain it.

    Attributes
    ----------
    encoder : str, optional
        The encoder of the features; for stores with several features, which to use.
    mpp : float, optional
        Microns per level-0 pixel.
    tile_px : int, optional
        Side of a tile in pixels at the resolution it was cut at.
    tile_level0, stride_level0 : float, optional
        Side and distance of tiles in level-0 pixels. For tiles on a lattice (torchmil), one of them stands for both.

    Raises
    ------
    ValueError
        A number is not positive.
    """

    encoder: str | None = None
    mpp: float | None = None
    tile_px: int | None = None
    tile_level0: float | None = None
    stride_level0: float | None = None

    def __post_init__(self) -> None:
        for name in ("mpp", "tile_px", "tile_level0", "stride_level0"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value:g}")


def convert_bags(
    places: Sequence[Path], out: Path, layout: str, given: Given | None = None, *, key: bytes | None = None
) -> list[Json]:
    """Write bags in another program's layout: features unchanged, coordinates exact to the pixel.

    Parameters
    ----------
    places : sequence of Path
        Folders or files of CLAM, TRIDENT, STAMP, torchmil, AnnData (as we write it), WSInfer; our results and stores.
    out : Path
        Must not exist, or be empty. It appears only when it is complete.
    layout : {"clam", "trident", "stamp", "torchmil", "anndata"}
    key : bytes, optional
        Slide ids are replaced by their pseudonyms.

    Returns
    -------
    list of dict
        A row per slide: ``slide_id``, ``tiles``, ``tile_level0``, ``stride_level0``, ``warnings``.

    Raises
    ------
    TrainError
        A bag cannot be read, lacks what the layout needs, or has other features than the rest.
    ResultsError
        anndata is not installed.
    ValueError
        An unknown layout.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> convert_bags([Path("job")], Path("for_stamp"), "stamp", Given(mpp=0.25))                   # doctest: +SKIP
    [{'slide_id': 'slide_1', 'tiles': 13816, 'tile_level0': 1024.0, 'stride_level0': 1024.0, 'warnings': []}]
    """
    if layout not in _NEEDS:
        raise ValueError(f"layout must be one of {', '.join(_NEEDS)}, got {layout!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainError(out, "is there already", "Choose another folder with -o")
    found = _find(places)
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    rows: list[Json] = []
    alike: dict[str, tuple[Any, str]] = {}
    try:
        for slide_id, path in found.items():
            name = pseudonym(slide_id, key)
            table = _table(name, path, layout, given or Given())
            shown = table.features.shape[1] if table.features is not None else None
            for what, value in (("features of width", shown), ("features of encoder", table.encoder)):
                other, first = alike.setdefault(what, (value, name))
                if other != value:
                    raise TrainError(path, f"has {what} {value}; {first} has {other}", "Convert them apart")
            LAYOUTS[layout](draft, table)
            stride = table.stride and table.stride[0]
            warnings = [] if table.features is not None else ["coordinates alone: there are no features"]
            if layout == "torchmil" and table.positions.dtype.kind == "f":
                warnings.append("tiles lie on no common lattice from the corner: positions are not whole")
            rows.append(
                {"slide_id": name, "tiles": len(table.corners), "tile_level0": table.tile[0], "stride_level0": stride}
                | {"warnings": warnings}
            )
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return rows


def lattice(
    corners: npt.NDArray[np.float64], least: float
) -> tuple[npt.NDArray[np.float64], tuple[float, float]] | None:
    """Find the lattice on which tiles lie: each tile's position, and the distance of neighbours.

    Parameters
    ----------
    corners : float64 (n, 2)
        If the lattice begins at (0, 0), positions are whole, and position times distance, rounded, gives the corner
        again, also for corners that were rounded to whole pixels. Otherwise positions are fractional.
    least : float
        The smallest distance accepted; two overlapping lattices have tiny steps.

    Returns
    -------
    (float64 (n, 2), (float, float)) or None
        None if there is no lattice, or a single tile.

    Examples
    --------
    >>> positions, distance = lattice(np.array([[527.0, 0], [1053, 0], [2633, 527]]), 50)
    >>> positions.tolist(), np.round(distance, 1).tolist()
    ([[1.0, 0.0], [2.0, 0.0], [5.0, 1.0]], [526.6, 527.0])
    """
    axes = np.round(corners.T, 3)
    steps = [_step(np.unique(values), least) for values in axes]
    if None in steps or not any(steps):
        return None
    x, y = (step or next(filter(None, steps)) for step in steps)  # a single row or column has none
    return np.stack([_steps(values, step) for values, step in zip(axes, (x, y), strict=True)], axis=1), (x, y)


def _step(values: npt.NDArray[np.float64], least: float) -> float | None:
    """The distance of which all steps are multiples, up to rounding; 0 for a single value, None if there is none."""
    steps = np.diff(values)
    if not len(steps):
        return 0.0
    step = float(steps.min())
    if step < least:
        return None
    for _ in range(3):  # the smallest step is too small by rounding, which adds up over wide gaps
        counts = np.round(steps / step)
        step = float(steps.sum() / counts.sum())
    at = np.concatenate([[0.0], np.cumsum(counts)])
    if np.abs(values[0] + at * step - values).max() > 1:
        return None
    at += round(values[0] / step)
    low, high = ((values + off)[at > 0] / at[at > 0] for off in (-0.5, 0.5))
    from_corner = low.max() <= high.min() and (at[0] != 0 or abs(values[0]) <= 0.5)  # a lattice from (0, 0) fits
    return float(low.max() + high.min()) / 2 if from_corner else step


def _steps(values: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.float64]:
    whole = np.round(values / step)
    return whole if np.abs(whole * step - values).max() <= 0.501 else values / step


def _find(places: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in places:
        more = scores_of_wsinfer(place) or find_bags([place])
        for name in found.keys() & more.keys():
            raise TrainError(more[name], f"slide {name} is also in {found[name]}", "Give one of the two")
        found |= more
    return found


def scores_of_wsinfer(place: Path) -> dict[str, Path]:
    """Return WSInfer's tables by slide; none if this is no results folder of WSInfer."""
    files = sorted((place / "model-outputs-csv").glob("*.csv"))
    return {file.stem: file for file in files} | ({place.stem: place} if place.suffix == ".csv" else {})


def read_scores(path: Path) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """Read a table of WSInfer: boxes (n, 4) in level-0 pixels, and the probability (n,) of each class.

    Raises
    ------
    TrainError
        It is no such table, or a cell is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = [*("minx", "miny", "width", "height"), *(c for c in reader.fieldnames or () if c[:5] == "prob_")]
            table = np.array([[float(row[c]) for c in columns] for row in reader], np.float64).reshape(-1, len(columns))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise TrainError(path, f"is no table of WSInfer's ({error!r})", "Expected minx,miny,width,height") from error
    if not len(table) or not np.isfinite(table[:, :4]).all():
        raise TrainError(path, "holds no tiles, or coordinates that are not finite", "Run WSInfer again")
    return table[:, :4], {name[5:]: values for name, values in zip(columns[4:], table[:, 4:].T, strict=True)}


def _table(name: str, path: Path, layout: str, given: Given) -> TileTable:
    bag = _read(path, given)
    if bag.boxes is None:
        raise TrainError(path, "has no coordinates", "CLAM keeps them in patches/ beside pt_files/: give that folder")
    meta, boxes = bag.info, bag.boxes
    mpp = _agreed(path, "microns a level-0 pixel", "--slide-mpp", meta.mpp, given.mpp and Mpp(given.mpp, given.mpp))
    tile, stride = (
        _agreed(path, f"level-0 pixels a {what}", f"--{what}-level0", known, side and (side, side))
        for what, known, side in (("tile", meta.tile, given.tile_level0), ("stride", meta.stride, given.stride_level0))
    )
    # All missing values are reported together below; until then 1 stands for each (a lattice is one in any unit).
    if meta.unit == "um":
        boxes = boxes / np.tile(mpp or (1.0, 1.0), 2)
        tile = tile or (float(boxes[0, 2]), float(boxes[0, 3]))
    elif meta.unit == "lattice":
        tile, stride = tile or stride, stride or tile
        boxes = boxes * np.tile(stride or (1.0, 1.0), 2)
    table = TileTable(
        name=name,
        features=bag.features if bag.features.shape[1] else None,
        corners=boxes[:, :2],
        positions=boxes[:, :2],
        tile=tile or (float(boxes[0, 2]), float(boxes[0, 3])),
        tile_px=_agreed(path, "pixels a tile", "--tile-px", meta.tile_px, given.tile_px),
        mpp=mpp,
        size=meta.size,
        encoder=bag.encoder and folder_name(bag.encoder),
    )
    table = _on_lattice(table, stride, fixed=given.stride_level0 is not None)
    needed = ("mpp", *_NEEDS[layout]) if meta.unit == "um" else _NEEDS[layout]
    _require(
        path,
        {"tile": tile}
        | {what: getattr(table, what) for what in needed if what != "encoder" or table.features is not None},
    )
    if layout == "stamp" and np.abs(bag.features).max() > np.finfo(np.float16).max:
        raise TrainError(path, "has features beyond 65,504, which STAMP's float16 cannot hold", "Use another layout")
    if mpp is None or table.tile_px is None:
        return table
    return replace(table, tile_mpp=float(f"{table.tile[0] * mpp.x / table.tile_px:.9g}"))


def _read(path: Path, given: Given) -> Bag:
    """A bag with the encoder's name; without features for WSInfer's tables."""
    if path.suffix == ".csv":
        boxes, _ = read_scores(path)
        tile = float(boxes[0, 2]), float(boxes[0, 3])
        return Bag(np.zeros((len(boxes), 0), np.float32), boxes, None, BagInfo(tile=tile))
    if path.is_dir():
        bag, scored = read_bag(path, given.encoder), read_result(path.parent)
        name = bag.info.encoder_name
        if name == SCORING_MODEL:
            name = str(scored.numbers["provenance"]["model"]) if scored else (bag.encoder or "")[:12]
        return bag._replace(encoder=Path(name or "").name or None)
    bag = read_bag(path)
    return bag._replace(encoder=_agreed(path, "as the encoder", "--encoder", bag.encoder, given.encoder))


def _on_lattice(table: TileTable, stride: tuple[float, float] | None, *, fixed: bool) -> TileTable:
    """Add the tiles' positions on their lattice, from the known stride unless that was rounded."""
    found = None
    if stride is not None:
        positions = np.round(table.corners / stride)
        if fixed or np.abs(positions * stride - table.corners).max() <= 1e-3:
            found = np.stack([_steps(*each) for each in zip(table.corners.T, stride, strict=True)], axis=1), stride
    found = found or lattice(table.corners, min(table.tile) / 8)
    if found is None and (stride is not None or len(table.corners) == 1):
        stride = stride or table.tile
        found = table.corners / stride, stride
    if found is None:
        return table
    whole = bool((found[0] == np.round(found[0])).all())
    return replace(table, positions=found[0].astype(np.int64) if whole else found[0], stride=found[1])


def _require(path: Path, values: dict[str, Any]) -> None:
    missing = [_MISSING[what] for what, value in values.items() if value is None]
    if missing:
        raise TrainError(path, ", ".join(what for what, _ in missing), ", ".join(do for _, do in missing).capitalize())


def _agreed(path: Path, what: str, option: str, meta: Any, given: Any) -> Any:
    """The given value, else the file's. If both exist they must agree within 1 %, since the file's may be rounded."""
    if meta is None or given is None:
        return given if meta is None else meta
    same = meta == given if isinstance(meta, str) else np.allclose(meta, given, rtol=0.01, atol=0)
    if not same:
        raise TrainError(path, f"says {meta} {what}, and {option} {given}", "Leave the option out")
    return given
