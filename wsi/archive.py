"""Many slides into one results folder: one broken slide is a row in failures.csv, not the end of the run.

::

    RESULTS/
      run.json         configuration, versions, model hashes, command line
      slides.csv       a row a scored slide, grows as slides finish
      failures.csv     slide, stage, error, remedy
      <slide_id>/      store.zarr, tiles.geojson.gz, regions.geojson, overlay.png, result.json
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wsi import __version__
from wsi.errors import (
    ConfigMismatch,
    ManifestError,
    OutputError,
    SlideNotFound,
    WsiError,
    is_output_error,
)
from wsi.files import write_csv, write_json
from wsi.run import Engine, Progress, ScoreConfig, SlideResult, read_result, score_slide
from wsi.slide import is_url

#: What a folder is searched for. DICOM is one slide a folder: its files are levels and frames of one.
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".dicom")
_DICOM = (".dcm", ".dicom")

_SLIDE_COLUMNS = ("slide_id", "slide", "status", "grade")
_NUMBER_COLUMNS = ("n_tiles", "tissue_mm2", "positive_mm2", "largest_region_um", "mpp", "mpp_source", "flags")
_STAGES = ("tissue", "grid", "tiles", "grade", "export")
_FAILURE_COLUMNS = ("slide_id", "slide", "stage", "error", "remedy")


@dataclass(frozen=True)
class SlideRef:
    """A slide to score: where it is, and its microns per level-0 pixel where somebody gave them, and who."""

    path: str
    mpp: float | None = None
    mpp_source: str = "user"


@dataclass
class Summary:
    """What became of a run's slides: rows of slides.csv and of failures.csv, in the order given."""

    scored: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def find_slides(inputs: Iterable[str], mpp: float | None = None) -> list[SlideRef]:
    """Turn files, folders and CSV manifests into a list of slides, each once, in a fixed order.

    Parameters
    ----------
    inputs : paths
        A slide, a URL, a folder (searched through, by suffix), or a ``.csv`` with a column ``slide``
        and optionally ``mpp``; relative paths in it are relative to the CSV.
    mpp : float, optional
        Microns per level-0 pixel of every slide that the manifest gives none for.

    Raises
    ------
    SlideNotFound
        Nothing is at a path, or no slide in a folder.
    ManifestError
        A row is wrong; its number is named.
    """
    found: dict[str, SlideRef] = {}
    for name in inputs:
        path = Path(name)
        if is_url(name):
            refs = [SlideRef(name, mpp)]
        elif not path.exists():
            raise SlideNotFound(name, "there is no such file or folder", "Check the path")
        elif path.is_dir():
            refs = [SlideRef(str(slide), mpp) for slide in _in_folder(path)]
            if not refs:
                raise SlideNotFound(name, "holds no slides", f"Searched for {' '.join(SUFFIXES)}")
        elif path.suffix.lower() == ".csv":
            refs = _in_manifest(path, mpp)
        else:
            refs = [SlideRef(name, mpp)]
        for ref in refs:
            found.setdefault(_key(ref.path), ref)
    return list(found.values())


def slide_ids(refs: Sequence[SlideRef], folder: Path) -> list[str]:
    """Name each slide's results: the file's stem, with a hash of its place where two share a stem.

    A folder that already holds the results of another slide counts as taken.
    """
    stems = [Path(ref.path.rstrip("/")).stem for ref in refs]
    count = Counter(stem.lower() for stem in stems)
    ids = []
    for ref, stem in zip(refs, stems, strict=True):
        earlier = read_result(folder / stem)
        taken = earlier is not None and _key(str(earlier.get("slide"))) != _key(ref.path)
        if count[stem.lower()] > 1 or taken:
            stem = f"{stem}-{hashlib.sha256(_key(ref.path).encode()).hexdigest()[:8]}"
        ids.append(stem)
    return ids


