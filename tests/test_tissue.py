"""Tissue: areas against shapely and a literal sum, made-up slides with one thing on them, and real masks of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from tests.array_slide import ArraySlide
from wsi import tissue as tissue_module
from wsi.errors import SlideError
from wsi.slide import open_slide
from wsi.tissue import TissueConfig, TissueMask, find_tissue, mask_polygons
from wsi.units import Box, Mpp

GLASS, STROMA, TUMOUR, NUCLEI = (243, 242, 241), (222, 160, 195), (165, 105, 165), (105, 75, 140)
DAB, COUNTERSTAIN, NECROSIS, BLOOD = (130, 85, 55), (150, 160, 195), (85, 40, 60), (215, 70, 75)

masks = hnp.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6)))
coordinate = st.floats(-40, 120, allow_nan=False)
side = st.floats(0.25, 150, allow_nan=False)


def slide_of(*patches: tuple[tuple[int, int, int], int, int, int, int], glass=GLASS, n=300, mpp=8.0) -> ArraySlide:
    """An n x n slide of noisy glass with blurred rectangles (colour, x, y, w, h) in pixels."""
    rng = np.random.default_rng(1)
    rgb = np.full((n, n, 3), glass, np.float64)
    for colour, x, y, w, h in patches:
        rgb[y : y + h, x : x + w] = colour
    rgb = ndimage.gaussian_filter(rgb, (0.7, 0.7, 0)) + rng.normal(0, 2.0, rgb.shape)
    return ArraySlide(np.clip(np.rint(rgb), 0, 255).astype(np.uint8), mpp)


def share(found: np.ndarray, x: int, y: int, w: int, h: int) -> float:
    """Part of a rectangle that is True."""
    return float(found[y : y + h, x : x + w].mean())


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


# --- exact areas ---------------------------------------------------------------------------------------------------


@given(masks, st.lists(st.tuples(coordinate, coordinate, side, side), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_fraction_is_the_sum_over_pixels_and_the_area_of_the_outlines(mask, boxes):
    area = Box(10.5, -3.0, 7.3 * mask.shape[1], 11.7 * mask.shape[0])
    found = TissueMask(mask, np.zeros_like(mask), area, Mpp(0.5, 0.5))
    got = found.fraction(np.array(boxes))
    outline = shapely.union_all(found.outlines())
    for box, fraction in zip((Box(*b) for b in boxes), got, strict=True):
        by_pixel = 0.0
        for row, column in np.argwhere(mask):
            common = box.intersect(Box(area.x + 7.3 * column, area.y + 11.7 * row, 7.3, 11.7))
            by_pixel += common.w * common.h
        by_shapely = shapely.box(box.x, box.y, box.x + box.w, box.y + box.h).intersection(outline).area
        assert fraction * box.w * box.h == pytest.approx(by_pixel, abs=1e-7)
        assert by_shapely == pytest.approx(by_pixel, abs=1e-7)


def test_half_a_pixel_of_shift_is_seen():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    found = TissueMask(mask, ~mask, Box(0, 0, 40, 40), Mpp(1, 1))
    assert found.fraction(
        np.array([[10.0, 10, 20, 20], [15, 10, 20, 20], [-10, -10, 60, 60]])
    ).tolist() == pytest.approx([1.0, 0.75, 400 / 3600])


@given(masks)
@settings(max_examples=80, deadline=None)
def test_outlines_are_the_mask_again(mask):
    polygons = mask_polygons(mask)
    assert all(p.is_valid and p.geom_type == "Polygon" for p in polygons)
    assert len(polygons) == ndimage.label(mask)[1]
    assert [p.area for p in polygons] == sorted((p.area for p in polygons), reverse=True)
    rows, columns = np.indices(mask.shape)
    inside = sum((shapely.contains_xy(p, columns + 0.5, rows + 0.5) for p in polygons), np.zeros(mask.shape, int))
    assert (inside == mask).all()
    assert sum(p.area for p in polygons) == mask.sum()


def test_an_outline_has_only_its_corners_and_keeps_its_hole():
    mask = np.ones((5, 7), bool)
    mask[2, 3] = False
    (polygon,) = mask_polygons(mask)
    assert len(polygon.exterior.coords) == 5 and len(polygon.interiors) == 1


def test_boxes_that_are_none_are_refused():
    found = TissueMask(np.ones((1, 1), bool), np.zeros((1, 1), bool), Box(0, 0, 1, 1), Mpp(1, 1))
    for boxes in (np.zeros((2, 3)), np.array([[0.0, 0, 0, 1]]), np.array([[0.0, 0, 1, np.nan]])):
        with pytest.raises(ValueError, match="positive sides"):
            found.fraction(boxes)
    assert found.fraction(np.zeros((0, 4))).shape == (0,)


# --- one thing on a slide ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [STROMA, TUMOUR, NUCLEI, DAB, COUNTERSTAIN, NECROSIS, BLOOD])
@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (225, 222, 212)])
def test_every_stain_is_tissue(colour, glass):
    found = find_tissue(slide_of((colour, 80, 60, 120, 150), glass=glass))
    truth = np.zeros((300, 300), bool)
    truth[60:210, 80:200] = True
    assert iou(found.mask, truth) > 0.93
    assert not found.pen.any()
    assert found.area_mm2 == pytest.approx(120 * 150 * 64e-6, rel=0.06)


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (0, 0, 0), (128, 128, 128), (215, 205, 195)])
def test_an_empty_slide_is_empty(colour):
    found = find_tissue(slide_of(glass=colour))
    assert not found.mask.any()
    assert found.area_mm2 == 0 and found.outlines() == [] and found.fraction(np.array([[0.0, 0, 50, 50]])) == 0


def test_a_slide_full_of_tissue_is_not_cut_in_two():
    found = find_tissue(slide_of((STROMA, 0, 0, 300, 300), (NUCLEI, 40, 40, 100, 100), (TUMOUR, 160, 100, 90, 200)))
    assert found.mask.mean() > 0.995


@pytest.mark.parametrize(
    "ink",
    [
        (45, 85, 185),
        (30, 50, 160),
        (20, 40, 140),
        (30, 60, 150),
        (20, 30, 100),
        (90, 163, 140),
        (35, 110, 60),
        (205, 30, 45),
        (35, 33, 38),
    ],
    ids=["blue", "darker", "dark", "permanent", "navy", "teal", "green", "red", "black"],
)
def test_ink_is_left_out_on_glass_and_on_tissue(ink):
    slide = slide_of((STROMA, 20, 100, 180, 150), (TUMOUR, 60, 140, 60, 60), (ink, 130, 30, 25, 200))
    found = find_tissue(slide)
    assert share(found.pen, 132, 32, 21, 196) > 0.95
    assert share(found.mask, 130, 30, 25, 200) == 0
    assert share(found.mask, 22, 102, 100, 146) > 0.98 and not found.pen[:, :125].any()
    assert share(found.mask, 125, 25, 40, 70) == 0, "the blurred rim of a stroke on glass is no tissue"
    kept = find_tissue(slide, TissueConfig(exclude_pen=False))
    assert not kept.pen.any()


@pytest.mark.parametrize("colour", [(186, 56, 69), (203, 58, 67), (166, 44, 62)])
def test_a_clot_is_tissue(colour):
    """Blood as dense as in public H&E patches of three patients; common red markers have this colour."""
    found = find_tissue(slide_of((colour, 60, 60, 120, 150)))
    assert not found.pen.any() and share(found.mask, 62, 62, 116, 146) > 0.98


def test_nuclei_and_pigment_are_too_small_for_ink():
    rng = np.random.default_rng(2)
    dots = [((40, 35, 45), int(x), int(y), 2, 2) for x, y in rng.integers(60, 190, (150, 2))]
    found = find_tissue(slide_of((STROMA, 50, 50, 150, 150), *dots))
    assert not found.pen.any() and share(found.mask, 52, 52, 146, 146) > 0.99


def test_black_of_the_scanner_dust_and_coverslip_edges_are_no_tissue():
    found = find_tissue(
        slide_of(
            ((2, 3, 2), 0, 0, 300, 25), ((2, 3, 2), 270, 0, 30, 300), ((150, 150, 148), 60, 240, 60, 30),
            ((190, 190, 192), 20, 30, 3, 250), ((70, 78, 82), 160, 220, 50, 50), (STROMA, 90, 60, 100, 100),
        )
    )  # fmt: skip
    truth = np.zeros((300, 300), bool)
    truth[60:160, 90:190] = True
    assert iou(found.mask, truth) > 0.93 and not found.pen.any()


def test_a_dark_field_is_told_from_the_densest_brightfield():
    nuclei = [((0, 0, 90), x, y, 4, 4) for x in range(20, 260, 30) for y in range(20, 260, 30)]
    dark = find_tissue(slide_of(*nuclei, glass=(1, 1, 3)))
    assert not dark.mask.any() and "fluorescence" in dark.dark_field and "luminance is 1 of 255" in dark.dark_field
    assert find_tissue(slide_of((NECROSIS, 0, 0, 300, 300))).dark_field == "" == find_tissue(slide_of()).dark_field
    unscanned = slide_of(glass=(1, 1, 3)).rgb
    unscanned[:, 100:] = 255  # filled in by the reader
    assert find_tissue(ArraySlide(unscanned, 8.0)).dark_field
    unscanned[:] = 255
    assert find_tissue(ArraySlide(unscanned, 8.0)).luminance is None


def test_a_real_fluorescence_slide_is_said_to_be_one(data_dir: Path):
    with open_slide(data_dir / "wsi/hamamatsu_ndpi/test3-DAPI-2-(387).ndpi") as slide:
        found = find_tissue(slide)
    assert not found.mask.any() and "fluorescence" in found.dark_field


def test_the_glass_is_found_beside_white_that_was_never_scanned():
    rgb = slide_of((STROMA, 20, 20, 100, 100), glass=(222, 216, 204)).rgb
    rgb[:, 150:] = 255
    found = tissue_module._glass_colour(rgb, rgb.min(axis=2), rgb.max(axis=2))
    assert found == pytest.approx((222, 216, 204), abs=1.5)


def test_specks_and_holes_are_judged_by_their_area():
    slide = slide_of(
        (STROMA, 20, 20, 150, 150), (GLASS, 40, 40, 15, 15), (GLASS, 80, 80, 40, 40), (STROMA, 220, 40, 9, 9)
    )
    config = TissueConfig(min_area_um2=100 * 64, min_hole_um2=400 * 64)
    found = find_tissue(slide, config)
    assert share(found.mask, 220, 40, 9, 9) == 0 and share(found.mask, 40, 40, 15, 15) == 1
    assert share(found.mask, 85, 85, 30, 30) == 0
    assert [len(p.interiors) for p in found.outlines()] == [1]
    finer = find_tissue(slide, TissueConfig(min_area_um2=20 * 64, min_hole_um2=0))
    assert share(finer.mask, 220, 40, 9, 9) > 0.8 and share(finer.mask, 42, 42, 10, 10) == 0


# --- geometry of the mask ------------------------------------------------------------------------------------------


def test_the_mask_lies_where_the_bounds_are():
    rgb = np.full((900, 1000, 3), 243, np.uint8)
    rgb[400:700, 500:800] = STROMA
    found = find_tissue(ArraySlide(rgb, mpp=8.0, bounds=Box(300, 200, 700, 700)))
    assert found.box == Box(300, 200, 700, 700) and found.mask.shape == (700, 700)
    inside, outside = found.fraction(np.array([[510.0, 410, 280, 280], [310, 210, 180, 180]]))
    assert inside > 0.999 and outside == 0


@pytest.mark.parametrize(
    ("size", "mpp", "shape"),
    [
        ((4000, 2000), 4.0, (1000, 2000)),  # as configured
        ((400, 300), 0.5, (192, 256)),  # small: finer, 256 px across
        ((100, 80), 0.5, (80, 100)),  # tiny: as it is
        ((600, 300), 16.0, (300, 600)),  # coarser than asked: never enlarged
        ((700, 3), 4.0, (2, 350)),
        ((1, 1), 0.5, (1, 1)),
    ],
)
def test_the_mask_is_never_finer_than_the_slide(size, mpp, shape):
    rgb = np.full((size[1], size[0], 3), STROMA, np.uint8)
    assert find_tissue(ArraySlide(rgb, mpp)).mask.shape == shape


def test_a_huge_slide_is_looked_at_more_coarsely(monkeypatch):
    monkeypatch.setattr(tissue_module, "_MAX_MASK_PX", 10_000)
    found = find_tissue(slide_of((STROMA, 75, 75, 150, 150)))
    assert found.mask.shape == (100, 100)
    assert found.area_mm2 == pytest.approx(150 * 150 * 64e-6, rel=0.1)


@pytest.mark.parametrize(
    "wrong", [{"mpp": 0.0}, {"mpp": float("nan")}, {"min_area_um2": -1.0}, {"min_hole_um2": float("nan")}]
)
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(SlideError):
        TissueConfig(**wrong)


# --- real slides ---------------------------------------------------------------------------------------------------


def test_a_real_skin_biopsy(data_dir: Path):
    """histolab's mask is dilated and has its holes filled, so it is compared where it is not plain glass."""
    expected = np.load(data_dir / "oracles/histolab_masks/tissue-mask-cmu-1-small-region.npy")
    with open_slide(next(data_dir.rglob("CMU-1-Small-Region.svs"))) as slide:
        found = find_tissue(slide)
        stained = slide.read(found.box, found.mask.shape[::-1]).max(axis=2) < 225
    expected = resized(expected, found.mask.shape)
    assert iou(found.mask, expected) > 0.8
    assert iou(found.mask & stained, expected & stained) > 0.97
    assert (found.mask & ~expected).sum() < 0.01 * found.mask.sum()
    assert not found.pen.any()


