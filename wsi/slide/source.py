"""Bytes of a slide file, local or remote: many ranges at a time, from any thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from wsi.errors import SlideNotFound, SlideUnreadable, brief
from wsi.files import coalesce

#: Ranges closer than this many bytes are read as one.
_GAP = {"local": 16_384, "remote": 262_144}
#: Bytes that one read may have.
_MOST = 8 << 20


class Source:
    """A file or an fsspec URL, read in ranges of bytes; `size` is its length. Raises SlideNotFound, SlideUnreadable."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs: Any = None
        self._remote = ""
        self._fd = -1
        self._close = os.close  # the module may be gone when the interpreter ends
        try:
            if "://" in path:
                self.size = self._find()
            else:
                self._fd = os.open(path, os.O_RDONLY)
                self.size = os.fstat(self._fd).st_size
        except ImportError as error:
            raise SlideUnreadable(path, f"needs a further package ({error})", "pip install 'wsi[remote]'") from error
        except FileNotFoundError as error:
            raise SlideNotFound(path, "there is no such file", "Check the path") from error

    def _find(self) -> int:
        try:
            self._fs, self._remote = fsspec.core.url_to_fs(self.path)
            found = self._fs.info(self._remote)
        except (FileNotFoundError, ImportError):
            raise
        except Exception as error:  # each file system has errors of its own
            remedy = "Check the address, the network, and that the server knows you"
            raise SlideUnreadable(self.path, f"cannot be reached ({brief(error)})", remedy) from error
        if found["type"] == "directory":
            raise SlideUnreadable(self.path, "is a folder, not a slide", "Name the slide file inside it")
        if found["size"] is None:
            raise SlideUnreadable(self.path, "is of a length that its server does not tell", "Copy it nearer")
        return int(found["size"])

    def open(self) -> Any:
        """Open the file as a binary stream."""
        return self._fs.open(self._remote, "rb") if self._fs is not None else Path(self.path).open("rb")

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer where the file ends. Raises OSError."""
        if self._fs is not None:
            return bytes(self._fetch([(offset, offset + length)])[0])
        return os.pread(self._fd, length, offset)

    def ranges(self, offsets: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        """Read many ranges: neighbours in one read, remote ones concurrently. Raises OSError."""
        wanted = sorted((offsets[i], length, i) for i, length in enumerate(lengths) if length)
        runs = list(coalesce(wanted, _GAP["local" if self._fs is None else "remote"], _MOST))
        spans = [(run[0][0], max(offset + length for offset, length, _ in run)) for run in runs]
        blobs = [self.read(start, end - start) for start, end in spans] if self._fs is None else self._fetch(spans)
        found: list[memoryview] = [memoryview(b"")] * len(offsets)
        for run, (start, _), blob in zip(runs, spans, blobs, strict=True):
            view = memoryview(blob)
            for offset, length, i in run:
                found[i] = view[offset - start : offset - start + length]
        return found

    def _fetch(self, spans: list[tuple[int, int]]) -> list[Any]:
        starts, ends = [start for start, _ in spans], [min(end, self.size) for _, end in spans]
        try:
            return list(self._fs.cat_ranges([self._remote] * len(spans), starts, ends, on_error="raise"))
        except Exception as error:  # each file system has errors of its own
            raise OSError(brief(error)) from error

    def close(self) -> None:
        """Close the file, as losing its last reference does."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._close(fd)

    def __del__(self) -> None:
        self.close()
