"""One contract for every reader, and the readers against each other and against other programs."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import fsspec
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.slide.make import halved, picture, spoil, write_pyramid
from wsi.errors import MppError, SlideError, SlideNotFound, SlideUnreadable
from wsi.slide import Slide, _fingerprint, base, fingerprint, open_slide
from wsi.tissue import find_tissue
from wsi.units import Box

READERS = ("tiff", "openslide", "tiffslide")
WIDTH, HEIGHT = 700, 456  # no multiple of a tile


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    full = picture(WIDTH, HEIGHT)
    return [full, halved(full), halved(halved(full))]


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory, pixels: list[np.ndarray]) -> Path:
    path = tmp_path_factory.mktemp("slides") / "pyramid.tif"
    write_pyramid(path, pixels)
    return path


@pytest.fixture(params=READERS)
def slide(request: pytest.FixtureRequest, pyramid: Path) -> Iterator[Slide]:
    with open_slide(pyramid, request.param) as opened:
        yield opened


def area_average(image: np.ndarray, x: float, y: float, w: float, h: float, out_w: int, out_h: int) -> np.ndarray:
    """Area average in float64 by summed-area table; white outside. Another way than the kernel's."""
    pad = 300
    white = np.pad(image.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    table = np.pad(white.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))

    def at(ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
        iy, ix = np.floor(ys).astype(int), np.floor(xs).astype(int)
        fy, fx = (ys - iy)[:, None, None], (xs - ix)[None, :, None]
        iy1, ix1 = np.minimum(iy + 1, table.shape[0] - 1), np.minimum(ix + 1, table.shape[1] - 1)
        top = table[iy][:, ix] * (1 - fx) + table[iy][:, ix1] * fx
        return top * (1 - fy) + (table[iy1][:, ix] * (1 - fx) + table[iy1][:, ix1] * fx) * fy

    ys, xs = y + pad + np.arange(out_h + 1) * h / out_h, x + pad + np.arange(out_w + 1) * w / out_w
    corners = at(ys, xs)
    sums = corners[1:, 1:] - corners[1:, :-1] - corners[:-1, 1:] + corners[:-1, :-1]
    return sums / (w / out_w * h / out_h)


class TestContract:
    def test_facts(self, slide: Slide) -> None:
        assert slide.size == (WIDTH, HEIGHT)
        assert slide.level_sizes == ((700, 456), (350, 228), (175, 114))
        assert slide.mpp == pytest.approx((0.5, 0.5)) and slide.mpp_source == "tiff-tags"
        assert slide.bounds == Box(0, 0, WIDTH, HEIGHT)

    def test_level_0_is_as_stored(self, slide: Slide, pixels: list[np.ndarray]) -> None:
        np.testing.assert_array_equal(slide.read(Box(37, 91, 300, 200), (300, 200)), pixels[0][91:291, 37:337])

    def test_outside_is_white(self, slide: Slide, pixels: list[np.ndarray]) -> None:
        got = slide.read(Box(-10, -20, 30, 40), (30, 40))
        assert (got[:20] == 255).all() and (got[:, :10] == 255).all()
        np.testing.assert_array_equal(got[20:, 10:], pixels[0][:20, :20])
        assert (slide.read(Box(5000, 0, 10, 10), (10, 10)) == 255).all()

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.floats(-60, 600), st.floats(-60, 400), st.floats(0.6, 12), st.integers(1, 25), st.integers(1, 25))
    def test_any_box_at_any_size(
        self, slide: Slide, pixels: list[np.ndarray], x: float, y: float, scale: float, out_w: int, out_h: int
    ) -> None:
        box = Box(x, y, out_w * scale, out_h * scale)
        level = slide.level_for(scale)
        got = slide.read(box, (out_w, out_h)).astype(float)
        fx, fy = pixels[level].shape[1] / WIDTH, pixels[level].shape[0] / HEIGHT
        expected = area_average(pixels[level], box.x * fx, box.y * fy, box.w * fx, box.h * fy, out_w, out_h)
        # positions are rounded to 1/4096 px and values to whole grey levels
        assert np.abs(got - expected).max() <= 0.5 + 255 * 4 / 4096

    def test_best_level(self, slide: Slide) -> None:
        assert [slide.level_for(d) for d in (0.3, 1, 1.98, 1.995, 2.5, 4.01, 100)] == [0, 0, 0, 1, 1, 2, 2]

    def test_blocks_change_nothing(self, slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
        box, out_px = Box(-3.7, 11.1, 690.5, 440.3), (97, 61)
        whole = slide.read(box, out_px)
        monkeypatch.setattr(base, "_BLOCK_PX", 900)
        np.testing.assert_array_equal(slide.read(box, out_px), whole)

    def test_writes_into_out(self, slide: Slide) -> None:
        batch = np.zeros((2, 20, 30, 3), np.uint8)
        assert slide.read(Box(5, 5, 90, 60), (30, 20), batch[1]) is not None
        np.testing.assert_array_equal(batch[1], slide.read(Box(5, 5, 90, 60), (30, 20)))
        assert batch[0].max() == 0

    def test_pickles_by_path(self, slide: Slide) -> None:
        with pickle.loads(pickle.dumps(slide)) as other:
            np.testing.assert_array_equal(
                other.read(Box(0, 0, 50, 50), (50, 50)), slide.read(Box(0, 0, 50, 50), (50, 50))
            )

    @pytest.mark.parametrize(("box", "out_px"), [(Box(0, 0, 0, 5), (5, 5)), (Box(0, 0, 5, 5), (0, 5))])
    def test_nothing_cannot_be_read(self, slide: Slide, box: Box, out_px: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="positive"):
            slide.read(box, out_px)


@pytest.mark.parametrize("reader", READERS)
class TestMpp:
    def test_vendor_property(self, tmp_path: Path, reader: str) -> None:
        write_pyramid(tmp_path / "a.svs", [picture(300, 200)], 0.2522, svs=True)
        with open_slide(tmp_path / "a.svs", reader) as slide:
            assert slide.mpp == (0.2522, 0.2522) and slide.mpp_source == "vendor:aperio"

    def test_a_decimal_comma(self, tmp_path: Path, reader: str) -> None:
        """Of a scanner whose computer writes numbers so; tiffslide takes it for no number."""
        text = "Aperio Image Library v12\r\n300x200|AppMag = 20|MPP = 1,0416"
        shape: dict = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
        tifffile.imwrite(tmp_path / "a.svs", picture(300, 200), description=text, **shape)
        if reader == "tiffslide":
            with pytest.raises(MppError):
                open_slide(tmp_path / "a.svs", reader)
            return
        with open_slide(tmp_path / "a.svs", reader) as slide:
            assert slide.mpp == (1.0416, 1.0416)

    def test_the_users_word_wins(self, pyramid: Path, reader: str) -> None:
        with open_slide(pyramid, reader, mpp=0.25) as slide:
            assert slide.mpp == (0.25, 0.25) and slide.mpp_source == "user"

    @pytest.mark.parametrize("mpp", [None, 26.458, 352.78, 0.01])
    def test_missing_or_implausible_names_the_remedy(self, tmp_path: Path, reader: str, mpp: float | None) -> None:
        write_pyramid(tmp_path / "a.svs", [picture(300, 200)], mpp, svs=True)
        with pytest.raises(MppError, match="Give it with --slide-mpp"):
            open_slide(tmp_path / "a.svs", reader)

    def test_the_user_may_be_wrong(self, pyramid: Path, reader: str) -> None:
        for mpp in (0.0, -1.0, float("nan"), 21.0):
            with pytest.raises(MppError, match="outside"):
                open_slide(pyramid, reader, mpp=mpp)


class TestBadInput:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SlideNotFound, match="no such file"):
            open_slide(tmp_path / "nothing.svs")
        with pytest.raises(FileNotFoundError):
            open_slide(tmp_path / "nothing.svs")

    def test_not_a_slide(self, tmp_path: Path) -> None:
        (tmp_path / "letter.svs").write_text("Dear Sir or Madam")
        for reader in ("auto", *READERS):
            with pytest.raises(SlideUnreadable):
                open_slide(tmp_path / "letter.svs", reader)
        with pytest.raises(SlideUnreadable, match="folder"):
            open_slide(tmp_path)
        with pytest.raises(SlideError, match="Known readers"):
            open_slide(tmp_path, "bioformats")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.svs")
        end = os.open(tmp_path / "a.svs", os.O_RDWR | os.O_NONBLOCK)  # so that no defect makes this test wait
        try:
            with pytest.raises(SlideUnreadable, match="is a pipe"):
                open_slide(tmp_path / "a.svs")
        finally:
            os.close(end)

    def test_the_overview_of_a_vsi_is_not_the_slide(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "Image.VSI", picture(96, 64), photometric="rgb", metadata=None)
        with pytest.raises(SlideUnreadable, match=r"\.ets"):
            open_slide(tmp_path / "Image.VSI", mpp=0.25)

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6])
    def test_truncated(self, tmp_path: Path, pyramid: Path, share: float) -> None:
        """Either refused at once, or at the first read that needs what is gone; never made up."""
        whole = pyramid.read_bytes()
        cut = tmp_path / "cut.tif"
        cut.write_bytes(whole[: int(len(whole) * share)])
        for reader in ("auto", *READERS):
            with pytest.raises(SlideUnreadable), open_slide(cut, reader, mpp=0.5) as slide:
                slide.read(Box(0, 0, *slide.size), slide.size)

    def test_a_damaged_tile_does_not_poison_the_handle(self, tmp_path: Path, pixels: list[np.ndarray]) -> None:
        path = tmp_path / "damaged.tif"
        write_pyramid(path, pixels[:1])
        with openslide.OpenSlide(path) as reference:
            good = np.asarray(reference.read_region((0, 0), 0, (64, 64)))[..., :3]
        spoil(path, 40, whole=True)
        with open_slide(path, "openslide") as slide:
            with pytest.raises(SlideUnreadable, match="damaged at level 0"):
                slide.read(Box(0, 0, *slide.size), slide.size)
            np.testing.assert_array_equal(slide.read(Box(0, 0, 64, 64), (64, 64)), good)

    def test_damage_in_a_copy_nearer_by(self, tmp_path: Path, pixels: list[np.ndarray]) -> None:
        """The copy is opened again, not the original, which may be anywhere."""
        copy = tmp_path / "copy.tif"
        write_pyramid(copy, pixels[:1])
        spoil(copy, 40, whole=True)
        with open_slide("memory://away/a.tif", "openslide", local=str(copy)) as slide:
            for _ in range(2):
                with pytest.raises(SlideUnreadable, match="damaged at level 0"):
                    slide.read(Box(0, 0, *slide.size), slide.size)
            np.testing.assert_array_equal(slide.read(Box(0, 0, 64, 64), (64, 64)), pixels[0][:64, :64])

    def test_a_turned_tiff_is_refused_by_those_who_turn_it_wrong(self, data_dir: Path) -> None:
        for reader in ("openslide", "tiffslide"):
            with pytest.raises(SlideUnreadable, match="orientation 3"):
                open_slide(data_dir / "wsi/tiff_orientation/test_orient3.tif", reader, mpp=1.0)


