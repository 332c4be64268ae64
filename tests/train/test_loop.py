"""What every training shares; that it resumes to the byte is tested where something is learnt."""

from __future__ import annotations

import numpy as np

from wsi.train.loop import digits, drawn


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


def test_digits() -> None:
    assert digits(None) is None and digits(1 / 3) == 0.33333333
