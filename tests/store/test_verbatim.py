"""The slide's own tiles: copied bytes decode to exactly what the slide gives; what cannot be copied is refused."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from tests.array_slide import ArraySlide
from tests.slide.make import halved, section, tiff_slide, write_jpeg_pyramid
from wsi.errors import GridError, StoreError
from wsi.grid import TileGrid
from wsi.phantom import PhantomConfig, write_phantom
from wsi.slide.tiff import TiffReader
from wsi.store import PatchStore, copy_tiles, stored_tiles
from wsi.units import Mpp

TILE = 32
SIZE = (20 * TILE + 5, 18 * TILE + 9)  # the last column and row of tiles are padded


def whole_tiles(slide: TiffReader, level: int, tile_px: int = TILE) -> TileGrid:
    grid = TileGrid.of_level(slide.size, slide.level_sizes[level], slide_mpp=slide.mpp, tile_px=tile_px)
    return grid.keep(grid.inside(slide.size))


def expected(slide: TiffReader, grid: TileGrid) -> np.ndarray:
    side = grid.tile_px
    return np.stack([slide.read(grid.box(i), (side, side)) for i in range(len(grid))])


def copied(slide: TiffReader, grid: TileGrid, path: Path, **more: int) -> PatchStore:
    store = PatchStore.create(path, grid, {}, pixels="verbatim")
    copy_tiles(slide, store, **more)  # type: ignore[arg-type]
    return store


@pytest.fixture(scope="module", params=["4:2:0", "4:2:2", "4:4:4", "RGB"])
def slide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TiffReader:
    full = section(*SIZE)
    kind = {"4:2:0": {"subsampling": (2, 2)}, "4:2:2": {"subsampling": (2, 1)}, "4:4:4": {"subsampling": (1, 1)}}
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    write_jpeg_pyramid(path, [full, halved(full)], tile=TILE, **kind.get(request.param, {"rgb": True}))
    return tiff_slide(path)


@pytest.mark.parametrize("level", [0, 1])
def test_copies_decode_to_what_the_slide_gives(slide: TiffReader, tmp_path: Path, level: int) -> None:
    grid = whole_tiles(slide, level)
    w, h = slide.level_sizes[level]
    assert len(grid) == (w // TILE) * (h // TILE) and stored_tiles(slide, grid)[0] == level
    store = copied(slide, grid, tmp_path / "s.zarr", threads=2)
    assert store.missing() == [] and not store.get("unreadable").any()
    patches = expected(slide, grid)
    np.testing.assert_array_equal(store.get("pixels"), patches)
    array = zarr.open_group(str(store.path), mode="r", zarr_format=3)["pixels"]
    np.testing.assert_array_equal(np.asarray(array[:]), patches)  # type: ignore[index]
    with tifffile.TiffFile(slide.path) as tiff:  # and to what another reader makes of the level
        whole = tiff.pages[level].asarray()
    for i in (0, len(grid) // 2, len(grid) - 1):
        row, column = int(grid.rows[i]) * TILE, int(grid.columns[i]) * TILE
        np.testing.assert_array_equal(store.read([i])[0], whole[row : row + TILE, column : column + TILE])


def test_the_bytes_are_the_slides_own(slide: TiffReader, tmp_path: Path) -> None:
    store = copied(slide, whole_tiles(slide, 0), tmp_path / "s.zarr")
    shard = (store.path / "pixels/c/0/0/0/0").read_bytes()
    assert shard.startswith(slide.jpeg_tiles(0, [(0, 0)])[0] or b"none")
    with Path(slide.path).open("rb") as file, tifffile.TiffFile(slide.path) as tiff:
        for i in (0, 1, 24):  # of the file's first 25 tiles, 5 in the second row; the 21st is padded
            file.seek(tiff.pages[0].dataoffsets[i] + 2)  # type: ignore[union-attr]
            assert file.read(tiff.pages[0].databytecounts[i] - 2) in shard  # type: ignore[union-attr]


def test_any_choice_of_tiles(slide: TiffReader, tmp_path: Path) -> None:
    """Tissue only, and with gaps: the grid's order is kept."""
    grid = whole_tiles(slide, 0)
    some = grid.keep(np.random.default_rng(0).random(len(grid)) < 0.4)
    np.testing.assert_array_equal(copied(slide, some, tmp_path / "a").get("pixels"), expected(slide, some))
    apart = TileGrid.of_level(slide.size, slide.level_sizes[0], slide_mpp=slide.mpp, tile_px=TILE, stride_px=3 * TILE)
    apart = apart.keep(apart.inside(slide.size))
    np.testing.assert_array_equal(copied(slide, apart, tmp_path / "b").get("pixels"), expected(slide, apart))


