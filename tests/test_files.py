"""Files are whole or not there."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.array_slide import ArraySlide
from wsi import tissue
from wsi.annotations import read_mask
from wsi.errors import AnnotationError, SlideError, StainError, is_output_error
from wsi.files import opened_image, remove_folder, replacing, replacing_folder, write_csv
from wsi.stain import fit


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_the_old_one_until_the_block_ends_well(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with replacing(path, sync=sync) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replacing(path, sync=sync) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


class Killed(BaseException):
    """Nothing after it is done, as after a kill."""


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """At the first rename, at the second, and while what was there before is removed."""
    path, steps = tmp_path / "a.zarr", [0]
    path.mkdir()
    (path / "mine").write_text("old")

    def killing(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            steps[0] += 1
            if steps[0] >= nth:
                raise Killed
            return function(*arguments, **more)

        return call

    with monkeypatch.context() as patched, pytest.raises(Killed), replacing_folder(path) as draft:
        draft.mkdir()
        (draft / "mine").write_text("new")
        patched.setattr(Path, "rename", killing(Path.rename))
        patched.setattr(shutil, "rmtree", killing(shutil.rmtree))
    with pytest.raises(KeyboardInterrupt), replacing_folder(path):
        raise KeyboardInterrupt
    assert (path / "mine").read_text() == ("new" if nth == 3 else "old")
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_a_folder_is_removed_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        remove_folder(tmp_path / "a")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.") and left.name.endswith(".draft")


def test_no_cell_breaks_a_row_of_a_table(tmp_path: Path) -> None:
    cells = ["plain", "a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "\u00e9", ""]
    write_csv(tmp_path / "a.csv", ["x", "y"], [{"x": cell, "y": 1} for cell in cells])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "y"], *([cell, "1"] for cell in cells)]
    assert (tmp_path / "a.csv").read_bytes().startswith(b"x,y\nplain,1\n")


@pytest.mark.parametrize(
    ("name", "output"), [("r/a/store.zarr", True), ("r", True), ("raw/a.svs", False), (None, False)]
)
def test_whose_error_it_is(tmp_path: Path, name: str | None, output: bool) -> None:
    """A failing disk under the slides is not the results', whatever their names begin with."""
    error = OSError(errno.EIO, "Input/output error", name and str(tmp_path / name))
    assert is_output_error(error, tmp_path / "r") == output


def test_what_cannot_be_begun_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, error in ((tmp_path / "none/a", FileNotFoundError), (tmp_path / "file/a", NotADirectoryError)):
        with pytest.raises(error), replacing(path):
            pass


@pytest.mark.parametrize("damage", ["cut", "flipped", "chunk", "none"])
def test_a_damaged_picture_is_an_error_of_whoever_reads_it(tmp_path: Path, damage: str) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / "a.png")
    sound = (tmp_path / "a.png").read_bytes()
    second = sound.index(b"IDAT", sound.index(b"IDAT") + 4)  # as in a file of which a block was lost
    (tmp_path / "a.png").write_bytes({
        "cut": sound[: len(sound) // 2],
        "flipped": sound[: second + 9] + bytes([sound[second + 9] ^ 255]) + sound[second + 10 :],
        "chunk": sound[:second] + b"\0\1\2\3" + sound[second + 4 :],
        "none": b"",
    }[damage])  # fmt: skip
    with pytest.raises(ValueError), opened_image(tmp_path / "a.png") as image:
        np.asarray(image)
    with pytest.raises(AnnotationError, match="no PNG"):
        read_mask(tmp_path / "a.png", downsample=1)
    with pytest.raises(SlideError, match="no mask"):
        tissue.tissue_in_image(str(tmp_path / "a.png"), ArraySlide(np.zeros((300, 300, 3), np.uint8)))
    with pytest.raises(StainError, match="not an image"):
        fit("macenko", np.zeros((9, 9, 3), np.uint8), tmp_path / "a.png")


def test_permissions_are_those_of_any_file_and_threads_leave_the_umask_alone(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:

        def write(name: int) -> None:
            for _ in range(50):
                with replacing(tmp_path / str(name), sync=False) as file:
                    file.write(b"x")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        assert os.umask(0o027) == 0o027
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(earlier)


def test_an_error_of_the_system_is_a_line_with_the_file(wsi, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "notes/report.json")

    monkeypatch.setattr("wsi.cli.app", denied)
    code, _, err = wsi("doctor")
    assert code == 2
    assert err.startswith("wsi: notes/report.json: Permission denied. Check")
    assert "Traceback" not in err
