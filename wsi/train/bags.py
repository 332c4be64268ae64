"""Read bags of tile features: our stores, and the files of CLAM, TRIDENT, STAMP, torchmil and AnnData.

::

    results/<slide>/store.zarr                      wsi score, wsi embed
    h5_files/<slide>.h5, pt_files/<slide>.pt        CLAM: features (n, d) and coords (n, 2); a tensor (n, d)
    patches/<slide>.h5                              CLAM: coords beside them, with the size of tiles
    .../features_<encoder>/<slide>.h5               TRIDENT: the same, and attributes
    <encoder>/<slide>.h5                            STAMP: feats (n, d), coords in microns
    features/<slide>.npy                            torchmil: coords/<slide>.npy beside, positions on the lattice
    <slide>.h5ad                                    AnnData as we write it: X (n, d), centres in obsm["spatial"]
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from wsi.errors import StoreError, TrainError
from wsi.files import replacing
from wsi.store import PatchStore
from wsi.units import Mpp

#: Encoder name of a store's ``features``, which ``wsi score`` writes.
SCORING_MODEL = "the scoring model"
_FILES = (".h5", ".pt", ".npy", ".h5ad")

#: Errors that readers of HDF5, pickles and .npy raise for a damaged file.
_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, EOFError, BadZipFile)


class BagInfo(NamedTuple):
    """Metadata of a bag's slide and tiles; None where the file does not give it.

    Attributes
    ----------
    tile, stride : (float, float)
        Width and height of tiles, and their spacing, in level-0 pixels.
    tile_px : int
        Side of a tile in the pixels that it was cut with.
    mpp : Mpp
        Microns per level-0 pixel.
    size : (int, int)
        The slide's width and height in level-0 pixels.
    encoder_name : str
        Name of the encoder, in a store of ours; `Bag.encoder` is its hash there.
    unit : {"px", "um", "lattice"}
        Unit of the bag's boxes: level-0 pixels, microns, or tiles.
    """

    tile: tuple[float, float] | None = None
    stride: tuple[float, float] | None = None
    tile_px: int | None = None
    mpp: Mpp | None = None
    size: tuple[int, int] | None = None
    encoder_name: str | None = None
    unit: str = "px"


class Bag(NamedTuple):
    """The tiles of one slide.

    Attributes
    ----------
    features : float16 or float32 (n, d)
        n >= 1, finite.
    boxes : float64 (n, 4), optional
        x, y, w, h in `info.unit`; None where the file has no coordinates.
    encoder : str, optional
        Hash of the encoder's weights, or the encoder's name in a file of another program.
    info : BagInfo
    """

    features: npt.NDArray[Any]
    boxes: npt.NDArray[np.float64] | None
    encoder: str | None
    info: BagInfo = BagInfo()


def find_bags(places: Iterable[str | Path]) -> dict[str, Path]:
    """Return the path of each slide's bag.

    `places` are results folders of ours, folders of CLAM or TRIDENT, or single bags. Raises TrainError where a place
    holds no bags or features of several encoders, or where a slide occurs twice.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        bags = list(_bags_in(place))
        if not bags:
            raise TrainError(place, "holds no bags", "Expected <slide>/store.zarr, *.h5, *.pt or features_<encoder>/")
        for slide_id, path in bags:
            if slide_id in found:
                raise TrainError(path, f"slide {slide_id} is also in {found[slide_id]}", "Give one of the two")
            found[slide_id] = path
    return found


def read_bag(path: Path, encoder: str | None = None) -> Bag:
    """Read and check a bag.

    `encoder` selects the features of a store that holds several: the name that ``wsi embed`` was given, or the
    beginning of the hash of the encoder's weights. Raises TrainError, which names the bag, where the bag is damaged or
    empty, or is not a table of finite numbers.
    """
    try:
        read = {".h5": _read_h5, ".pt": _read_pt, ".npy": _read_npy, ".h5ad": _read_h5ad}.get(path.suffix)
        bag = read(path) if read else _read_store(path, encoder)
    except (*_DAMAGED, StoreError) as error:
        raise TrainError(path, f"cannot be read ({error})", "Compute its features again") from error
    features = bag.features
    if features.ndim != 2 or features.dtype.kind != "f":
        raise TrainError(path, f"features are {features.dtype} {features.shape}, not floats (n, d)", "Is it a bag?")
    if not len(features):
        raise TrainError(path, "holds no tiles", "Leave the slide out of the labels, or look for its tissue again")
    starts = range(0, len(features), 16_384)  # in blocks: one mask would be half as large as the bag
    bad = sum(int((~np.isfinite(features[start : start + 16_384]).all(axis=1)).sum()) for start in starts)
    if bad:
        raise TrainError(path, f"{bad} of {len(features)} tiles have features that are not finite", "Compute it again")
    if bag.boxes is not None and len(bag.boxes) != len(features):
        raise TrainError(path, f"holds {len(features)} features and {len(bag.boxes)} coordinates", "Compute it again")
    if bag.boxes is not None and not np.isfinite(bag.boxes).all():
        raise TrainError(path, "has coordinates that are not finite", "Compute it again")
    return bag


