"""Leases: one owner at a time, whoever dies, sleeps or has a wrong clock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wsi.archive.claims import Claim, ClaimLost, Claims


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def elsewhere(claim: Claim) -> None:
    """Make a claim look as if another machine had made it."""
    path = Path(claim.path)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"host": "another machine"}).ljust(512))


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with Claims(tmp_path / "c") as one, Claims(tmp_path / "c") as two:
        claim = one.take("a")
        assert claim is not None and claim.holds()
        assert two.take("a") is None
        other = two.take("a.1")  # a name that looks like a claim of the first
        assert other is not None and other.holds() and claim.holds()
        one.release(claim)
        assert not claim.holds()
        assert (again := two.take("a")) is not None and again.holds()
    assert not (tmp_path / "c").exists()  # nothing stale is left


def test_many_contenders_one_winner(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        for round_ in range(20):
            barrier = threading.Barrier(8)

            def contend(name: str, barrier: threading.Barrier = barrier) -> Claim | None:
                barrier.wait()
                return claims.take(name)

            with ThreadPoolExecutor(8) as pool:
                took = list(pool.map(contend, [f"slide {round_}"] * 8))
            assert len([claim for claim in took if claim is not None and claim.holds()]) == 1


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    code = f"import os; from wsi.archive.claims import Claims; c = Claims({str(tmp_path)!r}).__enter__()"
    code += "; print(c.take('a').path); import sys; sys.stdout.flush(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9 and Path(done.stdout.strip()).exists()
    with Claims(tmp_path) as claims:
        claim = claims.take("a")
        assert claim is not None and claim.holds()
        assert [path.name for path in tmp_path.iterdir()] == ["a.2"]


def test_a_process_number_that_was_used_again_is_not_its_owner(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        (tmp_path / "a.1").write_text(json.dumps(json.loads(self_said(tmp_path, claims)) | {"began": "1"}))
        assert claims.take("a") is not None


def self_said(folder: Path, claims: Claims) -> str:
    """What a claim of this process looks like."""
    claim = claims.take("probe")
    assert claim is not None
    said = Path(claim.path).read_text()
    claims.release(claim)
    return said


def test_silence_elsewhere_is_measured_on_our_own_clock(tmp_path: Path) -> None:
    clock = Clock()
    with Claims(tmp_path) as one, Claims(tmp_path, silence_s=60, clock=clock) as two:
        claim = one.take("a")
        assert claim is not None
        elsewhere(claim)
        os.utime(claim.path, (0, 0))  # clocks and times of files have no say
        assert two.take("a") is None
        clock.now += 59
        assert two.take("a") is None
        Path(claim.path).write_text(Path(claim.path).read_text().replace('"beat": 0', '"beat": 1'))
        clock.now += 59
        assert two.take("a") is None  # it had a beat meanwhile
        clock.now += 60
        taken = two.take("a")
        assert taken is not None and taken.holds()
        assert not claim.holds()
        with pytest.raises(ClaimLost):
            claim.confirm()
        one.beat()  # the sleeper wakes up: that harms nobody
        assert taken.holds() and not claim.holds()
        one.release(claim)
        assert taken.holds()


def test_beats_change_the_file_and_keep_the_claim(tmp_path: Path) -> None:
    with Claims(tmp_path, beat_s=1e9) as claims:
        claim = claims.take("a")
        assert claim is not None
        before = Path(claim.path).read_bytes()
        claims.beat()
        assert Path(claim.path).read_bytes() != before and claim.holds()


def test_an_empty_or_spoilt_claim_is_waited_for_and_then_replaced(tmp_path: Path) -> None:
    for said in ("", "[]", "\0" * 512, '{"nonce": 3}'):
        clock = Clock()
        tmp_path.mkdir(exist_ok=True)  # it goes with the last claim
        (tmp_path / "a.7").write_text(said)
        with Claims(tmp_path, silence_s=60, clock=clock) as claims:
            assert claims.take("a") is None  # its owner may be about to write
            clock.now += 61
            assert claims.take("a") is not None


def test_an_owner_of_this_machine_that_sleeps_is_replaced_after_the_silence(tmp_path: Path) -> None:
    clock = Clock()
    with Claims(tmp_path, beat_s=1e9) as one, Claims(tmp_path, silence_s=60, clock=clock) as two:
        claim = one.take("a")  # its process lives, and says nothing: stopped, or its disk hangs
        assert two.take("a") is None
        clock.now += 59
        assert two.take("a") is None
        clock.now += 2
        taken = two.take("a")
        assert claim is not None and taken is not None and taken.holds() and not claim.holds()


def test_the_folder_may_go_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends, and removes the empty folder, just after we have seen that it is there."""
    folder, mkdir, goes = tmp_path / "c", Path.mkdir, [True, True]

    def made_and_gone(self: Path, *arguments: Any, **more: Any) -> None:
        mkdir(self, *arguments, **more)
        if self == folder and goes:
            goes.pop()
            folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_gone)
    with Claims(folder) as claims:
        claim = claims.take("a")
        assert claim is not None and claim.holds() and not goes


@pytest.mark.parametrize("function", ["os.listdir", "pathlib.Path.read_text"])
def test_what_another_machine_removed_while_we_looked_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """NFS says ESTALE where a local disk says ENOENT."""

    def stale(*_: Any, **__: Any) -> None:
        patched.undo()
        raise OSError(errno.ESTALE, "Stale file handle")

    with Claims(tmp_path) as one, Claims(tmp_path, beat_s=1e9) as two:
        assert one.take("other") is not None
        (tmp_path / "a.3").write_text("{}")
        (tmp_path / "a.3").unlink() if function == "os.listdir" else None
        with monkeypatch.context() as patched:
            patched.setattr(function, stale)
            claim = two.take("a")
        assert claim is not None and claim.holds()


def test_claims_of_the_dead_that_nobody_wants_are_removed_in_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with Claims(folder) as claims:
        said = json.loads(self_said(folder, claims))
        folder.mkdir(exist_ok=True)
        (folder / "done.1").write_text(json.dumps(said | {"began": "1"}))
        (folder / "elsewhere.1").write_text(json.dumps(said | {"host": "another machine"}))
    assert [path.name for path in folder.iterdir()] == ["elsewhere.1"]
