"""Slides, what becomes of them, and someone who spoils the processes that are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archive.make import CONFIG, SABOTAGE, at_start, write_slides
from wsi.archive import find_slides, tile_archive


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "slides"
    write_slides(folder, 2)
    return folder


@pytest.fixture(scope="session")
def whole(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slides tiled without any process but this."""
    out = tmp_path_factory.mktemp("whole")
    tile_archive(find_slides([str(slides)]), out, CONFIG, workers=0)
    return out


@pytest.fixture
def saboteur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_start(SABOTAGE, tmp_path, monkeypatch)
