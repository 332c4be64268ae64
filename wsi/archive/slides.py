"""Find the slides to process: files, folders, patterns and CSV manifests into one list, each slide once."""

from __future__ import annotations

import csv
import glob
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from wsi.errors import ManifestError, SlideNotFound
from wsi.slide import absolute, is_url

#: Suffixes that folders are searched for. DICOM files of one series are levels and parts of one slide.
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".dicom")
_DICOM = (".dcm", ".dicom")
#: Columns of a manifest; others are ignored.
COLUMNS = ("slide", "mpp", "mask", "label", "patient")
#: Wrong rows of a manifest that an error lists.
_MOST_SHOWN = 20


@dataclass(frozen=True)
class SlideRef:
    """A slide to process, with what the user or a manifest says of it."""

    path: str
    mpp: float | None = None  # microns per level-0 pixel; overrides what the file says
    mpp_source: str = "user"  # who gave `mpp`
    mask: str | None = None  # an image of the whole slide, of any size; tissue is where it is not black
    label: str = ""  # like `patient`, copied into slides.csv
    patient: str = ""
    local: str | None = None  # a copy on faster storage, to read from instead


def find_slides(inputs: Iterable[str], mpp: float | None = None) -> list[SlideRef]:
    """Turn files, folders, patterns and CSV manifests into a list of slides, each once, in a fixed order.

    Parameters
    ----------
    inputs : iterable of str
        Each a slide, a URL, a folder (searched recursively, by suffix), a pattern such as ``"archive/**/*.svs"``, or a
        ``.csv`` with a column ``slide`` and optionally ``mpp``, ``mask``, ``label``, ``patient``; its relative paths
        are relative to the CSV.
    mpp : float, optional
        Microns per level-0 pixel of every slide for which a manifest gives none.

    Raises
    ------
    SlideNotFound
        A path does not exist, or a folder holds no slide.
    ManifestError
        Rows of a manifest are wrong; their line numbers are named.
    """
    found: dict[str, SlideRef] = {}
    for name in inputs:
        path = Path(name)
        if is_url(name):
            refs = [SlideRef(name, mpp)]
        elif path.is_dir():
            refs = [SlideRef(str(slide), mpp) for slide in _in_folder(path)]
            if not refs:
                raise SlideNotFound(name, "holds no slides", f"Searched for {' '.join(SUFFIXES)}")
        elif path.suffix.lower() == ".csv" and _is_there(path):
            refs = _in_manifest(path, mpp)
        elif _is_there(path):
            refs = [SlideRef(name, mpp)]
        else:
            refs = [SlideRef(slide, mpp) for slide in sorted(glob.glob(name, recursive=True)) if Path(slide).is_file()]  # noqa: PTH207
            if not refs:
                what = "no file matches" if glob.has_magic(name) else "there is no such file or folder"
                raise SlideNotFound(name, what, "Check the path")
        for ref in refs:
            place = absolute(ref.path)
            found[place] = _joined(found[place], ref) if place in found else ref
    return list(found.values())


def _joined(one: SlideRef, other: SlideRef) -> SlideRef:
    """Merge two entries of one slide, which may be given by its folder and in a manifest, say."""
    for name in ("mpp", "mask", "label", "patient"):
        first, second = getattr(one, name), getattr(other, name)
        if first and second and first != second:
            raise ManifestError(other.path, f"is named twice, with {name} {first} and {second}", "Keep one")
        if second and not first:
            one = replace(one, **{name: second}, mpp_source=other.mpp_source if name == "mpp" else one.mpp_source)
    return one


