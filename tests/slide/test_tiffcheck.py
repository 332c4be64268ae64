"""One planted defect a rule, built by hand with struct; and no valid file is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slide.make import halved, picture, tiny_slides
from wsi.errors import SlideUnreadable, UnknownFormat
from wsi.slide import tiffcheck
from wsi.slide.tiffcheck import check_tiff

SLIDES = tiny_slides()
BYTE, SHORT, LONG, RATIONAL, SLONG, UNKNOWN, LONG8 = 1, 3, 4, 5, 9, 99, 16
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "Q", SLONG: "i", UNKNOWN: "B", LONG8: "Q"}


class At(NamedTuple):
    """A tag that says its value lies elsewhere."""

    kind: int
    count: int
    place: int


Tag = At | tuple[int, list[int]]
Tags = dict[int, Tag]


def check(data: bytes, size: int | None = None) -> None:
    check_tiff(lambda offset, length: data[offset : offset + length], size or len(data), "a.tif")


def image(width: int = 64, height: int = 48, tile: int = 32, **changed: Tag | None) -> Tags:
    """Tags of an RGB image in tiles of 10 bytes, one after the other from byte 16; `t256=None` drops tag 256."""
    n = -(-width // tile) * -(-height // tile)
    tags: dict[int, Tag | None] = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [8, 8, 8]), 259: (SHORT, [1]), 262: (SHORT, [2]),
        277: (SHORT, [3]), 322: (LONG, [tile]), 323: (LONG, [tile]),
        324: (LONG, [16 + 10 * i for i in range(n)]), 325: (LONG, [10] * n),
    }  # fmt: skip
    tags |= {int(name[1:]): value for name, value in changed.items()}
    return {code: value for code, value in tags.items() if value is not None}


def strips(**changed: Tag | None) -> Tags:
    """The same image in one strip."""
    no_tiles = {"t322": None, "t323": None, "t324": None, "t325": None}
    return image(**{**no_tiles, "t273": (LONG, [16]), "t278": (LONG, [48]), "t279": (LONG, [99]), **changed})


#: Where the first directory of `tiff` begins: behind a header of 16 bytes and 200 bytes for tiles.
FIRST = 216


def tiff(
    *ifds: Tags | list[tuple[int, Tag]], order: str = "<", big: bool = False, chain: list[int | None] | None = None
) -> bytes:
    """A file of these directories, each with its values behind it, and each naming the next (or that of `chain`)."""
    letter, head, wide = ("Q", "Q", 8) if big else ("I", "H", 4)
    file = bytearray({"<": b"II", ">": b"MM"}[order])
    file += struct.pack(f"{order}HHHQ", 43, 8, 0, FIRST) if big else struct.pack(f"{order}HI8x", 42, FIRST)
    file += bytes(200)
    starts, nexts = [], []
    for ifd in ifds:
        tags = list(ifd.items()) if isinstance(ifd, dict) else ifd
        starts.append(len(file))
        values_at = (
            len(file) + struct.calcsize(f"={head}{letter}") + len(tags) * struct.calcsize(f"=HH{letter}{letter}")
        )
        entries, values = b"", b""
        for code, tag in tags:
            if isinstance(tag, At):
                entries += struct.pack(f"{order}HH{letter}{letter}", code, *tag)
                continue
            kind, numbers = tag
            entries += struct.pack(f"{order}HH{letter}", code, kind, len(numbers))
            raw = struct.pack(f"{order}{len(numbers)}{FORMATS[kind]}", *numbers)
            if len(raw) <= wide:
                entries += raw.ljust(wide, b"\0")
            else:
                entries += struct.pack(order + letter, values_at + len(values))
                values += raw
        file += struct.pack(order + head, len(tags)) + entries
        nexts.append(len(file))
        file += bytes(wide) + values
    for place, following in zip(nexts, chain or [*range(1, len(ifds)), None], strict=True):
        file[place : place + wide] = struct.pack(order + letter, 0 if following is None else starts[following])
    return bytes(file)


@pytest.fixture(params=[("<", False), (">", False), ("<", True), (">", True)], ids=["II", "MM", "II-big", "MM-big"])
def layout(request: pytest.FixtureRequest) -> dict:
    return {"order": request.param[0], "big": request.param[1]}


def test_what_is_built_here_is_a_tiff(layout: dict) -> None:
    data = tiff(image(), image(32, 24), strips(), **layout)
    check(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert [page.shape for page in file.pages] == [(48, 64, 3), (24, 32, 3), (48, 64, 3)]
        assert file.pages[0].dataoffsets == (16, 26, 36, 46) and file.pages[2].dataoffsets == (16,)


MANY = [(700, (SHORT, [0]))]
DEFECTS: dict[str, tuple[list, str]] = {
    # directories
    "a directory without an image": ([{}], "IFD 0 has no whole numbers in tag 256"),
    "a tag more than can be": ([MANY * 4097], "IFD 0 has 4097 tags, more than 4096"),
    "tags more than can be, in all": ([[*image().items(), *MANY * 2000]] * 33, "declares 66330 tags, more than 65536"),
    "images more than can be": ([image()] * 1025, "has more than 1024 IFDs"),
    "a SubIFD that is its parent": ([image(t330=(LONG, [FIRST]))], "loop: IFD 1 at byte 216"),
    "a SubIFD beyond the file": ([image(t330=(LONG, [99999]))], "and IFD 1 at byte 100001|and IFD 1 at byte 100007"),
    "SubIFDs no number": ([image(t330=(RATIONAL, [99999]))], r"no whole numbers in tag 330 \(type 5, 1 values\)"),
    # values
    "a value of 64 MiB": ([image(t700=At(LONG, 1 << 25, 16))], "has 134217728 bytes in tag 700, more than 67108864"),
    "a value beyond the file": ([image(t700=At(LONG, 9, 99999))], "has tag 700 outside the file's"),
    "a value in the header": ([image(t700=At(LONG, 9, 4))], "has tag 700 outside the file's"),
    "a count that overflows": ([image(t700=At(RATIONAL, (1 << 32) - 1, 16))], "has 34359738360 bytes in tag 700"),
    "a tag twice": ([[*image().items(), (256, (LONG, [9]))]], "has tag 256 twice"),
    # sizes
    "no width": ([image(t256=None)], "no whole numbers in tag 256"),
    "width 0": ([image(t256=(LONG, [0]))], r"has \[0\] in tag 256, not one positive number"),
    "width -1": ([image(t256=(SLONG, [-1]))], r"has \[-1\] in tag 256"),
    "two widths": ([image(t256=(SHORT, [64, 64]))], r"has \[64, 64\] in tag 256"),
    "a fraction as width": ([image(t256=(RATIONAL, [64]))], r"no whole numbers in tag 256 \(type 5"),
    "a width of no known type": ([image(t256=(UNKNOWN, [64]))], r"has tag 256 of the unknown type 99"),
    "samples 0": ([image(t277=(SHORT, [0]))], r"has \[0\] in tag 277"),
    "pixels more than can be": ([image(), strips(t256=(LONG, [1 << 20]), t257=(LONG, [1 << 20]))],
                                "declares 1099511630848 pixels, more than 1099511627776"),
    # tiles
    "no tile height": ([image(t323=None)], "no whole numbers in tag 323"),
    "tile width 0": ([image(t322=(LONG, [0]))], r"has \[0\] in tag 322"),
    "a wide tile": ([image(t322=(LONG, [16400]))], "tiles of 16400 x 32 px, more than 16384 a side"),
    "a large tile": ([image(t322=(LONG, [8192]), t323=(LONG, [4096]))], "tiles of 100663296 bytes when decoded"),
    "a deep tile": ([image(t32998=(LONG, [16384]), t277=(SHORT, [9]))], "tiles of 150994944 bytes when decoded"),
    "large pixels": ([image(t277=(SHORT, [65535]), t258=(SHORT, [16]))], "tiles of 134215680 bytes when decoded"),
    "a large strip": ([strips(t257=(LONG, [1 << 20]), t278=None)], "strips of 201326592 bytes when decoded"),
    "no places": ([image(t324=None)], "does not say where its tiles are"),
    "no lengths": ([image(t325=None)], "does not say where its tiles are"),
    "places twice": ([image(t273=(LONG, [16, 26, 36, 46]))], "does not say where its tiles are, or says it twice"),
    "a tile too few": ([image(t257=(LONG, [65]))], "has 4 places and 4 lengths for 6 tiles"),
    "a plane too few": ([image(t284=(SHORT, [2]))], "has 4 places and 4 lengths for 12 tiles"),
    "a slice too few": ([image(t32997=(SHORT, [2]))], "has 4 places and 4 lengths for 8 tiles"),
    "a length too few": ([image(t325=(LONG, [10] * 3))], "has 4 places and 3 lengths for 4 tiles"),
    "a tile beyond the file": ([image(t324=(LONG, [16, 26, 36, 99999]))], "has tiles outside the file's"),
    "a tile that begins inside": ([image(t325=(LONG, [10, 10, 10, 9999]))], "has tiles outside the file's"),
    "a negative length": ([image(t325=(SLONG, [10, 10, 10, -1]))], "has tiles outside the file's"),
    "tiles more than the file": ([image(t325=(LONG, [190] * 4))], "has tiles of 760 bytes in all"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(name: str, layout: dict) -> None:
    ifds, message = DEFECTS[name]
    with pytest.raises(SlideUnreadable, match=message) as caught:
        check(tiff(*ifds, **layout))
    assert "\n" not in str(caught.value) and caught.value.where == "a.tif" and caught.value.remedy


@pytest.mark.parametrize("chain", [[1, 0], [1, 1]])
def test_a_chain_that_comes_back(chain: list[int | None], layout: dict) -> None:
    with pytest.raises(SlideUnreadable, match="loop: IFD 2"):
        check(tiff(image(), image(), chain=chain, **layout))


def test_a_directory_met_twice(layout: dict) -> None:
    """Named by a SubIFDs tag and by the chain."""
    second = len(tiff(image(t330=(LONG, [0])), **layout))
    with pytest.raises(SlideUnreadable, match=f"loop: IFD 2 at byte {second}"):
        check(tiff(image(t330=(LONG, [second])), image(32, 24), **layout))


def test_large_strips_are_for_thumbnails_alone(layout: dict) -> None:
    large = strips(t257=(LONG, [1 << 20]), t278=None)
    check(tiff(image(), large, **layout))
    second = len(tiff(image(t330=(LONG, [0])), **layout))
    with pytest.raises(SlideUnreadable, match="IFD 1 has strips of 201326592 bytes"):
        check(tiff(image(t330=(LONG, [second])), large, **layout))


def test_values_more_than_can_be_in_all(layout: dict) -> None:
    data = tiff(*[image(t700=At(BYTE, 60 << 20, 16))] * 5, **layout)
    with pytest.raises(SlideUnreadable, match=r"declares 3145\d+ bytes of tags, more than 268435456"):
        check(data, size=1 << 30)


@pytest.mark.parametrize("kind", [BYTE, LONG])
def test_tiles_more_than_can_be(kind: int, layout: dict) -> None:
    data = tiff(image(t324=At(kind, (1 << 23) + 1, 16)), **layout)
    with pytest.raises(SlideUnreadable, match=r"declares 83886\d\d numbers in tags, more than 8388608"):
        check(data, size=1 << 30)


def test_a_tile_that_is_stored_too_large(layout: dict) -> None:
    data = tiff(image(t325=(LONG, [10, 10, 10, (1 << 27) + 1])), **layout)
    with pytest.raises(SlideUnreadable, match="has a tile of 134217729 bytes as stored, more than 134217728"):
        check(data, size=1 << 30)


def test_strips_alone_may_be_long_as_in_ndpi(layout: dict) -> None:
    """Hamamatsu's tag on tiles is no excuse: a tile is decoded whole."""
    check(tiff(strips(t65420=(LONG, [1]), t257=(LONG, [1 << 20]), t278=(LONG, [1 << 20])), **layout))
    with pytest.raises(SlideUnreadable, match="has tiles of 805306368 bytes"):
        check(tiff(image(t65420=(LONG, [1]), t322=(LONG, [1 << 14]), t323=(LONG, [1 << 14])), **layout))
    data = tiff(image(t65420=(LONG, [1]), t325=(LONG, [10, 10, 10, (1 << 27) + 1])), **layout)
    with pytest.raises(SlideUnreadable, match="has a tile of 134217729 bytes as stored"):
        check(data, size=1 << 30)


