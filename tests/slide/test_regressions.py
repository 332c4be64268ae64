"""Files that once crashed or stalled a reader, or took too much memory: each is read, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from tests.conftest import REPOSITORY
from tests.slide.make import halved, picture
from wsi.errors import SlideUnreadable
from wsi.slide import open_slide
from wsi.units import Box

FILES = sorted((Path(__file__).parent / "regressions").glob("*.tif"))
assert len(FILES) >= 15


@pytest.fixture(scope="module", params=["tiff", "auto"])
def found(request: pytest.FixtureRequest) -> dict[str, str]:
    """What each file gives, in a process of its own: a fault may kill it."""
    if sys.platform != "linux":
        pytest.skip("limits are set as Linux knows them")
    command = [sys.executable, "-m", "tests.fuzz.fuzz_tiff", "--reader", request.param, "--replay", *map(str, FILES)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_it_is_read_or_refused(name: str, found: dict[str, str]) -> None:
    assert found[name] == "ok"


def test_a_sequential_jpeg_of_many_scans(tmp_path: Path) -> None:
    """Each scan is a pass over all pixels, and takes ten bytes: a tile of a megabyte would take minutes."""
    stream = imagecodecs.jpeg8_encode(picture(64, 64), level=50, subsampling="444")
    first = stream.index(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # of the first component alone, and cut short
    tile = stream[:first] + scan * 100 + b"\xff\xd9"
    arguments = {"tile": (64, 64), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (1, 1)}
    tifffile.imwrite(tmp_path / "a.tif", iter([tile]), shape=(64, 64, 3), dtype=np.uint8, metadata=None, **arguments)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide, pytest.raises(SlideUnreadable, match="scans"):
        slide.read(Box(0, 0, 64, 64), (64, 64))


def test_an_ome_tiff_that_names_another_file(tmp_path: Path) -> None:
    """Its text says that the picture lies in other.ome.tif, whose pyramid must not be looked for in this file."""
    full, other = picture(64, 48), picture(64, 48, seed=9)
    arguments = {"tile": (16, 16), "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "other.ome.tif", ome=True) as tiff:
        tiff.write(other, subifds=1, metadata={"axes": "YXS"}, **arguments)
        tiff.write(halved(other), subfiletype=1, **arguments)
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="48" SizeC="3" SizeZ="1" SizeT="1">'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        '<UUID FileName="other.ome.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "a.tif", full, description=text, metadata=None, **arguments)
    with (tmp_path / "a.tif").open("ab") as file:
        file.write(bytes(20_000))  # where the other file's tiles would lie
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 64, 48), (32, 24)), halved(full))
