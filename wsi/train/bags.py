"""Bags of tile features on disk: our stores, CLAM's .h5 and .pt, TRIDENT's folders.

::

    results/<slide>/store.zarr                      wsi score, wsi embed
    h5_files/<slide>.h5, pt_files/<slide>.pt        CLAM: features (n, d) and coords (n, 2); a tensor (n, d)
    .../features_<encoder>/<slide>.h5               TRIDENT: the same, and attributes
    <encoder>/<slide>.h5                            STAMP: feats (n, d), coords in microns
    features/<slide>.npy                            torchmil: coords/<slide>.npy beside, positions on the lattice
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wsi.errors import StoreError, TrainError
from wsi.files import replacing
from wsi.store import PatchStore

_FILES = (".h5", ".pt", ".npy")


class Bag(NamedTuple):
    """The tiles of one slide.

    Attributes
    ----------
    features : float16 or float32 (n, d)
        n >= 1, finite.
    boxes : float64 (n, 4), optional
        Level-0 x, y, w, h; None where the file does not say.
    encoder : str, optional
        What made the features: the hash of the weights, or the name that a TRIDENT file gives.
    """

    features: npt.NDArray[Any]
    boxes: npt.NDArray[np.float64] | None
    encoder: str | None


def find_bags(places: Iterable[str | Path]) -> dict[str, Path]:
    """Return where each slide's bag is.

    Parameters
    ----------
    places : iterable of paths
        Results folders of ours, CLAM or TRIDENT folders, or single bags.

    Raises
    ------
    TrainError
        Nothing is there, a folder holds features of several encoders, or a slide is there twice.
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
    """Read a bag and check it.

    Parameters
    ----------
    path : Path
    encoder : str, optional
        Of a store of ours: which features, by the name that ``wsi embed`` was given or the beginning of the hash of
        the encoder's weights. Needed where a store holds those of several.

    Raises
    ------
    TrainError
        It is empty, not a table of finite numbers, or damaged; the bag is named.
    """
    try:
        read = {".h5": _read_h5, ".pt": _read_pt, ".npy": _read_npy}.get(path.suffix)
        bag = read(path) if read else _read_store(path, encoder)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, EOFError, StoreError) as error:
        raise TrainError(path, f"cannot be read ({error})", "Compute its features again") from error
    features = bag.features
    if features.ndim != 2 or features.dtype.kind != "f":
        raise TrainError(path, f"features are {features.dtype} {features.shape}, not floats (n, d)", "Is it a bag?")
    if not len(features):
        raise TrainError(path, "holds no tiles", "Leave the slide out of the labels, or look for its tissue again")
    starts = range(0, len(features), 16_384)  # in blocks: a mask of all would be half the bag again
    bad = sum(int((~np.isfinite(features[start : start + 16_384]).all(axis=1)).sum()) for start in starts)
    if bad:
        raise TrainError(path, f"{bad} of {len(features)} tiles have features that are not finite", "Compute it again")
    if bag.boxes is not None and len(bag.boxes) != len(features):
        raise TrainError(path, f"holds {len(features)} features and {len(bag.boxes)} coordinates", "Compute it again")
    return bag


def _bags_in(place: Path) -> Iterable[tuple[str, Path]]:
    if (place / "store.zarr").is_dir():
        place = place / "store.zarr"
    if place.name == "store.zarr":
        return [(place.resolve().parent.name, place)]
    if place.is_file() and place.suffix in _FILES:
        return [(place.stem, place)]
    if not place.is_dir():
        raise TrainError(place, "there is no such file or folder", "Check the path")
    stores = sorted(place.glob("*/store.zarr"))
    if stores:
        return [(store.parent.name, store) for store in stores]
    folders = [folder for folder in (place / "h5_files", place / "pt_files") if folder.is_dir()][:1]
    named = [*sorted(place.glob("features_*")), *sorted(place.glob("*/features_*")), place / "features"]
    folders = folders or [place, *named]
    files = [[file for suffix in _FILES for file in sorted(folder.glob(f"*{suffix}"))] for folder in folders]
    full = [(folder, bags) for folder, bags in zip(folders, files, strict=True) if bags]
    if len(full) > 1:
        names = ", ".join(str(folder.relative_to(place)) for folder, _ in full)
        raise TrainError(place, f"holds features in {names}", "Give one of them: features of two encoders do not mix")
    return [(file.stem, file) for _, bags in full for file in bags]


