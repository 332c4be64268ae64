"""Writing files that are either whole or not there."""

from __future__ import annotations

import csv
import gc
import gzip
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; sync and rename it when the block ends well, else remove it.

    Parameters
    ----------
    sync : bool
        Wait until the disk has it. Without, a power cut may leave a file that is short: for files that tell.

    Examples
    --------
    >>> with replacing("out/table.csv") as file:  # doctest: +SKIP
    ...     file.write(b"a,b")
    """
    draft = _draft(path)
    file = draft.open("xb")
    try:
        with file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Name a temporary folder beside `path` that takes its place when the block ends well; else it is removed.

    What stood there before stays until then. Killed between the two renames, the next call brings it back first.

    Examples
    --------
    >>> with replacing_folder("out/a.zarr") as folder:  # doctest: +SKIP
    ...     folder.mkdir()
    """
    path = Path(path)
    draft, old = (path.with_name(f".{path.name}.{kind}") for kind in ("draft", "old"))
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield draft
        if path.exists():
            path.rename(old)
        draft.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder, if it is there, under a temporary name: a kill leaves no half of it under its own.

    Examples
    --------
    >>> remove_folder("out/store.zarr")
    """
    draft = _draft(path)
    with suppress(FileNotFoundError):
        Path(path).rename(draft)
        shutil.rmtree(draft, ignore_errors=True)


def time_beside(path: str | os.PathLike[str]) -> float:
    """Return what time it is by the file system that `path` is on: of a file made beside it, and removed.

    Named as ``replacing`` does, not with ``tempfile``: NFS has no files without a name, and what a kill leaves is to be
    known as ours.

    Examples
    --------
    >>> time_beside("result.json") > 0
    True
    """
    draft = _draft(path)
    with draft.open("xb") as file:
        seconds = os.fstat(file.fileno()).st_mtime
    draft.unlink(missing_ok=True)
    return seconds


def _draft(path: str | os.PathLike[str]) -> Path:
    """Name a temporary file."""
    return Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:12]}.draft")


def read_unpacked(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a file, unpacked where it is gzipped, and no more of it than `most_bytes`.

    Raises
    ------
    ValueError
        It is longer; a bomb is not unpacked further than the limit.
    OSError
        It cannot be read, or is no whole gzip file.

    Examples
    --------
    >>> read_unpacked("regions.geojson.gz", 1 << 20)  # doctest: +SKIP
    """
    with Path(path).open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        size = 0 if packed else os.fstat(file.fileno()).st_size
        raw = b"" if size > most_bytes else (gzip.GzipFile(fileobj=file) if packed else file).read(most_bytes + 1)
    if max(size, len(raw)) > most_bytes:
        told = f"{size / 2**20:,.0f} MiB" if size else f"more than {most_bytes / 2**20:,.0f} MiB unpacked"
        raise ValueError(f"it is {told}, and at most {most_bytes / 2**20:,.0f} are read")
    return raw


def in_one_go(spans: Iterable[tuple[int, int, int]], gap: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group (offset, length, mark), sorted, by what one read covers: nearer than `gap`, and up to `most` bytes at once.

    Examples
    --------
    >>> list(in_one_go([(0, 9, 0), (10, 5, 1), (90, 5, 2)], 4, 1000))
    [[(0, 9, 0), (10, 5, 1)], [(90, 5, 2)]]
    """
    run: list[tuple[int, int, int]] = []
    stop = 0
    for span in spans:
        offset, length, _ = span
        if run and (offset > stop + gap or max(stop, offset + length) - run[0][0] > most):
            yield run
            run = []
        stop = max(stop, offset + length) if run else offset + length
        run.append(span)
    if run:
        yield run


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a file.

    Examples
    --------
    >>> _ = Path("empty").write_bytes(b"")
    >>> sha256_of("empty")[:8]
    'e3b0c442'
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a picture for a block, in which its pixels are read.

    Raises
    ------
    ValueError
        It is no picture, damaged, or far larger than a picture is.
    FileNotFoundError

    Examples
    --------
    >>> with opened_image("mask.png") as image:  # doctest: +SKIP
    ...     pixels = np.asarray(image)
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        raise ValueError(str(error)) from error


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause garbage collection while millions of long-lived objects are built, which it would scan again and again.

    Examples
    --------
    >>> with collector_paused():
    ...     gc.isenabled()
    False
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # paths that are not UTF-8: as JSON escapes them


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table; None is an empty cell."""
    lines: list[str] = []
    # It quotes the characters of its line ends alone: given both, no cell breaks a row.
    sink = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.DictWriter(sink, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write("".join(lines).encode(errors="backslashreplace"))
