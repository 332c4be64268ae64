"""What every training shares; that it resumes to the byte is tested where something is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi.errors import ConfigMismatch, TrainError
from wsi.train.loop import bind, digits, drawn


def test_balancing_draws_classes_equally_often() -> None:
    ids, labels = [f"s{i:02d}" for i in range(24)], [int(i < 3) for i in range(24)]
    share = [
        np.mean(
            [labels[ids.index(i)] for k in range(40) for i in drawn(ids, labels, balance, np.random.default_rng(k))]
        )
        for balance in (True, False)
    ]
    assert abs(share[0] - 0.5) < 0.06 and share[1] == 3 / 24
    assert sorted(drawn(ids, labels, False, np.random.default_rng(0))) == ids


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


def test_digits() -> None:
    assert digits(None) is None and digits(1 / 3) == 0.33333333
