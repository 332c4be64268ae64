"""Slides in processes of their own: whatever one does to its process, the others are done, and it is a row."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.archive.make import CONFIG, at_start
from tests.e2e.conftest import digest, rows
from wsi.archive import Event, Limits, SlideRef, find_slides, run, tile_archive
from wsi.archive.jobs import TileJob
from wsi.archive.workers import Workers, _environment
from wsi.errors import OutputError, StoreError, WsiError
from wsi.tile import TileConfig


def bad(slides: Path, folder: Path, *names: str) -> list[SlideRef]:
    """Copies of a slide under names that the saboteur knows, between two that are well."""
    folder.mkdir()
    for name in names:
        shutil.copy(slides / "s0.svs", folder / f"{name}.svs")
    good = find_slides([str(slides)])
    return [good[0], *(SlideRef(str(folder / f"{name}.svs")) for name in names), good[1]]


def test_other_processes_give_the_same_bytes(slides: Path, whole: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    summary = tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=2, tell=told.append)
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"] and not summary.failed
    assert digest(tmp_path / "r") == digest(whole) != {}
    assert not (tmp_path / "r/.claims").exists()
    for name in ("s0", "s1"):
        kinds = [event.kind for event in told if event.slide_id == name]
        assert kinds[0] == "begin" and kinds[-1] == "done" and "stage" in kinds
    table = rows(tmp_path / "r/slides.csv")
    assert [row["n_tiles"] for row in table] == [str(row["n_tiles"]) for row in summary.done]


def test_what_kills_a_worker_is_a_row_and_the_rest_go_on(
    slides: Path, whole: Path, tmp_path: Path, saboteur: None
) -> None:
    refs = bad(slides, tmp_path / "bad", "segfault", "kill", "exit")
    summary = tile_archive(refs, tmp_path / "r", CONFIG)
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"]
    said = {row["slide_id"]: row for row in rows(tmp_path / "r/failures.csv")}
    assert set(said) == {"segfault", "kill", "exit"} == {row["slide_id"] for row in summary.failed}
    assert "SIGSEGV" in said["segfault"]["error"] and "another --reader" in said["segfault"]["remedy"]
    assert "SIGKILL" in said["kill"]["error"] and "memory" in said["kill"]["remedy"]
    assert "exit code 7" in said["exit"]["error"]
    kept = {name: hashed for name, hashed in digest(tmp_path / "r").items() if name[:2] in ("s0", "s1")}
    assert kept == digest(whole)


def test_limits(slides: Path, tmp_path: Path, saboteur: None) -> None:
    refs = bad(slides, tmp_path / "bad", "hang", "busy")
    summary = tile_archive(refs, tmp_path / "r", CONFIG, limits=Limits(seconds=8))
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"]
    said = {row["slide_id"]: row for row in summary.failed}
    assert "took more than 8 s" in said["hang"]["error"] and "--slide-timeout" in said["hang"]["remedy"]
    assert "took more than 8 s" in said["busy"]["error"] and said["busy"]["stage"] == "tiles"
    refs = bad(slides, tmp_path / "worse", "greedy")
    summary = tile_archive(refs, tmp_path / "r", CONFIG, limits=Limits(memory_bytes=1 << 30))
    said = {row["slide_id"]: row for row in summary.failed}
    assert "1.00 are allowed" in said["greedy"]["error"] and "--max-memory" in said["greedy"]["remedy"]


def test_a_slide_that_failed_is_tried_again_by_the_next_run(slides: Path, tmp_path: Path) -> None:
    broken = tmp_path / "s0.svs"
    broken.write_bytes((slides / "s0.svs").read_bytes()[:5000])
    refs = [SlideRef(str(broken))]
    assert tile_archive(refs, tmp_path / "r", CONFIG).failed[0]["slide_id"] == "s0"
    shutil.copy(slides / "s0.svs", broken)
    assert tile_archive(refs, tmp_path / "r", CONFIG).done[0]["slide_id"] == "s0"
    assert rows(tmp_path / "r/failures.csv") == [] and not (tmp_path / "r/s0/failure.json").exists()


def test_errors_of_the_job_come_back_as_they_are(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Known: none"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", TileConfig(pixels="gif"))
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        tile_archive(find_slides([str(slides)]), tmp_path / "file", CONFIG)
    with pytest.raises(WsiError, match="fewer than none"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=-1)


def test_a_worker_that_cannot_start_ends_the_run(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_start("import os, sys\nif 'wsi.archive.worker' in sys.orig_argv: os._exit(9)", tmp_path, monkeypatch)
    with pytest.raises(WsiError, match="exit code 9"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG)


#: A network, process numbers and mounts of its own: as good as another machine that shares the folder.
APART = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def run_apart(slides: Path, out: Path, *more: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The command line in a process group of its own, with a worker."""
    words = ["tile", str(slides), "--mpp", "1", "--tile", "32", "--pixels", "zstd", "-o", str(out), "-q", *more]
    command = [*prefix, sys.executable, "-c", "from wsi.cli import main; main()", *words]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def why_no_namespaces() -> str:
    """What keeps this user from making them; empty where nothing does."""
    if not shutil.which(APART[0]):
        return "namespaces are Linux's, and unshare(1) is not here"
    tried = subprocess.run([*APART, "true"], capture_output=True, text=True)
    return f"the kernel does not let this user make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def finish(process: subprocess.Popen[bytes]) -> int:
    _, stderr = process.communicate()
    print(stderr.decode())
    return process.returncode