def _read_store(path: Path, encoder: str | None) -> Bag:
    store = PatchStore.open(path)
    found = {}  # array: name and hash of what made it
    for array in store.arrays:
        about = store.about(array)
        if "encoder_sha256" in about:
            found[array] = (str(about["encoder"]), str(about["encoder_sha256"]))
    if "features" in store.arrays:
        found["features"] = ("the scoring model", store.attributes.get("model_sha256") or "")
    there = ", ".join(f"{name} ({sha256[:12]})" for name, sha256 in found.values())
    if encoder is not None:
        found = {
            array: by
            for array, by in found.items()
            if by[0] in (encoder, Path(encoder).name) or by[1].startswith(encoder)
        }
    if len({sha256 for _, sha256 in found.values()}) != 1:
        what = f"holds features of {there or 'no encoder'}" + (f", not of {encoder!r} alone" if encoder else "")
        raise TrainError(path, what, "Name one with --encoder" if there else "Run wsi embed")
    array, (_, sha256) = found.popitem()
    readable = ~store.get("unreadable") if not store.missing("unreadable") else slice(None)
    return Bag(store.get(array)[readable], store.grid.boxes()[readable], sha256 or None)


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
        boxes = None if coords is None else _boxes(np.asarray(coords, np.float64), dict(coords.attrs))
    return Bag(features, boxes, None if encoder in (None, "None") else str(encoder))


def _read_stamp(file: Any) -> Bag:
    """Microns to pixels only where the file says how large a pixel is, which STAMP's own do not."""
    coords, mpp = np.asarray(file["coords"], np.float64)[:, :2], file.attrs.get("wsi_slide_mpp")
    boxes = None
    if mpp is not None:
        side = np.full((len(coords), 2), float(file.attrs["tile_size_um"]))
        boxes = np.concatenate([coords, side], axis=1) / np.tile(np.asarray(mpp, np.float64), 2)
    return Bag(
        np.asarray(file["feats"]), boxes, str(file.attrs.get("extractor")) if "extractor" in file.attrs else None
    )


def _read_npy(path: Path) -> Bag:
    features = np.load(path, allow_pickle=False)
    beside = path.parent.parent / "coords" / path.name
    coords = np.load(beside, allow_pickle=False).astype(np.float64) if beside.is_file() else None
    return Bag(features, None if coords is None else np.concatenate([coords, np.ones_like(coords)], axis=1), None)


def _boxes(coords: npt.NDArray[np.float64], attributes: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Top left corners (n, 2 or more) to boxes (n, 4); a side that is not said is the least step between tiles."""
    corner = coords.reshape(len(coords), -1)[:, :2]
    said = attributes.get("patch_size_level0")
    if isinstance(said, (int, float, np.number)):  # TRIDENT stores a missing number as the word None
        side = float(said)
    else:
        side = min((float(np.diff(u).min()) for u in (np.unique(c) for c in corner.T) if len(u) > 1), default=1.0)
    return np.concatenate([corner, np.full((len(corner), 2), side)], axis=1)


def _read_pt(path: Path) -> Bag:
    import torch

    value = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: nothing is unpickled
    if isinstance(value, dict):
        value = value["features"]
    if not isinstance(value, torch.Tensor):
        raise TrainError(path, f"holds a {type(value).__name__}, not a tensor", "Is it a bag?")
    return Bag((value.float() if value.dtype == torch.bfloat16 else value).numpy(), None, None)


def write_pt(path: Path, features: npt.NDArray[np.float32]) -> None:
    """Write a bag as CLAM's ``pt_files`` hold it: a tensor (n, d)."""
    import torch

    with replacing(path) as file:
        torch.save(torch.from_numpy(np.ascontiguousarray(features)), file)
