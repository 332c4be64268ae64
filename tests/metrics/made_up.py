"""Scores of two methods on 129 slides that do not exist: 22 with macrometastases, 27 with micrometastases."""

from __future__ import annotations

import numpy as np


def scores_of_129() -> dict[str, np.ndarray]:
    """`size` (129,) of Macro, Micro and None; `truth` (129,) 0 or 1; `one` and `two` (129,) 0 to 1, with ties."""
    rng = np.random.default_rng(16)
    size = rng.permutation(["Macro"] * 22 + ["Micro"] * 27 + ["None"] * 80)
    signal = np.select([size == "Macro", size == "Micro"], [3.5, 1.5], 0.0)
    one, two = (1 / (1 + np.exp(1.5 - signal - rng.normal(0, noise, 129))) for noise in (1.2, 0.6))
    return {"size": size, "truth": (size != "None").astype(int), "one": one.round(2), "two": two.round(2)}
