"""What a run tells while it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archive.make import write_slides
from tests.e2e.conftest import Run, rows
from wsi.archive import Event
from wsi.cli.display import Pace


def test_pace_is_of_this_run_since_its_first_slide_began() -> None:
    now = 0.0
    pace = Pace(10, clock=lambda: now)
    for name in "abcd":
        assert pace.tell(Event("done", name)) == ""  # an earlier run's: they took no time
    now = 100.0  # the models are loaded
    pace.tell(Event("begin", "e"))
    assert pace.tell(Event("stage", "e", "tiles", 300, 1000)) == ""  # done by an earlier run
    now = 110.0
    assert pace.tell(Event("stage", "e", "tiles", 500, 1000)) == "20 tiles/s, 0:04:50 left"  # 0.2 of 6 slides in 10 s
    now = 150.0
    assert pace.tell(Event("stage", "e", "tiles", 1000, 1000)).startswith("14 tiles/s")
    assert pace.tell(Event("stage", "e", "export")).startswith("14 tiles/s")
    assert pace.tell(Event("done", "e")) == "14 tiles/s, 0:04:10 left"  # one in 50 s, five are left
    pace.tell(Event("begin", "f"))
    now = 200.0
    assert pace.tell(Event("failed", "f")) == "7 tiles/s, 1 failed, 0:03:20 left"
    pace.tell(Event("begin", "g"))
    assert pace.tell(Event("lost", "g")) == "7 tiles/s, 1 failed, 0:03:20 left" and pace.ended == 6


def test_pace_does_not_grow_with_the_slides() -> None:
    pace = Pace(100_000)
    for number in range(1000):
        pace.tell(Event("begin", str(number)))
        pace.tell(Event("stage", str(number), "tiles", 7, 9))
        pace.tell(Event("done", str(number)))
    assert pace._running == {} and pace.ended == 1000


def start(slides: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = ["tile", str(slides), "--mpp", "1", "--tile", "32", "--pixels", "zstd", "-o", str(out), *more]
    command = [sys.executable, "-c", "from wsi.cli import main; main()", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_well(tmp_path: Path) -> None:
    write_slides(tmp_path / "s", 2)
    process = start(tmp_path / "s", tmp_path / "r")
    while process.poll() is None and not list((tmp_path / "r").glob("*/store.zarr")):
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode in (130, 0)  # 0: it was done just then
    assert process.returncode == 0 or err == "wsi: stopped; the same command goes on from here\n"
    assert not (tmp_path / "r/.claims").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a file that is always full, is Linux's")
def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, workers: str) -> None:
    write_slides(tmp_path / "s", 1)
    process = start(tmp_path / "s", tmp_path / "r", "--log-json", "/dev/full", "--workers", workers)
    out, err = process.communicate()
    assert process.returncode == 2 and out == "" and err.startswith("wsi: /dev/full: cannot be written (No space left")
    assert rows(tmp_path / "r/failures.csv") == []


def test_log_json_on_stdout_is_json_alone(tmp_path: Path) -> None:
    write_slides(tmp_path / "s", 1)
    out, err = start(tmp_path / "s", tmp_path / "r", "--log-json", "-").communicate()
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert kinds[0] == "begin" and kinds[-1] == "done" and "1 of 1 slides tiled" in err


def test_closed_streams_do_no_harm(tmp_path: Path) -> None:
    """As some schedulers start programs; a worker needs them, and what is for people goes nowhere, not to stdout."""
    write_slides(tmp_path / "s", 1)
    words = f"{sys.executable} -c 'from wsi.cli import main; main()' tile {tmp_path}/s --mpp 1 --tile 32"
    done = subprocess.run(["sh", "-c", f"{words} -o {tmp_path}/r --json <&- 2>&-"], capture_output=True, check=False)
    assert done.returncode == 0 and len(json.loads(done.stdout)["tiled"]) == 1


def test_ctrl_c_before_a_verb_has_begun(wsi: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsi.cli.app", stopped)
    assert wsi("doctor") == (130, "", "")
