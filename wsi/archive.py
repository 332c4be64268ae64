"""Many slides into one results folder: one broken slide is a row in failures.csv, not the end of the run.

::

    RESULTS/
      run.json         configuration, versions, model hashes, command line
      slides.csv       a row a finished slide, grows as slides finish
      failures.csv     slide, stage, error, remedy
      <slide_id>/      what ``score_slide`` or ``tile_slide`` writes, seconds.json, and last result.json;
                       or failure.json

The tables are made of what lies in the slides' folders, so they can be lost, edited, or written by two runs at once.
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
from wsi.result import Progress, SlideResult, read_result
from wsi.run import Engine, ScoreConfig, score_slide
from wsi.slide import absolute, is_url
from wsi.tile import TileConfig, tile_slide

#: What a folder is searched for. DICOM files of one series are levels and parts of one slide.
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".dicom")
_DICOM = (".dcm", ".dicom")

_FAILURE = "failure.json"
_OUR_FILES = ("run.json", "slides.csv", "failures.csv")
_FAILURE_COLUMNS = ("slide_id", "slide", "stage", "error", "remedy")


@dataclass(frozen=True)
class SlideRef:
    """A slide to work on: where it is, and its microns per level-0 pixel where somebody gave them, and who."""

    path: str
    mpp: float | None = None
    mpp_source: str = "user"


@dataclass
class Summary:
    """What became of a run's slides: rows of slides.csv and of failures.csv, in the order given."""

    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """What is done to each slide of an archive.

    Attributes
    ----------
    work : callable
        Does it, given the slide, its own folder, and whom to tell; or goes on where it was stopped.
    identity : dict
        What decides the results: a results folder is bound to it.
    execution : dict
        What does not.
    status : str
        Of a finished slide, in the table.
    columns : tuple of str
        The table's columns, by names of result.json; "probabilities" stands for one column a class.
    stages : tuple of str
        Whose seconds the table tells.
    """

    work: Callable[[SlideRef, Path, Progress], SlideResult]
    identity: dict[str, Any]
    execution: dict[str, Any]
    status: str
    columns: tuple[str, ...]
    stages: tuple[str, ...]


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
            earlier = found.setdefault(absolute(ref.path), ref)
            if earlier.mpp != ref.mpp:
                raise ManifestError(ref.path, f"is named twice, with mpp {earlier.mpp} and {ref.mpp}", "Keep one")
    return list(found.values())


def slide_ids(refs: Sequence[SlideRef], folder: Path) -> list[str]:
    """Name each slide's results: the file's stem, with a hash of its place where another slide has that name.

    A slide keeps the name under which `folder` already holds its results.
    """
    stems = [Path(ref.path.rstrip("/")).stem for ref in refs]
    count = Counter(stem.lower() for stem in stems)
    ids = []
    for ref, stem in zip(refs, stems, strict=True):
        earlier = _earlier(folder / stem)
        own = earlier is not None and _is_of(earlier, ref)
        if not own and (earlier is not None or count[stem.lower()] > 1 or stem in _OUR_FILES):
            stem = f"{stem}-{hashlib.sha256(absolute(ref.path).encode()).hexdigest()[:8]}"
        ids.append(stem)
    return ids