def test_a_grid_laid_by_resolution_may_be_the_slides_own(slide: TiffReader) -> None:
    grid = TileGrid.cover(slide.size, slide_mpp=Mpp(0.5, 0.5), mpp=0.5, tile_px=TILE)
    assert stored_tiles(slide, grid.keep(grid.inside(slide.size)))[0] == 0


def test_shared_tables_and_real_encoders(tmp_path: Path, data_dir: Path) -> None:
    """Aperio: RGB kept as it is, tables shared, no Adobe marker, tiles of 240 px."""
    slide = tiff_slide(data_dir / "wsi/aperio/CMU-1-Small-Region.svs")
    side = slide.tile_px(0)
    assert side == (240, 240)
    grid = whole_tiles(slide, 0, 240)
    store = copied(slide, grid, tmp_path / "s.zarr")
    with tifffile.TiffFile(slide.path) as tiff:
        whole = tiff.pages[0].asarray()
    for i in range(0, len(grid), 5):
        row, column = int(grid.rows[i]) * 240, int(grid.columns[i]) * 240
        np.testing.assert_array_equal(store.read([i])[0], whole[row : row + 240, column : column + 240])


def test_a_phantom(tmp_path: Path) -> None:
    """4:2:0 with shared tables, and a quarter-size level whose downsample is whole."""
    write_phantom(tmp_path / "p.tif", PhantomConfig(size=(2048, 1024), seed=3, tile_px=128))
    slide = tiff_slide(tmp_path / "p.tif")
    for level in (0, 1):
        grid = whole_tiles(slide, level, 128)
        np.testing.assert_array_equal(
            copied(slide, grid, tmp_path / f"{level}.zarr").get("pixels"), expected(slide, grid)
        )


class TestHoles:
    """Tiles without bytes are glass, tiles cut short are unreadable."""

    @pytest.fixture
    def spoilt(self, tmp_path: Path) -> TiffReader:
        path = write_jpeg_pyramid(tmp_path / "a.tif", [section(*SIZE)], tile=TILE)
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            counts, code = list(page.databytecounts), page.tags["TileByteCounts"]  # type: ignore[union-attr]
            for sparse in (3, 22):
                counts[sparse] = 0
            for short in (5, 150):
                counts[short] //= 2
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tiff.pages[0].tags[code.code].overwrite(counts)  # type: ignore[union-attr]
        return tiff_slide(path)

    def test_they_are_told_apart(self, spoilt: TiffReader, tmp_path: Path) -> None:
        grid = whole_tiles(spoilt, 0)
        store = copied(spoilt, grid, tmp_path / "s.zarr")
        number = grid.rows * 21 + grid.columns  # of the file's tiles, 21 a row with the padded one
        np.testing.assert_array_equal(np.isin(number, [5, 150]), store.get("unreadable"))
        assert store.missing() == []
        for i in np.flatnonzero(np.isin(number, [3, 22, 5, 150])):
            assert (store.read([int(i)]) == 255).all()
        others = np.flatnonzero(~np.isin(number, [5, 150]))
        np.testing.assert_array_equal(store.read(others), expected(spoilt, grid.keep(others)))
        array = zarr.open_group(str(store.path), mode="r", zarr_format=3)["pixels"]
        np.testing.assert_array_equal(np.asarray(array[:]), store.get("pixels"))  # type: ignore[index]
        # a hole is a chunk that says white; a tile cut short has none
        index = np.frombuffer((store.path / "pixels/c/0/0/0/0").read_bytes()[-256 * 16 - 4 : -4], "<u8")
        absent = index.reshape(256, 2)[:, 0] == 2**64 - 1
        np.testing.assert_array_equal(absent, np.isin(number[:256], [5, 150]))

    def test_null_is_taken_for_them(self, spoilt: TiffReader, tmp_path: Path) -> None:
        grid = whole_tiles(spoilt, 0)
        store = PatchStore.create(tmp_path / "s.zarr", grid, {"attention": ((), "float32")}, pixels="verbatim")
        copy_tiles(spoilt, store)
        attention = np.where(store.get("unreadable"), np.nan, 0.5)
        store.put("attention", attention)
        np.testing.assert_array_equal(store.get("attention"), attention.astype(np.float32))


