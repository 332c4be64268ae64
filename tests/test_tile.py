"""One slide into a store: which patches, at which resolution, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.array_slide import ArraySlide
from tests.jpeg_slide import JpegTiffSlide, write_jpeg_pyramid
from tests.slide.make import halved, section
from wsi import tile
from wsi.errors import ConfigMismatch, GridError, SlideError, StoreError
from wsi.store import PatchStore
from wsi.tile import TileConfig, lay_grid, tile_slide

TILE = 32
SIZE = (22 * TILE + 7, 18 * TILE + 3)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pyramid of JPEG tiles, opened by a reader that gives them."""
    monkeypatch.setattr(tile, "open_slide", lambda path, reader, mpp, mpp_source: JpegTiffSlide(path, mpp or 0.5))
    full = section(*SIZE)
    return write_jpeg_pyramid(tmp_path / "a.tif", [full, halved(full)], tile=TILE)


@pytest.fixture
def slide(path: Path) -> JpegTiffSlide:
    return JpegTiffSlide(path)


class TestGrid:
    def test_by_resolution(self, slide: JpegTiffSlide) -> None:
        grid = lay_grid(slide, TileConfig(mpp=1.0, tile_px=50, stride_px=25))
        assert (grid.tile, grid.stride, grid.mpp, grid.tile_px) == ((100, 100), (50, 50), 1.0, 50)
        assert not grid.inside(slide.size).all()  # the last reach outside, as they do for scoring
        plain = lay_grid(slide, TileConfig())
        assert (plain.mpp, plain.tile_px) == (0.5, 256)

    @pytest.mark.parametrize("level", [0, 1])
    def test_by_level(self, slide: JpegTiffSlide, level: int) -> None:
        """The pixels of the level as they are stored, in tiles of the level's own size."""
        grid = lay_grid(slide, TileConfig(level=level))
        assert grid.tile_px == TILE
        stored = slide._read_level(level, 0, 0, *slide.level_sizes[level])
        for i in (0, 7, 19):
            x, y = int(grid.columns[i]) * TILE, int(grid.rows[i]) * TILE
            patch = stored[y : y + TILE, x : x + TILE]
            np.testing.assert_array_equal(
                slide.read(grid.box(i), (TILE, TILE))[: patch.shape[0], : patch.shape[1]], patch
            )
        assert lay_grid(slide, TileConfig(level=level, tile_px=20)).tile_px == 20
        assert lay_grid(ArraySlide(section(600, 600)), TileConfig(level=0)).tile_px == 256

    def test_verbatim_is_the_slides_own_grid(self, slide: JpegTiffSlide) -> None:
        own = lay_grid(slide, TileConfig(pixels="verbatim"))
        assert (len(own), own.tile_px, own.mpp) == (22 * 18, TILE, 0.5) and own.inside(slide.size).all()
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", level=1))) == 11 * 9
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", mpp=0.5, tile_px=TILE))) == 22 * 18
        assert len(lay_grid(slide, TileConfig(pixels="verbatim", stride_px=2 * TILE))) == 11 * 9

    def test_what_cannot_be_laid(self, slide: JpegTiffSlide) -> None:
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
    def test_every_kind(self, path: Path, slide: JpegTiffSlide, tmp_path: Path, pixels: str) -> None:
        told = []
        result = tile_slide(
            str(path), tmp_path / "r", TileConfig(level=0, pixels=pixels), threads=2,
            progress=lambda stage, done, total: told.append((stage, done, total)),
        )  # fmt: skip
        store = PatchStore.open(tmp_path / "r/store.zarr")
        numbers = json.loads((tmp_path / "r/result.json").read_text())
        assert numbers == result.numbers and set(result.seconds) == {"grid", "tissue", "tiles"}
        assert (numbers["n_tiles"], numbers["tile_px"], numbers["tile_mpp"]) == (len(store), TILE, 0.5)
        assert numbers["pixels"] == store.pixels == pixels and numbers["n_unreadable"] == 0 and numbers["flags"] == []
        assert 100 < len(store) < 22 * 18  # tissue only
        assert told[-1] == ("tiles", len(store), len(store)) and store.missing() == []
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

    def test_flags(self, path: Path, tmp_path: Path) -> None:
        enlarged = tile_slide(str(path), tmp_path / "a", TileConfig(mpp=0.25, tile_px=64, pixels="none"))
        assert enlarged.numbers["flags"] == ["upsampled"] and "enlarged" in enlarged.numbers["warnings"][0]
        write_jpeg_pyramid(tmp_path / "blank.tif", [np.full((200, 300, 3), 255, np.uint8)], tile=TILE)
        blank = tile_slide(str(tmp_path / "blank.tif"), tmp_path / "b", TileConfig(pixels="verbatim"))
        assert blank.numbers["flags"] == ["no-tissue"] and blank.numbers["n_tiles"] == 0

    def test_tiles_cut_short_are_counted(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jpeg_tiles = JpegTiffSlide.jpeg_tiles

        def one_short(self: JpegTiffSlide, level: int, columns: list[int], rows: list[int]) -> list[bytes | None]:
            return [
                None if (level, column, row) == (0, 11, 9) else stream
                for column, row, stream in zip(columns, rows, jpeg_tiles(self, level, columns, rows), strict=True)
            ]

        monkeypatch.setattr(JpegTiffSlide, "jpeg_tiles", one_short)  # tissue is found at level 1
        result = tile_slide(str(path), tmp_path / "r", TileConfig(pixels="verbatim"))
        store = PatchStore.open(tmp_path / "r/store.zarr")
        bad = np.flatnonzero(store.get("unreadable"))
        assert result.numbers["n_unreadable"] == 1 and result.numbers["flags"] == ["unreadable-tiles"]
        assert [(store.grid.columns[i], store.grid.rows[i]) for i in bad] == [(11, 9)]
        assert (store.read(bad) == 255).all()
