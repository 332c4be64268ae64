"""Bytes of a slide file: many ranges at a time, from a disk or over a network, from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from wsi.errors import SlideNotFound, SlideUnreadable

#: Ranges nearer than this are fetched as one: cheaper than asking twice.
_GAP = {"local": 16_384, "remote": 262_144}

#: And no more than this at once.
_MOST = 8 << 20


class Source:
    """A file that is read in ranges.

    Attributes
    ----------
    path : str
        A file, or an fsspec URL.
    size : int
        Bytes in the file.

    Raises
    ------
    SlideNotFound, SlideUnreadable
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs: Any = None
        self._fd = -1
        self._close = os.close  # the module may be gone when the interpreter ends
        try:
            if "://" in path:
                self._fs, self._remote = fsspec.core.url_to_fs(path)
                self.size = int(self._fs.size(self._remote))
            else:
                self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                self._lock = threading.Lock()
                self.size = os.fstat(self._fd).st_size
        except ImportError as error:
            raise SlideUnreadable(path, f"needs a further package ({error})", "pip install 'wsi[remote]'") from error
        except FileNotFoundError as error:
            raise SlideNotFound(path, "there is no such file", "Check the path") from error

    def open(self) -> Any:
        """Open the file as a stream of bytes, for those who want one."""
        return self._fs.open(self._remote, "rb") if self._fs is not None else Path(self.path).open("rb")

    def read(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes: fewer where the file ends."""
        if self._fs is not None:
            return bytes(self._fs.cat_file(self._remote, start=offset, end=min(offset + length, self.size)))
        if hasattr(os, "pread"):
            return os.pread(self._fd, length, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, length)

    def ranges(self, offsets: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        """Read many ranges, neighbours in one go, and remote ones all at the same time."""
        order = sorted((i for i, length in enumerate(lengths) if length), key=offsets.__getitem__)
        gap = _GAP["local" if self._fs is None else "remote"]
        spans: list[tuple[int, int, list[int]]] = []  # start, end, which ranges
        for i in order:
            start, end = offsets[i], offsets[i] + lengths[i]
            if spans:
                first, last, members = spans[-1]
                if start <= last + gap and max(end, last) - first <= _MOST:
                    members.append(i)
                    spans[-1] = first, max(end, last), members
                    continue
            spans.append((start, end, [i]))
        if self._fs is not None:
            ends = [min(end, self.size) for _, end, _ in spans]
            blobs = self._fs.cat_ranges([self._remote] * len(spans), [start for start, _, _ in spans], ends)
        else:
            blobs = [self.read(start, end - start) for start, end, _ in spans]
        found: list[memoryview] = [memoryview(b"")] * len(offsets)
        for (start, _, members), blob in zip(spans, blobs, strict=True):
            view = memoryview(blob)
            for i in members:
                found[i] = view[offsets[i] - start : offsets[i] - start + lengths[i]]
        return found

    def close(self) -> None:
        """Close the file; so does its last reference."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._close(fd)

    def __del__(self) -> None:
        self.close()
