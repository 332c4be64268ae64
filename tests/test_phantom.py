"""Phantom slides: the same bytes again, readable by every reader, and true to their truth."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import shapely
import tifffile

from wsi import native
from wsi.errors import OutputError
from wsi.heatmap import major_axis_um
from wsi.phantom import PhantomConfig, Truth, write_phantom
from wsi.slide import Slide, open_slide
from wsi.units import Box, Mpp

#: Not whole tiles, and not whole pixels at the upper levels.
CONFIG = PhantomConfig(size=(3003, 2101), seed=5, tumours=2)


class Phantom(NamedTuple):
    path: Path
    truth: Truth


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Phantom:
    path = tmp_path_factory.mktemp("phantom") / "phantom.svs"
    return Phantom(path, write_phantom(path, CONFIG))


@pytest.fixture(scope="module")
def with_pen(tmp_path_factory) -> Phantom:
    path = tmp_path_factory.mktemp("pen") / "pen.tif"
    return Phantom(path, write_phantom(path, PhantomConfig(size=CONFIG.size, seed=5, tumours=2, pen=True)))


def whole_level(slide: Slide, level: int) -> np.ndarray:
    return slide.read(Box(0, 0, *slide.size), slide.level_sizes[level])


def hematoxylin(rgb: np.ndarray) -> np.ndarray:
    """Concentration of haematoxylin, float64 (h, w), by inverting the textbook stain matrix."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    return (-np.log((rgb + 1.0) / 245) @ np.linalg.inv(stains))[..., 0]


def mask_of(shape: shapely.Geometry, rgb: np.ndarray, px: float) -> np.ndarray:
    """Pixels whose centre lies in `shape`, bool (h, w); `px` level-0 pixels a pixel."""
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]] * px + px / 2
    return shapely.contains_xy(shape, x, y)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_configuration_gives_the_same_bytes(phantom, tmp_path):
    again = write_phantom(tmp_path / "again.svs", CONFIG)
    assert sha256(tmp_path / "again.svs") == sha256(phantom.path)
    truth = "phantom.truth.geojson"
    assert sha256(tmp_path / "again.truth.geojson") == sha256(phantom.path.with_name(truth))
    assert again.tumours.equals(phantom.truth.tumours)


def test_the_seed_changes_the_colours(phantom, tmp_path):
    config = PhantomConfig(size=(1024, 1024), seed=6, tumours=0)
    assert write_phantom(tmp_path / "other.svs", config).tumours.is_empty
    with open_slide(tmp_path / "other.svs") as a, open_slide(phantom.path) as b:
        assert (a.read(Box(0, 0, 8, 8), (8, 8)) != b.read(Box(0, 0, 8, 8), (8, 8))).any()


def test_openslide_and_tiffslide_read_the_same_pixels_at_all_levels(phantom):
    with open_slide(phantom.path, "openslide") as a, open_slide(phantom.path, "tiffslide") as b:
        assert a.vendor == b.vendor == "aperio"
        assert a.mpp == b.mpp == (0.5, 0.5)
        assert a.mpp_source == "vendor:aperio"
        assert a.level_sizes == b.level_sizes == ((3003, 2101), (751, 526), (188, 132))
        for level in range(3):
            np.testing.assert_array_equal(whole_level(a, level), whole_level(b, level))


def test_tiles_share_their_jpeg_tables(phantom):
    with tifffile.TiffFile(phantom.path) as tiff:
        assert not tiff.is_bigtiff
        tiled = [page for page in tiff.pages if page.is_tiled]
        assert len(tiled) == 3
        assert len({page.jpegtables for page in tiled}) == 1
        assert tiled[0].jpegtables.startswith(b"\xff\xd8\xff\xdb")
        assert tiled[0].tags["YCbCrSubSampling"].value == (2, 2)
        assert "DateTime" not in tiled[0].tags
        tile = tiff.filehandle.read_segments(tiled[0].dataoffsets[:1], tiled[0].databytecounts[:1])
        stream = next(iter(tile))[0]
        assert stream.startswith(b"\xff\xd8\xff\xc0")
        assert stream.endswith(b"\xff\xd9")
        glass = min(tiled[0].databytecounts)
        assert tiled[0].databytecounts.count(glass) > 5  # one stream, again and again