@pytest.mark.parametrize("mpp", [0.5, 8.0])
def test_a_real_immunostain(data_dir: Path, mpp: float):
    """A pale blue core among dust and smears that are no tissue; histolab's mask is five times the core."""
    expected = np.load(data_dir / "oracles/histolab_masks/tissue-mask-kidney-48-5.npy")
    with open_slide(data_dir / "wsi/generic_tiff/kidney-48-5.tif", mpp=mpp) as slide:
        found = find_tissue(slide)
        stained = slide.read(found.box, found.mask.shape[::-1]).min(axis=2) < 205
    expected = resized(expected, found.mask.shape)
    assert not (found.mask & ~expected).any()
    assert iou(found.mask, ndimage.binary_closing(stained & expected, iterations=2)) > 0.75


def test_a_real_slide_with_ink_in_three_colours(data_dir: Path):
    folder = data_dir / "oracles/histolab_thumb"
    rgb = np.asarray(Image.open(folder / "diagnostic-slide-thumb-rgb.png").convert("RGB"))
    found = find_tissue(ArraySlide(rgb, mpp=40.0))
    section = np.load(folder / "diagnostic-slide-thumb-rgb-pen-marks-mask.npy")  # the section, ink on it included
    dark = ~np.load(folder / "diagnostic-slide-thumb-otsu-threshold-mask.npy")  # ink, and the darkest tissue
    free = ~(dark | found.pen)
    assert iou(found.mask & free, section & free) > 0.9
    assert (found.mask & ~section).sum() < 0.01 * found.mask.sum()
    assert (found.pen & dark).sum() > 0.78 * found.pen.sum()
    assert (found.pen & dark).sum() > 0.6 * dark.sum()
    assert not (found.pen & found.mask).any()


