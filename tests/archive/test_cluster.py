"""The same slides on a Dask cluster of two workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.archive.make import CONFIG
from tests.e2e.conftest import digest, rows
from wsi.archive import Cache, Event, SlideRef, find_slides, tile_archive
from wsi.archive.claims import ClaimLost
from wsi.archive.cluster import Cluster
from wsi.archive.jobs import Task, TileJob
from wsi.errors import OutputError, StoreError, WsiError
from wsi.tile import TileConfig

pytest.importorskip("distributed", reason="needs the extra 'cluster'")


def test_two_workers_give_the_same_bytes_and_a_crash_is_a_row(
    slides: Path, whole: Path, tmp_path: Path, saboteur: None
) -> None:
    folder = tmp_path / "slides"
    shutil.copytree(slides, folder)
    shutil.copy(slides / "s0.svs", folder / "segfault.svs")
    (folder / "cut.svs").write_bytes((slides / "s0.svs").read_bytes()[:3000])
    refs, cache = find_slides([str(folder)]), Cache(tmp_path / "c", 10**9)
    summary = tile_archive(refs, tmp_path / "r", CONFIG, scheduler="local", workers=2, cache=cache)
    assert [row["slide_id"] for row in summary.done] == ["s0", "s1"]
    failed = {row["slide_id"]: row["error"] for row in rows(tmp_path / "r/failures.csv")}
    assert set(failed) == {"segfault", "cut"} and "worker after worker" in failed["segfault"]
    for name in ("s0", "s1"):
        mine, theirs = digest(tmp_path / "r" / name), digest(whole / name)
        assert len(mine) > 5
        assert {path: mine[path] for path in mine if "json" not in path} == {
            path: theirs[path] for path in theirs if "json" not in path
        }  # the JSON files name the copy of the slide
    assert not (tmp_path / "r/.claims").exists()


def test_workers_with_another_working_directory(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distributed

    shutil.copytree(slides, tmp_path / "slides")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        monkeypatch.chdir(tmp_path)
        done = tile_archive(find_slides(["slides"]), "r", CONFIG, scheduler=cluster.scheduler_address).done
    assert [row["slide_id"] for row in done] == ["s0", "s1"]
    mine, theirs = digest(tmp_path / "r"), digest(whole)
    assert {path for path in mine if mine[path] != theirs[path]} <= {
        f"{name}/{file}" for name in ("s0", "s1") for file in ("result.json", "store.zarr/zarr.json")
    }  # which name the place of the slide


def test_a_folder_that_workers_do_not_see_ends_the_run(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi.archive.workers.perform", lambda *_: (_ for _ in ()).throw(ClaimLost("nothing there")))
    with pytest.raises(OutputError, match="not seen by a worker"):
        tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert not (tmp_path / "r/.claims").exists()


def test_what_cannot_be_is_said_at_once(slides: Path, tmp_path: Path) -> None:
    refs = find_slides([str(slides)])
    with pytest.raises(StoreError, match="Known: none"):
        tile_archive(refs, tmp_path / "r", TileConfig(pixels="gif"), scheduler="local")
    with pytest.raises(WsiError, match="cannot be reached"):
        tile_archive(refs, tmp_path / "r", CONFIG, scheduler="nonsense://nowhere")
    with pytest.raises(WsiError, match="workers on others do not see"):
        tile_archive(refs, tmp_path / "r", CONFIG, scheduler="tcp://host:8786", cache=Cache(tmp_path / "c", 10**9))


def test_a_slide_whose_worker_died_after_it_is_looked_at_again() -> None:
    class Lost:
        status = "lost"

    told: list[Event] = []
    cluster, future = Cluster(TileJob(CONFIG, 1), "local", 1), Lost()
    cluster._running[future] = Task("a", SlideRef("a.svs"), "a")
    cluster._ended.put(future)
    cluster.wait(told.append)
    assert told == [Event("lost", "a")]
