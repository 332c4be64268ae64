"""The results folder: the configuration it is bound to, the slides' folders, and the tables.

::

    RESULTS/
      run.json         configuration, versions, model hashes, command line
      slides.csv       one row per finished slide, updated during a run; slides.parquet: the same, at the end of a run
      failures.csv     slide, stage, error, remedy
      <slide_id>/      the files of one slide: those of its job, seconds.json and last result.json; or failure.json
      .claims/         claims of running processes on slides

The tables are derived from the slides' folders: they may be lost, edited, or written by two runs at once.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wsi.archive.slides import SlideRef
from wsi.errors import ConfigMismatch, OutputError
from wsi.files import remove_folder, replacing, sha256_of, time_beside, write_csv, write_json
from wsi.result import SlideResult, read_result
from wsi.slide import absolute

CLAIMS = ".claims"
#: The claim needed to write run.json and the tables; no slide has this name.
TABLES_CLAIM = ".books"
_FAILURE = "failure.json"
_MAX_STEM = 200  # bytes; file systems allow 255
_TABLES = ("slides.csv", "slides.parquet", "failures.csv")
_OUR_FILES = ("run.json", *_TABLES)
_FROM_MANIFEST = ("label", "patient")  # columns copied into slides.csv
_START_OVER = "Choose another folder with -o, or start these slides over with --force"
_FOLLOW_THE_MODEL = ("context", "mil_sha256", "model_config", "model_sha256", "stain_range")  # not named beside it
_FAILURE_COLUMNS = ("slide_id", "slide", "stage", "error", "remedy")

Row = dict[str, Any]


def slide_ids(refs: Sequence[SlideRef], folder: Path) -> list[str]:
    """Return an id for each slide: its file's stem, plus a hash of its path if another slide has the same stem.

    The hash is also added if the stem is no usable folder name: hidden, too long, or one of our files. A slide keeps
    the id under which `folder` already holds its results or a part of them.
    """
    stems = [Path(ref.path.rstrip("/")).stem for ref in refs]
    count = Counter(stem.lower() for stem in stems)
    ids = []
    for ref, stem in zip(refs, stems, strict=True):
        odd = stem in _OUR_FILES or stem[0] == "." or len(os.fsencode(stem)) > _MAX_STEM
        path, whose = absolute(ref.path), None if odd else owner_of(folder / stem)
        if odd or (whose != path and (whose is not None or count[stem.lower()] > 1)):
            place = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            stem = f"{stem.lstrip('.')[: _MAX_STEM // 4]}-{place}"
        ids.append(stem)
    return ids


def bind(
    folder: Path, refs: Sequence[SlideRef], ids: Sequence[str], *, configuration: Mapping[str, Any],
    execution: Mapping[str, Any], command: Sequence[str], force: bool,
) -> None:  # fmt: skip
    """Check that the slides' results may go into the folder, and write run.json; with `force` delete old results.

    Raises ConfigMismatch if the folder holds results of another configuration (the difference is named), and
    OutputError if it holds files that are not ours. Then nothing is changed.
    """
    identity = json.loads(json.dumps(configuration))
    path = folder / "run.json"
    foreign = sorted(slide_id for slide_id in ids if (folder / slide_id).exists() and not _is_ours(folder / slide_id))
    if foreign:  # --force would delete it
        what = f"holds a folder {foreign[0]!r} that is not results of ours"
        raise OutputError(folder, what, "Choose an empty folder with -o")
    known = {*ids, *_OUR_FILES}
    others = sorted(child.name for child in folder.iterdir() if child.name not in known and child.name[0] != ".")
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["configuration"]
    except FileNotFoundError:
        earlier = identity
        if others:
            what = f"holds files that are not results of ours ({', '.join(others[:3])})"
            raise OutputError(folder, what, "Choose an empty folder") from None
    except (ValueError, KeyError, TypeError):
        earlier = {}
    if earlier != identity and (not force or others):
        changed = sorted(key for key in {*identity, *earlier} if identity.get(key) != earlier.get(key))
        if "model" in changed:  # its name says more than its hashes
            changed = [key for key in changed if key not in _FOLLOW_THE_MODEL]
        what = "holds results of another configuration: " + ", ".join(
            f"{key} was {json.dumps(earlier.get(key))}, now {json.dumps(identity.get(key))}" for key in changed
        )
        if others and force:
            what = f"{what}; and of other slides ({', '.join(others[:3])})"
            raise ConfigMismatch(folder, what, "Choose another folder")
        raise ConfigMismatch(folder, what, _START_OVER)
    for ref, slide_id in zip(refs, ids, strict=True):
        if force:
            _throw_away(folder / slide_id)
        else:
            _check_same_input(folder / slide_id, ref)
    about = {"configuration": identity, "command": list(command), "execution": execution, "versions": _versions()}
    write_json(path, {"use": "research only", **about})


def _check_same_input(own: Path, ref: SlideRef) -> None:
    """Raise ``ConfigMismatch`` if a slide's result was made with another `mpp` or mask."""
    if (result := read_result(own)) is None:
        return
    mpp, mask = result.numbers.get("mpp_given"), result.numbers.get("mask")
    masked = ref.mask and absolute(ref.mask)
    if mpp != ref.mpp:
        given = [value or "the file's own" for value in (mpp, ref.mpp)]
        raise ConfigMismatch(own, f"was made at {given[0]} microns per pixel, now {given[1]} is asked for", _START_OVER)
    if mask != masked:
        what = f"was made with the mask {mask or 'none'}, now {masked or 'none'} is asked for"
        raise ConfigMismatch(own, what, _START_OVER)
    if ref.mask and result.numbers.get("mask_sha256") not in (None, sha256_of(ref.mask)):
        raise ConfigMismatch(own, f"was made with the mask {masked} as it was then; it has changed", _START_OVER)