GREY, RGBA = picture(96, 64)[..., 0], np.dstack([picture(96, 64), np.full((64, 96), 128, np.uint8)])


@pytest.mark.parametrize(
    ("pixels", "stored"),
    [
        (GREY, {"photometric": "miniswhite"}),
        (GREY, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) * 80}),
        (RGBA, {"photometric": "separated"}),
        (RGBA[..., :3], {"photometric": "cielab"}),
        (RGBA[..., :3], {"photometric": "ycbcr"}),
        (RGBA[..., :3], {"photometric": "rgb", "compression": "aperio_jp2000_ycbc"}),
        (RGBA, {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        (RGBA, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    ],
)
@pytest.mark.parametrize("layout", [{"tile": (32, 32)}, {"rowsperstrip": 16}])
def test_colours_that_tiffslide_does_not_convert_are_refused(
    tmp_path: Path, layout: dict, pixels: np.ndarray, stored: dict
) -> None:
    """OpenSlide converts them where they lie in tiles; read as they are stored, white would be black."""
    tifffile.imwrite(tmp_path / "a.tif", pixels, metadata=None, **layout, **stored)
    with pytest.raises(SlideUnreadable, match="stores its colours as"):
        open_slide(tmp_path / "a.tif", "tiffslide", mpp=0.5)
    with suppress(SlideUnreadable), open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert slide.reader == "openslide"


def test_jpeg_strips_cut_short_are_refused_never_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        picture(96, 64),
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(2, 2),
        rowsperstrip=32,
        metadata=None,
    )
    spoil(path, 1)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.reader == "tiffslide"
        with tifffile.TiffFile(path) as tiff:
            np.testing.assert_array_equal(slide.read(Box(0, 0, 96, 32), (96, 32)), tiff.pages.first.asarray()[:32])
        with pytest.raises(SlideUnreadable, match="Premature end"):
            slide.read(Box(0, 0, 96, 64), (96, 64))
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        size = raw.index(b"\xff\xc0", tiff.pages.first.dataoffsets[0]) + 5
    raw[size : size + 4] = (16384).to_bytes(2, "big") * 2
    path.write_bytes(raw)
    with open_slide(path, mpp=0.5) as slide, pytest.raises(SlideUnreadable, match="JPEG of 16384 x 16384 px"):
        slide.read(Box(0, 0, 96, 32), (96, 32))


