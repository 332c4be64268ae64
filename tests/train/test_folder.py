"""A model folder belongs to one training, and cannot be made where nothing can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi.errors import ConfigMismatch, OutputError, TrainError
from wsi.train.folder import bind


def test_a_folder_is_bound_to_what_it_was_begun_with(tmp_path: Path) -> None:
    bind(tmp_path, {"mpp": 0.5, "classes": ("a", "b")})
    before = (tmp_path / "run.json").read_bytes()
    bind(tmp_path, {"mpp": 0.5, "classes": ("a", "b")})
    with pytest.raises(ConfigMismatch, match="another mpp"):
        bind(tmp_path, {"mpp": 0.25, "classes": ("a", "b")})
    assert (tmp_path / "run.json").read_bytes() == before
    (tmp_path / "run.json").write_bytes(before[:10])
    with pytest.raises(TrainError, match="is damaged"):
        bind(tmp_path, {"mpp": 0.5})


def test_a_model_from_elsewhere_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigMismatch, match="did not begin"):
        bind(tmp_path, {"mpp": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        bind(tmp_path / "file/model", {"mpp": 0.5})
