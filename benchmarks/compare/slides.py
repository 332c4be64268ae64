"""Slides to read in a benchmark: large, quickly made, the same everywhere.

A bank of tissue tiles is cut from a phantom and encoded once; a slide is a disc of them, drawn at random, on glass.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsi.phantom import PhantomConfig, write_phantom

U8 = npt.NDArray[np.uint8]

QUALITY, MPP, BANK, SEED = 80, 0.25, 192, 7
#: Drawn coarser than the slide says it is, tiles have as many bytes as real ones: 0.2 a pixel, CAMELYON 0.18 to 0.27.
DRAWN_MPP = 0.5
VERSION = 1  # raised with every change of what is drawn: slides are kept from run to run
TISSUE = 0.6  # of the slide's area, a disc in its middle
STEP = 16  # from level 0 to the only other
GLASS = (243, 242, 244)


@dataclass(frozen=True)
class SlideKind:
    """What kind of slide: side in pixels, side of a tile, and chroma as "420" or "444"."""

    side_px: int
    tile_px: int
    chroma: str

    @property
    def name(self) -> str:
        """Name, also of its file."""
        return f"{self.side_px}px-{self.tile_px}px-{self.chroma}"


def in_tissue(side_px: int, x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Whether level-0 points lie on the disc of tissue."""
    return np.asarray(np.hypot(x - side_px / 2, y - side_px / 2) < side_px * np.sqrt(TISSUE / np.pi))


def cached(folder: Path, kind: SlideKind) -> Path:
    """Return the slide, which is made where it is not there yet."""
    path = folder / f"{kind.name}-v{VERSION}.svs"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        _write(draft, kind)
        draft.replace(path)
    return path


def tissue_tiles(tile_px: int, n: int = BANK) -> U8:
    """Cut `n` different tissue tiles from a phantom, uint8 (n, tile_px, tile_px, 3)."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "phantom.svs"
        write_phantom(path, PhantomConfig(size=(4096, 4096), mpp=DRAWN_MPP, seed=SEED, tumours=2, quality=95))
        image = tifffile.imread(path, key=0)
    # Overlapping ones, so that few pixels make many tiles.
    corners = np.arange(0, image.shape[0] - tile_px + 1, 96)
    tiles = (image[y : y + tile_px, x : x + tile_px] for y, x in itertools.product(corners, corners))
    dense = [tile for tile in tiles if (tile[::8, ::8].min(axis=2) < 225).mean() > 0.9]
    return np.stack([dense[i] for i in np.linspace(0, len(dense) - 1, n).astype(int)])


def _write(path: Path, kind: SlideKind) -> None:
    tile_px, side = kind.tile_px, kind.side_px
    sampling = (2, 2) if kind.chroma == "420" else (1, 1)
    bank = tissue_tiles(tile_px)
    glass = np.full((tile_px, tile_px, 3), GLASS, np.uint8)

    def encode(tile: U8) -> bytes:
        return bytes(imagecodecs.jpeg8_encode(tile, QUALITY, subsampling=sampling))

    tables = _tables(encode(glass))
    streams = [_abbreviated(encode(tile)) for tile in (glass, *bank)]  # number 0 is glass
    n = -(-side // tile_px)
    centres = (np.arange(n) + 0.5) * tile_px
    numbers = np.random.default_rng(SEED).integers(1, len(streams), (n, n))
    numbers[~in_tissue(side, centres[None, :], centres[:, None])] = 0

    small_px = tile_px // STEP
    small = np.stack([tile[STEP // 2 :: STEP, STEP // 2 :: STEP] for tile in (glass, *bank)])
    above = small[numbers].swapaxes(1, 2).reshape(n * small_px, n * small_px, 3)[: -(-side // STEP), : -(-side // STEP)]

    def above_tiles() -> Iterator[bytes]:
        m = -(-len(above) // tile_px)
        padded = np.pad(above, ((0, m * tile_px - len(above)),) * 2 + ((0, 0),), mode="edge")
        for row, column in itertools.product(range(m), repeat=2):
            y, x = row * tile_px, column * tile_px
            yield _abbreviated(encode(np.ascontiguousarray(padded[y : y + tile_px, x : x + tile_px])))

    full = f"Aperio Image Library (wsi benchmark)\r\n{side}x{side}"
    note = f"({tile_px}x{tile_px}) JPEG/YCC Q={QUALITY}|AppMag = 40|MPP = {MPP}"
    options = {"photometric": "rgb", "compression": "jpeg", "subsampling": sampling, "metadata": None}
    tiled = options | {"dtype": np.uint8, "tile": (tile_px, tile_px), "jpegtables": tables}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write((streams[i] for i in numbers.ravel()), shape=(side, side, 3), description=f"{full} {note}", **tiled)
        # Aperio's second page is a thumbnail in strips.
        tiff.write(np.ascontiguousarray(above[::4, ::4]), description=full, rowsperstrip=16, **options)
        tiff.write(above_tiles(), shape=above.shape, description=f"{full} -> {len(above)}x{len(above)} {note}", **tiled)


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Give a JPEG's segments up to its start of scan, with that and all that follows as the last one."""
    at = 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield jpeg[at + 1], jpeg[at:end]
        at = end
    yield 0xDA, jpeg[at:]


def _tables(jpeg: bytes) -> bytes:
    """Quantisation and Huffman tables as TIFF keeps them: once for all tiles."""
    return b"\xff\xd8" + b"".join(part for marker, part in _segments(jpeg) if marker in (0xDB, 0xC4)) + b"\xff\xd9"


def _abbreviated(jpeg: bytes) -> bytes:
    """Drop the tables (and the JFIF header) from a JPEG."""
    return b"\xff\xd8" + b"".join(part for marker, part in _segments(jpeg) if marker in (0xC0, 0xDA))