def test_a_real_slide_with_labelled_cells(data_dir: Path):
    folder = data_dir / "patches/idc_mosaic_slides"
    labels = np.asarray(Image.open(folder / "idc_14082_grid50_labels.png"))
    with open_slide(folder / "idc_14082.tif") as slide:
        found = find_tissue(slide)
    rows, columns = np.indices(labels.shape)
    boxes = np.stack([columns * 50.0, rows * 50.0, np.full(labels.shape, 50.0), np.full(labels.shape, 50.0)], -1)
    fraction = found.fraction(boxes.reshape(-1, 4)).reshape(labels.shape)
    assert (fraction[labels == 0] < 0.1).all()
    assert (fraction[labels == 2] > 0.1).all() and (fraction[labels == 2] > 0.5).mean() > 0.88
    # The published patches are a quarter fat, and nine are dust out of focus without a cell.
    assert (fraction[labels > 0] > 0.1).mean() > 0.93
    assert not found.pen.any()
    half_a_cell = boxes.reshape(-1, 4) + np.array([25, 25, 0, 0])
    assert (found.fraction(half_a_cell).reshape(labels.shape)[labels == 0] > 0.1).any(), "the labels can tell"


@pytest.mark.parametrize(
    ("name", "mpp"), [("no-tissue-red-pen", 2.0), ("almost-white-1", 2.0), ("almost-white-1", 8.0)]
)
def test_a_real_tile_without_tissue(data_dir: Path, name: str, mpp: float):
    rgb = np.asarray(Image.open(data_dir / f"stain/histolab_tiles/{name}.png").convert("RGB"))
    found = find_tissue(ArraySlide(rgb, mpp))
    assert not found.mask.any()
    assert found.pen.any() == ("pen" in name)