def score_archive(
    refs: Sequence[SlideRef],
    folder: Path,
    engine: Engine,
    config: ScoreConfig,
    *,
    force: bool = False,
    command: Sequence[str] = (),
    started: Callable[[int, str], None] = lambda i, slide_id: None,
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Score slides one after the other; the same call again does only what is missing.

    Parameters
    ----------
    refs : sequence of SlideRef
    folder : Path
        The results folder; made where it is not there.
    force : bool
        Throw earlier results of another configuration away.
    command : sequence of str
        Recorded in run.json.
    started : callable
        Called with the slide's position and id before each.
    progress : callable
        As in ``score_slide``.

    Raises
    ------
    ConfigMismatch
        The folder holds results of another configuration; the difference is named.
    OutputError
        The folder cannot be written to (full, read-only): going on would be of no use.
    """
    config.check(engine.model.config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, engine, config, force=force, command=command)
        ids = slide_ids(refs, folder)
        rows = {row["slide_id"]: row for row in _read_csv(folder / "slides.csv")}
        failures = {row["slide_id"]: row for row in _read_csv(folder / "failures.csv")}
        summary = Summary()
        for i, (ref, slide_id) in enumerate(zip(refs, ids, strict=True)):
            started(i, slide_id)
            stage = "open"

            def watch(name: str, done: int, total: int) -> None:
                nonlocal stage
                stage = name
                progress(name, done, total)

            failures.pop(slide_id, None)
            try:
                numbers = _finished(folder / slide_id, ref)
                if numbers is None:
                    result = score_slide(
                        ref.path,
                        folder / slide_id,
                        engine,
                        config,
                        mpp=ref.mpp,
                        mpp_source=ref.mpp_source,
                        progress=watch,
                    )
                    rows[slide_id] = _row(result, engine)
                elif slide_id not in rows:  # stopped between result.json and the table: only the seconds are lost
                    rows[slide_id] = _row(SlideResult(numbers, {}), engine)
                summary.scored.append(rows[slide_id])
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, WsiError) and is_output_error(error):
                    raise
                rows.pop(slide_id, None)
                failures[slide_id] = _failure(ref, slide_id, stage, error)
                summary.failed.append(failures[slide_id])
            _write_tables(folder, rows, failures, engine)
    except OSError as error:
        if isinstance(error, WsiError):
            raise
        raise OutputError.of(error, folder) from error
    return summary


def _in_folder(folder: Path) -> list[Path]:
    slides, dicom_folders = [], set()
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if suffix in _DICOM:
            if path.parent in dicom_folders:
                continue
            dicom_folders.add(path.parent)
        slides.append(path)
    return slides


def _in_manifest(path: Path, mpp: float | None) -> list[SlideRef]:
    refs = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "slide" not in (reader.fieldnames or ()):
                raise ManifestError(
                    path,
                    f"has no column 'slide' (it has {', '.join(reader.fieldnames or ['none'])})",
                    "Columns: slide[,mpp]",
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                name = (row["slide"] or "").strip()
                if not name:
                    raise ManifestError(where, "names no slide", "Fill in the column 'slide'")
                given = (row.get("mpp") or "").strip()
                try:
                    own = (float(given), "manifest") if given else (mpp, "user")
                except ValueError:
                    raise ManifestError(
                        where, f"mpp is {given!r}, not a number", "Microns per pixel, such as 0.25"
                    ) from None
                slide = name if is_url(name) else str(path.parent / name)
                if not is_url(name) and not Path(slide).exists():
                    raise ManifestError(where, f"there is no slide {slide}", "Paths are relative to the manifest")
                refs.append(SlideRef(slide, *own))
    except UnicodeDecodeError as error:
        raise ManifestError(path, f"is not UTF-8 text ({error.reason})", "Save it as CSV in UTF-8") from error
    if not refs:
        raise ManifestError(path, "names no slides", "One row a slide below the header")
    return refs


def _key(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())


def _finished(folder: Path, ref: SlideRef) -> dict[str, Any] | None:
    """Return the numbers of a slide that an earlier run finished."""
    result = read_result(folder)
    if result is None or _key(str(result.get("slide"))) != _key(ref.path):
        return None
    if ref.mpp is not None and (result["mpp_source"] != ref.mpp_source or abs(result["mpp"] / ref.mpp - 1) > 1e-5):
        raise ConfigMismatch(
            folder,
            f"was scored at {result['mpp']:g} microns per pixel ({result['mpp_source']}), now {ref.mpp:g} is given",
            "Choose another results folder, or start over with --force",
        )
    return result


def _claim(folder: Path, engine: Engine, config: ScoreConfig, *, force: bool, command: Sequence[str]) -> None:
    """Write run.json, or refuse a folder of another configuration."""
    identity = json.loads(
        json.dumps(
            {
                "model": engine.model.config.folder.name,
                "model_sha256": engine.model.sha256,
                "mil_sha256": engine.mil.sha256 if engine.mil else None,
                "precision": engine.model.precision,
                "wsi_version": __version__,
                **asdict(config),
            }
        )
    )
    path = folder / "run.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["configuration"]
    except FileNotFoundError:
        others = [name.name for name in folder.iterdir() if not name.name.startswith(".")]
        if others:
            raise OutputError(
                folder,
                f"holds files that are not results of ours ({', '.join(sorted(others)[:3])})",
                "Choose an empty folder",
            ) from None
        earlier = identity
    except (ValueError, KeyError, TypeError) as error:
        if not force:
            raise ConfigMismatch(
                path, "is damaged", "Choose another results folder, or start over with --force"
            ) from error
        earlier = None
    if earlier != identity and not force:
        changed = sorted(key for key in {*identity, *earlier} if identity.get(key) != earlier.get(key))
        raise ConfigMismatch(
            folder,
            "holds results of another configuration: "
            + ", ".join(
                f"{key} was {json.dumps(earlier.get(key))}, now {json.dumps(identity.get(key))}" for key in changed
            ),
            "Choose another folder with -o, or start over with --force",
        )
    if force:
        _clear(folder)
    write_json(
        path,
        {
            "use": "research only",
            "configuration": identity,
            "command": list(command),
            "execution": {"device": engine.model.device, "batch_size": engine.batch_size, "threads": engine.threads},
            "versions": _versions(),
        },
    )


def _clear(folder: Path) -> None:
    """Remove what this package made in a results folder, and nothing else."""
    for child in folder.iterdir():
        if child.is_dir() and ((child / "store.zarr").exists() or (child / "result.json").exists()):
            shutil.rmtree(child)
    for name in ("slides.csv", "failures.csv", "run.json"):
        (folder / name).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("wsi", "numpy", "torch", "timm", "zarr", "openslide-python", "openslide-bin", "tiffslide", "shapely")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: importlib.metadata.version(name) for name in names if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _row(result: SlideResult, engine: Engine) -> dict[str, Any]:
    numbers = result.numbers
    probabilities = numbers["probabilities"] or {}
    return {
        "slide_id": numbers["slide_id"],
        "slide": numbers["slide"],
        "status": "scored",
        "grade": numbers["grade"],
        **{f"prob_{name}": probabilities.get(name) for name in _grades(engine)},
        **{name: numbers[name] for name in _NUMBER_COLUMNS if name != "flags"},
        "flags": " ".join(numbers["flags"]),
        **{f"seconds_{stage}": _seconds(result.seconds.get(stage)) for stage in _STAGES},
    }


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _failure(ref: SlideRef, slide_id: str, stage: str, error: Exception) -> dict[str, Any]:
    known = isinstance(error, WsiError)
    if not known:  # a bug, or a library's: the table has no room for where it happened
        traceback.print_exception(error, file=sys.stderr)
    return {
        "slide_id": slide_id,
        "slide": ref.path,
        "stage": stage,
        "error": f"{error.where}: {error.what}" if isinstance(error, WsiError) else f"{type(error).__name__}: {error}",
        "remedy": error.remedy if isinstance(error, WsiError) else "Please report this: it should not happen",
    }


def _grades(engine: Engine) -> tuple[str, ...]:
    return engine.mil.config.class_names if engine.mil else ()


def _write_tables(
    folder: Path, rows: dict[str, dict[str, Any]], failures: dict[str, dict[str, Any]], engine: Engine
) -> None:
    columns = (
        *_SLIDE_COLUMNS,
        *(f"prob_{name}" for name in _grades(engine)),
        *_NUMBER_COLUMNS,
        *(f"seconds_{stage}" for stage in _STAGES),
    )
    write_csv(folder / "slides.csv", columns, [rows[key] for key in sorted(rows)])
    write_csv(folder / "failures.csv", _FAILURE_COLUMNS, [failures[key] for key in sorted(failures)])


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def default_threads() -> int:
    """Reader threads: what the machine has, since decoding releases the interpreter lock."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
