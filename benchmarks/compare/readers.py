"""The programs that ``read.py`` compares. Each imports what it needs when it is asked, in a process of its own.

A program is ``prepare(job, threads) -> run``; ``run()`` gives uint8 RGB (out_px, out_px, 3) for each box. All have to
average the pixels of level 0, since no other level is as fine. Peers run with their defaults, but for a cache of
256 MiB where theirs is off, and average two by two with Pillow's ``reduce``, the fastest that gives the same pixels.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
ReadBox = Callable[[int, int, int], U8]
Prepare = Callable[["Job", int], Callable[[], Iterable[U8]]]

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Job:
    """Boxes to read: their top left corners in level-0 pixels, on a lattice of `side_px`, each to `out_px` pixels."""

    path: str
    slide: str
    corners: tuple[tuple[int, int], ...]
    side_px: int
    out_px: int


@dataclass(frozen=True)
class Program:
    """A way to read; on several cores by processes, or by `threads` of its own."""

    prepare: Prepare
    package: str
    threads: bool = False
    patches: bool = True  # else whole tiles: a limit, not a reader
    reduces: int = 1  # means something only for patches that are reduced so many times


def one_by_one(open_: Callable[[str], ReadBox]) -> Prepare:
    """Make a program of what reads a square of level 0."""

    def prepare(job: Job, threads: int) -> Callable[[], Iterator[U8]]:
        from PIL import Image

        read, factor = open_(job.path), job.side_px // job.out_px

        def run() -> Iterator[U8]:
            for x, y in job.corners:
                rgb = read(x, y, job.side_px)
                yield rgb if factor == 1 else np.asarray(Image.fromarray(rgb).reduce(factor))

        return run

    return prepare


def openslide(path: str) -> ReadBox:
    """OpenSlide."""
    import openslide

    slide = openslide.OpenSlide(path)
    return lambda x, y, side: np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"))


def tiffslide(path: str) -> ReadBox:
    """Tiffslide."""
    import tiffslide

    slide = tiffslide.TiffSlide(path)
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side), as_array=True)


def cucim(path: str) -> ReadBox:
    """Read with cuCIM on the CPU."""
    from cucim import CuImage

    CuImage.cache("per_process", memory_capacity=CACHE_BYTES >> 20)
    slide = CuImage(path)
    return lambda x, y, side: np.asarray(slide.read_region((x, y), (side, side), 0))


def fastslide(path: str) -> ReadBox:
    """Fastslide."""
    import fastslide

    slide = fastslide.FastSlide.from_file_path(path, cache=CACHE_BYTES)
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side)).numpy()


def large_image(path: str) -> ReadBox:
    """Read with large-image and its TIFF source."""
    import large_image_source_tiff
    from large_image.constants import TILE_FORMAT_NUMPY

    slide = large_image_source_tiff.open(path)

    def read(x: int, y: int, side: int) -> U8:
        region = {"left": x, "top": y, "width": side, "height": side, "units": "base_pixels"}
        return np.ascontiguousarray(slide.getRegion(region=region, format=TILE_FORMAT_NUMPY)[0][..., :3])

    return read


def libvips(path: str) -> ReadBox:
    """Read with libvips, whose TIFF loader keeps a few rows of tiles."""
    import pyvips

    image = pyvips.Image.new_from_file(path, access="random")
    region = pyvips.Region.new(image)
    return lambda x, y, side: np.frombuffer(region.fetch(x, y, side, side), np.uint8).reshape(side, side, image.bands)


def tifffile(path: str) -> ReadBox:
    """Page segments, decoded one by one and put together here; the latest 256 MiB of them are kept."""
    import tifffile

    file = tifffile.TiffFile(path)
    page: Any = file.pages[0]
    tile_px, columns, handle = page.tilewidth, -(-page.imagewidth // page.tilewidth), file.filehandle
    kept: OrderedDict[int, U8] = OrderedDict()

    def tile(index: int) -> U8:
        if index not in kept:
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
            kept[index] = page.decode(data, index, jpegtables=page.jpegtables)[0][0]
            if len(kept) * tile_px * tile_px * 3 > CACHE_BYTES:
                kept.popitem(last=False)
        return kept[index]

    def read(x: int, y: int, side: int) -> U8:
        if side == tile_px and x % tile_px == y % tile_px == 0:
            return tile(y // tile_px * columns + x // tile_px)
        out = np.empty((side, side, 3), np.uint8)
        for row, column in _touched(x, y, side, tile_px):
            top, left = row * tile_px - y, column * tile_px - x
            part = tile(row * columns + column)[max(-top, 0) : side - top, max(-left, 0) : side - left]
            y0, x0 = max(top, 0), max(left, 0)
            out[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
        return out

    return read


def ours(job: Job, threads: int) -> Callable[[], Iterator[U8]]:
    """Stream patches through the public face of wsi, in a process set up as those of `wsi tile` are."""
    import wsi
    from wsi.memory import keep_freed_memory
    from wsi.tiling import stream

    keep_freed_memory()
    slide = wsi.open_slide(job.path)
    columns, rows = (np.array(job.corners, np.int32) // job.side_px).T
    side, mpp = (float(job.side_px),) * 2, slide.mpp.x * job.side_px / job.out_px
    grid = wsi.TileGrid(columns, rows, side, side, job.out_px, mpp)

    def run() -> Iterator[U8]:
        for _, rgb, _, _ in stream(slide, grid, [range(len(grid))], batch_size=64, threads=threads):
            yield from rgb

    return run


def decoder(package: str, scale: int = 1) -> Prepare:
    """Only decode: every tile that a box touches once, whole streams in memory, into one reused array."""

    def prepare(job: Job, threads: int) -> Callable[[], Iterator[U8]]:
        streams, tile_px = stored(job)
        out = np.empty((tile_px // scale, tile_px // scale, 3), np.uint8)
        if package == "imagecodecs":
            import imagecodecs

            return lambda: (imagecodecs.jpeg8_decode(jpeg, out=out) for jpeg in streams)
        import simplejpeg

        side = tile_px // scale
        return lambda: (
            simplejpeg.decode_jpeg(jpeg, min_height=side, min_width=side, min_factor=1, buffer=out) for jpeg in streams
        )

    return prepare


def _touched(x: int, y: int, side: int, tile_px: int) -> Iterator[tuple[int, int]]:
    """Row and column of every tile that a box touches."""
    last_row, last_column = (y + side - 1) // tile_px, (x + side - 1) // tile_px
    return itertools.product(range(y // tile_px, last_row + 1), range(x // tile_px, last_column + 1))


def stored(job: Job) -> tuple[list[bytes], int]:
    """Every tile that a box touches as a JPEG that can be decoded by itself, and a tile's side."""
    import tifffile

    with tifffile.TiffFile(job.path) as file:
        page: Any = file.pages[0]
        tile_px, columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        touched = {tile for x, y in job.corners for tile in _touched(x, y, job.side_px, tile_px)}
        streams = []
        for row, column in sorted(touched):
            file.filehandle.seek(page.dataoffsets[row * columns + column])
            data = file.filehandle.read(page.databytecounts[row * columns + column])
            streams.append(b"\xff\xd8" + page.jpegtables[2:-2] + data[2:])
        return streams, tile_px


PROGRAMS = {
    "wsi": Program(ours, "wsi", threads=True),
    "openslide-python": Program(one_by_one(openslide), "openslide-python"),
    "tiffslide": Program(one_by_one(tiffslide), "tiffslide"),
    "large-image": Program(one_by_one(large_image), "large-image-source-tiff"),
    "fastslide": Program(one_by_one(fastslide), "fastslide"),
    "libvips": Program(one_by_one(libvips), "pyvips-binary"),
    "cucim": Program(one_by_one(cucim), "cucim-cu12"),
    "tifffile segments": Program(one_by_one(tifffile), "tifffile"),
    "limit: imagecodecs": Program(decoder("imagecodecs"), "imagecodecs", patches=False),
    "limit: simplejpeg": Program(decoder("simplejpeg"), "simplejpeg", patches=False),
    "limit: half scale": Program(decoder("simplejpeg", 2), "simplejpeg", patches=False, reduces=2),
}
