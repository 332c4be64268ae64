"""Kills at random moments (short form of ``make soak``), and a file system that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.archive.make import CONFIG
from tests.archive.soak import soak
from tests.e2e.conftest import digest, rows
from wsi import files
from wsi.archive import find_slides, tile_archive
from wsi.archive.claims import Claim
from wsi.errors import OutputError
from wsi.result import read_result
from wsi.scored import scored_slides
from wsi.store import PatchStore


def test_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    done = soak(4, seed=1, folder=tmp_path)
    assert sum(done.values()) >= 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("place", ["result.json", "slides.csv", "shard"])
def test_a_failing_disk_ends_the_run_and_loses_nothing(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, place: str
) -> None:
    def fail(path: object) -> None:
        raise OSError(number, "planted", str(path))

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            if Path(path).name == place:
                fail(path)
            return function(path, *arguments, **more)

        return call

    with monkeypatch.context() as patched:
        if place == "shard":
            patched.setattr(PatchStore, "keep", lambda self, shard, chunks: fail(self.path))
        else:
            for module in ("wsi.archive.folder", "wsi.result"):
                for name in ("write_csv", "write_json"):
                    patched.setattr(f"{module}.{name}", failing(getattr(files, name)), raising=False)
        with pytest.raises(OutputError, match="planted"):
            tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert not (tmp_path / "r/.claims").exists()
    tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert digest(tmp_path / "r") == digest(whole)
    assert len(rows(tmp_path / "r/slides.csv")) == 2


def test_who_was_overtaken_writes_no_result(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run takes the slide over and finishes it while we sleep just before the result is written."""
    asked: list[str] = []

    def holds(self: Claim) -> bool:
        asked.append(self.path)
        if len(asked) < 5:
            return Path(self.path).exists()
        patched.undo()
        Path(self.path).rename(Path(self.path).with_suffix(".9"))  # another's now, as far as we can see
        tile_archive(find_slides([str(slides / "s0.svs")]), tmp_path / "other", CONFIG, workers=0)
        (tmp_path / "r/s0/result.json").write_bytes((tmp_path / "other/s0/result.json").read_bytes())
        (tmp_path / "r/s0/seconds.json").write_text('{"tiles": 12345.0}')
        Path(self.path).with_suffix(".9").unlink()
        return False

    patched = monkeypatch
    patched.setattr(Claim, "holds", holds)
    summary = tile_archive(find_slides([str(slides / "s0.svs")]), tmp_path / "r", CONFIG, workers=0)
    assert summary.done[0]["seconds_tiles"] == 12345.0  # theirs, not ours
    assert not summary.failed


def test_half_written_files_of_a_killed_run_are_swept(slides: Path, tmp_path: Path) -> None:
    own = tmp_path / "r/s0"
    own.mkdir(parents=True)
    (tmp_path / "r/.slides.csv.0123.draft").write_text("slide_i")
    (tmp_path / "r/.run.json.0123.draft").write_text("{")
    (own / ".result.json.0123.draft").write_text("{")
    (own / ".store.zarr.77.draft").mkdir()
    (own / ".store.zarr.77.draft/zarr.json").write_text("{")
    tile_archive(find_slides([str(slides / "s0.svs")]), tmp_path / "r", CONFIG, workers=0)
    written = ["overlay.png", "regions.geojson", "result.json", "seconds.json", "store.zarr"]
    assert sorted(path.name for path in own.iterdir()) == written
    tables = ["failures.csv", "run.json", "slides.csv", "slides.parquet"]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted([*tables, "s0"])


@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_on_nfs_between_making_and_removing_a_file(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """There every file has a name (no O_TMPFILE), and keeps it when its maker dies."""

    class Killed(BaseException):
        pass

    def open_named(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if unnamed and flags & unnamed == unnamed:
            raise OSError(errno.EOPNOTSUPP, "planted", path)
        return make(path, flags, *arguments, **more)

    def unlink(path: Any, **more: Any) -> None:
        if Path(path).parent.name != ".claims" and Path(path).exists():  # claims are another test's
            removed.append(path)
            if len(removed) == nth:
                raise Killed
        remove(path, **more)

    make, remove, removed = os.open, os.unlink, list[Any]()
    unnamed = getattr(os, "O_TMPFILE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_named)
        patched.setattr(os, "unlink", unlink)
        with pytest.raises(Killed):
            tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert Path(removed[nth - 1]).exists()
    tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert digest(tmp_path / "r") == digest(whole)
    assert not list((tmp_path / "r").rglob("*.draft"))


def test_a_file_system_that_remembers_what_was_missing(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS does, until a file is made there by this machine: with Dask, another one writes the result."""
    missing: set[Path] = set()

    def remembering(own: Path) -> object:
        found = None if own in missing else read_result(own)
        if found is None:
            missing.add(own)
        return found

    def made(path: Path) -> float:
        missing.discard(path.parent)
        return files.time_beside(path)

    monkeypatch.setattr("wsi.archive.jobs.read_result", remembering)
    monkeypatch.setattr("wsi.archive.folder.time_beside", made)
    assert len(tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0).done) == 2
    assert digest(tmp_path / "r") == digest(whole)


def test_a_full_disk_leaves_no_claim_that_the_next_run_would_wait_for(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim's name takes no space, and what stands in it does."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "planted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="planted"):
            tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert not (tmp_path / "r/.claims").exists()
    tile_archive(find_slides([str(slides)]), tmp_path / "r", CONFIG, workers=0)
    assert digest(tmp_path / "r") == digest(whole)


def test_a_kill_while_results_are_thrown_away(
    slides: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a store under its own name would be damaged, and half of a slide's folder would count as done."""

    class Killed(BaseException):
        pass

    def some(path: Path, **_: object) -> None:
        min(path.rglob("zarr.json")).unlink()
        raise Killed

    refs = find_slides([str(slides)])
    tile_archive(refs, tmp_path / "r", CONFIG, workers=0)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("shutil.rmtree", some)
        tile_archive(refs, tmp_path / "r", CONFIG, workers=0, force=True)
    assert set(scored_slides(tmp_path / "r")) == {"s1"}
    assert not tile_archive(refs, tmp_path / "r", CONFIG, workers=0).failed
    assert digest(tmp_path / "r") == digest(whole)