def test_each_level_is_the_area_average_of_the_one_before(tmp_path):
    write_phantom(tmp_path / "fine.svs", PhantomConfig(size=(1537, 1027), quality=98, tumours=1))
    with open_slide(tmp_path / "fine.svs") as slide:
        for level in (1, 2):
            fine, coarse = whole_level(slide, level - 1), whole_level(slide, level)
            h, w = fine.shape[0] // 4, fine.shape[1] // 4
            average = np.empty((h, w, 3), np.uint8)
            edges = [np.arange(n + 1) * (4 << native.FIXED_POINT_BITS) for n in (h, w)]
            native.area_average(np.ascontiguousarray(fine[: h * 4, : w * 4]), *edges, average)
            difference = average.astype(float) - coarse[:h, :w]
            assert np.abs(difference.mean(axis=(0, 1))).max() < 0.5
            # Chroma is stored at half the resolution: brightness alone is compared pixel by pixel.
            grey = np.array([0.299, 0.587, 0.114])
            assert np.abs(difference @ grey).mean() < 1.5
            shifted = (average[:, 1:].astype(float) - coarse[:h, : w - 1]) @ grey
            assert np.abs(shifted).mean() > 4 * np.abs(difference @ grey).mean()


def test_tumours_lie_where_the_truth_says(phantom):
    with open_slide(phantom.path) as slide:
        rgb = whole_level(slide, 1)
    stain = hematoxylin(rgb)
    inside = mask_of(phantom.truth.tumours, rgb, 4)
    tissue = mask_of(phantom.truth.tissue, rgb, 4)
    assert stain[inside].mean() > 2 * stain[tissue & ~inside].mean()
    assert stain[~tissue].mean() < 0.05

    def contrast(shift: int) -> float:
        """Mean stain inside less that in a rim of 64 px outside, with the truth moved by `shift` level-0 px."""
        moved = shapely.affinity.translate(phantom.truth.tumours, shift, shift)
        rim = mask_of(moved.buffer(64), rgb, 4) & ~mask_of(moved, rgb, 4)
        return stain[mask_of(moved, rgb, 4)].mean() - stain[rim].mean()

    best = max(range(-48, 49, 4), key=contrast)
    assert abs(best) <= 4
    assert contrast(128) < 0.8 * contrast(0)  # half a tile of 256


def test_tissue_lies_where_the_truth_says(phantom):
    with open_slide(phantom.path) as slide:
        rgb = whole_level(slide, 1)
        glass = rgb[0, 0].astype(int)
    coloured = np.abs(rgb - glass).max(axis=2) > 24
    deep, outside = mask_of(phantom.truth.tissue.buffer(-12), rgb, 4), ~mask_of(phantom.truth.tissue.buffer(12), rgb, 4)
    assert coloured[deep].mean() > 0.7  # the rest is fat and clefts
    assert not coloured[outside].any()
    share = phantom.truth.tissue.area / np.prod(CONFIG.size)
    assert 0.5 < share < 0.7
    assert shapely.box(0, 0, *CONFIG.size).contains(phantom.truth.tissue)


def test_the_number_of_tumours_is_as_asked(phantom):
    assert len(phantom.truth.tumours.geoms) == 2
    assert phantom.truth.tissue.buffer(0.1).contains(phantom.truth.tumours)
    assert phantom.truth.pen.is_empty


def test_pen_marks_change_nothing_else(phantom, with_pen):
    assert with_pen.truth.tumours.equals(phantom.truth.tumours)
    assert with_pen.truth.tissue.equals(phantom.truth.tissue)
    assert shapely.box(0, 0, *CONFIG.size).contains(with_pen.truth.pen)
    with open_slide(phantom.path) as a, open_slide(with_pen.path) as b:
        clean, marked = whole_level(a, 1), whole_level(b, 1)
    # Ink reaches as far as the 16 px of a JPEG block, of 4 level-0 px each.
    ink, far = mask_of(with_pen.truth.pen.buffer(-4), clean, 4), ~mask_of(with_pen.truth.pen.buffer(100), clean, 4)
    np.testing.assert_array_equal(clean[far], marked[far])
    assert (clean[ink].astype(int) - marked[ink]).max(axis=1).min() > 30
    green, blue, black = (mask_of(stroke.buffer(-4), marked, 4) for stroke in with_pen.truth.pen.geoms)
    assert marked[green].mean(axis=0).argmax() == 1
    assert marked[blue].mean(axis=0).argmax() == 2
    assert marked[black].mean() < 60


