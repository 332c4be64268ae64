"""Calling the command line, and looking at what it left."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def wsi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        if arguments[:1] in (("score",), ("tile",)) and len(arguments) > 1 and "--workers" not in arguments:
            arguments = (
                *arguments,
                "--workers",
                0,
            )  # patches of a test reach no other process; tests/archive has those
        monkeypatch.setattr(sys, "argv", ["wsi", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def rows(path: Path) -> list[dict[str, str]]:
    """Read a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file that holds numbers; not the tables, which tell seconds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "seconds.json"
        and path.relative_to(folder).parts[0] not in ("run.json", "slides.csv", "slides.parquet", "failures.csv")
    }
