"""One slide into a store: which patches, at which resolution, and what is told of it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import shape

from tests.array_slide import ArraySlide
from tests.slide.make import halved, picture, section, tiff_slide, write_jpeg_pyramid
from wsi.errors import ConfigMismatch, GridError, SlideError, SlideUnreadable, StoreError
from wsi.grid import TileGrid
from wsi.slide import open_slide
from wsi.slide.base import U8
from wsi.slide.tiff import TiffReader
from wsi.store import PatchStore
from wsi.tile import TileConfig, keep_tiles, lay_grid, tile_slide
from wsi.tissue import find_tissue
from wsi.units import Box

TILE = 32
SIZE = (22 * TILE + 7, 18 * TILE + 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pyramid of JPEG tiles."""
    full = section(*SIZE)
    return write_jpeg_pyramid(tmp_path / "a.tif", [full, halved(full)], tile=TILE)


@pytest.fixture
def slide(path: Path) -> TiffReader:
    return tiff_slide(path)


class TestGrid:
    def test_by_resolution(self, slide: TiffReader) -> None:
        grid = lay_grid(slide, TileConfig(mpp=1.0, tile_px=50, stride_px=25))
        assert (grid.tile, grid.stride, grid.mpp, grid.tile_px) == ((100, 100), (50, 50), 1.0, 50)
        assert not grid.inside(slide.size).all()  # the last reach outside, as they do for scoring
        plain = lay_grid(slide, TileConfig())
        assert (plain.mpp, plain.tile_px) == (0.5, 256)

    @pytest.mark.parametrize("level", [0, 1])
    def test_by_level(self, slide: TiffReader, level: int) -> None:
        """The pixels of the level as they are stored, in tiles of the level's own size."""
        grid = lay_grid(slide, TileConfig(level=level))
        assert grid.tile_px == TILE
        stored = slide._read_level(level, 1, 0, 0, *slide.level_sizes[level])
        for i in (0, 7, 19):
            x, y = int(grid.columns[i]) * TILE, int(grid.rows[i]) * TILE
            patch = stored[y : y + TILE, x : x + TILE]
            np.testing.assert_array_equal(
                slide.read(grid.box(i), (TILE, TILE))[: patch.shape[0], : patch.shape[1]], patch
            )
        assert lay_grid(slide, TileConfig(level=level, tile_px=20)).tile_px == 20
        assert lay_grid(ArraySlide(section(600, 600)), TileConfig(level=0)).tile_px == 256

    def test_verbatim_is_the_slides_own_grid(self, slide: TiffReader) -> None:
        own = lay_grid(slide, TileConfig(pixels="verbatim"))
        assert (len(own), own.tile_px, own.mpp) == (22 * 18, TILE, 0.5) and own.inside(slide.size).all()
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", level=1))) == 11 * 9
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", mpp=0.5, tile_px=TILE))) == 22 * 18
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", stride_px=2 * TILE))) == 11 * 9

    def test_what_cannot_be_laid(self, slide: TiffReader) -> None:
        for config, says in (
            (TileConfig(level=2), "has no level 2"),
            (TileConfig(pixels="verbatim", tile_px=64), "are not its tiles of 32 x 32 px"),
            (TileConfig(pixels="verbatim", mpp=0.6, tile_px=32), "do not lie on its own tiles"),
            (TileConfig(pixels="verbatim", stride_px=48), "do not lie on its own tiles"),
            (TileConfig(mpp=50, tile_px=256), "smaller than one tile"),
        ):
            with pytest.raises(GridError, match=says):
                lay_grid(slide, config)
        with pytest.raises(GridError, match="no JPEG tiles"):
            lay_grid(ArraySlide(section(300, 300)), TileConfig(pixels="verbatim"))


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (TileConfig(pixels="gif"), StoreError, "Known: none, zstd, jpeg, verbatim"),
        (TileConfig(reader="paint"), SlideError, "Known readers"),
        (TileConfig(mpp=0.5, level=0), GridError, "only one"),
        (TileConfig(mpp=-1), GridError, "positive"),
        (TileConfig(mpp=float("nan")), GridError, "positive"),
        (TileConfig(level=-1), GridError, "from 0"),
        (TileConfig(tile_px=0), GridError, "tile=0"),
        (TileConfig(stride_px=0), GridError, "stride=0"),
        (TileConfig(min_tissue=1.1), GridError, "from 0 to 1"),
    ],
)
def test_wrong_wishes(config: TileConfig, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        tile_slide("nothing.svs", tmp_path / "r", config)
    assert not (tmp_path / "r").exists()


class TestSlides:
    @pytest.mark.parametrize("pixels", ["verbatim", "jpeg", "zstd", "none"])
    def test_every_kind(self, path: Path, slide: TiffReader, tmp_path: Path, pixels: str) -> None:
        told = []
        result = tile_slide(
            str(path), tmp_path / "r", TileConfig(level=0, pixels=pixels), threads=2,
            progress=lambda stage, done, total: told.append((stage, done, total)),
        )  # fmt: skip
        store = PatchStore.open(tmp_path / "r/store.zarr")
        numbers = json.loads((tmp_path / "r/result.json").read_text())
        assert numbers == result.numbers and {"grid", "tissue", "tiles"} <= set(result.seconds)
        assert (numbers["n_tiles"], numbers["tile_px"], numbers["tile_mpp"]) == (len(store), TILE, 0.5)
        assert numbers["pixels"] == store.pixels == pixels and numbers["n_unreadable"] == 0 and numbers["flags"] == []
        assert 100 < len(store) < 22 * 18  # tissue only
        assert ("tiles", len(store), len(store)) in told and told[-1] == ("finish", 0, 0) and store.missing() == []
        if pixels in ("verbatim", "zstd"):
            for i in (0, 77, len(store) - 1):
                np.testing.assert_array_equal(store.read([i])[0], slide.read(store.grid.box(i), (TILE, TILE)))
        elif pixels == "none":
            lazy = store.dask(slide)
            np.testing.assert_array_equal(lazy[9].compute(), slide.read(store.grid.box(9), (TILE, TILE)))

    def test_all_of_the_slide(self, path: Path, tmp_path: Path) -> None:
        tile_slide(str(path), tmp_path / "r", TileConfig(pixels="verbatim", min_tissue=0))
        assert len(PatchStore.open(tmp_path / "r/store.zarr")) == 22 * 18

    def test_resumes_and_refuses_another_wish(self, path: Path, tmp_path: Path) -> None:
        config = TileConfig(pixels="verbatim")
        tile_slide(str(path), tmp_path / "r", config)
        shard = tmp_path / "r/store.zarr/pixels/c/0/0/0/0"
        before = shard.read_bytes()
        shard.unlink()
        tile_slide(str(path), tmp_path / "r", config)
        assert shard.read_bytes() == before
        with pytest.raises(ConfigMismatch, match="pixels: verbatim"):
            tile_slide(str(path), tmp_path / "r", TileConfig(level=0, pixels="zstd"))
        with pytest.raises(StoreError, match="other tiles"):
            tile_slide(str(path), tmp_path / "r", TileConfig(pixels="verbatim", min_tissue=0.9))
        with pytest.raises(ConfigMismatch, match="slide"):
            tile_slide(str(path), tmp_path / "r", config, mpp=0.4)

    def test_nothing_is_made_where_verbatim_is_impossible(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(GridError, match="jpeg or zstd"):
            tile_slide(str(path), tmp_path / "r", TileConfig(pixels="verbatim", tile_px=64))
        assert not (tmp_path / "r/store.zarr").exists()

    def test_the_picture_shows_which_tiles_were_kept(self, path: Path, slide: TiffReader, tmp_path: Path) -> None:
        wish = TileConfig(level=0, pixels="none")
        for name in ("r", "s/r"):
            tile_slide(str(path), tmp_path / name, wish)
        for file in ("overlay.png", "regions.geojson"):
            assert (tmp_path / "r" / file).read_bytes() == (tmp_path / "s/r" / file).read_bytes()
        shown = np.asarray(Image.open(tmp_path / "r/overlay.png").convert("RGB")).astype(int)
        zoom, margin = 2, 24  # a picture of less than 800 px is drawn with larger pixels
        store, kept = PatchStore.open(tmp_path / "r/store.zarr"), np.zeros((18, 22), bool)
        kept[store.grid.rows, store.grid.columns] = True
        bluer = (shown[..., 2] - shown[..., 0])[margin : margin + 18 * TILE * zoom, margin : margin + 22 * TILE * zoom]
        plain = slide.read(Box(0, 0, 22 * TILE, 18 * TILE), (22 * TILE, 18 * TILE)).astype(int)
        bluer = bluer[::zoom, ::zoom] - (plain[..., 2] - plain[..., 0])
        for row, column in np.ndindex(17, 22):  # not the last row, where the scale bar is
            if column > 7 or row < 14:
                cell = bluer[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                assert (np.median(cell) > 15) == kept[row, column], (row, column)
        assert 100 < kept.sum() < kept.size

    def test_the_tissue_is_outlined_for_qupath(self, path: Path, tmp_path: Path) -> None:
        tile_slide(str(path), tmp_path / "r", TileConfig(level=0, pixels="none"))
        found = json.loads((tmp_path / "r/regions.geojson").read_text())["features"]
        with open_slide(str(path)) as slide:
            tissue = find_tissue(slide)
        assert sum(shape(each["geometry"]).area for each in found) == pytest.approx(
            sum(outline.area for outline in tissue.outlines()), rel=1e-3
        )
        assert {each["properties"]["classification"]["name"] for each in found} == {"Tissue"}

    @pytest.mark.parametrize(
        ("wish", "says"),
        [
            (TileConfig(mpp=0.501), "resampled by 1.002 from pixels of 0.5 um: --level 0 keeps"),
            (TileConfig(mpp=0.495), "resampled by 0.99 from pixels of 0.5 um: --level 0 keeps"),
            (TileConfig(mpp=0.5), None),
            (TileConfig(mpp=0.52), None),
            (TileConfig(level=0), None),
            (TileConfig(level=1), None),
        ],
    )
    def test_pixels_that_are_nearly_the_slides_own(
        self, path: Path, tmp_path: Path, wish: TileConfig, says: str | None
    ) -> None:
        warnings = tile_slide(str(path), tmp_path / "r", replace(wish, tile_px=64, pixels="none")).numbers["warnings"]
        assert [warning[: len(says)] for warning in warnings] == [says] if says else warnings == []

    def test_flags(self, path: Path, tmp_path: Path) -> None:
        enlarged = tile_slide(str(path), tmp_path / "a", TileConfig(mpp=0.25, tile_px=64, pixels="none"))
        assert enlarged.numbers["flags"] == ["upsampled"] and "enlarged" in enlarged.numbers["warnings"][0]
        write_jpeg_pyramid(tmp_path / "blank.tif", [np.full((200, 300, 3), 255, np.uint8)], tile=TILE)
        blank = tile_slide(str(tmp_path / "blank.tif"), tmp_path / "b", TileConfig(pixels="verbatim"))
        assert blank.numbers["flags"] == ["no-tissue"] and blank.numbers["n_tiles"] == 0
        assert "lower --min-tissue" in blank.numbers["warnings"][0]
        write_jpeg_pyramid(tmp_path / "dark.tif", [np.full((200, 300, 3), 2, np.uint8)], tile=TILE)
        dark = tile_slide(str(tmp_path / "dark.tif"), tmp_path / "c", TileConfig(tile_px=64, pixels="none"))
        (said,) = dark.numbers["warnings"]
        assert dark.numbers["flags"] == ["no-tissue"] and "fluorescence" in said and "--min-tissue" not in said

    def test_tiles_cut_short_are_counted(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jpeg_tiles = TiffReader.jpeg_tiles

        def one_short(self: TiffReader, level: int, tiles: list[tuple[int, int]]) -> list[bytes | None]:
            return [
                None if (level, *tile) == (0, 11, 9) else stream
                for tile, stream in zip(tiles, jpeg_tiles(self, level, tiles), strict=True)
            ]

        monkeypatch.setattr(TiffReader, "jpeg_tiles", one_short)  # tissue is found at level 1
        result = tile_slide(str(path), tmp_path / "r", TileConfig(pixels="verbatim"))
        store = PatchStore.open(tmp_path / "r/store.zarr")
        bad = np.flatnonzero(store.get("unreadable"))
        assert result.numbers["n_unreadable"] == 1 and result.numbers["flags"] == ["unreadable-tiles"]
        assert [(store.grid.columns[i], store.grid.rows[i]) for i in bad] == [(11, 9)]
        assert (store.read(bad) == 255).all()


@pytest.fixture(scope="module")
def array() -> ArraySlide:
    return ArraySlide(picture(640, 480), mpp=0.5)


@pytest.fixture(scope="module")
def grid(array: ArraySlide) -> TileGrid:
    return TileGrid.cover(array.size, slide_mpp=array.mpp, mpp=0.7, tile_px=16)


class TestKeeping:
    """A store is filled with what the slide gives, however many threads, and goes on where it was stopped."""

    @pytest.mark.parametrize("pixels", ["zstd", "jpeg"])
    def test_a_store_is_filled(self, array: ArraySlide, grid: TileGrid, tmp_path: Path, pixels: str) -> None:
        expected = np.stack([array.read(grid.box(i), (16, 16)) for i in range(len(grid))])
        stores = []
        for threads in (1, 3):
            store = PatchStore.create(tmp_path / f"{threads}.zarr", grid, {}, pixels=pixels)
            told: list[int] = []
            keep_tiles(array, store, threads=threads, progress=told.append)
            assert told[0] == 0 and told[-1] == len(grid) and told == sorted(told) and store.missing() == []
            stores.append(store)
        for shard in store.shards:
            one, three = (store.path / f"pixels/c/{shard}/0/0/0" for store in stores)
            assert one.read_bytes() == three.read_bytes()
        if pixels == "zstd":
            np.testing.assert_array_equal(store.get("pixels"), expected)
        else:
            assert np.abs(store.get("pixels").astype(int) - expected).mean() < 15  # noisy pictures

    def test_only_what_is_missing_is_read(self, array: ArraySlide, grid: TileGrid, tmp_path: Path) -> None:
        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
        keep_tiles(array, store, threads=2)
        before = store.get("pixels")
        (store.path / "pixels/c/1/0/0/0").unlink()
        read: list[Box] = []

        class Watched(ArraySlide):
            def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None, **how: bool) -> U8:
                read.append(box)
                return super().read(box, out_px, out, **how)

        keep_tiles(Watched(array.rgb, mpp=0.5), store, threads=2)
        assert sorted(read) == sorted(grid.box(i) for i in store.tiles(1))
        np.testing.assert_array_equal(store.get("pixels"), before)

    def test_what_cannot_be_read_is_marked_and_white(self, grid: TileGrid, tmp_path: Path) -> None:
        bad = grid.boxes()[:, 1] >= 200

        class Broken(ArraySlide):
            def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None, **how: bool) -> U8:
                if box.y >= 200:
                    raise SlideUnreadable("damaged.svs", "is damaged")
                return super().read(box, out_px, out, **how)

        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
        keep_tiles(Broken(picture(640, 480), mpp=0.5), store, threads=2)
        np.testing.assert_array_equal(store.get("unreadable"), bad)
        assert (store.get("pixels")[bad] == 255).all() and (store.get("pixels")[~bad] < 255).any(axis=(1, 2, 3)).all()

    def test_an_error_keeps_whole_shards(self, grid: TileGrid, tmp_path: Path) -> None:
        first_bad = int(np.flatnonzero(grid.boxes()[:, 1] >= 200)[0])

        class Gone(ArraySlide):
            def read(self, box: Box, out_px: tuple[int, int], out: U8 | None = None, **how: bool) -> U8:
                if box.y >= 200:
                    raise OSError("no such device")
                return super().read(box, out_px, out, **how)

        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="zstd")
        with pytest.raises(OSError, match="device"):
            keep_tiles(Gone(picture(640, 480), mpp=0.5), store, threads=2)
        assert store.missing() == list(range(first_bad // 256, len(store.shards))) and first_bad > 256
        assert not [t for t in threading.enumerate() if t.name.startswith("wsi-read")]

    def test_nothing_to_keep(self, array: ArraySlide, grid: TileGrid, tmp_path: Path) -> None:
        store = PatchStore.create(tmp_path / "s.zarr", grid, {})
        told: list[int] = []
        keep_tiles(array, store, threads=2, progress=told.append)
        assert told == [len(grid)]

    def test_the_slides_own_tiles_are_copied(self, tmp_path: Path) -> None:
        slide = tiff_slide(write_jpeg_pyramid(tmp_path / "a.tif", [picture(640, 480)], tile=16))
        grid = TileGrid.of_level(slide.size, slide.size, slide_mpp=slide.mpp, tile_px=16)
        store = PatchStore.create(tmp_path / "s.zarr", grid, {}, pixels="verbatim")
        keep_tiles(slide, store, threads=2)
        np.testing.assert_array_equal(store.read([700])[0], slide.read(grid.box(700), (16, 16)))
