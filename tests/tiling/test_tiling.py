"""Streaming: the same batches whatever the threads, bounded memory, clean ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.array_slide import ArraySlide
from tests.slide.make import halved, picture, write_jpeg_pyramid
from wsi.errors import SlideUnreadable
from wsi.grid import TileGrid
from wsi.slide import Slide, open_slide
from wsi.slide.base import U8
from wsi.tiling import stream
from wsi.units import Box


@pytest.fixture(scope="module")
def slide() -> ArraySlide:
    return ArraySlide(picture(640, 480), mpp=0.5)


@pytest.fixture(scope="module")
def grid(slide: ArraySlide) -> TileGrid:
    return TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=0.7, tile_px=16)


@pytest.mark.parametrize(("threads", "batch_size", "ahead"), [(1, 1, 0), (1, 7, 2), (8, 64, 2), (3, 1000, 5)])
def test_order_and_bytes_do_not_depend_on_how(
    slide: ArraySlide, grid: TileGrid, threads: int, batch_size: int, ahead: int
) -> None:
    runs = [range(0, 100), range(150, len(grid))]
    tiles, pixels = [], []
    with closing(stream(slide, grid, runs, batch_size=batch_size, threads=threads, ahead=ahead)) as batches:
        for part, rgb, unreadable, problem in batches:
            assert problem is None and not unreadable.any()
            assert len(part) == len(rgb) <= batch_size
            assert any(part.start >= run.start and part.stop <= run.stop for run in runs)
            tiles += list(part)
            pixels.append(rgb.copy())
    assert tiles == [*range(0, 100), *range(150, len(grid))]
    expected = np.stack([slide.read(grid.box(i), (16, 16)) for i in tiles])
    np.testing.assert_array_equal(np.concatenate(pixels), expected)


def test_memory_is_a_few_batches(slide: ArraySlide, grid: TileGrid) -> None:
    places = set()
    with closing(stream(slide, grid, [range(len(grid))], batch_size=10, threads=2, ahead=2)) as batches:
        for _, rgb, _, _ in batches:
            places.add(rgb.__array_interface__["data"][0])
    assert len(places) == 3


def test_nothing_to_read(slide: ArraySlide, grid: TileGrid) -> None:
    assert list(stream(slide, grid, [], batch_size=4, threads=2)) == []


class Damaged(ArraySlide):
    """Unreadable from y = 40 on."""

    def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None, **how: bool) -> U8:
        if box.y >= 40:
            raise SlideUnreadable("damaged.svs", "is damaged")
        return super().read(box, out_px, out, **how)


def test_what_cannot_be_read_is_marked_and_white(grid: TileGrid) -> None:
    slide = Damaged(picture(640, 480), mpp=0.5)
    bad = []
    for part, rgb, unreadable, problem in stream(slide, grid, [range(len(grid))], batch_size=8, threads=4):
        bad += [part[i] for i in np.flatnonzero(unreadable)]
        assert (problem == "is damaged") == unreadable.any()
        assert (rgb[unreadable] == 255).all() and (rgb[~unreadable] < 255).any(axis=(1, 2, 3)).all()
    assert bad == np.flatnonzero(grid.boxes()[:, 1] >= 40).tolist()


class Gone(ArraySlide):
    """Its disk is pulled out."""

    def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None, **how: bool) -> U8:
        if box.y >= 40:
            raise OSError("no such device")
        return super().read(box, out_px, out, **how)


def test_an_error_arrives_and_threads_end(grid: TileGrid) -> None:
    slide = Gone(picture(640, 480), mpp=0.5)
    seen = 0
    with pytest.raises(OSError, match="device"):
        for part, _, _, _ in stream(slide, grid, [range(len(grid))], batch_size=8, threads=4):
            seen = part.stop
    first_bad = int(np.flatnonzero(grid.boxes()[:, 1] >= 40)[0])
    assert seen == first_bad // 8 * 8
    assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]


def test_stopping_early_ends_the_threads(slide: ArraySlide, grid: TileGrid) -> None:
    with closing(stream(slide, grid, [range(len(grid))], batch_size=4, threads=4)) as batches:
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG pyramid whose tiles do not divide its levels."""
    path = tmp_path_factory.mktemp("tiles") / "jpeg.tif"
    full = picture(1003, 741)
    write_jpeg_pyramid(path, [full, halved(halved(full))])
    return path


