"""Files that once crashed or stalled a reader, or took too much memory: each is read, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FILES = sorted((Path(__file__).parent / "regressions").glob("*.tif"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux knows them")


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What each file gives, in a process of its own: a fault may kill it."""
    command = [sys.executable, "-m", "tests.fuzz.fuzz_tiff", "--reader", "tiff", "--replay", *map(str, FILES)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_it_is_read_or_refused(name: str, found: dict[str, str]) -> None:
    assert found[name] == "ok"
