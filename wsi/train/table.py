"""Reading of tables that people typed or programs wrote: CSV rows, and names that differ only in spelling."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

from wsi.errors import TrainError

#: How pandas, R and spreadsheets write a missing value, in lower case.
_EMPTY = ("", "nan", "na", "<na>", "n/a", "#n/a", "null")
#: Line number and cells by column of each row.
Rows = list[tuple[int, dict[str, str]]]
NUMBER = re.compile(r"-?\d+(\.\d*)?")


def rows_of(path: Path, columns: str) -> Rows:
    """Read the rows of a CSV that are not empty: each with its line number, cells stripped, missing cells empty.

    `path` is UTF-8 with or without a byte order mark; `columns` says in messages what it should hold. Raises TrainError
    where the file cannot be read, has a column twice, or a row longer than its header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if "".join(line).strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainError(path, f"cannot be read ({error})", f"Give a CSV with the columns {columns}") from error
    header = lines[0][1] if lines else []
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise TrainError(path, f"has the column {twice[0]} twice", "Keep one")
    for i, line in lines:
        if len(line) > len(header):
            what = f"line {i} has {len(line)} cells, the header {len(header)}"
            raise TrainError(path, what, "Quote cells with commas")
    return [(i, dict(zip_longest(header, line, fillvalue=""))) for i, line in lines[1:]]


def refuse_empty(path: Path, rows: Rows, columns: Iterable[str], known: Collection[str] = ()) -> None:
    """Raise TrainError for an empty cell in `columns`, or one like "NA", unless it is one of `known`."""
    for i, row in rows:
        for name in columns:
            if row[name].casefold() in _EMPTY and row[name] not in known:
                what = f"line {i}: {name} is {row[name] or 'empty'}"
                raise TrainError(path, what, "Fill it in, or remove the row")


def key_of(name: str) -> Decimal | str:
    """Return a name's identity regardless of spelling: a number, or letters without spaces and case.

    Examples
    --------
    >>> key_of("07") == key_of("7.0"), key_of("P 1") == key_of("p1")
    (True, True)
    """
    return Decimal(name) if NUMBER.fullmatch(name) else "".join(name.casefold().split())


def refuse_alike(where: Path, what: str, names: Iterable[str]) -> None:
    """Raise TrainError for names that differ only in spelling: one patient would become two, one class two."""
    seen: dict[Decimal | str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(key_of(name), name)
        if other != name:
            what = f"{what} {other!r} and {name!r} differ in case, blanks or zeros alone"
            raise TrainError(where, what, "Write them alike, or as different as they are")