def _throw_away(own: Path) -> None:
    """Delete a slide's folder in an order in which a kill leaves nothing that looks finished or foreign."""
    (own / "result.json").unlink(missing_ok=True)
    for path in own.glob("*"):
        if path.name != "store.zarr":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    remove_folder(own / "store.zarr")
    shutil.rmtree(own, ignore_errors=True)


def sweep_tables(folder: Path) -> None:
    """Remove incomplete tables that a killed process left. Requires ``TABLES_CLAIM``."""
    for name in (*_OUR_FILES, CLAIMS):
        for path in folder.glob(f".{name}.*.draft"):
            path.unlink(missing_ok=True)


def look_again(own: Path) -> None:
    """Refresh the NFS client's view of a slide's folder by making and removing a file in it. Requires its claim.

    For up to a minute an NFS client remembers that a file was missing (nfs(5), acdirmax); meanwhile another machine may
    have finished the slide.
    """
    own.mkdir(exist_ok=True)
    time_beside(own / "result.json")


def sweep(own: Path) -> None:
    """Remove what a killed or failed attempt left in a slide's folder. Requires its claim."""
    if not own.is_dir():
        return
    for pattern in (".*.draft", "*.partial"):  # ours, and Zarr's
        for path in own.rglob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    (own / _FAILURE).unlink(missing_ok=True)


def write_failure(own: Path, failure: Row) -> None:
    """Record in a slide's folder why it has no result."""
    own.mkdir(exist_ok=True)
    write_json(own / _FAILURE, failure)


def read_failure(own: Path, *, since: float = 0.0) -> Row | None:
    """Return why a slide failed, if that was recorded at `since` (by the file system's clock) or later."""
    try:
        if (own / _FAILURE).stat().st_mtime < since:
            return None
    except OSError:
        return None
    found = _failure(own)
    return found if found is not None and "remedy" in found else None


