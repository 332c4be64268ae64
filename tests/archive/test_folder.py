"""Names of slides' folders, whatever the slides are called."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.archive.make import CONFIG
from tests.e2e.conftest import rows
from wsi.archive import Cache, Event, SlideRef, find_slides, tile_archive
from wsi.archive.folder import TABLES_CLAIM, slide_ids
from wsi.archive.jobs import Task, failure
from wsi.archive.walk import _Run
from wsi.files import time_beside, write_csv
from wsi.result import SlideResult, read_result


def test_a_stem_that_can_be_no_folder_gets_another_name(tmp_path: Path) -> None:
    names = ["a.svs", "run.json.svs", ".hidden.svs", "n" * 251 + ".svs", "\u00e9" * 120 + ".svs", "x/a.svs"]
    refs = [SlideRef("https://host/" + "u" * 300 + ".svs"), *(SlideRef(str(tmp_path / name)) for name in names)]
    ids = slide_ids(refs, tmp_path / "r")
    assert len({*ids}) == len(refs) and slide_ids([SlideRef(str(tmp_path / "a.svs"))], tmp_path / "r") == ["a"]
    for slide_id in ids:
        assert slide_id[0] != "." and slide_id not in ("a", "run.json") and len(os.fsencode(f"{slide_id}.999")) <= 255


@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_are_not_utf_8(slides: Path, tmp_path: Path, workers: int) -> None:
    folder = bytes(tmp_path / "s")
    (tmp_path / "s").mkdir()
    try:
        Path(os.fsdecode(folder + b"/b\xffd.svs")).write_bytes(b"no slide")
    except OSError as error:
        if error.errno != errno.EILSEQ:
            raise
        pytest.skip("the file system of the temporary folder takes no names but UTF-8 (APFS): no slide can have one")
    shutil.copy(slides / "s0.svs", os.fsdecode(folder + b"/g\xffd.svs"))
    cache = Cache(tmp_path / "c", 10**9)
    summary = tile_archive(find_slides([str(tmp_path / "s")]), tmp_path / "r", CONFIG, workers=workers, cache=cache)
    assert [row["slide"] for row in summary.failed] == [os.fsdecode(folder + b"/b\xffd.svs")]
    assert [row["slide"] for row in summary.done] == [os.fsdecode(folder + b"/g\xffd.svs")]
    assert [row["slide_id"] for row in rows(tmp_path / "r/failures.csv")] == [r"b\udcffd"]
    assert pq.read_table(tmp_path / "r/slides.parquet")["slide_id"].to_pylist() == [r"g\udcffd"]
    kept = json.loads(next((tmp_path / "r").glob("b*/failure.json")).read_text())
    assert kept == summary.failed[0]  # the path itself, not a picture of it


def test_what_cannot_be_written_of_such_a_name_says_so() -> None:
    try:
        "b\udcffd".encode()
    except UnicodeEncodeError as error:
        row = failure(Task("x", SlideRef("b\udcffd.svs"), "x"), "export", error)
        assert row["remedy"] == "Rename it" and "not UTF-8" in row["error"]


def named(folder: Path, *slides: Path) -> list[SlideRef]:
    """Copies of slides, all with one name."""
    refs = []
    for number, slide in enumerate(slides):
        (folder / str(number)).mkdir(parents=True)
        refs.append(SlideRef(str(shutil.copy(slide, folder / f"{number}/same.svs"))))
    return refs


def test_two_runs_at_once_with_slides_of_one_name(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own list, and finds the name free when it begins."""
    one, two = named(tmp_path, slides / "s0.svs", slides / "s1.svs")
    check_disk = _Run.check_disk

    def other_first(self: _Run) -> None:
        monkeypatch.setattr(_Run, "check_disk", check_disk)
        tile_archive([one], tmp_path / "r", CONFIG, workers=0)
        check_disk(self)

    monkeypatch.setattr(_Run, "check_disk", other_first)
    (row,) = tile_archive([two], tmp_path / "r", CONFIG, workers=0).done
    assert row["slide"] == two.path and row["slide_id"].startswith("same-")
    assert {row["slide"] for row in rows(tmp_path / "r/slides.csv")} == {one.path, two.path}


def test_a_name_belongs_to_the_slide_that_was_begun_under_it(slides: Path, tmp_path: Path) -> None:
    one, two = named(tmp_path, slides / "s0.svs", slides / "s1.svs")

    def stop(event: Event) -> None:
        if event.stage == "finish":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tile_archive([one], tmp_path / "r", CONFIG, workers=0, tell=stop)
    for ref, starts in ((two, "same-"), (one, "same")):
        (row,) = tile_archive([ref], tmp_path / "r", CONFIG, workers=0).done
        assert row["slide"] == ref.path and row["slide_id"].startswith(starts)
    assert row["slide_id"] == "same"


