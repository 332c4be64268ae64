"""What many tests share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # tests that need it say so
    from hypothesis import settings

    settings.register_profile("wsi", deadline=None)  # how long an example takes says how busy the machine is
    settings.load_profile("wsi")

#: Exit code, stdout, stderr of a command.
Run = Callable[..., tuple[int, str, str]]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real slides and patches: $WSI_TEST_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("real data is not here: set $WSI_TEST_DATA to its folder")
    return folder


@pytest.fixture
def wsi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: exit code, stdout, stderr."""

    from wsi.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        if arguments[:1] in (("score",), ("tile",)) and len(arguments) > 1 and "--workers" not in arguments:
            arguments = (*arguments, "--workers", 0)  # what a test patches reaches no other process; see tests/archive
        monkeypatch.setattr(sys, "argv", ["wsi", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
