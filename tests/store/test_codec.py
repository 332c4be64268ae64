"""wsi.jpeg: what other decoders give, refusals, and Zarr finding it by itself."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import zarr
from PIL import Image

from tests.slide.make import picture, section
from wsi.store.codec import SUBSAMPLINGS, JpegCodec, decode_jpeg, encode_jpeg

U8 = np.ndarray


def decoded(stream: bytes, shape: tuple[int, ...]) -> U8:
    out = np.full(shape, 77, np.uint8)
    decode_jpeg(stream, out)
    return out


def with_pillow(stream: bytes) -> U8:
    return np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("rgb", [picture(64, 48), section(64, 48), picture(50, 33)], ids=["smooth", "tissue", "odd"])
def test_other_decoders_give_the_same(subsampling: str, rgb: U8) -> None:
    for stream in (
        encode_jpeg(rgb, 85, subsampling),
        imagecodecs.jpeg8_encode(rgb, level=60, subsampling=SUBSAMPLINGS[subsampling]),
        imagecodecs.jpeg8_encode(rgb, level=60, colorspace="RGB", outcolorspace="RGB"),  # with an Adobe marker
        imagecodecs.jpeg8_encode(rgb[..., 0].copy()),  # grey
    ):
        np.testing.assert_array_equal(decoded(stream, rgb.shape), with_pillow(stream))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("side", [8, 50, 256])
def test_white_stays_white(subsampling: str, side: int) -> None:
    white = np.full((side, side, 3), 255, np.uint8)
    assert (decoded(encode_jpeg(white, 100, subsampling), white.shape) == 255).all()


def test_what_is_cut_short_is_refused_wherever_it_is_cut() -> None:
    stream = encode_jpeg(picture(64, 64), 80)
    for length in range(len(stream)):
        with pytest.raises(ValueError):
            decoded(stream[:length], (64, 64, 3))
    scan = stream.index(b"\xff\xda")
    for length in range(scan + 20, len(stream) - 2, 11):  # with an end that looks right
        with pytest.raises(ValueError):
            decoded(stream[:length] + b"\xff\xd9", (64, 64, 3))


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (16, 16), (200, 200)])
def test_another_size_is_refused(shape: tuple[int, int]) -> None:
    stream = encode_jpeg(picture(64, 64)[:, :48].copy())
    with pytest.raises(ValueError, match=r"too small|holds"):
        decoded(stream, (*shape, 3))


def test_what_is_no_jpeg_is_refused() -> None:
    for junk in (b"", b"\xff\xd8", b"Dear Sir or Madam", bytes(1000)):
        with pytest.raises(ValueError):
            decoded(junk, (8, 8, 3))


@pytest.fixture
def array(tmp_path: Path) -> zarr.Array:
    made: zarr.Array = zarr.create_array(
        tmp_path / "a.zarr", shape=(5, 40, 40, 3), dtype="uint8", chunks=(1, 40, 40, 3), shards=(4, 40, 40, 3),
        serializer=JpegCodec(75, "4:4:4"), compressors=None, fill_value=255,
    )  # fmt: skip
    return made


def test_zarr_writes_and_reads_with_it(array: zarr.Array) -> None:
    rgb = np.stack([section(40, 40, seed) for seed in range(5)])
    array[:] = rgb
    expected = np.stack([with_pillow(encode_jpeg(patch, 75, "4:4:4")) for patch in rgb])
    np.testing.assert_array_equal(array[:], expected)
    np.testing.assert_array_equal(array[3, 5:7, 8:], expected[3, 5:7, 8:])
    assert 0 < np.abs(expected.astype(int) - rgb).mean() < 10


def test_a_fresh_process_finds_it_by_its_entry_point(array: zarr.Array, tmp_path: Path) -> None:
    array[:] = np.stack([picture(40, 40, seed) for seed in range(5)])
    code = (
        "import sys, zarr\n"
        "assert 'wsi' not in sys.modules\n"
        f"array = zarr.open_array({str(tmp_path / 'a.zarr')!r}, mode='r')\n"
        "sys.stdout.buffer.write(array[:].tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout == np.asarray(array[:]).tobytes()


def test_zarr_meets_damage_as_an_error(array: zarr.Array, tmp_path: Path) -> None:
    array[:] = np.stack([picture(40, 40, seed) for seed in range(5)])
    shard = tmp_path / "a.zarr/c/0/0/0/0"
    raw = shard.read_bytes()
    end = raw.index(b"\xff\xd9")
    shard.write_bytes(raw[: end - 200] + bytes(202) + raw[end + 2 :])
    with pytest.raises(ValueError, match=r"[Cc]orrupt|[Pp]remature"):
        array[0]


def test_metadata_round_trip() -> None:
    codec = JpegCodec(33, "4:2:2")
    assert JpegCodec.from_dict(codec.to_dict()) == codec
    assert codec.to_dict() == {"name": "wsi.jpeg", "configuration": {"quality": 33, "subsampling": "4:2:2"}}
    assert JpegCodec.from_dict({"name": "wsi.jpeg"}) == JpegCodec()


@pytest.mark.parametrize("arguments", [(0,), (101,), (90.0,), (90, "4:1:0")])
def test_refuses_what_is_no_quality_and_no_subsampling(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="JPEG"):
        JpegCodec(*arguments)


@pytest.mark.parametrize(
    ("shape", "chunks", "dtype"),
    [((4, 8, 8, 3), (1, 8, 8, 3), "uint16"), ((4, 8, 8, 4), (1, 8, 8, 4), "uint8"), ((8, 8, 3), (8, 8, 3), "uint8")],
)
def test_arrays_of_other_things_are_refused(tmp_path: Path, shape: tuple, chunks: tuple, dtype: str) -> None:
    with pytest.raises(ValueError, match=r"wsi\.jpeg holds uint8"):
        zarr.create_array(
            tmp_path / "a.zarr", shape=shape, dtype=dtype, chunks=chunks, serializer=JpegCodec(), compressors=None
        )


def test_chunks_of_many_pictures_are_refused(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(4, 8, 8, 3), dtype="uint8", chunks=(2, 8, 8, 3), serializer=JpegCodec(),
        compressors=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"takes chunks of \(1, h, w, 3\)"):
        array[:] = np.zeros((4, 8, 8, 3), np.uint8) + 9