def _bags_in(place: Path) -> Iterable[tuple[str, Path]]:
    if (place / "store.zarr").is_dir():
        place = place / "store.zarr"
    if place.name == "store.zarr":
        return [(place.resolve().parent.name, place)]
    if place.is_file() and place.suffix in _FILES:
        return [(place.stem, place)]
    if place.is_file():
        raise TrainError(place, "is no file of features", f"Their names end with {', '.join(_FILES)}")
    if not place.is_dir():
        raise TrainError(place, "there is no such file or folder", "Check the path")
    stores = sorted(place.glob("*/store.zarr"))
    if stores:
        return [(store.parent.name, store) for store in stores]
    folders = [folder for folder in (place / "h5_files", place / "pt_files") if folder.is_dir()][:1]
    named = [*sorted(place.glob("features_*")), *sorted(place.glob("*/features_*")), place / "features"]
    folders = folders or [place, *named]
    full = _with_bags(folders) or _with_bags([each.parent for each in sorted(place.glob("*/*.h5")) if _is_stamp(each)])
    if len(full) > 1:
        names = ", ".join(str(folder.relative_to(place)) for folder, _ in full)
        raise TrainError(place, f"holds features in {names}", "Give one of them: features of two encoders do not mix")
    return [(file.stem, file) for _, bags in full for file in bags]


def _with_bags(folders: Iterable[Path]) -> list[tuple[Path, list[Path]]]:
    found = [
        (folder, [file for suffix in _FILES for file in sorted(folder.glob(f"*{suffix}"))])
        for folder in dict.fromkeys(folders)
    ]
    return [(folder, files) for folder, files in found if files]


