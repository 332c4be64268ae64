"""FROC against the published oracles, MONAI's numbers and a literal restatement of the official script."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from tests.metrics import official
from wsi.annotations import rasterize
from wsi.metrics.froc import Lesions, SlideHits, find_lesions, froc, match


def oracle_mask() -> np.ndarray:
    mask = np.zeros((200, 200), bool)
    mask[20:60, 20:60] = mask[20:60, 66:80] = mask[150:154, 150:154] = True
    y, x = np.mgrid[:200, :200]
    radius = np.hypot(y - 120, x - 60)
    mask[(radius > 18) & (radius < 25)] = True
    return mask


A = [(0.9, 960, 960), (0.8, 2240, 960), (0.95, 4864, 4864), (0.7, 1920, 3840), (0.6, 3200, 320), (0.5, 6080, 6080)]
B = [(0.85, 5, 5), (0.3, 9, 9)]


def columns(detections: list[tuple[float, float, float]]) -> list[list[float]]:
    return [[d[i] for d in detections] for i in range(3)]


def oracle_slides() -> list[SlideHits]:
    lesions = find_lesions(oracle_mask())
    return [match(lesions, *columns(A)), match(None, *columns(B)), match(None, [], [], [])]


def test_the_oracle_of_the_specification():
    lesions = find_lesions(oracle_mask())
    whole = np.zeros((200, 200), int)
    height, width = lesions.labels.shape
    left, top = lesions.origin
    whole[top : top + height, left : left + width] = lesions.labels
    assert np.bincount(whole.ravel())[1:].tolist() == [3248, 2673, 132]
    assert whole[120, 60] == 2, "the ring's hole is filled"
    assert lesions.major_axis_um / (0.243 * 32) == pytest.approx([78.269, 58.346, 12.994], abs=5e-4)
    assert lesions.itc.tolist() == [False, False, True]
    slides = oracle_slides()
    assert slides[0].hits.tolist() == np.float32([0.9, 0.7, 0]).tolist() and slides[0].ignored == 1
    curve = froc(slides)
    assert curve.per_slide == pytest.approx([4 / 3, 1, 2 / 3, 1 / 3, 1 / 3, 0, 0])
    assert curve.sensitivity.tolist() == [1, 1, 1, 1, 0.5, 0.5, 0]
    assert curve.at == pytest.approx((0.5, 1, 1, 1, 1, 1)) and curve.n_lesions == 2
    assert curve.score.value == pytest.approx(0.9166666667)


def test_the_lowest_threshold_is_dropped_as_in_the_script():
    curve = froc([SlideHits(True, np.array([0.2]), np.array([0.9, 0.1]), 2)])
    assert list(zip(curve.per_slide, curve.sensitivity, strict=True)) == [(1, 0.5), (0, 0.5), (0, 0)]
    assert curve.score.value == 0.5


def test_false_positives_of_normal_slides_alone():
    """JAMA's axis: of slides A, B and C the last two are normal, with the false positives 0.85 and 0.3."""
    curve = froc(oracle_slides(), fp="normal")
    by_hand = official.curve([0.85, 0.3], np.float32([0.9, 0.7, 0]).tolist(), 2, 2)
    assert curve.per_slide.tolist() == by_hand[0] and curve.sensitivity.tolist() == by_hand[1]
    only_tumour = froc(oracle_slides()[:1], fp="normal")
    assert only_tumour.score.value is None and "no slide" in only_tumour.score.reason
    with pytest.raises(ValueError, match="fp"):
        froc([], fp="none")


def test_numbers_of_monai(data_dir: Path):
    vectors = json.loads((data_dir / "oracles/monai_froc_and_stain_vectors.json").read_text())
    for case in vectors["compute_fp_tp"]:
        labels = np.array(case["evaluation_mask"], np.int32)
        itc = np.isin(np.arange(1, labels.max() + 1), case["labels_to_exclude"])
        lesions = Lesions(labels, np.zeros(len(itc)), itc, downsample=2 ** case["level"])
        hits = match(lesions, case["probs"], case["x"], case["y"])
        assert hits.false_positives.tolist() == case["fp"] and hits.n_lesions == case["num_targets"]
        assert hits.hits.tolist() == np.float32(case["tp"]).tolist()
    case = vectors["froc_score"][0]
    slides = [
        SlideHits(True, np.array(case["fp"]), np.array(case["tp"], float), case["num_targets"]),
        SlideHits(False, np.zeros(0), np.zeros(0), 0),
    ]
    assert froc(slides).score.value == pytest.approx(case["score"])
    assert froc(slides).at[0] == pytest.approx(vectors["froc_score"][1]["score"])


