"""What many tests share."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # tests that need it say so
    from hypothesis import settings

    settings.register_profile("wsi", deadline=None)  # how long an example takes says how busy the machine is
    settings.load_profile("wsi")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real slides and patches: $WSI_TEST_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("real data is not here: set $WSI_TEST_DATA to its folder")
    return folder
