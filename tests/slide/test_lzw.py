"""LZW streams whose codes are not defined: found as a slow reading of the stream finds them, and never decoded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from wsi.annotations import read_mask
from wsi.errors import AnnotationError, SlideUnreadable
from wsi.slide import open_slide
from wsi.slide.lzw import check_lzw, decode
from wsi.units import Box

CLEAR, END = 256, 257


def stream(codes: list[int], old: bool = False) -> bytes:
    """Write codes as TIFF 6.0 does, wider one code early; or as older writers did, in time and lowest bit first."""
    bits: list[int] = []
    known = 258
    for i, code in enumerate(codes):
        width = 9 + sum(known >= limit + (1 if old else 0) for limit in (511, 1023, 2047))
        digits = [code >> place & 1 for place in range(width)]
        bits += digits if old else digits[::-1]
        if code == CLEAR:
            known = 258
        elif i and codes[i - 1] != CLEAR:
            known += 1
    bits += [0] * (-len(bits) % 8)
    return np.packbits(bits, bitorder="little" if old else "big").tobytes()


def first_codes(data: bytes) -> list[int]:
    """Read a stream code by code, and return those that come first after a Clear."""
    old = data[0] == 0 and data[1] & 1
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little" if old else "big").tolist()
    found, known, width, place, before = [], 258, 9, 0, None
    while place + width <= len(bits):
        digits = bits[place : place + width]
        code = sum(bit << i for i, bit in enumerate(digits if old else digits[::-1]))
        place += width
        if before == CLEAR:
            found.append(code)
        if code == CLEAR:
            known, width = 258, 9
        elif before != CLEAR:
            known += 1
            if known in ((512, 1024, 2048) if old else (511, 1023, 2047)):
                width += 1
        if code == END or known == 5120:
            break
        before = code
    return found


def refused(data: bytes) -> bool:
    try:
        check_lzw(data)
    except ValueError as error:
        assert "not defined" in str(error)
        return True
    return False


CODES = st.lists(st.one_of(st.integers(0, 511), st.just(CLEAR), st.integers(0, 255)), max_size=60)


@given(CODES, st.integers(0, 2000), CODES, st.booleans())
def test_found_as_by_reading_code_by_code(before: list[int], run: int, after: list[int], old: bool) -> None:
    data = stream([CLEAR, 65, *before, *[66] * run, *after, END], old)
    assert refused(data) == any(code > END for code in first_codes(data))


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(data: bytes, old: bool) -> None:
    data = (b"\x00\x01" if old else b"\x80\x00") + data
    assert refused(data) == any(code > END for code in first_codes(data))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("length", [1, 253, 254, 255, 766, 1790, 4000, 4861])
def test_at_every_width(length: int, old: bool) -> None:
    """The code after a Clear that comes after so many others, where one bit off would read something else."""
    good, bad = ([CLEAR, 65, *[66] * length, CLEAR, code, 67, END] for code in (65, 300))
    assert not refused(stream(good, old)) and refused(stream(bad, old))
    assert first_codes(stream(bad, old)) == [65, 300]
    if length <= 4000:  # imagecodecs takes no more
        assert imagecodecs.lzw_decode(stream(good, old), out=9999) == b"A" + b"B" * length + b"AC"


@given(st.integers(0, 1 << 30), st.integers(1, 200_000), st.integers(1, 256))
def test_what_an_encoder_writes_passes(seed: int, length: int, values: int) -> None:
    data = np.random.default_rng(seed).integers(0, values, length).astype(np.uint8).tobytes()
    assert decode(imagecodecs.lzw_encode(data), out=length) == data


def test_nothing_but_clears_is_given_up() -> None:
    with pytest.raises(ValueError, match="more than"):
        check_lzw(stream([CLEAR, 65] * 20_000))
    check_lzw(b"")
    check_lzw(b"\x80")


DAMAGED = """
import hashlib, random
import imagecodecs, numpy as np
from wsi.slide.lzw import decode

rng, seen = random.Random(1), hashlib.sha256()
shapes = ((2, 900), (256, 900), (16, 5000), (4, 40000), (256, 9000))
whole = [
    imagecodecs.lzw_encode(np.random.default_rng(i).integers(0, k, n).astype(np.uint8).tobytes())
    for i, (k, n) in enumerate(shapes)
]
for _ in range(2000):
    data = bytearray(rng.choice(whole))
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(2, len(data))] = rng.randrange(256)
    try:
        seen.update(decode(bytes(data), out=rng.choice((768, 5000, 100_000))))
    except Exception as error:
        seen.update(str(error).encode())
print(seen.hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_damaged_streams_give_the_same_whatever_lies_in_memory() -> None:
    """The C library fills memory that is taken with one byte or another; without the check this process dies."""
    found = set()
    for fill in ("1", "165"):
        done = subprocess.run(
            [sys.executable, "-c", DAMAGED],
            cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "MALLOC_PERTURB_": fill}, check=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


def test_readers_and_masks_are_guarded(tmp_path: Path) -> None:
    """The first tile leaves pointers behind that the second one's code 300 would follow."""
    whole = imagecodecs.lzw_encode(bytes(64 * 64 * 3))
    tiles = [whole, stream([CLEAR, 300, 66, 67, END])]
    arguments = {"tile": (64, 64), "photometric": "rgb", "compression": "lzw", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", iter(tiles), shape=(64, 128, 3), dtype=np.uint8, **arguments)
    for reader in ("tiff", "tiffslide", "auto"):
        with open_slide(tmp_path / "a.tif", reader, mpp=0.5) as slide:
            assert slide.read(Box(0, 0, 64, 64), (64, 64)).max() == 0
            with pytest.raises(SlideUnreadable, match="not defined"):
                slide.read(Box(64, 0, 64, 64), (64, 64))
    with pytest.raises(AnnotationError, match="not defined"):
        read_mask(tmp_path / "a.tif", downsample=1)
