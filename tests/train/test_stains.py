"""The range of training stains is learnt from the training part, and counted on the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from tests.stain.make import TRUE_HE, two_stains
from wsi.errors import StoreError
from wsi.stain.range import StainRange, measure, point_of
from wsi.train.cohort import Split
from wsi.train.stains import learn_stains, stains_line

TRAIN = tuple(f"t{i}" for i in range(20))


def tiles(seed: int, vectors: np.ndarray = TRUE_HE) -> Callable[[], np.ndarray]:
    return partial(two_stains, 32, 32, seed, vectors)


@pytest.fixture
def pixels() -> dict[str, Callable[[], np.ndarray]]:
    yellow = np.stack([TRUE_HE[:, 0], [0.2, 0.6, 0.77]], 1)
    held = {
        "v0": tiles(100),
        "v1": tiles(101, yellow),
        "x0": tiles(102),
        "x1": tiles(103, yellow),
        "x2": tiles(104, yellow),
    }
    return {name: tiles(i) for i, name in enumerate(TRAIN)} | held


def test_those_kept_back_do_not_widen_the_range_and_are_counted(pixels: dict[str, Callable[[], np.ndarray]]) -> None:
    pixels["white"] = lambda: np.full((32, 32, 3), 255, np.uint8)
    split = Split((*TRAIN, "white"), ("v0", "v1"), ("x0", "x1", "x2"))
    known, figures = learn_stains(pixels, {name: name for name in pixels}, [split])
    assert known == StainRange.of([point_of(measure(pixels[name]())) for name in sorted(TRAIN)], sorted(TRAIN))
    assert figures == {"validation": {"slides": 2, "outside": 1}, "test": {"slides": 3, "outside": 2}}
    assert "test 2 of 3 outside" in stains_line(known, figures) and "95% of 20 training patients" in stains_line(
        known, {}
    )


def test_with_folds_each_slide_is_counted_by_a_split_that_did_not_train_on_it(
    pixels: dict[str, Callable[[], np.ndarray]],
) -> None:
    splits = [Split(TRAIN, (), ("x1",)), Split((*TRAIN, "x1"), (), ("x2",))]
    known, figures = learn_stains(pixels, {name: name for name in pixels}, splits)
    assert known.patients == 21 and figures["test"]["slides"] == 2 and figures["test"]["outside"] >= 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreError("/home/ann/s3/store.zarr", "keeps no pixels and names no slide"), "t3 keeps no pixels"),
        (FileNotFoundError(2, "No such file or directory", "/home/ann/s3.svs"), "t3 No such file or directory"),
        (OSError("disk is gone: /home/ann/s3.svs"), "t3 cannot be read (OSError)"),
    ],
    ids=["an error of ours", "of the system", "without a number"],
)
def test_without_pixels_there_is_a_reason_that_may_be_published(
    pixels: dict[str, Callable[[], np.ndarray]], error: Exception, reason: str
) -> None:
    def gone() -> np.ndarray:
        raise error

    known, figures = learn_stains(pixels | {"t3": gone}, {name: name for name in pixels}, [Split(TRAIN, ("v0",), ())])
    assert known.limit is None and reason in (known.reason or "") and figures == {}
    line = stains_line(known, figures)
    assert "not known" in line and reason in line and "/home" not in line