def test_slides_of_monai(data_dir: Path):
    oracle = json.loads((data_dir / "oracles/monai_froc_and_stain_vectors.json").read_text())["lesion_froc"]
    height, width = oracle["height"], oracle["width"]

    def slide(name: str, n_lesions: int) -> SlideHits:
        right, wrong = map(int, name.split("_"))
        mask = np.zeros((height, width), bool)
        for j in range(1, n_lesions + 1):
            column = j * width // 7
            mask[height // 2 - 3 : height // 2 + 3, column - 3 : column + 3] = True
        points = [(0.8, j * width // 7) for j in range(1, right + 1)]
        points += [(p, j * width // 7) for p, j in ((0.6, 5), (0.4, 6))[:wrong]]
        # Pixels of 37.5 / 2 um make the growth of 37.5 um the 2 px that MONAI's test grows by (it grows by d / 2 = 1).
        lesions = find_lesions(mask, mpp=37.5, downsample=1)
        lesions = Lesions(lesions.labels, lesions.major_axis_um, np.zeros(len(lesions.itc), bool), 1, lesions.origin)
        return match(lesions, [p for p, _ in points], [x for _, x in points], [height // 2] * len(points))

    for case in oracle["cases"]:
        found = froc([slide(name, n) for name, n in case["pairs"]]).score
        if case["froc"] == "nan":
            assert found.value is None and found.reason == "no lesion that counts"
        else:
            assert found.value == pytest.approx(case["froc"]), case


@st.composite
def slide_sets(draw):
    """Masks of discs, rings and specks, and detections at confidences that tie; coordinates also beyond the edges."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slides = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(rng.integers(1, 130, 2))
        y, x = np.mgrid[: shape[0], : shape[1]]
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(0, 6)):
            radius, hole = rng.uniform(0.5, 28), rng.uniform(0, 1) * rng.integers(2)
            far = np.hypot(y - rng.uniform(-5, shape[0] + 5), (x - rng.uniform(-5, shape[1] + 5)) * rng.uniform(0.4, 2))
            mask |= (far < radius) & (far >= radius * hole)
        k = int(rng.integers(0, 25))
        p = rng.integers(0, 11, k) / rng.choice([8, 10])
        px, py = rng.uniform(-40, 32 * shape[1] + 40, k), rng.uniform(-40, 32 * shape[0] + 40, k)
        slides.append((mask, bool(rng.integers(4)), p, np.floor(px), np.floor(py)))
    return slides


@given(slide_sets())
@settings(max_examples=150, deadline=None)
def test_equals_a_literal_restatement_bit_for_bit(slides):
    fps, tps, n_lesions, ours = [], [], 0, []
    for mask, is_tumour, p, x, y in slides:
        labels = official.evaluation_mask(mask.astype(np.uint8) * 255) if mask.any() else np.zeros(mask.shape, int)
        itc = official.itc_labels(labels)
        fp, tp, n = official.false_and_true_positives(zip(p, x, y, strict=True), labels, itc, is_tumour)
        fps, tps, n_lesions = fps + fp, tps + tp, n_lesions + n
        lesions = find_lesions(mask)
        assert len(lesions.itc) == labels.max(initial=0)
        axes = [each.axis_major_length for each in measure.regionprops(labels)]
        assert lesions.major_axis_um / (0.243 * 32) == pytest.approx(axes, rel=1e-9, abs=1e-6)
        outside = ((x < 0) | (y < 0) | (x >= mask.shape[1] * 32) | (y >= mask.shape[0] * 32)).sum()
        size = mask.shape[1] * 32, mask.shape[0] * 32
        hits = match(lesions if is_tumour else None, p, x, y, size=size)
        assert hits.outside == outside
        ours.append(hits)
    curve = froc(ours)
    if n_lesions == 0:
        assert curve.score.value is None
        return
    x, y = official.curve(fps, tps, n_lesions, len(slides))
    assert curve.per_slide.tolist() == x and curve.sensitivity.tolist() == y
    assert curve.score.value == official.score(fps, tps, n_lesions, len(slides))


@given(slide_sets(), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_draw_of_the_bootstrap_is_the_curve_of_those_slides(slides, seed):
    hits = [match(find_lesions(mask) if tumour else None, p, x, y) for mask, tumour, p, x, y in slides]
    draws = np.random.default_rng(seed)
    drawn = [froc([hits[i] for i in draws.integers(len(hits), size=len(hits))]).score.value for _ in range(4)]
    defined = [value for value in drawn if value is not None]
    found = froc(hits, n_bootstrap=4, seed=seed).score
    if len(hits) < 2 or found.value is None or len(defined) <= 2 or min(defined) == max(defined):
        assert found.low is None and found.reason
    else:
        assert [found.low, found.high] == pytest.approx(np.percentile(defined, (2.5, 97.5)), abs=1e-12)
        assert f"{len(defined)} of 4 draws" in found.method


def test_real_lesions_are_counted_as_the_script_counts_them(data_dir: Path):
    """Outlines of CAMELYON16 training slides: hundreds of lesions that merge, enclose each other and are tiny."""
    n_lesions = n_itc = 0
    with zipfile.ZipFile(data_dir / "camelyon/camelyon16_tumor_polygons_json.zip") as archive:
        for name in ("Tumor_006.json", "Tumor_013.json", "Tumor_044.json", "Tumor_085.json"):
            outlines = json.loads(archive.read(name))
            parts = {
                kind: [shapely.Polygon(p["vertices"]).buffer(0) for p in outlines[kind] if len(p["vertices"]) > 3]
                for kind in ("positive", "negative")
            }
            area = shapely.union_all(parts["positive"]).difference(shapely.union_all(parts["negative"]))
            left, top, right, bottom = area.bounds
            area = shapely.transform(area, lambda xy, at=(left - 999, top - 999): xy - at)
            mask = rasterize(area, (int(right - left) // 32 + 70, int(bottom - top) // 32 + 70), 32)
            labels = official.evaluation_mask(mask.astype(np.uint8) * 255)
            lesions = find_lesions(mask)
            y, x = np.nonzero(labels)
            assert len(lesions.itc) == labels.max() and (lesions.at(x * 32, y * 32) == labels[y, x]).all(), name
            assert (np.flatnonzero(lesions.itc) + 1).tolist() == official.itc_labels(labels), name
            n_lesions, n_itc = n_lesions + len(lesions.itc), n_itc + int(lesions.itc.sum())
    assert n_lesions > 20 and 0 < n_itc < n_lesions


def test_planted_defects_are_seen():
    """Axes exchanged, a pyramid level too many, half a tile: the commonest errors of heatmap code."""
    lesions = find_lesions(oracle_mask())

    def score(confidence, x, y) -> float:
        return froc([match(lesions, confidence, x, y), match(None, [], [], [])]).score.value

    right = [(0.9, 960, 1300), (0.8, 1920, 3840)]
    assert score(*columns(right)) == 1
    p, x, y = map(np.array, columns(right))
    assert score(p, y, x) < 1 and score(p, x / 2, y / 2) < 1 and score(p, x * 2, y * 2) < 1


def test_a_mask_of_other_values_is_refused():
    with pytest.raises(ValueError, match="bool"):
        find_lesions(np.full((9, 9), 255, np.uint8))


@pytest.mark.parametrize(
    "detections", [([0.5, np.nan], [1, 2], [1, 2]), ([0.5], [1, 2], [1, 2]), ([-0.1], [1], [1]), ([0.5], [np.inf], [1])]
)
def test_detections_that_are_none_are_refused(detections):
    with pytest.raises(ValueError, match=r"detections|confidence"):
        match(None, *detections)


def test_a_lesion_along_the_whole_border_is_filled():
    """Its only background is a hole, which must not be taken for the outside."""
    mask = np.ones((60, 60), bool)
    mask[20:40, 20:40] = False
    labels = official.evaluation_mask(mask.astype(np.uint8) * 255)
    assert (find_lesions(mask).labels == labels).all() and labels.all()


def test_one_mask_pixel_is_one_lesion_of_isolated_cells():
    mask = np.zeros((7, 7), bool)
    mask[3, 3] = True
    lesions = find_lesions(mask)
    assert lesions.itc.tolist() == [True] and math.isfinite(lesions.major_axis_um[0])
    assert froc([match(lesions, [0.9], [100], [100])]).score.value is None