def test_a_killed_run_leaves_no_worker_and_goes_on_at_once(slides: Path, whole: Path, tmp_path: Path) -> None:
    process = run_apart(slides, tmp_path)
    while process.poll() is None and not list(tmp_path.glob("*/store.zarr")):
        os.sched_yield()
    process.kill()
    process.communicate()
    assert finish(run_apart(slides, tmp_path)) == 0
    assert digest(tmp_path) == digest(whole) and not (tmp_path / ".claims").exists()
    with pytest.raises(ProcessLookupError):  # the first worker saw its stdin end
        while True:
            os.killpg(process.pid, 0)
            os.sched_yield()


def test_ctrl_c_ends_well(slides: Path, whole: Path, tmp_path: Path) -> None:
    process = run_apart(slides, tmp_path)
    while process.poll() is None and not list(tmp_path.glob("*/store.zarr")):
        os.sched_yield()
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode in (130, 0)  # 0: it was done just then
    if process.returncode:
        assert stderr.decode() == "wsi: stopped; the same command goes on from here\n"
    assert not (tmp_path / ".claims").exists()
    assert finish(run_apart(slides, tmp_path)) == 0
    assert digest(tmp_path) == digest(whole)


@pytest.mark.parametrize("prefix", [(), APART], ids=["one machine", "namespaces"])
def test_two_runs_at_once_share_the_slides(slides: Path, whole: Path, tmp_path: Path, prefix: Sequence[str]) -> None:
    """Each with a cache of its own."""
    if prefix and (reason := why_no_namespaces()):
        pytest.skip(reason)
    out, caches = tmp_path / "r", [tmp_path / "cache0", tmp_path / "cache1"]
    runs = [run_apart(slides, out, "--cache-dir", str(cache), prefix=prefix) for cache in caches]
    assert [finish(run) for run in runs] == [0, 0]
    assert digest(out) == digest(whole) and not (out / ".claims").exists()
    assert [row["slide_id"] for row in rows(out / "slides.csv")] == ["s0", "s1"]
    assert not any(list(cache.iterdir()) for cache in caches)


def test_the_job_survives_the_journey() -> None:
    from wsi.archive.jobs import ScoreJob, TileJob, from_json, to_json
    from wsi.engine import EngineConfig, ScoreConfig
    from wsi.tissue import TissueConfig

    for job in (
        ScoreJob(EngineConfig("m", batch_size=7), ScoreConfig(positive=("a", "b"), tissue=TissueConfig(mpp=4.0))),
        TileJob(CONFIG, 3),
    ):
        assert from_json(json.loads(json.dumps(to_json(job)))) == job


def test_a_worker_that_is_killed_between_two_slides_costs_neither(slides: Path, whole: Path, tmp_path: Path) -> None:
    def tell(event: Event) -> None:
        if event.kind == "done" and event.slide_id == "s0":
            os.kill(executor._workers[0]._process.pid, signal.SIGKILL)

    executor = Workers(TileJob(CONFIG, 2), 1, Limits())
    summary = run(find_slides([str(slides)]), tmp_path, TileJob(CONFIG, 2), executor, tell=tell)
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"] and not summary.failed
    assert digest(tmp_path) == digest(whole)


def test_a_limit_met_in_the_last_moment_does_not_fail_the_next_slide(slides: Path, tmp_path: Path) -> None:
    def tell(event: Event) -> None:
        if event.stage == "finish" and event.slide_id == "s0":
            while not executor._messages.qsize():  # it has ended, which we have not heard yet
                os.sched_yield()
            executor._workers[0].check(Limits(seconds=0))

    executor = Workers(TileJob(CONFIG, 2), 1, Limits())
    summary = run(find_slides([str(slides)]), tmp_path, TileJob(CONFIG, 2), executor, tell=tell)
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"] and not summary.failed


def test_ctrl_c_is_nothing_to_a_worker_that_begins(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the whole group, and would be a traceback of whatever is being imported."""
    code = "import os, signal, sys\nif 'wsi.archive.worker' in sys.orig_argv: os.kill(os.getpid(), signal.SIGINT)"
    at_start(code, tmp_path, monkeypatch)
    assert len(tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG).done) == 2
    assert digest(tmp_path / "r") == digest(whole)


def test_workers_that_begin_no_slide_end_the_run(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, wsi.archive.jobs as jobs\njobs.Task.from_json = lambda said: os._exit(9)"
    at_start(code, tmp_path, monkeypatch)
    with pytest.raises(WsiError, match="before they begin a slide"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG)


def test_a_memory_limit_that_no_slide_could_keep_is_refused(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(WsiError, match="GiB before its first slide"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, limits=Limits(memory_bytes=10 << 20))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [(None, 2, "01010"), ("", 0, None), ("-1", 0, None), ("3,5", 2, "35353"), ("7", 1, "77777"), (None, 0, None)],
)
def test_each_worker_gets_a_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: int, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = [_environment(number, 5, devices).get("CUDA_VISIBLE_DEVICES") for number in range(5)]
    assert given == ([visible] * 5 if expected is None else list(expected))


def test_a_worker_of_another_configuration_ends_the_run(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that finds no GPU would compute in another precision than the first."""
    code = f"""
import wsi.archive.jobs as jobs, os
first = os.path.exists({str(tmp_path / "second")!r}) or open({str(tmp_path / "second")!r}, "w").close()
load = jobs.TileJob.load
def other(self):
    ready = load(self)
    ready.execution["device"] = "cpu" if first else "gpu"
    return ready
jobs.TileJob.load = other
"""
    at_start(code, tmp_path, monkeypatch)
    monkeypatch.setattr(Workers, "free", lambda self: len(self._workers) == 2 and self._workers[1].is_free)
    with pytest.raises(WsiError, match="another execution than the first"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=2)
