"""Our own TIFF reader: every codec and layout against OpenSlide, tifffile or Pillow."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageOps

from tests.slide.make import halved, picture, spoil, write_jpeg_pyramid, write_pyramid
from wsi.errors import SlideUnreadable, UnknownFormat
from wsi.slide import open_slide
from wsi.slide.cells import cell_edges
from wsi.slide.source import Source
from wsi.slide.tiff import _one_scan
from wsi.units import Box


def psnr_db(got: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((got.astype(np.float64) - expected) ** 2)))


def area_halved(rgb: np.ndarray, by: int) -> np.ndarray:
    h, w = (side // by for side in rgb.shape[:2])
    return rgb[: h * by, : w * by].astype(np.float64).reshape(h, by, w, by, 3).mean((1, 3))


@pytest.fixture(scope="module")
def tissue(data_dir: Path) -> np.ndarray:
    """Real H&E of another laboratory, uint8 (1024, 1024, 3)."""
    with Image.open(data_dir / "stain/camelyon17_centres/centre_1_patient_024_node_2.jpeg") as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:1024, :1024])


LAYOUTS: dict[str, dict[str, Any]] = {
    "jpeg 4:2:0": {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    "jpeg 4:2:2": {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 1)},
    "jpeg 4:4:4": {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (1, 1)},
    "jpeg rgb": {"compression": "jpeg", "photometric": "rgb"},
    "lzw": {"compression": "lzw", "predictor": True},
    "deflate": {"compression": "deflate", "predictor": True},
    "zstd": {"compression": "zstd"},
    "jpeg 2000": {"compression": "jpeg2000"},
    "none": {},
}


def as_stored(rgb: np.ndarray, layout: dict[str, Any]) -> np.ndarray:
    """What tifffile wants of RGB pixels: it does not convert colours."""
    return np.asarray(Image.fromarray(rgb).convert("YCbCr")) if layout["photometric"] == "ycbcr" else rgb


class TestLayouts:
    @pytest.mark.parametrize("bigtiff", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_as_tifffile_and_openslide_decode_it(self, tmp_path: Path, layout: str, bigtiff: bool) -> None:
        path, full = tmp_path / "a.tif", picture(301, 205)
        with tifffile.TiffWriter(path, bigtiff=bigtiff) as tiff:
            for i, level in enumerate([full, halved(full)]):
                arguments = {"photometric": "rgb", **LAYOUTS[layout]}
                tiff.write(
                    as_stored(level, arguments), tile=(64, 96), subfiletype=min(i, 1), metadata=None, **arguments
                )
        with open_slide(path, mpp=0.5) as slide, tifffile.TiffFile(path) as tiff:
            assert slide.reader == "tiff" and slide.level_sizes == ((301, 205), (150, 102))
            for level, page in enumerate(tiff.pages):
                w, h = slide.level_sizes[level]
                np.testing.assert_array_equal(slide._read_level(level, 1, 0, 0, w, h), page.asarray())
        if layout in {"zstd", "jpeg 2000"}:  # this OpenSlide reads neither
            return
        with open_slide(path, "openslide", mpp=0.5) as other, open_slide(path, "tiff", mpp=0.5) as slide:
            box = Box(0, 0, 301, 205)
            np.testing.assert_array_equal(slide.read(box, (301, 205)), other.read(box, (301, 205)))

    @pytest.mark.parametrize("layout", ["jpeg rgb", "lzw"])
    def test_grey(self, tmp_path: Path, layout: str) -> None:
        grey = picture(200, 130)[..., 0]
        compression = LAYOUTS[layout]["compression"]
        tifffile.imwrite(tmp_path / "a.tif", grey, tile=(64, 64), compression=compression, metadata=None)
        with open_slide(tmp_path / "a.tif", "tiff", mpp=1) as slide:
            expected = tifffile.imread(tmp_path / "a.tif")[..., None].repeat(3, axis=2)
            np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 130), (200, 130)), expected)

    def test_ome_tiff_with_subifds(self, tmp_path: Path) -> None:
        path, full = tmp_path / "a.ome.tif", picture(600, 400)
        with tifffile.TiffWriter(path, ome=True) as tiff:
            arguments: dict[str, Any] = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb"}
            metadata = {"axes": "YXS", "PhysicalSizeX": 0.23, "PhysicalSizeY": 0.23}
            tiff.write(full, subifds=2, metadata=metadata, **arguments)
            tiff.write(halved(full), subfiletype=1, **arguments)
            tiff.write(halved(halved(full)), subfiletype=1, **arguments)
        with open_slide(path) as slide:
            assert (slide.reader, slide.mpp, slide.mpp_source) == ("tiff", (0.23, 0.23), "vendor:ome-tiff")
            assert slide.level_sizes == ((600, 400), (300, 200), (150, 100))
            np.testing.assert_array_equal(slide.read(Box(0, 0, 600, 400), (150, 100)), halved(halved(full)))

    def test_ome_text_that_lists_its_pictures_in_another_order(self, tmp_path: Path) -> None:
        path = tmp_path / "a.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as tiff:
            for side, mpp in [(256, 0.25), (128, 8.0)]:
                metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                tiff.write(picture(side, side), tile=(64, 64), photometric="rgb", metadata=metadata)
        with tifffile.TiffFile(path) as tiff:
            head, first, second, _ = re.split(r"(?=<Image |</OME>)", tiff.ome_metadata or "")
        tifffile.tiffcomment(path, (head + second + first + "</OME>").encode())
        with open_slide(path) as slide:
            assert slide.size == (256, 256) and slide.mpp == (0.25, 0.25)

    def test_ome_channels_are_no_grey_slide(self, tmp_path: Path) -> None:
        channels = np.stack([picture(128, 96, seed)[..., 0] for seed in range(3)])
        metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        tifffile.imwrite(
            tmp_path / "a.ome.tif", channels, tile=(64, 64), photometric="minisblack", ome=True, metadata=metadata
        )
        for mpp in (None, 0.5):
            with pytest.raises(SlideUnreadable, match="3 channels"):
                open_slide(tmp_path / "a.ome.tif", mpp=mpp)

    def test_philips(self, tmp_path: Path) -> None:
        """Levels are padded to whole tiles: what lies where is told by the text, not by their sizes."""
        path, full = tmp_path / "a.tiff", picture(1024, 512)
        levels = [full, halved(full), halved(halved(full)), halved(halved(halved(full)))]  # 512, 256, 128 wide

        def spacing(by: int) -> str:
            text = f"&quot;{0.000226891 * by}&quot; &quot;{0.000226907 * by}&quot;"
            return (
                '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">'
                f"{text}</Attribute>"
            )

        data = "".join(
            f'<DataObject ObjectType="PixelDataRepresentation">{spacing(2**i)}</DataObject>' for i in range(len(levels))
        )
        text = (
            '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
            f'{spacing(1)}<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
            '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
            f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{data}</Array></Attribute>'
            "</DataObject></Array></Attribute></DataObject>"
        )
        with tifffile.TiffWriter(path) as tiff:
            for i, level in enumerate(levels):
                padded = np.full((-(-level.shape[0] // 256) * 256, -(-level.shape[1] // 256) * 256, 3), 77, np.uint8)
                padded[: level.shape[0], : level.shape[1]] = level
                description = {"description": text, "software": "Philips DP v1.0"} if i == 0 else {}
                arguments: dict[str, Any] = {"tile": (256, 256), "compression": "deflate", "photometric": "rgb"}
                tiff.write(padded, subfiletype=min(i, 1), metadata=None, **arguments, **description)
        with open_slide(path, "tiff") as slide, open_slide(path, "openslide") as other:
            assert slide.vendor == other.vendor == "philips"
            assert slide.mpp == other.mpp == pytest.approx((0.226907, 0.226891))
            assert slide.level_sizes == other.level_sizes == ((1024, 512), (512, 256), (256, 128), (128, 64))
            for level in levels:
                h, w, _ = level.shape
                np.testing.assert_array_equal(slide.read(Box(0, 0, 1024, 512), (w, h)), level)
                np.testing.assert_array_equal(other.read(Box(0, 0, 1024, 512), (w, h)), level)

    def test_missing_tiles_are_white(self, tmp_path: Path) -> None:
        path, full = tmp_path / "a.tif", picture(256, 192)
        tifffile.imwrite(path, full, tile=(64, 64), compression="zlib", photometric="rgb", metadata=None)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tags = tiff.pages.first.tags
            counts = [0 if i in (0, 1, 2, 3, 4, 6) else n for i, n in enumerate(tags["TileByteCounts"].value)]
            offsets = [n and at for n, at in zip(counts, tags["TileOffsets"].value, strict=True)]
            tags["TileByteCounts"].overwrite(counts)
            tags["TileOffsets"].overwrite(offsets)
        with open_slide(path, mpp=1) as slide, open_slide(path, "openslide", mpp=1) as other:
            assert slide.reader == "tiff" and slide.bounds == other.bounds == Box(0, 64, 256, 128)
            got = slide.read(Box(0, 0, 256, 192), (256, 192))
            np.testing.assert_array_equal(got, other.read(Box(0, 0, 256, 192), (256, 192)))
            assert (got[:64] == 255).all() and (got[64:128, 64:128] < 255).any()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_as_pillow_turns_it(self, tmp_path: Path, orientation: int) -> None:
        path, stored = tmp_path / "a.tif", picture(150, 100)
        turn = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, stored, tile=(64, 48), photometric="rgb", compression="lzw", extratags=turn)
        image = Image.fromarray(stored)
        image.getexif()[274] = orientation
        shown = np.asarray(ImageOps.exif_transpose(image))
        with open_slide(path, mpp=1) as slide:
            assert slide.reader == "tiff" and slide.size == (shown.shape[1], shown.shape[0])
            np.testing.assert_array_equal(slide.read(Box(0, 0, *slide.size), slide.size), shown)
            np.testing.assert_array_equal(slide.read(Box(13, 7, 60, 70), (60, 70)), shown[7:77, 13:73])

    @pytest.mark.parametrize(
        "arguments",
        [
            {"photometric": "rgb"},  # strips
            {"photometric": "rgb", "planarconfig": "separate", "tile": (64, 64)},
            {"photometric": "miniswhite", "tile": (64, 64)},
        ],
    )
    def test_refuses_what_it_is_not_sure_of(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        full = picture(128, 128)
        if arguments.get("planarconfig"):
            full = np.moveaxis(full, 2, 0)
        elif arguments["photometric"] == "miniswhite":
            full = full[..., 0]
        tifffile.imwrite(tmp_path / "a.tif", full, **arguments)
        with pytest.raises(UnknownFormat):
            open_slide(tmp_path / "a.tif", "tiff", mpp=1)

    def test_levels_of_another_picture_in_the_file_are_not_its_own(self, tmp_path: Path) -> None:
        """OpenSlide mixes both."""
        path, full, other = tmp_path / "a.tif", picture(512, 512), picture(400, 400, seed=7)
        with tifffile.TiffWriter(path) as tiff:
            for level, kind in [(full, 0), (halved(full), 1), (other, 0), (halved(other), 1)]:
                tiff.write(level, tile=(64, 64), photometric="rgb", subfiletype=kind, metadata=None)
        with open_slide(path, mpp=0.5) as slide:
            assert slide.level_sizes == ((512, 512), (256, 256))
            np.testing.assert_array_equal(slide.read(Box(0, 0, 512, 512), (256, 256)), halved(full))

    def test_levels_turned_apart_are_refused(self, tmp_path: Path) -> None:
        with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
            for i, level in enumerate([picture(128, 96), picture(64, 48)]):
                turn = [(274, "H", 1, 3 - 2 * i, True)]
                tiff.write(level, tile=(64, 48), photometric="rgb", subfiletype=i, extratags=turn, metadata=None)
        with pytest.raises(SlideUnreadable, match="orientation 1 and 3"):
            open_slide(tmp_path / "a.tif", mpp=0.5)

    def test_other_formats_are_left_to_openslide(self, data_dir: Path) -> None:
        with pytest.raises(UnknownFormat):
            open_slide(next((data_dir / "wsi/hamamatsu_ndpi").glob("*.ndpi")), "tiff", mpp=1)


def shrink_of(slide, box: Box, out_px: tuple[int, int]) -> int:
    """By how much the decoder reduces what ``Slide.read`` reads of a box."""
    level = slide.level_for(min(box.w / out_px[0], box.h / out_px[1]))
    scale = slide.scale(level)
    x, y = cell_edges(box.x, box.w, out_px[0], scale[0]), cell_edges(box.y, box.h, out_px[1], scale[1])
    return min(slide.shrink_along(level, 0, x), slide.shrink_along(level, 1, y))


class TestReduced:
    """JPEG at 1/2, 1/4, 1/8 of its size."""

    @pytest.mark.parametrize("subsampling", [(2, 2), (2, 1), (1, 1)])
    @pytest.mark.parametrize("by", [2, 4, 8])
    def test_near_the_area_average_of_real_tissue(
        self, tmp_path: Path, tissue: np.ndarray, by: int, subsampling: tuple[int, int]
    ) -> None:
        write_jpeg_pyramid(tmp_path / "a.tif", [tissue], tile=256, subsampling=subsampling)
        whole = Box(0, 0, 1024, 1024)
        with open_slide(tmp_path / "a.tif") as slide, open_slide(tmp_path / "a.tif", decode="full") as full:
            exact = area_halved(full.read(whole, (1024, 1024)), by)
            assert shrink_of(slide, whole, (1024 // by, 1024 // by)) == (min(by, 2) if subsampling == (2, 1) else by)
            assert psnr_db(slide.read(whole, (1024 // by, 1024 // by)), exact) >= 45
            assert np.abs(full.read(whole, (1024 // by, 1024 // by)) - exact).max() <= 0.5
            assert shrink_of(full, whole, (1024 // by, 1024 // by)) == 1

    @pytest.mark.parametrize("scale", [2.057, 3.0, 5.5])
    def test_between_whole_pixels_it_is_decoded_in_full(self, tmp_path: Path, tissue: np.ndarray, scale: float) -> None:
        write_jpeg_pyramid(tmp_path / "a.tif", [tissue], tile=256)
        box = Box(3, 5, 150 * scale, 150 * scale)
        with (
            open_slide(tmp_path / "a.tif") as slide,
            open_slide(tmp_path / "a.tif", decode="full") as full,
            open_slide(tmp_path / "a.tif", decode="fast") as fast,
        ):
            exact = full.read(box, (150, 150))
            np.testing.assert_array_equal(slide.read(box, (150, 150)), exact)
            assert shrink_of(fast, box, (150, 150)) == (2 if scale < 4 else 4)
            assert 25 < psnr_db(fast.read(box, (150, 150)), exact) < 60

    def test_only_what_lies_inside_the_level(self, tmp_path: Path) -> None:
        """Beyond a border that is no whole reduced pixel, reduced pixels mix in what the encoder made up there."""
        full = np.zeros((205, 301, 3), np.uint8)
        write_jpeg_pyramid(tmp_path / "a.tif", [full], tile=64)
        with open_slide(tmp_path / "a.tif") as slide:
            assert shrink_of(slide, Box(0, 0, 300, 204), (150, 102)) == 2
            assert shrink_of(slide, Box(0, 0, 304, 208), (152, 104)) == 1
            got = slide.read(Box(0, 0, 304, 208), (152, 104))
            assert (got[:96, :128] <= 2).all() and (got[:, 151] == 255).all() and (got[103] == 255).all()


class TestDamage:
    def test_a_tile_cut_short_is_refused_never_grey(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        write_jpeg_pyramid(path, [picture(256, 256)])
        with tifffile.TiffFile(path) as tiff:
            tag = tiff.pages.first.tags["TileByteCounts"]
            counts = list(tag.value)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            counts[2] //= 2
            tiff.pages.first.tags["TileByteCounts"].overwrite(counts)
        with open_slide(path) as slide:
            with pytest.raises(SlideUnreadable, match="damaged at level 0, x 0, y 128"):
                slide.read(Box(0, 0, 256, 256), (256, 256))
            assert slide.read(Box(0, 0, 256, 128), (256, 128)).std() > 10
            out = [np.zeros((128, 128, 3), np.uint8) for _ in range(2)]
            problems = slide.read_tiles(0, 1, [(0, 1), (1, 1)], out)
            assert problems[0] and problems[1] is None
            assert (out[0] == 255).all() and out[1].std() > 10
            assert slide.jpeg_tiles(0, [(0, 1), (1, 1)])[0] is None  # type: ignore[attr-defined]

    @pytest.mark.parametrize("reader", ["tiff", "openslide"])
    def test_pictures_of_whole_slides_say_where_they_are_damaged(self, tmp_path: Path, reader: str) -> None:
        path, full = tmp_path / "a.tif", picture(1024, 512)
        write_pyramid(path, [full], tile=128)
        spoil(path, 11, whole=True)  # column 3, row 1
        with open_slide(path, reader) as slide:
            damage: list[Box] = []
            got = slide.read(Box(0, 0, 1024, 512), (1024, 512), damage=damage)
            lost = np.zeros((512, 1024), bool)
            for box in damage:
                lost[int(box.y) : int(box.y + box.h), int(box.x) : int(box.x + box.w)] = True
            assert lost[128:256, 384:512].all() and lost.sum() <= 4 * 256**2
            assert (got[lost] == 255).all()
            np.testing.assert_array_equal(got[~lost], full[~lost])

    def test_a_tile_of_another_size_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        write_jpeg_pyramid(path, [picture(256, 128)])
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            offset, count = page.dataoffsets[1], page.databytecounts[1]
        raw = bytearray(path.read_bytes())
        at = raw.index(b"\xff\xc0", offset)
        assert at < offset + count
        raw[at + 5 : at + 9] = (16384).to_bytes(2, "big") * 2  # a bomb: 16,384 x 16,384 px
        path.write_bytes(raw)
        with open_slide(path) as slide:
            out = [np.zeros((128, 128, 3), np.uint8)]
            assert "16384" in str(slide.read_tiles(0, 1, [(1, 0)], out)[0])


class TestVerbatim:
    @pytest.mark.parametrize("layout", ["jpeg 4:2:0", "jpeg 4:4:4", "jpeg rgb"])
    def test_stored_tiles_are_files_of_their_own(self, tmp_path: Path, layout: str) -> None:
        path = tmp_path / "a.tif"
        pixels = as_stored(picture(256, 128), LAYOUTS[layout])
        tifffile.imwrite(path, pixels, tile=(128, 128), metadata=None, **LAYOUTS[layout])
        with open_slide(path, "tiff", mpp=1) as slide:
            for column, stream in enumerate(slide.jpeg_tiles(0, [(0, 0), (1, 0)])):  # type: ignore[attr-defined]
                expected = slide.read(Box(column * 128, 0, 128, 128), (128, 128))
                np.testing.assert_array_equal(simplejpeg.decode_jpeg(stream), expected)

    def test_lengths_that_a_writer_rounded_up(self, tmp_path: Path) -> None:
        """A zero after the end of the picture, counted in the tile's length: nothing is missing."""
        path = tmp_path / "a.tif"
        write_jpeg_pyramid(path, [picture(256, 128)])
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            whole = [tiff.filehandle.read(n) for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)
                     if tiff.filehandle.seek(at) is not None]  # fmt: skip
        end = path.stat().st_size
        with path.open("ab") as file:
            file.write(b"".join(tile + b"\0" for tile in whole))
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tags = tiff.pages.first.tags
            lengths = [len(tile) + 1 for tile in whole]
            tags["TileByteCounts"].overwrite(lengths)
            tags["TileOffsets"].overwrite([end + sum(lengths[:i]) for i in range(len(lengths))])
        with open_slide(path, "tiff") as slide:
            for column, stream in enumerate(slide.jpeg_tiles(0, [(0, 0), (1, 0)])):
                expected = slide.read(Box(column * 128, 0, 128, 128), (128, 128))
                np.testing.assert_array_equal(simplejpeg.decode_jpeg(stream), expected)

    def test_a_tile_whose_beginning_is_damaged_is_none(self, tmp_path: Path) -> None:
        path = write_jpeg_pyramid(tmp_path / "a.tif", [picture(256, 128)])
        with tifffile.TiffFile(path) as tiff:
            offset = tiff.pages.first.dataoffsets[1]
        raw = bytearray(path.read_bytes())
        raw[offset : offset + 2] = bytes(2)
        path.write_bytes(raw)
        with open_slide(path, "tiff") as slide:
            first, second = slide.jpeg_tiles(0, [(0, 0), (1, 0)])
            assert first is not None and second is None

    def test_only_jpeg(self, tmp_path: Path) -> None:
        write_pyramid(tmp_path / "a.tif", [picture(200, 100)])
        with (
            open_slide(tmp_path / "a.tif", "tiff") as slide,
            pytest.raises(SlideUnreadable, match="not stored as JPEG"),
        ):
            slide.jpeg_tiles(0, [(0, 0)])  # type: ignore[attr-defined]


