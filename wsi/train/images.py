"""Labelled patches: folders of classes, tables, and stores labelled by outlines on their slides.

::

    FOLDER/<class>/*.png                  or FOLDER/train|val|test/<class>/*.png, which gives the split
    TABLE.csv                             path, label, patient, and optionally split
    STORES/<slide>/store.zarr             wsi tile --pixels, wsi score --pixels; outlines give the labels
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsi.errors import TrainError
from wsi.files import opened_image
from wsi.store import PatchStore
from wsi.train.cohort import PARTS, Cohort, Split, make_cohort, read_labels, read_parts

U8 = npt.NDArray[np.uint8]
Place = Path | tuple[PatchStore, int]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_MOST_PX = 2048

#: Pillow's modes that convert to 8-bit RGB.
_KINDS = ("RGB", "RGBA", "L", "P", "CMYK")
#: Least covered share of a tile that has the outline's class; as in ``wsi evaluate patches``.
_MOST = 0.5


class Labelled(NamedTuple):
    """Patches with labels.

    Attributes
    ----------
    places : dict of id to Place
        An image file, or a store and the number of a tile in it.
    cohort : Cohort
        One case a patch, by the same ids.
    split : Split, optional
        Where the input gives one.
    mpp : float, optional
        Microns per pixel, where the input gives it.
    """

    places: dict[str, Place]
    cohort: Cohort
    split: Split | None = None
    mpp: float | None = None

    def without(self, names: Sequence[str]) -> tuple[Cohort, Split | None]:
        """Return cohort and split without some patches."""
        gone = set(names)
        cases = {name: case for name, case in self.cohort.cases.items() if name not in gone}
        split = self.split and Split(*(tuple(name for name in part if name not in gone) for part in self.split))
        return Cohort(cases, self.cohort.class_names), split


class Patches:
    """Pixels of patches by id. All are read once to check them, and kept in memory up to `keep_bytes`.

    Raises TrainError, which names the patch, where one cannot be read, or has another size than most; `subset` leaves
    the latter out instead.

    Attributes
    ----------
    tile_px : int
        Side of the patches: the commonest.
    checksums : dict of id to int
        CRC-32 of the pixels.
    left_out : list of str
    """

    def __init__(self, places: Mapping[str, Place], *, subset: bool = False, keep_bytes: int = 4 << 30) -> None:
        self._places = dict(places)
        self._kept: dict[str, U8] = {}
        self._pool = ThreadPoolExecutor(4)
        self.checksums: dict[str, int] = {}
        sides: dict[str, tuple[int, int]] = {}
        for name, rgb in zip(places, self._pool.map(self._one, places), strict=True):
            self.checksums[name], sides[name] = zlib.crc32(rgb.tobytes()), rgb.shape[:2]
            if rgb.nbytes <= keep_bytes:
                keep_bytes -= rgb.nbytes
                self._kept[name] = rgb
        square = Counter(side for side in sides.values() if side[0] == side[1])
        if not square:
            raise TrainError("patches", "none of them is square", "Cut squares: wsi tile")
        (self.tile_px, _), _ = square.most_common(1)[0]
        self.left_out = [name for name, side in sides.items() if side != (self.tile_px, self.tile_px)]
        if self.left_out and not subset:
            h, w = sides[self.left_out[0]]
            what = f"is {w} x {h} px, most are {self.tile_px} px ({len(self.left_out)} are not)"
            raise TrainError(self._where(self.left_out[0]), what, "Cut them alike, or leave them out with --subset")

    def read(self, names: Sequence[str]) -> U8:
        """Return patches, uint8 (n, tile_px, tile_px, 3)."""
        return np.stack(list(self._pool.map(self._one, names)))

    def _one(self, name: str) -> U8:
        if name in self._kept:
            return self._kept[name]
        place = self._places[name]
        return _read_image(place) if isinstance(place, Path) else place[0].read([place[1]])[0]

    def _where(self, name: str) -> str:
        place = self._places[name]
        return str(place) if isinstance(place, Path) else f"{place[0].path}, tile {place[1]}"


def read_folder(folder: Path, *, classes: Sequence[str] = (), patient_in: str | None = None) -> Labelled:
    """Read a folder with one folder of images a class; folders train, val and test above these give the split.

    Parameters
    ----------
    classes : sequence of str
        Order of the classes; default: numeric, or alphabetical.
    patient_in : str, optional
        Regular expression that finds the patient in an image's path, as its first group. Without it each image is its
        own patient.

    Raises
    ------
    TrainError
        There are no classes, one has no images, or a path holds no patient.
    """
    parts = {sub: PARTS[sub.name.lower()] for sub in _folders(folder) if sub.name.lower() in PARTS}
    if len(parts) != len(_folders(folder)):
        parts = {}
    rows: list[tuple[str, str, str]] = []
    division: tuple[list[str], ...] = ([], [], [])
    for above, part in parts.items() if parts else [(folder, None)]:
        if not _folders(above):
            raise TrainError(above, "holds no folder a class", "Give a folder of folders, one a class, or a CSV")
        for of_class in _folders(above):
            images = sorted(path for path in of_class.rglob("*") if path.suffix.lower() in _SUFFIXES)
            images = [path for path in images if not path.name.startswith(".")]
            if not images:
                remedy = f"Add some ({' '.join(_SUFFIXES)}), or remove it"
                raise TrainError(of_class, "is a class without images", remedy)
            for path in images:
                name = path.relative_to(folder).as_posix()
                rows.append((name, _patient(name, patient_in, path), of_class.name))
                if part is not None:
                    division[part].append(name)
    cohort = make_cohort(folder, rows, classes)
    places: dict[str, Place] = {name: folder / name for name in cohort.cases}
    return Labelled(places, cohort, Split(*map(tuple, division)) if parts else None)


def read_table(path: Path, *, label: str = "label", classes: Sequence[str] = ()) -> Labelled:
    """Read a CSV ``path, label``, optionally ``patient`` and ``split``. Paths are relative to the CSV's folder.

    Raises TrainError as ``read_labels`` and ``read_parts`` do.
    """
    cohort = read_labels(path, label=label, classes=classes, case="path")
    places: dict[str, Place] = {name: path.parent / name for name in cohort.cases}
    return Labelled(places, cohort, read_parts(path, cohort, case="path"))


def read_stores(
    stores: Mapping[str, Path],
    outlines: Mapping[str, Iterable[tuple[str, shapely.Geometry]]],
    *,
    classes: Sequence[str] = (),
    rest: str | None = None,
    patients: Mapping[str, str] | None = None,
) -> Labelled:
    """Label the tiles of stores by outlines: a tile has the class that covers at least half of it.

    Unreadable tiles are left out, and those that no class or several classes cover by half.

    Parameters
    ----------
    stores : mapping of slide id to path
        Stores that keep pixels.
    outlines : mapping of slide id to (class, geometry)
        Level-0 pixels.
    classes : sequence of str
        Classes to learn, in this order; default: all.
    rest : str, optional
        Class of the tiles that no outline covers by half; it comes first.
    patients : mapping of slide id to str, optional
        Default: every slide is its own patient.

    Raises
    ------
    TrainError
        A store without pixels, stores of different resolutions, or a slide without a patient.
    """
    rows: list[tuple[str, str, str]] = []
    places: dict[str, Place] = {}
    first: PatchStore | None = None
    for slide_id, path in stores.items():
        store = PatchStore.open(path)
        first = first or store
        if store.pixels == "none":
            raise TrainError(path, "keeps no pixels", "Make it with wsi tile --pixels jpeg")
        if (store.grid.tile_px, store.grid.mpp) != (first.grid.tile_px, first.grid.mpp):
            what = f"holds {store.grid.tile_px} px at {store.grid.mpp:g} microns per pixel, {first.path} "
            what += f"{first.grid.tile_px} px at {first.grid.mpp:g}"
            raise TrainError(path, what, "Tile all slides alike")
        if patients is not None and slide_id not in patients:
            raise TrainError(path, "has no row in the table of patients", "Add it")
        drawn: dict[str, list[shapely.Geometry]] = {}
        for group, geometry in outlines.get(slide_id, ()):
            if not classes or group in classes:
                drawn.setdefault(group, []).append(geometry)
        covered = {group: store.grid.covered(shapely.union_all(shapes)) >= _MOST for group, shapes in drawn.items()}
        claims = np.sum([*covered.values(), np.zeros(len(store), bool)], axis=0)
        unreadable = store.get("unreadable")
        for name, chosen in [*covered.items(), *([] if rest is None else [(rest, claims == 0)])]:
            for tile in np.flatnonzero(chosen & (claims <= 1) & ~unreadable).tolist():
                rows.append((f"{slide_id}/{tile}", patients[slide_id] if patients else slide_id, name))
                places[f"{slide_id}/{tile}"] = (store, tile)
    if not rows or first is None:
        what = "no outline covers half a tile of these slides"
        raise TrainError("annotations", what, "Compare names and coordinates")
    names = [*classes] or sorted({name for _, _, name in rows})
    names = names if rest is None else [rest, *(name for name in names if name != rest)]
    return Labelled(places, make_cohort(Path("annotations"), sorted(rows), names), None, first.grid.mpp)


def _read_image(path: Path) -> U8:
    try:
        with opened_image(path) as image:
            (w, h), kind = image.size, image.mode
            rgb = np.array(image.convert("RGB")) if max(w, h) <= _MOST_PX and kind in _KINDS else None
    except (OSError, ValueError) as error:
        raise TrainError(path, f"cannot be read as an image ({error})", "Fetch it again, or leave it out") from error
    if max(w, h) > _MOST_PX:
        raise TrainError(path, f"is {w} x {h} px", "Cut slides into patches: wsi tile")
    if rgb is None:
        raise TrainError(path, f"holds pixels of the kind {kind}", "Save it as 8-bit RGB")
    return rgb


def _patient(name: str, pattern: str | None, path: Path) -> str:
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise TrainError(f"--patient-in {pattern!r}", f"is no regular expression ({error})") from error
    if found is None:
        raise TrainError(path, f"holds no patient: {pattern!r} is not in its path", "Correct --patient-in")
    return found[1] if found.groups() else found[0]


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        raise TrainError(place, "there is no such folder", "Check the path")
    return sorted(sub for sub in place.iterdir() if sub.is_dir() and not sub.name.startswith("."))