def _is_stamp(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "feats" in file
    except OSError:
        return False


def _read_store(path: Path, encoder: str | None) -> Bag:
    store = PatchStore.open(path)
    found = {}  # array: name and hash of its encoder
    for array in store.arrays:
        about = store.about(array)
        if "encoder_sha256" in about:
            found[array] = (str(about["encoder"]), str(about["encoder_sha256"]))
    if "features" in store.arrays:
        found["features"] = (SCORING_MODEL, store.attributes.get("model_sha256") or "")
    there = ", ".join(f"{name} ({sha256[:12]})" for name, sha256 in found.values())
    if encoder is not None:
        found = {
            array: by
            for array, by in found.items()
            if by[0] in (encoder, Path(encoder).name) or by[1].startswith(encoder)
        }
    if len({sha256 for _, sha256 in found.values()}) != 1:
        what = f"holds features of {there or 'no encoder'}" + (f", not of {encoder!r} alone" if encoder else "")
        make = f"wsi embed {path.parent.parent} --encoder {encoder or 'uni (or another)'}"
        if encoder is None and there:
            raise TrainError(path, what, "Name one with --encoder")
        raise TrainError(path, what, f"Make them: {make}" + (", or name another --encoder" if there else ""))
    array, (name, sha256) = found.popitem()
    readable = ~store.get("unreadable") if not store.missing("unreadable") else slice(None)
    grid, slide = store.grid, store.attributes.get("slide", {})
    info = BagInfo(
        tile=grid.tile,
        stride=grid.stride,
        tile_px=grid.tile_px,
        mpp=_mpp(slide.get("mpp")),
        size=_pair(slide.get("size"), int),
        encoder_name=name,
    )
    return Bag(store.get(array)[readable], grid.boxes()[readable], sha256 or None, info)


def _read_h5(path: Path) -> Bag:
    import h5py

    with h5py.File(path, "r") as file:
        if "feats" in file:
            return _read_stamp(file)
        dataset = file["features"]
        features = np.asarray(dataset)
        features = features[0] if features.ndim == 3 and len(features) == 1 else features
        encoder = dataset.attrs.get("encoder")
        coords = file.get("coords")
        boxes, info = _beside(path) if coords is None else _boxes(coords)
        if boxes is not None and info.tile is None:
            info = _beside(path)[1]
            boxes[:, 2:] = info.tile or boxes[:, 2:]
    return Bag(features, boxes, None if encoder in (None, "None") else str(encoder), info)


def _read_stamp(file: Any) -> Bag:
    """Convert microns to pixels where the file gives the pixel size, which STAMP's own files do not."""
    corners, attributes = np.asarray(file["coords"], np.float64)[:, :2], dict(file.attrs)
    side = _number(attributes, "tile_size_um", float)
    boxes = None if side is None else np.concatenate([corners, np.full((len(corners), 2), side)], axis=1)
    info = BagInfo(tile_px=_number(attributes, "tile_size_px", int), unit="um")
    mpp = _mpp(attributes.get("wsi_slide_mpp"))
    if mpp is not None and boxes is not None and len(boxes):
        boxes /= np.tile(mpp, 2)
        info = info._replace(mpp=mpp, tile=_pair(boxes[0, 2:], float), unit="px")
    encoder = str(attributes["extractor"]) if "extractor" in attributes else None
    return Bag(np.asarray(file["feats"]), boxes, encoder, info)


def _read_npy(path: Path) -> Bag:
    with path.open("rb") as file:  # np.load does not close a file that it cannot read
        features = np.load(file, allow_pickle=False)
    beside = path.parent.parent / "coords" / path.name
    coords = np.load(beside, allow_pickle=False).astype(np.float64) if beside.is_file() else None
    boxes = None if coords is None else np.concatenate([coords, np.ones_like(coords)], axis=1)
    return Bag(features, boxes, None, BagInfo(unit="lattice"))


def _read_h5ad(path: Path) -> Bag:
    """Read what we wrote. AnnData is HDF5, so h5py is enough."""
    import h5py

    with h5py.File(path, "r") as file:
        if not isinstance(file["X"], h5py.Dataset):
            raise ValueError("X is sparse")
        features, about = np.asarray(file["X"]), file.get("uns", {})
        kept = {name: about[name][()] for name in about if isinstance(about[name], h5py.Dataset)}
        tile, encoder, boxes = _pair(kept.get("tile_level0_px"), float), kept.get("encoder"), None
        if tile and "spatial" in file.get("obsm", {}):
            corners = np.asarray(file["obsm"]["spatial"], np.float64)[:, :2] - np.array(tile) / 2
            boxes = np.concatenate([corners, np.tile(tile, (len(corners), 1))], axis=1)
    info = BagInfo(
        tile=tile,
        stride=_pair(kept.get("stride_level0_px"), float),
        tile_px=_number(kept, "tile_px", int),
        mpp=_mpp(kept.get("slide_mpp")),
        size=_pair(kept.get("slide_size_px"), int),
    )
    return Bag(features, boxes, encoder.decode() if isinstance(encoder, bytes) else None, info)


def _boxes(coords: Any) -> tuple[npt.NDArray[np.float64], BagInfo]:
    """Top left corners (n, 2 or more) to boxes (n, 4); an unknown tile size is the least step between tiles."""
    attributes = dict(coords.attrs)
    corner = np.asarray(coords, np.float64).reshape(len(coords), -1)[:, :2]
    side, info = _number(attributes, "patch_size_level0", float), BagInfo()
    if side is not None:  # TRIDENT
        size = _number(attributes, "level0_width", int), _number(attributes, "level0_height", int)
        px, overlap = _number(attributes, "patch_size", int), _number(attributes, "overlap", float)
        step = None if px is None or overlap is None else side * (px - overlap) / px
        info = BagInfo((side, side), step and (step, step), px, size=size if None not in size else None)
    elif "patch_level" in attributes:  # CLAM: in pixels of that level
        down, size = _pair(attributes.get("downsample"), float), _pair(attributes.get("level_dim"), int)
        at_level_0 = not int(attributes["patch_level"])
        if down or at_level_0:
            side = float(attributes["patch_size"]) * (down[0] if down else 1.0)
            info = BagInfo((side, side), size=size if at_level_0 else None)
    if side is None:
        side = min((float(np.diff(u).min()) for u in (np.unique(c) for c in corner.T) if len(u) > 1), default=1.0)
    return np.concatenate([corner, np.full((len(corner), 2), side)], axis=1), info


def _beside(path: Path) -> tuple[npt.NDArray[np.float64] | None, BagInfo]:
    """Read coordinates and metadata from CLAM's ``patches/`` file of the same slide."""
    import h5py

    file = path.parent.parent / "patches" / f"{path.stem}.h5"
    if not file.is_file():
        return None, BagInfo()
    with h5py.File(file, "r") as opened:
        return _boxes(opened["coords"])


def _number(attributes: Mapping[str, Any], name: str, kind: Any) -> Any:
    """Return a number that a file may lack; TRIDENT stores a missing one as the word None."""
    value = attributes.get(name)
    return kind(value) if isinstance(value, (int, float, np.number)) else None


def _pair(value: Any, kind: Any) -> Any:
    return None if value is None or np.shape(value) != (2,) else (kind(value[0]), kind(value[1]))


def _mpp(value: Any) -> Mpp | None:
    found = _pair(value, float)
    return None if found is None else Mpp(*found)


def _read_pt(path: Path) -> Bag:
    import torch

    value = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: nothing is unpickled
    if isinstance(value, dict):
        value = value["features"]
    if not isinstance(value, torch.Tensor):
        raise TrainError(path, f"holds a {type(value).__name__}, not a tensor", "Is it a bag?")
    boxes, info = _beside(path)
    return Bag((value.float() if value.dtype == torch.bfloat16 else value).numpy(), boxes, None, info)


def write_pt(path: Path, features: npt.NDArray[np.float32]) -> None:
    """Write a bag as CLAM's ``pt_files`` hold it: a tensor (n, d)."""
    import torch

    with replacing(path) as file:
        torch.save(torch.from_numpy(np.ascontiguousarray(features)), file)