class TestResuming:
    def test_only_what_is_missing_is_copied(self, slide: TiffReader, tmp_path: Path) -> None:
        grid = whole_tiles(slide, 0)
        store = copied(slide, grid, tmp_path / "s.zarr")
        paths = sorted(store.path.glob("pixels/c/*/0/0/0"))
        before = [(path.read_bytes(), path.stat().st_ino) for path in paths]
        paths[1].write_bytes(paths[1].read_bytes()[:-7])
        told: list[int] = []
        copy_tiles(slide, store, progress=told.append)
        after = [(path.read_bytes(), path.stat().st_ino) for path in paths]
        assert after[0] == before[0] and after[1][0] == before[1][0] and after[1][1] != before[1][1]
        assert told == [256, len(grid)]

    def test_threads_change_no_byte(self, slide: TiffReader, tmp_path: Path) -> None:
        grid = whole_tiles(slide, 0)
        one, four = (copied(slide, grid, tmp_path / f"{n}.zarr", threads=n) for n in (1, 4))
        for path in one.path.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (four.path / path.relative_to(one.path)).read_bytes()

    def test_a_kill_leaves_whole_shards_only(self, tmp_path: Path) -> None:
        """SIGKILL while a shard of 256 tiles is written: what lies under a final name is whole."""
        slide = tiff_slide(write_jpeg_pyramid(tmp_path / "a.tif", [section(64 * 16, 64 * 16)], tile=16))
        grid = whole_tiles(slide, 0, 16)
        patches = expected(slide, grid)
        for wait_for in (0, 1, 3, 9):
            store = PatchStore.create(tmp_path / f"{wait_for}.zarr", grid, {}, pixels="verbatim")
            code = (
                "import sys\n"
                "from tests.slide.make import tiff_slide\n"
                "from wsi.store import PatchStore, copy_tiles\n"
                "slide, store = tiff_slide(sys.argv[1]), PatchStore.open(sys.argv[2])\n"
                "copy_tiles(slide, store, progress=lambda done: print(done, flush=True))\n"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", code, slide.path, str(store.path)], stdout=subprocess.PIPE, cwd=Path.cwd()
            )
            assert process.stdout is not None
            for _ in range(1 + wait_for):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            again = PatchStore.open(store.path)
            there = sorted(set(again.shards) - set(again.missing("pixels")))
            assert len(there) >= wait_for
            files = [path for path in store.path.glob("pixels/c/*/0/0/*") if path.name[0] != "."]
            assert len(files) == len(there)
            for shard in there:
                tiles = again.tiles(shard)
                np.testing.assert_array_equal(again.read(tiles), patches[tiles.start : tiles.stop])
            copy_tiles(slide, again)
            np.testing.assert_array_equal(again.get("pixels"), patches)

    def test_an_error_ends_the_threads_and_leaves_what_is_whole(
        self, slide: TiffReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = PatchStore.create(tmp_path / "s.zarr", whole_tiles(slide, 0), {}, pixels="verbatim")
        jpeg_tiles = slide.jpeg_tiles

        def failing(level: int, tiles: list[tuple[int, int]]) -> list[bytes | None]:
            if len(tiles) < 256:
                raise OSError(5, os.strerror(5))
            return jpeg_tiles(level, tiles)

        monkeypatch.setattr(slide, "jpeg_tiles", failing)
        with pytest.raises(OSError, match="Input/output"):
            copy_tiles(slide, store, threads=2)
        monkeypatch.undo()
        assert store.missing() == [1]
        copy_tiles(slide, store, threads=2)
        assert store.missing() == []


class TestRefuses:
    def refusal(self, slide: object, grid: TileGrid) -> str:
        with pytest.raises(GridError) as refused:
            stored_tiles(slide, grid)  # type: ignore[arg-type]
        assert "jpeg or zstd" in refused.value.remedy
        return str(refused.value)

    def test_grids_that_are_not_the_slides_own(self, slide: TiffReader) -> None:
        def cover(mpp: float, tile_px: int, stride_px: int | None = None) -> TileGrid:
            return TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=mpp, tile_px=tile_px, stride_px=stride_px).keep(
                np.arange(5)
            )

        assert "are not its tiles of 32 x 32 px" in self.refusal(slide, cover(0.5, 64))
        assert "do not lie on its own tiles" in self.refusal(slide, cover(0.5, 32, 16))
        assert "do not lie on its own tiles" in self.refusal(slide, cover(0.51, 32))
        assert "do not lie on its own tiles at level 1" in self.refusal(slide, cover(1.2, 32))
        assert "do not lie" in self.refusal(slide, cover(0.5004, 32))  # less than a pixel in all, and yet

    def test_patches_over_the_edge(self, slide: TiffReader) -> None:
        grid = TileGrid.cover(slide.size, slide_mpp=slide.mpp, mpp=0.5, tile_px=TILE)
        assert "39 of 399 patches reach over the slide's edge" in self.refusal(slide, grid)

    def test_slides_without_jpeg_tiles(self, tmp_path: Path) -> None:
        array = ArraySlide(section(128, 128))
        grid = TileGrid.cover(array.size, slide_mpp=array.mpp, mpp=0.5, tile_px=TILE)
        assert "no JPEG tiles that the array reader can copy" in self.refusal(array, grid)
        tifffile.imwrite(tmp_path / "a.tif", section(128, 128), tile=(32, 32), compression="deflate")
        assert "no JPEG tiles" in self.refusal(tiff_slide(tmp_path / "a.tif"), grid)

    def test_the_wrong_store(self, slide: TiffReader, tmp_path: Path) -> None:
        store = copied(slide, whole_tiles(slide, 0), tmp_path / "s.zarr")
        with pytest.raises(StoreError, match="the slide's own JPEG tiles"):
            store.write(0, {"pixels": np.zeros((256, TILE, TILE, 3), np.uint8)})
        other = PatchStore.create(tmp_path / "t.zarr", store.grid, {}, pixels="jpeg")
        with pytest.raises(StoreError, match="jpeg"):
            copy_tiles(slide, other)


def test_damage_inside_a_tile_is_met_when_it_is_read(tmp_path: Path) -> None:
    """JPEG has no checksum; what breaks the decoding is an error that names the patch."""
    path = write_jpeg_pyramid(tmp_path / "a.tif", [section(128, 128)], tile=TILE)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[2], tiff.pages[0].databytecounts[2]  # type: ignore[union-attr]
    raw = bytearray(path.read_bytes())
    raw[offset + count - 60 : offset + count - 2] = bytes(58)
    path.write_bytes(raw)
    slide = tiff_slide(path)
    store = copied(slide, whole_tiles(slide, 0), tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="patch 2 is damaged"):
        store.read([1, 2])
    marked = copied(slide, whole_tiles(slide, 0), tmp_path / "marked.zarr")
    marked.write(0, {"unreadable": np.arange(16) == 2})
    assert (marked.read([2]) == 255).all()
    stream = slide.jpeg_tiles(0, [(1, 0)])[0]
    np.testing.assert_array_equal(store.read([1])[0], np.asarray(Image.open(io.BytesIO(stream or b""))))
