"""Calling the command line, and looking at what it left."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest

from tests.conftest import Run as Run
from tests.slide.make import halved, section, write_pyramid


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small slides, each another."""
    folder = tmp_path_factory.mktemp("archive")
    for name, seed in (("a", 0), ("b", 1)):
        full = section(seed=seed)
        write_pyramid(folder / f"{name}.svs", [full, halved(full)], 0.5, svs=True)
    return folder


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