def score_archive(
    refs: Sequence[SlideRef],
    folder: str | os.PathLike[str],
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
    folder : path
        The results folder; made where it is not there.
    force : bool
        Throw earlier results of these slides away; those of other slides stay.
    command : sequence of str
        Recorded in run.json.
    started : callable
        Called with the slide's position and id before each.
    progress : callable
        As in ``score_slide``.

    Raises
    ------
    ConfigMismatch
        The folder holds results of another configuration; the difference is named, and nothing is touched.
    OutputError
        The folder cannot be written to (full, read-only): going on would be of no use.
    """
    config.check(engine.model.config)

    def work(ref: SlideRef, own: Path, progress: Progress) -> SlideResult:
        return score_slide(ref.path, own, engine, config, mpp=ref.mpp, mpp_source=ref.mpp_source, progress=progress)

    job = _Job(
        work,
        identity={
            "model": engine.model.name,
            "model_sha256": engine.model.sha256,
            "mil_sha256": engine.mil.sha256 if engine.mil else None,
            "precision": engine.model.precision,
            "wsi_version": __version__,
            **{name: value for name, value in asdict(config).items() if name != "max_unreadable"},  # decides no number
        },
        execution={
            "max_unreadable": config.max_unreadable,
            "device": engine.model.device,
            "batch_size": engine.batch_size,
            "threads": engine.threads,
        },
        status="scored",
        columns=(
            "grade", "probabilities", "n_tiles", "n_unreadable", "tissue_mm2", "positive_mm2", "largest_region_um",
            "mpp", "mpp_source", "flags",
        ),
        stages=("tissue", "stain", "grid", "tiles", "grade", "export"),
    )  # fmt: skip
    return _run(refs, Path(folder), job, force=force, command=command, started=started, progress=progress)


def tile_archive(
    refs: Sequence[SlideRef],
    folder: str | os.PathLike[str],
    config: TileConfig,
    *,
    threads: int = 4,
    force: bool = False,
    command: Sequence[str] = (),
    started: Callable[[int, str], None] = lambda i, slide_id: None,
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Cut slides into patch stores, ``<folder>/<slide_id>/store.zarr``; the same call again does only what is missing.

    Parameters and errors are those of ``score_archive``, with what ``tile_slide`` takes in place of the engine.
    """
    config.check()

    def work(ref: SlideRef, own: Path, progress: Progress) -> SlideResult:
        return tile_slide(
            ref.path, own, config, threads=threads, mpp=ref.mpp, mpp_source=ref.mpp_source, progress=progress
        )

    job = _Job(
        work,
        identity={"wsi_version": __version__, **asdict(config)},
        execution={"threads": threads},
        status="tiled",
        columns=(
            "n_tiles", "n_unreadable", "tile_px", "tile_mpp", "pixels", "tissue_mm2", "mpp", "mpp_source", "flags",
        ),
        stages=("grid", "tissue", "tiles"),
    )  # fmt: skip
    return _run(refs, Path(folder), job, force=force, command=command, started=started, progress=progress)


def _run(
    refs: Sequence[SlideRef],
    folder: Path,
    job: _Job,
    *,
    force: bool,
    command: Sequence[str],
    started: Callable[[int, str], None],
    progress: Progress,
) -> Summary:
    summary = Summary()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ids = slide_ids(refs, folder)
        _claim(folder, job, refs, ids, force=force, command=command)
        for i, (ref, slide_id) in enumerate(zip(refs, ids, strict=True)):
            started(i, slide_id)
            stage = "open"

            def watch(name: str, done: int, total: int) -> None:
                nonlocal stage
                stage = name
                progress(name, done, total)

            own = folder / slide_id
            try:
                result = read_result(own) or job.work(ref, own, watch)
                (own / _FAILURE).unlink(missing_ok=True)
                summary.done.append(_row(result, job))
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, WsiError) and is_output_error(error, folder):
                    raise
                failure = _failure(ref, slide_id, stage, error)
                summary.failed.append(failure)
                own.mkdir(exist_ok=True)
                write_json(own / _FAILURE, failure)
            _write_tables(folder, job)
    except OSError as error:
        if isinstance(error, WsiError):
            raise
        raise OutputError.of(error, folder) from error
    return summary


def _in_folder(folder: Path) -> list[Path]:
    slides, series = [], set()
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if suffix in _DICOM:
            uid = _dicom_series(path)
            if (path.parent, uid) in series:
                continue
            series.add((path.parent, uid))
        slides.append(path)
    return slides


def _dicom_series(path: Path) -> bytes:
    """Return the SeriesInstanceUID (0020,000E): files of one series are levels and parts of one slide."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(b"\x20\x00\x0e\x00")
    if at < 0:
        return path.name.encode()  # each file for itself
    explicit = head[at + 4 : at + 6] == b"UI"
    length = int.from_bytes(head[at + 6 : at + 8] if explicit else head[at + 4 : at + 8], "little")
    return head[at + 8 : at + 8 + length].strip(b"\0 ")


def _in_manifest(path: Path, mpp: float | None) -> list[SlideRef]:
    refs = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
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


def _earlier(folder: Path) -> dict[str, Any] | None:
    """Return what a slide folder says of its slide: of a finished one, or of one that failed."""
    result = read_result(folder)
    if result is not None:
        return result.numbers
    try:
        found = json.loads((folder / _FAILURE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_of(earlier: dict[str, Any], ref: SlideRef) -> bool:
    return earlier.get("slide") == absolute(ref.path)


def _is_ours(folder: Path) -> bool:
    """Whether a slide's folder holds what this package writes, or nothing yet."""
    names = {child.name for child in folder.iterdir()} if folder.is_dir() else {folder.name}
    return not {name for name in names if name[0] != "."} or bool({"store.zarr", "result.json", _FAILURE} & names)


