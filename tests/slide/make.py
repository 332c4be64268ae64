"""Small slides with known pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from wsi.slide.base import GivenMpp
from wsi.slide.tiff import TiffReader


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, uint8 (height, width, 3): no two places alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height) + 60], axis=-1)
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def halved(rgb: np.ndarray) -> np.ndarray:
    """Average of 2 x 2 pixels; an odd last row or column is dropped."""
    h, w = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    cells = rgb[:h, :w].astype(np.float64).reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))
    return np.floor(cells + 0.5).astype(np.uint8)


def write_pyramid(
    path: Path, levels: list[np.ndarray], mpp: float | None = 0.5, *, svs: bool = False, tile: int = 64
) -> None:
    """Write a lossless tiled pyramid: a generic TIFF, or Aperio-like."""
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            arguments: dict = {"tile": (tile, tile), "compression": "deflate", "photometric": "rgb", "metadata": None}
            if svs:
                text = f"Aperio Image Library v12\r\n{level.shape[1]}x{level.shape[0]}"
                arguments["description"] = text + (f"|AppMag = 20|MPP = {mpp}" if mpp else "|AppMag = 20")
            elif mpp:
                arguments |= {"resolution": (10000 / mpp, 10000 / mpp), "resolutionunit": "CENTIMETER"}
            tiff.write(level, subfiletype=0 if i == 0 or svs else 1, **arguments)


def write_jpeg_pyramid(
    path: Path,
    levels: Sequence[np.ndarray],
    mpp: float = 0.5,
    *,
    tile: int = 128,
    subsampling: tuple[int, int] = (2, 2),
    rgb: bool = False,
    quality: int = 85,
) -> Path:
    """Write a generic pyramid of JPEG tiles with shared tables: YCbCr, or `rgb` without an Adobe marker, as Aperio."""
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate(levels):
            tiff.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": quality, "outcolorspace": "rgb"} if rgb else {"level": quality},
                subsampling=(1, 1) if rgb else subsampling,
                subfiletype=min(i, 1),
                resolution=(10000 / mpp, 10000 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def spoil(path: Path, *tiles: int, page: int = 0, whole: bool = False) -> None:
    """Damage stored tiles, which are numbered row by row: zeros in place of their second half, or of all they hold."""
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for tile in tiles:
            offset, count = tiff.pages[page].dataoffsets[tile], tiff.pages[page].databytecounts[tile]
            start = 0 if whole else count // 2
            raw[offset + start : offset + count] = bytes(count - start)
    path.write_bytes(raw)


def tiff_slide(path: str | os.PathLike[str], mpp: float = 0.5) -> TiffReader:
    """Open a slide with our own TIFF reader, whatever resolution it says."""
    return TiffReader(os.fspath(path), GivenMpp(mpp, "user"))


def section(width: int = 900, height: int = 700, seed: int = 0) -> np.ndarray:
    """A pink piece with a purple patch in it, on glass, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.full((height, width, 3), 243.0)
    tissue = ((x - width / 2) / (width * 0.4)) ** 2 + ((y - height / 2) / (height * 0.4)) ** 2 < 1
    rgb[tissue] = (225, 150, 190)
    rgb[tissue & (x > width * 0.55)] = (130, 80, 160)
    return np.clip(rgb + rng.normal(0, 6, rgb.shape), 0, 255).astype(np.uint8)


