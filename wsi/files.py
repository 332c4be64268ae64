"""Writing files that are either whole or not there."""

from __future__ import annotations

import csv
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.draft")
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


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write indented JSON; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # paths that are not UTF-8: as JSON escapes them


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))
