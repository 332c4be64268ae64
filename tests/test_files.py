"""Files are whole or not there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from wsi.files import replacing


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


def test_what_cannot_be_begun_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, error in ((tmp_path / "none/a", FileNotFoundError), (tmp_path / "file/a", NotADirectoryError)):
        with pytest.raises(error), replacing(path):
            pass


def test_permissions_are_those_of_any_file_and_threads_leave_the_umask_alone(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:

        def write(name: int) -> None:
            for _ in range(50):
                with replacing(tmp_path / str(name), sync=False) as file:
                    file.write(b"x")

        threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.umask(0o027) == 0o027
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(earlier)
