"""Copies nearer by: same bytes, within the budget, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.archive.make import CONFIG
from tests.e2e.conftest import digest
from wsi import archive
from wsi.archive import Cache, Event, SlideRef, find_slides, tile_archive


def test_the_same_bytes_from_copies(slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str | None] = []
    give = archive.workers.InProcess.give
    monkeypatch.setattr(
        archive.workers.InProcess, "give", lambda self, task: opened.append(task.ref.local) or give(self, task)
    )
    tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0, cache=Cache(tmp_path / "c", 10**9))
    assert digest(tmp_path / "r") == digest(whole)
    assert [Path(path).name for path in opened if path] == ["s0.svs", "s1.svs"]
    assert all(path.startswith(str(tmp_path / "c/run-")) for path in opened if path)
    assert list((tmp_path / "c").iterdir()) == []


def test_the_budget_is_kept(slides: Path, whole: Path, tmp_path: Path) -> None:
    size = (slides / "s0.svs").stat().st_size
    most = 0

    def tell(event: Event) -> None:
        nonlocal most
        held = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*.svs"))
        most = max(most, held)

    refs = find_slides([str(slides)])
    cache = Cache(tmp_path / "c", int(size * 1.5))
    tile_archive(refs, tmp_path / "r", CONFIG, workers=0, cache=cache, tell=tell)
    assert 0 < most <= size * 1.5
    assert digest(tmp_path / "r") == digest(whole)
    most = 0
    tile_archive(refs, tmp_path / "r2", CONFIG, workers=0, cache=Cache(tmp_path / "c", size // 2), tell=tell)
    assert most == 0 and digest(tmp_path / "r2") == digest(whole)  # too large for it: read in place


def test_a_slide_that_cannot_be_copied_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"no slide")
    refs = [*find_slides([str(tmp_path / "a.svs")]), archive.SlideRef(str(tmp_path / "gone.svs"))]
    summary = tile_archive(refs, tmp_path / "r", CONFIG, workers=0, cache=Cache(tmp_path / "c", 10**9))
    said = [row["error"] for row in summary.failed]
    assert (
        str(tmp_path / "a.svs") in said[0]
        and "/c/run-" not in said[0]
        and "/c/run-" not in said[1]
        and "no such file" in said[1]
    )


def test_what_a_killed_run_left_is_deleted_by_the_next(slides: Path, tmp_path: Path) -> None:
    code = f"import os; from wsi.archive import Cache; c = Cache({str(tmp_path / 'c')!r}, 10**9).__enter__()"
    code += f"; c.fetch({str(slides / 's0.svs')!r}).result(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list((tmp_path / "c").rglob("*.svs"))) == 1
    with Cache(tmp_path / "c", 10**9), Cache(tmp_path / "c", 10**9):  # the living do not delete each other
        assert len(list((tmp_path / "c").glob("run-*"))) == 2 and not list((tmp_path / "c").rglob("*.svs"))
    assert list((tmp_path / "c").iterdir()) == []


def test_folders_of_slides_and_urls(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/Index.dat").write_bytes(b"12345")
    (tmp_path / "m.mrxs").write_bytes(b"123")
    (tmp_path / "x.dcm").write_bytes(b"1")
    with Cache(tmp_path / "c", 8) as cache:
        copy = cache.fetch(str(tmp_path / "m.mrxs")).result()
        assert copy is not None and (Path(copy).with_suffix("") / "Index.dat").read_bytes() == b"12345"
        assert not cache.has_room(str(tmp_path / "m.mrxs"))
        cache.drop(str(tmp_path / "m.mrxs"))
        assert not Path(copy).exists()
        assert cache.fetch(str(tmp_path / "x.dcm")).result() is None  # one file of a series
        copy = cache.fetch(f"file://{tmp_path}/m.mrxs").result()
        assert copy is not None and Path(copy).read_bytes() == b"123"


def test_an_address_that_nobody_knows_is_left_to_the_reader(slides: Path, tmp_path: Path) -> None:
    """File systems of fsspec raise what they like: here ValueError, for want of credentials something else."""
    refs = [SlideRef("nosuch://bucket/a.svs"), *find_slides([str(slides / "s0.svs")])]
    summary = tile_archive(refs, tmp_path / "r", CONFIG, workers=0, cache=Cache(tmp_path / "c", 10**9))
    assert [row["slide_id"] for row in summary.done] == ["s0"]
    assert [row["slide"] for row in summary.failed] == ["nosuch://bucket/a.svs"]
