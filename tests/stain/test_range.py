"""The range of training stains: its limit holds what it promises, and what was planted lies outside."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.slide.make import halved, section, write_pyramid
from tests.stain.make import TRUE_HE, two_stains
from wsi.errors import ModelError, SlideError
from wsi.stain import StainTransform, fit
from wsi.stain.range import FILE, Point, StainRange, measure, point_of, sample_store, sample_tiles
from wsi.store import PatchStore, slide_of
from wsi.tile import TileConfig, tile_slide


def turned(stain: int, degrees: float) -> np.ndarray:
    """The two true stains, columns, one of them turned away from the other."""
    vectors = TRUE_HE.copy()
    other = vectors[:, 1 - stain]
    away = vectors[:, stain] - (vectors[:, stain] @ other) * other
    angle = np.arccos(vectors[:, stain] @ other) + np.radians(degrees)
    vectors[:, stain] = np.cos(angle) * other + np.sin(angle) * away / np.linalg.norm(away)
    return vectors


def a_point(rng: np.random.Generator, spread: float = 0.03) -> Point:
    """A slide of one of three laboratories, none of them normal in any sense."""
    centre = np.array([0.6, 0.7, 0.4, 0.2, 0.85, 0.5])[None] + 0.1 * np.eye(6)[rng.integers(3)]
    vectors = (centre + spread * rng.standard_t(3, (1, 6))).clip(0.02).reshape(2, 3)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (*vectors.ravel().tolist(), *rng.gamma(20, 0.07, 2).tolist())


def apart(a: Point, b: Point) -> float:
    """The distance, written as the docstring says it."""
    squares = 0.0
    for i in (0, 3):
        cosine = sum(x * y for x, y in zip(a[i : i + 3], b[i : i + 3], strict=True))
        squares += float(np.degrees(np.arccos(min(1.0, cosine)))) ** 2
    squares += sum((10 * np.log2(a[i] / b[i])) ** 2 for i in (6, 7))
    return float(np.sqrt(squares))


def test_the_limit_is_what_the_docstring_says() -> None:
    rng = np.random.default_rng(0)
    points = [a_point(rng) for _ in range(60)]
    patients = [f"p{i // 2}" for i in range(60)]
    worst = sorted(
        max(min(apart(a, b) for b, of in zip(points, patients, strict=True) if of != who)
            for a, of in zip(points, patients, strict=True) if of == who)
        for who in sorted(set(patients))
    )  # fmt: skip
    known = StainRange.of(points, patients, 0.9)
    assert known.patients == 30 and known.limit == pytest.approx(worst[28 - 1], rel=1e-5)  # 0.9 of 31, rounded up
    new = a_point(rng, 0.3)
    assert known.check(new).distance == pytest.approx(min(apart(new, point) for point in points), rel=1e-4)


def test_few_new_patients_of_the_same_origin_lie_outside() -> None:
    rng = np.random.default_rng(1)
    outside = 0
    for _ in range(400):
        of = [[a_point(rng) for _ in range(rng.integers(1, 3))] for _ in range(25)]  # slides of a patient
        new, *train = of
        points, patients = zip(*[(point, k) for k, own in enumerate(train) for point in own], strict=True)
        known = StainRange.of(points, patients, 0.9)
        outside += any(known.check(point).outside for point in new)
    assert 0.02 * 400 < outside < 0.1 * 400 + 3 * (400 * 0.1 * 0.9) ** 0.5


def test_planted_shifts_are_found_and_named_in_numbers() -> None:
    rng = np.random.default_rng(2)
    train = [
        point_of(measure(two_stains(64, 64, i, turned(0, rng.normal(0, 2)), 0.35 * float(np.exp(rng.normal(0, 0.1))))))
        for i in range(40)
    ]
    known = StainRange.of(train, range(40))
    same = known.check(two_stains(64, 64, 99))
    assert same.outside is None and same.distance is not None
    yellow = np.stack([TRUE_HE[:, 0], [0.2, 0.6, 0.77]], 1)  # eosin 21 degrees away
    eosin = known.check(two_stains(64, 64, 99, yellow))
    numbers = re.search(r"haematoxylin (\d+) and eosin (\d+) degrees from the nearest", eosin.outside or "")
    assert numbers and int(numbers[1]) < 8 and 17 <= int(numbers[2]) <= 25, eosin
    assert eosin.distance is not None and known.limit is not None and f"{known.limit:.3g} of another" in eosin.outside
    thick = known.check(two_stains(64, 64, 99, TRUE_HE, 1.2)).outside or ""
    assert (times := re.search(r"([\d.]+) and ([\d.]+) times as strong", thick)) and float(times[1]) > 1.5
    assert "stain outside the training range" in thick and "95% of 40 training patients" in thick


def test_what_cannot_be_told_is_null_with_its_reason(tmp_path: Path) -> None:
    few = StainRange.of([a_point(np.random.default_rng(i)) for i in range(18)], range(18))
    assert few.limit is None and "of 18 training patients; 19 or more" in (few.reason or "")
    found = few.check(two_stains(64, 64))
    assert found[:2] == (None, None) and "19 or more" in (found.undefined or "")
    enough = StainRange.of([a_point(np.random.default_rng(i)) for i in range(19)], range(19))
    assert enough.limit is not None
    blank = enough.check(np.full((2, 32, 32, 3), 255, np.uint8))
    assert blank[:2] == (None, None) and "no pixel is tissue" in (blank.undefined or "")
    few.write(tmp_path)
    assert StainRange.read(tmp_path) == few and StainRange.read(tmp_path / "elsewhere") is None


def test_it_is_read_as_written_also_by_the_head_inside(tmp_path: Path) -> None:
    known = StainRange.of([point_of(measure(two_stains(64, 64, i))) for i in range(19)], range(19))
    known.write(tmp_path)
    assert StainRange.read(tmp_path) == known == StainRange.read(tmp_path / "mil")
    assert StainRange.read(tmp_path).sha256 == known.sha256  # type: ignore[union-attr]
    good = json.loads((tmp_path / FILE).read_text())
    for change in (
        {"slides": []}, {"slides": ["1 2 3"]}, {"limit": "far"}, {"limit": -1}, {"slides": ["1 0 0 0 1 0 1 nan"]},
        {"slides": ["1 0 0 0 1 0 1 0"]}, {"slides": 3},
    ):  # fmt: skip
        (tmp_path / FILE).write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match="is damaged"):
            StainRange.read(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        StainRange.read(tmp_path)


def test_a_store_gives_the_tiles_that_its_slide_gives(tmp_path: Path) -> None:
    full = section(700, 600)
    path = tmp_path / "a.svs"
    write_pyramid(path, [full, halved(full)], 0.5, svs=True)
    for pixels in ("none", "zstd"):
        config = TileConfig(mpp=1.0, tile_px=32, pixels=pixels, min_tissue=0)
        tile_slide(str(path), tmp_path / pixels, config)
    cut, kept = (PatchStore.open(tmp_path / pixels / "store.zarr") for pixels in ("none", "zstd"))
    np.testing.assert_array_equal(sample_store(cut), sample_store(kept))
    assert len(sample_store(cut)) == 64 < len(cut)
    with slide_of(cut) as slide:
        stain = fit("macenko", slide)
        normalised = sample_tiles(slide, cut.grid, stain)
    np.testing.assert_array_equal(normalised, StainTransform.from_json(stain.to_json()).apply(sample_store(kept)))
    shutil.move(path, tmp_path / "b.svs")
    with pytest.raises(SlideError):
        sample_store(cut)