def tiny_slides() -> dict[str, bytes]:
    """Valid slides of one to five kilobytes, by name: every compression and layout that a TIFF reader must know."""
    noisy = picture(40, 24)
    plain = np.repeat(np.repeat(picture(5, 3), 8, axis=0), 8, axis=1)  # compresses well
    slides = {f"plain-{name}": _tiny([plain], compression=name) for name in ("none", "lzw", "deflate", "zstd")}
    slides |= {f"plain-{name}": _tiny([plain], compression=name) for name in ("packbits", "jpeg2000", "lzma", "webp")}
    slides["predictor"] = _tiny([plain], compression="deflate", predictor=True)
    for name, sampling in {"420": (2, 2), "422": (2, 1), "444": (1, 1)}.items():
        slides[f"jpeg-{name}"] = _tiny([noisy], compression="jpeg", photometric="ycbcr", subsampling=sampling)
    slides["jpeg-rgb"] = _tiny([noisy], compression="jpeg", compressionargs={"outcolorspace": "rgb"})
    slides["jpeg-grey"] = _tiny([noisy[..., 0]], compression="jpeg", photometric="minisblack")
    aperio = {"description": "Aperio Image Library v12\r\n40x24|AppMag = 20|MPP = 0.5"}
    slides["aperio-jp2000"] = _tiny([plain], compression="aperio_jp2000_rgb", **aperio)
    slides["aperio"] = _tiny([noisy], compression="jpeg", **aperio)
    slides["shared-tables"] = _shared_tables(noisy, **aperio)
    levels = [plain, halved(plain), halved(halved(plain))]
    slides["pyramid"] = _tiny(levels, compression="deflate")
    slides["big-endian"] = _tiny(levels, {"byteorder": ">"}, compression="deflate")
    slides["bigtiff"] = _tiny(levels, {"bigtiff": True}, compression="deflate")
    slides["subifds"] = _tiny(levels, {"bigtiff": True}, subifds=2, compression="deflate")
    mpp = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    slides["ome"] = _tiny(levels, {"ome": True}, subifds=2, compression="deflate", metadata=mpp)
    slides["philips"] = _tiny(levels[:2], compression="deflate", software="Philips DP v1.0", description=_philips(2))
    slides["planes"] = _tiny([np.moveaxis(plain, 2, 0)], compression="deflate", planarconfig="separate")
    slides["alpha"] = _tiny([np.dstack([plain, plain[..., :1]])], compression="deflate", extrasamples=["unassalpha"])
    some = [None if i % 2 else tile for i, tile in enumerate(_tiles(noisy))]
    slides["sparse"] = _tiny([iter(some)], compression="lzw", shape=noisy.shape, dtype=noisy.dtype)
    return slides


def _tiny(levels: list, layout: dict | None = None, subifds: int | None = None, **arguments: object) -> bytes:
    shape: dict = {"tile": (16, 16), "photometric": "rgb", "metadata": None}
    shape |= {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"} | arguments
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **(layout or {})) as tiff:
        for i, level in enumerate(levels):
            tiff.write(level, subfiletype=int(i > 0), subifds=None if i else subifds, **shape)
            shape["metadata"] = None
    return file.getvalue()


def _philips(levels: int, mpp: float = 0.5) -> str:
    """The description of a Philips TIFF, as far as readers look at it; each level is half of the one before."""

    def spacing(level: int) -> str:
        mm = f"&quot;{mpp / 1000 * 2**level}&quot;"
        return f'<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030">{mm} {mm}</Attribute>'

    stored = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(level)}</DataObject>' for level in range(levels)
    )
    return (
        f'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">{spacing(0)}'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{stored}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )


def _tiles(rgb: np.ndarray, side: int = 16) -> list[np.ndarray]:
    h, w = (-(-n // side) * side for n in rgb.shape[:2])
    padded = np.pad(rgb, ((0, h - rgb.shape[0]), (0, w - rgb.shape[1]), (0, 0)), mode="edge")
    return [padded[y : y + side, x : x + side] for y in range(0, h, side) for x in range(0, w, side)]


def _shared_tables(rgb: np.ndarray, **arguments: object) -> bytes:
    """An RGB JPEG slide as Aperio writes it: no Adobe marker, and one JPEGTables tag for all tiles."""
    tables, tiles = b"", []
    for tile in _tiles(rgb):
        raw = imagecodecs.jpeg8_encode(tile, level=75, colorspace="rgb", outcolorspace="rgb")
        place, own, common = 2, b"", b""
        while (marker := raw[place + 1]) != 0xDA:  # start of scan: all that follows is the tile's own
            segment = raw[place : place + 2 + int.from_bytes(raw[place + 2 : place + 4], "big")]
            if marker in (0xDB, 0xC4):  # quantisation and Huffman tables
                common += segment
            elif marker != 0xEE:  # Adobe
                own += segment
            place += len(segment)
        tables = b"\xff\xd8" + common + b"\xff\xd9"
        tiles.append(b"\xff\xd8" + own + raw[place:])
    arguments |= {"shape": rgb.shape, "dtype": rgb.dtype, "extratags": [(347, 7, len(tables), tables, True)]}
    return _tiny([iter(tiles)], compression="jpeg", compressionargs={"outcolorspace": "rgb"}, **arguments)
