"""Names of slides' folders, whatever the slides are called."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.archive.make import CONFIG
from tests.e2e.conftest import rows
from wsi.archive import Cache, SlideRef, find_slides, tile_archive
from wsi.archive.folder import slide_ids
from wsi.archive.jobs import Task, failure


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