def _claim(
    folder: Path,
    job: _Job,
    refs: Sequence[SlideRef],
    ids: Sequence[str],
    *,
    force: bool,
    command: Sequence[str],
) -> None:
    """Write run.json, or refuse a folder of another configuration before anything is touched."""
    identity = json.loads(json.dumps(job.identity))
    path = folder / "run.json"
    remedy = "Choose another folder with -o, or start these slides over with --force"
    foreign = sorted(slide_id for slide_id in ids if (folder / slide_id).exists() and not _is_ours(folder / slide_id))
    if foreign:  # --force would delete it
        what = f"holds a folder {foreign[0]!r} that is not results of ours"
        raise OutputError(folder, what, "Choose an empty folder with -o")
    others = sorted(
        child.name for child in folder.iterdir() if child.name not in {*ids, *_OUR_FILES} and child.name[0] != "."
    )
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
        what = "holds results of another configuration: " + ", ".join(
            f"{key} was {json.dumps(earlier.get(key))}, now {json.dumps(identity.get(key))}" for key in changed
        )
        if others and force:
            raise ConfigMismatch(
                folder, f"{what}; and of other slides ({', '.join(others[:3])})", "Choose another folder"
            )
        raise ConfigMismatch(folder, what, remedy)
    for ref, slide_id in zip(refs, ids, strict=True):
        own = folder / slide_id
        result = read_result(own)
        if force:
            shutil.rmtree(own, ignore_errors=True)
        elif result is not None and result.numbers.get("mpp_given") != ref.mpp:
            given = [value or "the file's own" for value in (result.numbers.get("mpp_given"), ref.mpp)]
            raise ConfigMismatch(own, f"was made at {given[0]} microns per pixel, now {given[1]} is asked for", remedy)
    write_json(
        path,
        {
            "use": "research only",
            "configuration": identity,
            "command": list(command),
            "execution": job.execution,
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = (
        "wsi",
        "numpy",
        "torch",
        "timm",
        "zarr",
        "simplejpeg",
        "openslide-python",
        "openslide-bin",
        "tiffslide",
        "shapely",
    )
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


def _row(result: SlideResult, job: _Job) -> dict[str, Any]:
    numbers = result.numbers
    row = {"slide_id": numbers["slide_id"], "slide": numbers["slide"], "status": job.status}
    for name in job.columns:
        if name == "probabilities":
            row |= {f"prob_{kind}": value for kind, value in (numbers[name] or {}).items()}
        else:
            row[name] = " ".join(numbers[name]) if name == "flags" else numbers[name]
    return row | {f"seconds_{stage}": round(value, 3) for stage, value in result.seconds.items()}


def _failure(ref: SlideRef, slide_id: str, stage: str, error: Exception) -> dict[str, Any]:
    known = isinstance(error, WsiError)
    if not known:  # a bug, or a library's: the table has no room for where it happened
        traceback.print_exception(error, file=sys.stderr)
    return {
        "slide_id": slide_id,
        "slide": absolute(ref.path),
        "stage": stage,
        "error": f"{error.where}: {error.what}" if isinstance(error, WsiError) else f"{type(error).__name__}: {error}",
        "remedy": error.remedy if isinstance(error, WsiError) else "Please report this: it should not happen",
    }


def _write_tables(folder: Path, job: _Job) -> None:
    """Make slides.csv and failures.csv of what lies in the slide folders, whoever wrote it."""
    rows, failures = [], []
    for own in sorted(child for child in folder.iterdir() if child.is_dir()):
        result = read_result(own)
        if result is not None:
            rows.append(_row(result, job))
        elif (failure := _earlier(own)) is not None:
            failures.append(failure)
    grades = sorted({name for row in rows for name in row if name.startswith("prob_")})
    columns = ["slide_id", "slide", "status"]
    for name in job.columns:
        columns += grades if name == "probabilities" else [name]
    columns += [f"seconds_{stage}" for stage in job.stages]
    write_csv(folder / "slides.csv", columns, rows)
    write_csv(folder / "failures.csv", _FAILURE_COLUMNS, failures)


def default_threads() -> int:
    """Reader threads: what the machine has, since decoding releases the interpreter lock."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