def test_strips_without_limit_are_not_decoded(tmp_path: Path) -> None:
    """Hamamatsu's tag allows them, and behind a URL there is no OpenSlide to ask: tiffslide would decode the whole."""
    path = tmp_path / "a.tif"
    tags = [(65420, "I", 1, 1, True)]
    tifffile.imwrite(path, picture(64, 48), photometric="rgb", compression="zlib", rowsperstrip=48, extratags=tags)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages.first.tags[name].overwrite(30_000)
    with fsspec.open("memory://slides/strips.tif", "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(SlideUnreadable, match="parts of 2700000000 bytes"):
        open_slide("memory://slides/strips.tif", mpp=0.5)


def test_url_through_fsspec(pyramid: Path) -> None:
    with fsspec.open("memory://slides/pyramid.tif", "wb") as file:
        file.write(pyramid.read_bytes())
    with open_slide("memory://slides/pyramid.tif") as slide, open_slide(pyramid) as local:
        assert slide.reader == "tiff"
        box = Box(10, 10, 600, 400)
        np.testing.assert_array_equal(slide.read(box, (75, 50)), local.read(box, (75, 50)))
    with pytest.raises(SlideNotFound):
        open_slide("memory://slides/nothing.tif")


def test_url_of_an_s3_server(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "no s3fs and moto[server], which only this test needs"
    moto, s3fs = (pytest.importorskip(name, reason=why) for name in ("moto.server", "s3fs"))
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "anything")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("slides")
        files.pipe("slides/cohort/pyramid.tif", pyramid.read_bytes())
        with open_slide("s3://slides/cohort/pyramid.tif") as slide, open_slide(pyramid) as local:
            assert (slide.reader, slide.level_sizes) == ("tiff", local.level_sizes)
            box = Box(10, 10, 600, 400)
            np.testing.assert_array_equal(slide.read(box, (75, 50)), local.read(box, (75, 50)))
        with pytest.raises(SlideNotFound):
            open_slide("s3://slides/nothing.tif")
        with pytest.raises(SlideUnreadable, match="folder"):
            open_slide("s3://slides/cohort")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_labels_are_never_read(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: object) -> None:
        raise AssertionError("an associated image was looked at")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(forbidden))
    monkeypatch.setattr(tiffslide.TiffSlide, "associated_images", property(forbidden))
    for reader in READERS:
        with open_slide(data_dir / "wsi/aperio/CMU-1-Small-Region.svs", reader) as slide:
            find_tissue(slide)
            slide.read(slide.bounds, (100, 133))


