"""Files: written atomically (complete, or not there at all), read within limits."""

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
    """Open a temporary file beside `path`; sync and rename it when the block succeeds, else remove it.

    Without `sync`, a power cut may leave a file cut short: only for files whose readers detect that.

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
    """Name a temporary folder beside `path` that replaces it when the block succeeds; else it is removed.

    A folder already at `path` stays until then. If a kill interrupts the replacement, the next call restores it first.

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
    """Remove a folder, if there is one. It is renamed first, so that a kill leaves no incomplete folder at `path`.

    Examples
    --------
    >>> remove_folder("out/store.zarr")
    """
    draft = _draft(path)
    with suppress(FileNotFoundError):
        Path(path).rename(draft)
        shutil.rmtree(draft, ignore_errors=True)


def time_beside(path: str | os.PathLike[str]) -> float:
    """Return the current time of the file system that holds `path`, in seconds, from a file made beside it and removed.

    The file is named as by ``replacing``, not by ``tempfile``: NFS has no unnamed files, and a sweep must recognise one
    that a kill leaves.

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
    return Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:12]}.draft")


def read_unpacked(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a file of at most `most_bytes`, decompressed if it is gzip.

    Raises ValueError if it is longer (decompression stops at the limit), and OSError if it cannot be read or is an
    incomplete gzip file.

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
        most = f"{most_bytes / 2**20:,.0f}"
        found = f"{size / 2**20:,.0f} MiB" if size else f"more than {most} MiB unpacked"
        raise ValueError(f"it is {found}, and at most {most} are read")
    return raw


def coalesce(spans: Iterable[tuple[int, int, int]], gap: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group sorted (offset, length, mark) into reads of up to `most` bytes: spans at most `gap` bytes apart.

    Examples
    --------
    >>> list(coalesce([(0, 9, 0), (10, 5, 1), (90, 5, 2)], 4, 1000))
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
    """Open an image with Pillow; its pixels must be read inside the block.

    Raises FileNotFoundError, and ValueError if it is not an image, damaged, or too large (a decompression bomb).

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
    """Pause garbage collection while millions of long-lived objects are built, which it would scan repeatedly.

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
    """Write indented JSON; NaN and infinity raise ``ValueError``."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # of paths that are not UTF-8


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table; None is an empty cell."""
    lines: list[str] = []
    # csv quotes only cells that hold a character of its line end: with both, no cell breaks a row for any reader.
    sink = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.DictWriter(sink, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write("".join(lines).encode(errors="backslashreplace"))
