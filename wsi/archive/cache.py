"""Copies of slides on fast local storage, made while earlier slides are processed."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import fsspec

from wsi.archive.claims import Claims
from wsi.slide import is_url

#: Formats of several files whose names do not show which belong together: these are read in place.
_IN_PLACE = (".vms", ".vmu", ".dcm", ".dicom")


class Cache:
    """A folder for copies, of at most `max_bytes` in total.

    A slide larger than that is read in place; one for which there is no room now has to wait. Each run has its own
    subfolder and deletes it at the end. Subfolders of killed runs are deleted by the next run.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(folder), max_bytes
        self._own = self._folder / f"run-{uuid.uuid4().hex[:12]}"
        self._claims = Claims(self._folder / ".claims")
        self._held: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wsi-cache")

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._claims.__enter__()
        self._claims.take(self._own.name)
        for left in self._folder.glob("run-*"):
            if (claim := self._claims.take(left.name)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                self._claims.release(claim)
        self._own.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._own, ignore_errors=True)
        self._claims.__exit__(*error)

    def has_room(self, path: str) -> bool:
        """Whether ``fetch`` may be called now: there is room for a copy, or none will be made."""
        size = _size(path)
        return size is None or size > self._max_bytes or sum(self._held.values()) + size <= self._max_bytes

    def fetch(self, path: str) -> Future[str | None]:
        """Begin to copy a slide; the future gives the copy's path, or None if it is to be read in place."""
        size = _size(path)
        if size is None or size > self._max_bytes:
            done: Future[str | None] = Future()
            done.set_result(None)
            return done
        self._held[path] = size
        return self._pool.submit(self._copy, path)

    def drop(self, path: str) -> None:
        """Delete the copy of a slide, if there is one."""
        if self._held.pop(path, None) is not None:
            shutil.rmtree(self._place(path), ignore_errors=True)

    def _place(self, path: str) -> Path:
        return self._own / hashlib.sha256(os.fsencode(path)).hexdigest()

    def _copy(self, path: str) -> str | None:
        place = self._place(path)
        copy = place / path.rstrip("/").rsplit("/", 1)[-1]
        try:
            place.mkdir()
            if is_url(path):
                with fsspec.open(path, "rb") as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
            else:
                shutil.copyfile(path, copy)
            beside = Path(path).with_suffix("")
            if copy.suffix.lower() == ".mrxs" and beside.is_dir():
                shutil.copytree(beside, copy.with_suffix(""))
        except Exception:  # noqa: BLE001 - full disk, unreadable slide: the reader will report it better
            shutil.rmtree(place, ignore_errors=True)
            return None
        return str(copy)


def _size(path: str) -> int | None:
    """Return the bytes of a slide; None if they are unknown or it cannot be copied."""
    suffix = Path(path).suffix.lower()
    if suffix in _IN_PLACE:
        return None
    try:
        if is_url(path):
            filesystem, name = fsspec.core.url_to_fs(path)
            size: int | None = filesystem.size(name)
            return size
        beside = Path(path).with_suffix("")
        parts = beside.rglob("*") if suffix == ".mrxs" and beside.is_dir() else ()
        return Path(path).stat().st_size + sum(part.stat().st_size for part in parts)
    except Exception:  # noqa: BLE001 - fsspec's file systems may raise anything
        return None
