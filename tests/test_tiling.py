"""Streaming: the same batches whatever the threads, bounded memory, clean ends."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.array_slide import ArraySlide
from tests.jpeg_slide import JpegTiffSlide, write_jpeg_pyramid
from tests.slide.make import picture
from wsi.errors import SlideUnreadable
from wsi.grid import TileGrid
from wsi.slide.base import U8
from wsi.store import PatchStore
from wsi.tiling import keep_tiles, stream
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
        for part, rgb in batches:
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
        for _, rgb in batches:
            places.add(rgb.__array_interface__["data"][0])
    assert len(places) == 3


def test_nothing_to_read(slide: ArraySlide, grid: TileGrid) -> None:
    assert list(stream(slide, grid, [], batch_size=4, threads=2)) == []


class Damaged(ArraySlide):
    """Unreadable from tile 50 on."""

    def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None) -> U8:
        if box.y >= 40:
            raise SlideUnreadable("damaged.svs", "is damaged")
        return super().read(box, out_px, out)


def test_an_error_arrives_and_threads_end(grid: TileGrid) -> None:
    slide = Damaged(picture(640, 480), mpp=0.5)
    seen = 0
    with pytest.raises(SlideUnreadable):
        for part, _ in stream(slide, grid, [range(len(grid))], batch_size=8, threads=4):
            seen = part.stop
    first_bad = int(np.flatnonzero(grid.boxes()[:, 1] >= 40)[0])
    assert seen == first_bad // 8 * 8
    assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]


def test_stopping_early_ends_the_threads(slide: ArraySlide, grid: TileGrid) -> None:
    with closing(stream(slide, grid, [range(len(grid))], batch_size=4, threads=4)) as batches:
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]


class TestKeeping:
    """A store is filled with what the slide gives, however many threads, and goes on where it was stopped."""

    @pytest.mark.parametrize("pixels", ["zstd", "jpeg"])
    def test_a_store_is_filled(self, slide: ArraySlide, grid: TileGrid, tmp_path: Path, pixels: str) -> None:
        expected = np.stack([slide.read(grid.box(i), (16, 16)) for i in range(len(grid))])
        stores = []
        for threads in (1, 3):
            store = PatchStore.create(tmp_path / f"{threads}.zarr", grid, {}, pixels=pixels)
            told: list[int] = []
            keep_tiles(slide, store, threads=threads, progress=told.append)
            assert told[0] == 0 and told[-1] == len(grid) and told == sorted(told) and store.missing() == []
            stores.append(store)
        for shard in store.shards:
            one, three = (store.path / f"pixels/c/{shard}/0/0/0" for store in stores)
            assert one.read_bytes() == three.read_bytes()
        if pixels == "zstd":
            np.testing.assert_array_equal(store.get("pixels"), expected)
        else:
            assert np.abs(store.get("pixels").astype(int) - expected).mean() < 15  # noisy pictures

    def test_only_what_is_missing_is_read(self, slide: ArraySlide, grid: TileGrid, tmp_path: Path) -> None:
        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
        keep_tiles(slide, store, threads=2)
        before = store.get("pixels")
        (store.path / "pixels/c/1/0/0/0").unlink()
        read: list[Box] = []

        class Watched(ArraySlide):
            def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None) -> U8:
                read.append(box)
                return super().read(box, out_px, out)

        keep_tiles(Watched(slide.rgb, mpp=0.5), store, threads=2)
        assert sorted(read) == sorted(grid.box(i) for i in store.tiles(1))
        np.testing.assert_array_equal(store.get("pixels"), before)

    def test_an_error_keeps_whole_shards(self, grid: TileGrid, tmp_path: Path) -> None:
        first_bad = int(np.flatnonzero(grid.boxes()[:, 1] >= 200)[0])

        class Broken(ArraySlide):
            def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None) -> U8:
                if box.y >= 200:
                    raise SlideUnreadable("damaged.svs", "is damaged")
                return super().read(box, out_px, out)

        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
        with pytest.raises(SlideUnreadable):
            keep_tiles(Broken(picture(640, 480), mpp=0.5), store, threads=2)
        assert store.missing() == list(range(first_bad // 256, len(store.shards))) and first_bad > 256
        assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]

    def test_nothing_to_keep(self, slide: ArraySlide, grid: TileGrid, tmp_path: Path) -> None:
        store = PatchStore.create(tmp_path / "s.zarr", grid, {})
        told: list[int] = []
        keep_tiles(slide, store, threads=2, progress=told.append)
        assert told == [len(grid)]

    def test_the_slides_own_tiles_are_copied(self, tmp_path: Path) -> None:
        slide = JpegTiffSlide(write_jpeg_pyramid(tmp_path / "a.tif", [picture(640, 480)], tile=16))
        grid = TileGrid.of_level(slide.size, slide.size, slide_mpp=slide.mpp, tile_px=16)
        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="verbatim")
        keep_tiles(slide, store, threads=2)
        np.testing.assert_array_equal(store.read([700])[0], slide.read(grid.box(700), (16, 16)))