def test_a_long_description() -> None:
    data = tiff(image(t270=At(BYTE, (1 << 24) + 1, 16)))
    with pytest.raises(SlideUnreadable, match="has a description of 16777217 bytes, more than 16777216"):
        check(data + bytes(1 << 24))


@pytest.mark.parametrize(
    ("header", "kind", "message"),
    [
        (b"", SlideUnreadable, "ends at byte 0, and the header at byte 8"),
        (b"II*\0\1", SlideUnreadable, "ends at byte 5"),
        (b"II*\0" + bytes(4), SlideUnreadable, "has no image"),
        (b"MM\0+\0\4\0\0" + bytes(8), SlideUnreadable, "does not say 8-byte offsets"),
        (b"II+\0\x08\0\1\0" + bytes(8), SlideUnreadable, "does not say 8-byte offsets"),
        (b"II+\0\x08\0\0\0" + bytes(4), SlideUnreadable, "ends at byte 12"),
        (b"Dear Sir", UnknownFormat, "is not a TIFF: it begins with the bytes 44 65 61 72"),
        (b"MM*\0" + bytes(12), UnknownFormat, "is not a TIFF"),
    ],
)
def test_headers(header: bytes, kind: type[SlideUnreadable], message: str) -> None:
    with pytest.raises(kind, match=message):
        check(header)