def _in_folder(folder: Path) -> list[Path]:
    slides: list[Path] = []
    series: dict[tuple[Path, bytes], list[tuple[bool, int, Path]]] = {}
    for path in sorted(_files_in(folder)):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES or not path.is_file():
            continue
        if suffix in _DICOM:
            uid, is_volume, n_px = _dicom_instance(path)
            series.setdefault((path.parent, uid), []).append((not is_volume, -n_px, path))
        else:
            slides.append(path)
    # A series is named after its finest level, which remains if labels and overviews are deleted.
    return sorted([*slides, *(min(instances)[2] for instances in series.values())])


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, following links, each folder once; skip hidden files and results of ours."""

    def refuse(error: OSError) -> None:
        what = f"cannot be searched ({error.strerror})"
        raise SlideNotFound(error.filename, what, "Check its permissions") from error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or {"run.json", "slides.csv"} <= {*files}:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "lost+found")
        yield from (Path(place, name) for name in files if name[0] != ".")


def _dicom_instance(path: Path) -> tuple[bytes, bool, int]:
    """Return a DICOM file's series (its files are levels of one slide), whether it is a level, and its pixel count."""
    with path.open("rb") as file:
        head = file.read(1 << 16)

    def value(tag: bytes, kind: bytes) -> bytes:
        if (at := head.find(tag)) < 0:
            return b""
        explicit = head[at + 4 : at + 6] == kind
        length = int.from_bytes(head[at + 6 : at + 8] if explicit else head[at + 4 : at + 8], "little")
        return head[at + 8 : at + 8 + length]

    uid = value(b"\x20\x00\x0e\x00", b"UI").strip(b"\0 ")  # SeriesInstanceUID (0020,000E)
    image_type = value(b"\x08\x00\x08\x00", b"CS").strip(b"\0 ").split(b"\\")  # (0008,0008)
    # TotalPixelMatrixColumns and Rows (0048,0006 and 0007)
    w, h = (int.from_bytes(value(tag, b"UL"), "little") for tag in (b"\x48\x00\x06\x00", b"\x48\x00\x07\x00"))
    return uid or path.name.encode(), b"VOLUME" in image_type, w * h  # without a UID, a series of its own


def _in_manifest(path: Path, mpp: float | None) -> list[SlideRef]:
    refs, bad = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            if "slide" not in names:
                has = ", ".join(names) or "none"
                remedy = f"Columns: {COLUMNS[0]}[,{','.join(COLUMNS[1:])}]"
                raise ManifestError(path, f"has no column 'slide' (it has {has})", remedy)
            for row in reader:
                try:
                    refs.append(_in_row(f"{path}, line {reader.line_num}", path.parent, row, mpp))
                except ManifestError as error:
                    bad.append(error)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(path, f"is no CSV in UTF-8 ({error})", "Save it as CSV in UTF-8") from error
    if len(bad) == 1:
        raise bad[0]
    if bad:
        shown = [str(error).removeprefix(f"{path}, ") for error in bad[:_MOST_SHOWN]]
        if len(bad) > _MOST_SHOWN:
            shown.append(f"and {len(bad) - _MOST_SHOWN} more")
        raise ManifestError(path, "\n  ".join([f"{len(bad)} of its rows are wrong:", *shown]))
    if not refs:
        raise ManifestError(path, "names no slides", "One row a slide below the header")
    return refs


def _in_row(where: str, folder: Path, row: dict[str, str | None], mpp: float | None) -> SlideRef:
    cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
    if not cells["slide"]:
        raise ManifestError(where, "names no slide", "Fill in the column 'slide'")
    try:
        own = (float(cells["mpp"]), "manifest") if cells["mpp"] else (mpp, "user")
    except ValueError:
        own = (math.nan, "")
    if own[0] is not None and not own[0] > 0:
        remedy = "Microns per pixel, such as 0.25"
        raise ManifestError(where, f"mpp is {cells['mpp']!r}, not a number above 0", remedy)
    paths = {}
    for kind in ("slide", "mask"):
        name = cells[kind]
        paths[kind] = name if not name or is_url(name) else str(folder / name)
        if name and not is_url(name) and not _is_there(Path(paths[kind])):
            raise ManifestError(where, f"there is no {kind} {paths[kind]}", "Paths are relative to the manifest")
    return SlideRef(paths["slide"], *own, mask=paths["mask"] or None, label=cells["label"], patient=cells["patient"])


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False
