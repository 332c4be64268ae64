"""Files that once crashed or stalled a reader, or took too much memory: each is read, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FILES = sorted((Path(__file__).parent / "regressions").glob("*.tif"))

#: Faults that are known and not mended yet.
OPEN = {
    "jpeg-tile-50.tif": "tiles whose sides are no multiple of the reduction are readable in full alone",
    "jpeg2000-65536.tif": "memory for 65,536 px square is taken before the tile's size is compared",
    "philips-negative.tif": "ValueError: a level with negative sides",
    "philips-too-far.tif": "ZeroDivisionError: a level without pixels",
    "philips-too-few-tiles.tif": "IndexError: the text gives a level more tiles than the file holds",
    "scans.tif": "hundreds of progressive scans take minutes",
    "wide-row.tif": "all tiles across a row are decoded at once: 17 GB",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux knows them")


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What each file gives, in a process of its own: a fault may kill it."""
    command = [sys.executable, "-m", "tests.fuzz.fuzz_tiff", "--reader", "tiff", "--replay", *map(str, FILES)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_it_is_read_or_refused(name: str, found: dict[str, str], request: pytest.FixtureRequest) -> None:
    if name in OPEN:
        request.applymarker(pytest.mark.xfail(reason=OPEN[name], strict=True))
    assert found[name] == "ok"


def test_what_is_open_is_there() -> None:
    assert {path.name for path in FILES} >= OPEN.keys() and len(FILES) >= 9