def test_cut_anywhere(layout: dict) -> None:
    data = tiff(image(t324=(LONG, [196, 196, 196, 206])), image(32, 24), **layout)  # every byte of it is needed
    check(data)
    for end in range(len(data)):
        with pytest.raises(SlideUnreadable):
            check(data[:end])


def test_what_is_unusual_and_valid(layout: dict) -> None:
    for ifd in (
        image(t257=(SHORT, [33])),  # more tiles than needed: LibTIFF takes these too
        image(t325=(LONG, [190, 0, 0, 10]), t324=(LONG, [16, 0, 99999, 206])),  # holes
        image(t324=(LONG, [16] * 4), t325=(LONG, [190] * 4)),  # equal tiles that share their bytes
        image(t324=None, t325=None, t273=(LONG, [16] * 4), t279=(LONG, [10] * 4)),  # tiles under the strips' names
        image(t325=(SHORT, [10] * 4)),
        image(t284=(SHORT, [2]), t324=(LONG, [16] * 12), t325=(SHORT, [10] * 12)),
        strips(t278=(LONG, [0xFFFFFFFF])),
        strips(t278=None),
        image(t322=(LONG, [16384]), t323=(LONG, [1024])),
        image(t270=(LONG, [])),
        image(t700=(UNKNOWN, [1, 2, 3])),
    ):
        check(tiff(ifd, {}, {34665: (LONG, [3])}, strips(t257=(LONG, [1 << 30])), **layout))
    check(tiff([*image().items(), (270, (SHORT, [1])), (270, (SHORT, [1]))], **layout))  # tifffile: two descriptions
    check(tiff(*[image()] * 1024, **layout))


