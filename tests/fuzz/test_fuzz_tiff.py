"""The fuzzer itself: it sees planted faults, cuts them down, and changes tags without stumbling."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tests.fuzz.fuzz_tiff import mutate_tag
from tests.slide.make import tiny_slides

SLIDES = tiny_slides()

PLANTED = """
import ctypes, json, os, pathlib, signal, tempfile
import numpy as np
from tests.fuzz import fuzz_tiff

def planted(path, reader):
    data = path.read_bytes()
    if b"S" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"H" in data:
        while True:
            pass
    if b"V" in data:
        np.empty(1 << 40, np.uint8)
    if b"M" in data:
        np.ones(3 << 25, np.uint8)
    if b"X" in data:
        raise KeyError("X")
    if b"F" in data:
        raise fuzz_tiff.Fault("Two lines!")

fuzz_tiff.SECONDS_LIMIT, fuzz_tiff.MEMORY_LIMIT, fuzz_tiff.read_slide = 1, 1 << 26, planted
path = pathlib.Path(tempfile.mkdtemp()) / "a"
found = {word: fuzz_tiff.try_apart(word.encode(), "tiff", path) for word in ("good", "S", "H", "V", "M", "X", "F")}
found["least"] = fuzz_tiff.minimise(b"a" * 700 + b"X" + b"b" * 300, "tiff", path).decode()
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer limits memory by RLIMIT_AS, which Linux alone keeps")
def test_planted_faults_are_seen_and_cut_down() -> None:
    done = subprocess.run([sys.executable, "-c", PLANTED], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "good": "",
        "S": "signal-SIGSEGV",
        "H": "timeout",
        "V": "MemoryError-string-planted",
        "M": "memory",
        "X": "KeyError-string-planted",
        "F": "Fault-string-planted-two-lines",
        "least": "X",
    }


@given(st.sampled_from(sorted(SLIDES)), st.integers(0, 1 << 30))
def test_a_tag_is_changed_in_its_place(name: str, seed: int) -> None:
    data = SLIDES[name]
    changed = mutate_tag(data, seed)
    assert changed == mutate_tag(data, seed) and len(changed) == len(data)
    assert sum(a != b for a, b in zip(data, changed, strict=True)) <= 8


def test_most_changes_change_something() -> None:
    assert sum(mutate_tag(SLIDES["pyramid"], seed) != SLIDES["pyramid"] for seed in range(100)) > 80


@given(st.binary(max_size=60))
def test_any_bytes_can_be_changed(data: bytes) -> None:
    for start in (b"II*\0", b"MM\0*", b"II+\0", b""):
        assert len(mutate_tag(start + data, 0)) == len(start + data)