def test_labels_of_other_runs_slides_stay(slides: Path, tmp_path: Path) -> None:
    refs = [SlideRef(str(slides / f"s{i}.svs"), label=f"l{i}", patient=f"p{i}") for i in range(2)]
    for ref in refs:
        tile_archive([ref], tmp_path, CONFIG, workers=0)
    found = rows(tmp_path / "slides.csv")
    assert [(row["label"], row["patient"]) for row in found] == [("l0", "p0"), ("l1", "p1")]
    assert pq.read_table(tmp_path / "slides.parquet")["label"].to_pylist() == ["l0", "l1"]


def test_the_last_table_has_what_another_machine_finished_a_moment_ago(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS believes that it is not there, as it was not, until a file is made beside it."""
    refs = find_slides([str(slides)])
    tile_archive(refs[1:], tmp_path, CONFIG, workers=0)
    fresh: set[str] = set()

    def remembering(own: Path) -> SlideResult | None:
        return read_result(own) if own.name == "s0" or own.name in fresh else None

    def made(path: Path) -> float:
        fresh.add(path.parent.name)
        return time_beside(path)

    monkeypatch.setattr("wsi.archive.folder.read_result", remembering)
    monkeypatch.setattr("wsi.archive.folder.time_beside", made)
    tile_archive(refs[:1], tmp_path, CONFIG, workers=0)
    assert [row["slide_id"] for row in rows(tmp_path / "slides.csv")] == ["s0", "s1"]


def test_a_sleeper_that_overwrites_the_last_table_mends_it(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read what is finished, and sleeps; its claim is taken over, by a run that finishes another slide."""
    refs = find_slides([str(slides)])

    def slept(path: Path, *table: Any) -> None:
        if path.name == "slides.csv" and rows_of(table) == ["s0"] and not (tmp_path / "s1").exists():
            for claim in (tmp_path / ".claims").glob(f"{TABLES_CLAIM}.*"):
                claim.unlink()
            tile_archive(refs[1:], tmp_path, CONFIG, workers=0)
        write_csv(path, *table)

    def rows_of(table: tuple[Any, ...]) -> list[str]:
        return [row["slide_id"] for row in table[1]]

    monkeypatch.setattr("wsi.archive.folder.write_csv", slept)
    tile_archive(refs[:1], tmp_path, CONFIG, workers=0)
    assert [row["slide_id"] for row in rows(tmp_path / "slides.csv")] == ["s0", "s1"]


def test_a_slide_whose_file_has_changed_is_not_taken_for_done(slides: Path, tmp_path: Path) -> None:
    slide, whole = Path(shutil.copy(slides / "s0.svs", tmp_path)), (slides / "s0.svs").read_bytes()
    changed = bytes([*whole[:-1], 255 - whole[-1]])  # of the same size
    refs = [SlideRef(str(slide)), SlideRef(str(slides / "s1.svs"))]
    tile_archive(refs, tmp_path / "r", CONFIG, workers=0)
    was = slide.stat()
    slide.write_bytes(changed)
    os.utime(slide, ns=(was.st_atime_ns, was.st_mtime_ns))  # and the same time
    summary = tile_archive(refs, tmp_path / "r", CONFIG, workers=0)
    assert [row["slide_id"] for row in summary.done] == ["s1"]
    assert "is of another file than lies there now" in summary.failed[0]["error"]
    assert "this slide alone with --force" in rows(tmp_path / "r/failures.csv")[0]["remedy"]
    tile_archive(refs[:1], tmp_path / "r", CONFIG, workers=0, force=True)
    assert len(tile_archive(refs, tmp_path / "r", CONFIG, workers=0).done) == 2


def test_a_slide_whose_file_changes_half_way_is_not_gone_on_with(slides: Path, tmp_path: Path) -> None:
    slide = Path(shutil.copy(slides / "s0.svs", tmp_path))

    def stop(event: Event) -> None:
        if event.stage == "tiles" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tile_archive([SlideRef(str(slide))], tmp_path / "r", CONFIG, workers=0, tell=stop)
    slide.write_bytes(slide.read_bytes() + b"more")
    (row,) = tile_archive([SlideRef(str(slide))], tmp_path / "r", CONFIG, workers=0).failed
    assert "made with another file_fingerprint" in row["error"] and "Delete it" in row["remedy"]


def test_a_slide_that_still_grows_does_not_end_the_run(slides: Path, tmp_path: Path) -> None:
    slide = Path(shutil.copy(slides / "s0.svs", tmp_path))

    def grow(event: Event) -> None:
        if event.stage == "finish" and event.slide_id == "s0":
            slide.write_bytes(slide.read_bytes() + b"more")

    refs = [SlideRef(str(slide)), SlideRef(str(slides / "s1.svs"))]
    summary = tile_archive(refs, tmp_path / "r", CONFIG, workers=0, tell=grow)
    assert [row["slide_id"] for row in summary.done] == ["s1"] and "another file" in summary.failed[0]["error"]