def test_what_subifds_point_to_next_means_nothing(layout: dict) -> None:
    second = len(tiff(image(t330=(LONG, [0])), **layout))
    check(tiff(image(t330=(LONG, [second])), image(32, 24), chain=[None, 0], **layout))


def test_beyond_4_gib_only_bigtiff_is_tiff(layout: dict) -> None:
    """An NDPI is not, and its first directory mostly lies where a TIFF's offsets do not reach."""
    check(tiff(image(t65420=(LONG, [1])), **layout))
    data = tiff(image(), **layout)
    if layout["big"]:
        check(data, size=5 << 30)
    else:
        with pytest.raises(UnknownFormat, match="beyond 4 GiB"):
            check(data, size=5 << 30)


@pytest.mark.parametrize("name", SLIDES)
def test_every_kind_of_slide_passes(name: str) -> None:
    check(SLIDES[name])


@pytest.mark.parametrize("big", [False, True])
def test_generated_pyramids_pass(tmp_path: Path, big: bool) -> None:
    """With a thumbnail in strips between the levels, as Aperio has it; tiles of 512 and of 64."""
    full = picture(900, 700)
    for tile in (64, 512):
        for subifds in (None, 2):
            with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=big) as file:
                file.write(full, tile=(tile, tile), compression="jpeg", subifds=subifds)
                if not subifds:
                    file.write(full[::3, ::3].copy(), rowsperstrip=234, metadata=None)
                for level in (halved(full), halved(halved(full))):
                    file.write(level, tile=(tile, tile), compression="lzw", subfiletype=1, metadata=None)
            check((tmp_path / "a.tif").read_bytes())