class Tables:
    """slides.csv and failures.csv, derived from the slides' folders.

    `columns` of slides.csv are keys of result.json ("probabilities" becomes one column per class); finished slides get
    `status`. Labels and patients are those of `refs`, by slide id; for other slides, those in the table are kept.
    """

    def __init__(self, folder: Path, columns: Sequence[str], status: str, refs: Mapping[str, SlideRef]) -> None:
        self._folder, self._columns, self._status, self._refs = folder, columns, status, refs
        self._rows: dict[str, Row] = {}
        self._written, self._took = -1e9, 0.0

    def row(self, result: SlideResult) -> Row:
        """Return the row of a result, and keep it for the next ``write``."""
        numbers = result.numbers
        row = {"slide_id": numbers["slide_id"], "slide": numbers["slide"], "status": self._status}
        ref = self._refs.get(row["slide_id"])
        row |= {name: value for name in _FROM_MANIFEST if ref and (value := getattr(ref, name))}
        for name in self._columns:
            if name == "probabilities":
                row |= {f"prob_{kind}": value for kind, value in (numbers[name] or {}).items()}
            else:
                row[name] = " ".join(numbers[name]) if name == "flags" else numbers.get(name)
        row |= {f"seconds_{stage}": round(value, 3) for stage, value in result.seconds.items()}
        self._rows[row["slide_id"]] = row
        return row

    def is_due(self) -> bool:
        """Whether to write again: less often the longer writing takes."""
        return time.monotonic() - self._written > max(1.0, 20 * self._took)

    def write(self, *, last: bool = False) -> None:
        """Write both tables; if `last`, from all slides' folders afresh. Requires ``TABLES_CLAIM``."""
        now = time.monotonic()
        if last:
            self._rows.clear()
            time_beside(self._folder / "slides.csv")  # see look_again: other machines' slides
        failures = []
        for name in sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir()):
            own = self._folder / name
            if name in self._rows or name.startswith("."):
                continue
            result = read_result(own)
            if result is None and last and _is_ours(own):
                with suppress(OSError):  # another user's
                    look_again(own)
                result = read_result(own)
            if result is not None:
                self.row(result)
            if (failure := read_failure(own)) is not None:
                failures.append(failure)
        kept = _labels(self._folder / "slides.csv")
        rows = [self._rows[name] | ({} if name in self._refs else kept.get(name, {})) for name in sorted(self._rows)]
        columns = self._all_columns(rows)
        write_csv(self._folder / "slides.csv", columns, rows)
        write_csv(self._folder / "failures.csv", _FAILURE_COLUMNS, failures)
        if last and rows:
            _write_parquet(self._folder / "slides.parquet", columns, rows)
        self._written = time.monotonic()
        self._took = self._written - now

    def _all_columns(self, rows: Sequence[Row]) -> list[str]:
        found = dict.fromkeys(key for row in rows for key in row)  # in their order
        named = ["slide_id", "slide", "status", *(name for name in _FROM_MANIFEST if name in found)]
        for name in self._columns:
            named += sorted(key for key in found if key.startswith("prob_")) if name == "probabilities" else [name]
        return [*named, *(key for key in found if key.startswith("seconds_"))]


def _labels(path: Path) -> dict[str, Row]:
    """Return labels and patients of an earlier slides.csv, by slide id."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return {row["slide_id"]: {name: row[name] for name in _FROM_MANIFEST if row.get(name)} for row in rows}
    except (FileNotFoundError, ValueError, KeyError, csv.Error):
        return {}


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    def cell(value: object) -> object:  # paths that are not UTF-8, as in the CSV
        return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value

    table = pyarrow.table({name: [cell(row.get(name)) for row in rows] for name in columns})
    with replacing(path) as file:
        pyarrow.parquet.write_table(table, file)


def owner_of(own: Path) -> str | None:
    """Return the path of the slide that a slide's folder belongs to (finished, failed or begun); None if unknown."""
    result = read_result(own)
    known = _failure(own) if result is None else result.numbers
    if known is not None:
        return str(known.get("slide"))
    try:
        return str(json.loads((own / "store.zarr/zarr.json").read_bytes())["attributes"]["wsi"]["slide_path"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _failure(folder: Path) -> Row | None:
    try:
        found = json.loads((folder / _FAILURE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_ours(folder: Path) -> bool:
    """Whether a folder may be a slide's: it is empty or holds files of this package."""
    names = {child.name for child in folder.iterdir()} if folder.is_dir() else {folder.name}
    return not {name for name in names if name[0] != "."} or bool({"store.zarr", "result.json", _FAILURE} & names)


def _versions() -> dict[str, str]:
    names = "wsi numpy torch timm zarr simplejpeg openslide-python openslide-bin tiffslide shapely distributed"
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