class Counting:
    """Counts how often each stored tile is decoded."""

    def __init__(self, slide: Slide) -> None:
        self.counts: Counter[tuple[int, int, int]] = Counter()
        self._read_tiles = slide.read_tiles
        slide.read_tiles = self.read_tiles  # type: ignore[method-assign]

    def read_tiles(
        self, level: int, shrink: int, tiles: Sequence[tuple[int, int]], out: Sequence[U8]
    ) -> list[str | None]:
        self.counts.update((shrink, *tile) for tile in tiles)
        return self._read_tiles(level, shrink, tiles, out)


@pytest.mark.parametrize("decode", ["auto", "full", "fast"])
@pytest.mark.parametrize(
    ("mpp", "tile_px", "stride_px"),
    [
        (0.5, 128, 128),  # the stored tiles themselves
        (0.5, 100, 37),  # overlapping, across stored tiles
        (1.0, 60, 60),  # half resolution, reduced by the decoder
        (1.0, 61, 13),  # the same, some at odd places
        (0.61, 90, 90),  # between the levels
        (2.5, 17, 30),  # with gaps, from the second level
        (8.0, 12, 12),  # a patch of many stored tiles
    ],
)
def test_cut_from_tiles_decoded_once_as_read(jpeg: Path, mpp: float, tile_px: int, stride_px: int, decode: str) -> None:
    with open_slide(jpeg, "tiff", decode=decode) as slide:
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=mpp, tile_px=tile_px, stride_px=stride_px)
        expected = np.stack([slide.read(grid.box(i), (tile_px, tile_px)) for i in range(len(grid))])
        for threads, batch_size, max_bytes in ((1, 64, 1 << 28), (4, 7, 1 << 28), (2, 50, 1)):
            counting = Counting(slide)
            runs = [range(len(grid))]
            got = [
                rgb.copy()
                for _, rgb, _, _ in stream(
                    slide, grid, runs, batch_size=batch_size, threads=threads, max_bytes=max_bytes
                )
            ]
            np.testing.assert_array_equal(np.concatenate(got), expected)
            assert set(counting.counts.values()) == {1}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.4, 4), st.integers(5, 120), st.integers(3, 150), st.randoms(use_true_random=False))
def test_any_grid_and_any_choice_of_tiles(jpeg: Path, mpp: float, tile_px: int, stride_px: int, random: Random) -> None:
    with open_slide(jpeg, "tiff") as slide:
        if tile_px * mpp / 0.5 > 740:
            return
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=mpp, tile_px=tile_px, stride_px=stride_px)
        grid = grid.keep(np.array(sorted(random.sample(range(len(grid)), min(len(grid), 25)))))
        cut = random.randint(0, len(grid))
        runs = [range(0, cut), range(min(cut + 3, len(grid)), len(grid))]
        for tiles, rgb, _, _ in stream(slide, grid, runs, batch_size=6, threads=2):
            for i, tile in enumerate(tiles):
                np.testing.assert_array_equal(rgb[i], slide.read(grid.box(tile), (tile_px, tile_px)))


def test_a_damaged_stored_tile_marks_the_patches_on_it(jpeg: Path, tmp_path: Path) -> None:
    raw = bytearray(jpeg.read_bytes())
    with tifffile.TiffFile(jpeg) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[9], page.databytecounts[9]  # the second of the second row
    raw[offset + count // 2 : offset + count] = bytes(count - count // 2)
    (tmp_path / "damaged.tif").write_bytes(raw)
    with open_slide(jpeg, "tiff") as whole, open_slide(tmp_path / "damaged.tif", "tiff") as slide:
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=0.5, tile_px=50)
        boxes = grid.boxes()
        on_it = (boxes[:, 0] < 256) & (boxes[:, 0] + 50 > 128) & (boxes[:, 1] < 256) & (boxes[:, 1] + 50 > 128)
        for tiles, rgb, unreadable, problem in stream(slide, grid, [range(len(grid))], batch_size=16, threads=2):
            np.testing.assert_array_equal(unreadable, on_it[tiles.start : tiles.stop])
            assert (problem is not None) == unreadable.any()
            for i, tile in enumerate(tiles):
                if not unreadable[i]:
                    np.testing.assert_array_equal(rgb[i], whole.read(grid.box(tile), (50, 50)))