def test_no_real_file_is_refused(data_dir: Path) -> None:
    """And of those damaged on purpose the ones whose structure is."""
    refused, n = set(), 0
    for path in sorted(p for p in data_dir.rglob("*") if p.suffix.lower() in {".svs", ".tif", ".tiff", ".ndpi"}):
        n += 1
        try:
            check(path.read_bytes())
        except SlideUnreadable:
            refused.add(path.name)
    assert n >= 30
    assert refused == {"bad_header1.tif", "bad_header2.tif", "bad_ifd_offset.tif", "bad_strip_offset.tif", "broken.svs"}


@pytest.mark.parametrize("big", [False, True])
def test_few_requests_even_for_150_000_tiles(big: bool) -> None:
    """A slide of 2 GB in 150,000 tiles, and nine levels and a thumbnail beside it, from a file behind a URL."""
    n = 388 * 387
    spread = [FIRST + 13_000 * i for i in range(n)]
    base = image(388 * 256, 387 * 256, 256, t324=(LONG, spread), t325=(LONG, [13_000] * n))
    levels = [image(388 * 256 >> i, 387 * 256 >> i, 256) for i in range(6, 12)]
    data = tiff(base, strips(), *levels, big=big)
    requests: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        requests.append(length)
        return data[offset : offset + length]

    check_tiff(read_at, 2_000_000_000, "a.tif")
    assert len(requests) <= 6 and sum(requests) <= len(data) + 5 * 65536


def test_a_file_that_shrinks_while_it_is_read() -> None:
    with pytest.raises(SlideUnreadable, match="ends at byte"):
        check(tiff(image())[:300], size=2000)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(SLIDES)),
    st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_mutated_slides_pass_or_are_refused(name: str, changes: list[tuple[int, bytes]]) -> None:
    """In little memory; and what passes is within the limits as tifffile sees it, which reads tags its own way."""
    data = bytearray(SLIDES[name])
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new[: len(data) - place]
    tracemalloc.start()
    try:
        check(bytes(data))
    except SlideUnreadable as error:
        assert "\n" not in str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        for i, page in enumerate(file.pages):
            assert i < tiffcheck.MAX_IFDS
            if page.is_tiled:
                assert max(page.tile) <= tiffcheck.MAX_TILE_PX
                assert np.prod(page.chunks) * np.max(page.bitspersample) // 8 <= tiffcheck.MAX_TILE_BYTES
                assert len(page.dataoffsets) == len(page.databytecounts) >= np.prod(page.chunked)
                assert all(o + n <= len(data) for o, n in zip(page.dataoffsets, page.databytecounts, strict=True) if n)