def test_alpha_lies_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 51]]], np.uint8)
    assert base.compose_on_white(rgba).tolist() == [[[255, 255, 255], [200, 0, 0], [244, 204, 204]]]


class TestRealFiles:
    def test_another_program_decoded_this_tile(self, data_dir: Path) -> None:
        expected = np.asarray(Image.open(data_dir / "wsi/oracles_cmu1/CMU-1-Small-Region-page-0-tile_5-5.bmp"))
        for reader in READERS:
            with open_slide(data_dir / "wsi/aperio/CMU-1-Small-Region.svs", reader) as slide:
                assert slide.mpp == (0.499, 0.499)
                np.testing.assert_array_equal(slide.read(Box(1200, 1200, 240, 240), (240, 240)), expected)

    def test_all_readers_give_the_same_pixels(self, data_dir: Path) -> None:
        """On every file that several can open, at many places and sizes; also the same size, mpp and bounds."""
        by_all = 0
        for path in sorted(p for p in (data_dir / "wsi").rglob("*") if p.suffix in {".svs", ".tif", ".tiff", ".ndpi"}):
            with ExitStack() as stack:
                opened = []
                for reader in READERS:
                    try:
                        opened.append(stack.enter_context(open_slide(path, reader, mpp=1.0, decode="full")))
                    except SlideError as error:
                        assert "\n" not in str(error)
                for other in opened[1:]:
                    self.compare(path, opened[0], other)
                by_all += len(opened) == len(READERS)
        assert by_all >= 9

    @staticmethod
    def compare(path: Path, one: Slide, two: Slide) -> None:
        assert one.size == two.size and one.bounds == two.bounds, path
        rng = np.random.default_rng(0)
        for _ in range(10):
            out_px = int(rng.integers(1, 150)), int(rng.integers(1, 150))
            scale = rng.uniform(0.5, 12)
            box = Box(rng.uniform(-9, one.size[0]), rng.uniform(-9, one.size[1]), out_px[0] * scale, out_px[1] * scale)
            try:
                expected = one.read(box, out_px)
            except SlideUnreadable:
                continue  # a file that is damaged on purpose
            np.testing.assert_array_equal(two.read(box, out_px), expected, err_msg=str(path))

    def test_holes_are_white_and_bounds_known(self, data_dir: Path) -> None:
        for reader in READERS:
            with open_slide(data_dir / "wsi/generic_tiff/panimg_no_dzi.tif", reader) as slide:
                assert slide.bounds == Box(0, 512, 3072, 3456)
                assert (slide.read(Box(0, 0, 512, 512), (512, 512)) == 255).all()

    def test_malformed_files_give_one_clear_line(self, data_dir: Path) -> None:
        names = [*sorted((data_dir / "wsi/malformed").glob("bad_*")), data_dir / "wsi/malformed/broken.svs"]
        assert len(names) == 8
        for path in names:
            with pytest.raises(SlideError) as caught, open_slide(path) as slide:  # all lack an mpp at the least
                slide.read(Box(0, 0, *slide.size), slide.size)
            assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_a_fingerprint_tells_files_of_one_size_apart(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).bytes(200_000)
    literal = hashlib.sha256(b"200000\n" + whole[:65536] + whole[-65536:]).hexdigest()[:12]
    for i, value in (
        (0, literal),
        (65_535, None),
        (65_536, literal),
        (134_463, literal),
        (134_464, None),
        (199_999, None),
    ):
        file = tmp_path / f"{i}.svs"
        file.write_bytes(whole[:i] + bytes([whole[i] ^ (i > 0)]) + whole[i + 1 :])
        found = fingerprint(str(file))
        assert found is not None and len(found) == 12 and (found == literal) == (value is not None), i
    file.write_bytes(b"short")
    assert fingerprint(str(file)) == hashlib.sha256(b"5\nshortshort").hexdigest()[:12]
    read = _fingerprint.cache_info().misses
    assert fingerprint(str(file)) and _fingerprint.cache_info().misses == read, "an unchanged file is read once"
    assert fingerprint("https://example.org/a.svs") is None is fingerprint(str(tmp_path / "none.svs"))