class TestSource:
    def test_neighbours_are_fetched_in_one_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = np.random.default_rng(0).bytes(300_000)
        (tmp_path / "a").write_bytes(content)
        source = Source(str(tmp_path / "a"))
        asked: list[tuple[int, int]] = []
        read = source.read
        monkeypatch.setattr(source, "read", lambda offset, n: asked.append((offset, n)) or read(offset, n))
        offsets, lengths = [200_000, 0, 1000, 5000, 299_000], [10, 1000, 50, 100, 5000]
        got = source.ranges(offsets, lengths)
        assert [bytes(g) for g in got] == [content[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
        assert asked == [(0, 5100), (200_000, 10), (299_000, 5000)]
        source.close()

    def test_remote_ranges_are_asked_for_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = np.random.default_rng(0).bytes(2_000_000)
        with fsspec.open("memory://ranges/a", "wb") as file:
            file.write(content)
        source = Source("memory://ranges/a")
        calls: list[int] = []
        together = type(source._fs).cat_ranges

        def counted(self: Any, paths: list[str], *arguments: Any, **more: Any) -> Any:
            calls.append(len(paths))
            return together(self, paths, *arguments, **more)

        monkeypatch.setattr(type(source._fs), "cat_ranges", counted)
        got = source.ranges([1_900_000, 10], [200_000, 20])
        assert [bytes(g) for g in got] == [content[1_900_000:], content[10:30]] and calls == [2]
        assert source.size == len(content) and source.read(5, 7) == content[5:12]

    def test_whatever_a_server_raises_says_where_and_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Away(Exception):
            """Of a file system that knows nothing of OSError."""

        def away(*arguments: Any, **more: Any) -> Any:
            raise Away("no route\nand more")

        with fsspec.open("memory://ranges/b", "wb") as file:
            file.write(bytes(100))
        source = Source("memory://ranges/b")
        monkeypatch.setattr(type(source._fs), "cat_file", away)
        for read in (lambda: source.read(0, 10), lambda: source.ranges([0, 50], [10, 10])):
            with pytest.raises(OSError, match=r"^no route$"):
                read()
        monkeypatch.setattr(type(source._fs), "info", away)
        with pytest.raises(SlideUnreadable, match=r"memory://ranges/b: cannot be reached \(no route\)"):
            Source("memory://ranges/b")
        monkeypatch.setattr(type(source._fs), "info", lambda *a, **m: {"type": "file", "size": None})
        with pytest.raises(SlideUnreadable, match="length"):
            Source("memory://ranges/b")
        with pytest.raises(SlideUnreadable, match="nonsense"):
            Source("nonsense://ranges/b")


def test_a_known_beginning_of_a_jpeg_promises_one_scan() -> None:
    """Tiles that begin like one that was looked at are not counted again: libjpeg refuses what would come after."""
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    plain = simplejpeg.encode_jpeg(rgb, quality=80, colorspace="RGB", colorsubsampling="420")
    known = _one_scan(plain)
    assert known is not None and plain.startswith(known) and known.count(b"\xff\xda") == 1
    scan = plain[plain.index(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="more than one scan"):
        simplejpeg.decode_jpeg(plain[:-2] + 500 * scan + plain[-2:])
    for options in ({"progressive": True}, {"qtables": "web_low", "progressive": True}):
        with io.BytesIO() as file:
            Image.fromarray(rgb).save(file, "JPEG", **options)
            assert _one_scan(file.getvalue()) is None
    assert _one_scan(plain[:100]) is None and _one_scan(b"") is None


def test_a_tile_of_another_size_among_others_is_damage(tmp_path: Path) -> None:
    """Also after tiles that were right: the beginning is compared, and another one is looked at."""
    rgb = picture(512, 512)
    write_jpeg_pyramid(tmp_path / "a.tif", [rgb], 0.5)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages[0]
        start, length = page.dataoffsets[-1], page.databytecounts[-1]
    sof = data.index(b"\xff\xc0", start, start + length)
    data[sof + 5 : sof + 9] = (32).to_bytes(2, "big") * 2
    (tmp_path / "a.tif").write_bytes(data)
    with open_slide(tmp_path / "a.tif", "tiff") as slide:
        slide.read(Box(0, 0, 64, 64), (64, 64))
        with pytest.raises(SlideUnreadable, match="32 x 32"):
            slide.read(Box(0, 0, 512, 512), (512, 512))