def test_the_truth_file_says_the_same(with_pen):
    collection = json.loads(with_pen.path.with_name("pen.truth.geojson").read_text())
    shapes: dict[str, list[shapely.Geometry]] = {}
    for feature in collection["features"]:
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid
        assert not shape.is_empty
        assert feature["geometry"]["coordinates"][0][0] == feature["geometry"]["coordinates"][0][-1]
        shapes.setdefault(feature["properties"]["classification"]["name"], []).append(shape)
    assert {name: len(parts) for name, parts in shapes.items()} == {"Tissue": 3, "Tumor": 2, "Pen": 3}
    assert shapely.MultiPolygon(shapes["Tumor"]).equals_exact(with_pen.truth.tumours, 1e-6)
    assert len({feature["id"] for feature in collection["features"]}) == 8


def test_the_truth_file_is_what_qupath_reads(with_pen, data_dir):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((data_dir.parent / "qupath_geojson.schema.json").read_text())
    jsonschema.validate(json.loads(with_pen.path.with_name("pen.truth.geojson").read_text()), schema)


def test_memory_does_not_grow_with_the_slide(tmp_path):
    script = """
import resource, sys
from wsi.phantom import PhantomConfig, write_phantom
peaks = []
for size in ((1024, 1024), (20_000, 4000)):
    write_phantom(sys.argv[1], PhantomConfig(size=size, tumours=1))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
print(*peaks)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "big.svs")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = map(float, run.stdout.split())
    assert large - small < 60  # MiB; the pixels are 230


def test_a_very_large_slide_has_a_fourth_level(tmp_path):
    write_phantom(tmp_path / "wide.svs", PhantomConfig(size=(33_000, 1024), tumours=0))
    with open_slide(tmp_path / "wide.svs") as slide:
        assert slide.level_sizes == ((33_000, 1024), (8250, 256), (2063, 64), (516, 16))


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsi.phantom.svs._Level.end_row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "a.svs", PhantomConfig(size=(1024, 1024), tumours=0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere/a\.svs: cannot be written"):
        write_phantom(tmp_path / "nowhere" / "a.svs", PhantomConfig(size=(1024, 1024), tumours=0))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": (1023, 2048)}, "width"),
        ({"size": (2048, 100_001)}, "height"),
        ({"size": (2048.5, 2048)}, "width"),
        ({"mpp": 0.0}, "mpp"),
        ({"mpp": float("nan")}, "mpp"),
        ({"tumours": -1}, "tumours"),
        ({"seed": -1}, "seed"),
        ({"quality": 101}, "quality"),
        ({"tile_px": 100}, "tile_px"),
    ],
)
def test_impossible_configurations_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        PhantomConfig(**arguments)


def test_tumours_without_room_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no room for 100 tumours"):
        write_phantom(tmp_path / "a.svs", PhantomConfig(size=(1024, 1024), tumours=100))


def test_tumours_of_given_length(tmp_path):
    lengths = (700.0, 450.0, 140.0)
    config = PhantomConfig(size=(4096, 4096), mpp=1.0, seed=3, tumours=1, tumour_um=lengths)
    truth = write_phantom(tmp_path / "a.svs", config)
    found = [major_axis_um(outline, Mpp(1, 1)) for outline in truth.tumours.geoms]
    assert found[:3] == pytest.approx(lengths, rel=0.12) and len(found) == 4
    assert truth.tissue.buffer(1).contains(truth.tumours)
    parts = list(truth.tumours.geoms)[:3]
    assert min(a.distance(b) for i, a in enumerate(parts) for b in parts[:i]) > 149
    for wrong in ((50.0,), (3000.0,)):
        with pytest.raises(ValueError, match=r"tumour_um\[0\]"):
            PhantomConfig(size=(4096, 4096), mpp=1.0, tumour_um=wrong)
    with pytest.raises(ValueError, match="no room"):
        write_phantom(tmp_path / "b.svs", PhantomConfig(size=(1024, 1024), mpp=1.0, tumours=0, tumour_um=(500.0,) * 9))
