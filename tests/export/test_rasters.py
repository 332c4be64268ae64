"""Heatmaps as images: where the mark lies by each format's own metadata, read by tifffile, zarr and Pillow."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from tests.conftest import Run
from tests.export.make import marked_results
from wsi.errors import OutputError
from wsi.export.rasters import Raster, export_rasters
from wsi.store.multiscale import write_multiscale
from wsi.units import Box, Mpp

OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
GRIDS = [(0.25, 0.5, None), (0.2431, 0.5, None), (0.5, 1.0, 32)]


@pytest.mark.parametrize("bounds", [None, Box(700, 300, 2000, 1600)])
@pytest.mark.parametrize(("mpp", "tile_mpp", "stride"), GRIDS)
def test_the_mark_is_hit_in_every_image(tmp_path: Path, bounds, mpp, tile_mpp, stride):
    """The brightest pixel begins where the mark does; with overlap one of the steps that lie on it."""
    made = marked_results(tmp_path / "r", mpp=mpp, tile_mpp=tile_mpp, stride_px=stride, bounds=bounds)
    for kind in ("ome-tiff", "png"):
        export_rasters(tmp_path / "r", tmp_path, kind)
    export_rasters(tmp_path / "r", tmp_path / "new", "ome-zarr")
    export_rasters(tmp_path / "r", tmp_path / "old", "ome-zarr", version="0.4")

    found = []
    with tifffile.TiffFile(tmp_path / "a.ome.tiff") as tiff:
        assert tiff.is_ome
        pixels = ElementTree.fromstring(tiff.ome_metadata).find(f"{OME}Image/{OME}Pixels")
        values = tiff.series[0].levels[0].asarray()[0]
        names = [each.get("Name") for each in pixels.findall(f"{OME}Channel")]
        assert names == ["tumour", "prob_stroma", "prob_tumour"] and pixels.get("PhysicalSizeXUnit") == "µm"
        um = np.array([float(pixels.get("PhysicalSizeX")), float(pixels.get("PhysicalSizeY"))])
    at = np.array(np.unravel_index(np.nanargmax(values), values.shape))[::-1]
    found.append(at * um / mpp)
    for folder in ("new", "old"):
        group = zarr.open_group(tmp_path / folder / "a.ome.zarr", mode="r")
        about = group.attrs.get("ome", group.attrs)["multiscales"][0]
        array = group[about["datasets"][0]["path"]][0]
        assert np.array_equal(array, values, equal_nan=True)
        scale, shift = (each[kind] for each, kind in zip(
            about["datasets"][0]["coordinateTransformations"], ("scale", "translation"), strict=True))  # fmt: skip
        centre = (at[::-1] * scale[1:] + shift[1:])[::-1] / mpp  # from the centre of the slide's first pixel
        found.append(centre + 0.5 - np.array(scale[:0:-1]) / mpp / 2)
    step = np.array(made.grid.stride)
    for corner in found:
        inside = (corner - (made.mark.x, made.mark.y) > -0.505) & (
            corner + step - (made.mark.x + made.mark.w, made.mark.y + made.mark.h) < 0.505
        )
        assert inside.all(), (corner, made.mark)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (*values.shape, 4) and ((picture[..., 3] == 255) == np.isfinite(values)).all()


def test_levels_lie_on_each_other(tmp_path: Path):
    """A pixel of a coarser level covers its four: centres by the metadata are the mean of their centres."""
    rng = np.random.default_rng(0)
    raster = Raster(rng.random((2, 700, 900), np.float32), ("a", "b"), (128.0, 130.0), Mpp(0.25, 0.26))
    levels = raster.levels()
    assert [level.shape for level in levels] == [(2, 700, 900), (2, 350, 450), (2, 175, 225)]
    assert levels[1][1, 7, 9] == pytest.approx(levels[0][1, 14:16, 18:20].mean(), rel=1e-6)
    write_multiscale(tmp_path / "a.ome.zarr", levels, ("a", "b"), step=raster.step, mpp=raster.mpp)
    datasets = zarr.open_group(tmp_path / "a.ome.zarr", mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    transforms = [
        [np.array(t.get("scale", t.get("translation"))) for t in d["coordinateTransformations"]] for d in datasets
    ]
    for (fine, fine_at), (coarse, coarse_at) in pairwise(transforms):
        assert coarse * 3 + coarse_at == pytest.approx(fine * [3, 6.5, 6.5] + fine_at + (coarse - fine) * [3, 0, 0])


def test_missing_tiles_are_nan_in_the_pyramid_too():
    values = np.full((1, 600, 600), np.nan, np.float32)
    values[0, 10, 10] = 0.25
    levels = Raster(values, ("p",), (1.0, 1.0), Mpp(1, 1)).levels()
    assert [np.isfinite(level).sum() for level in levels] == [1, 1, 1] and np.nanmax(levels[-1]) == 0.25


def test_the_same_results_give_the_same_images(tmp_path: Path):
    marked_results(tmp_path / "r")
    for run in ("x", "y"):
        for kind in ("ome-tiff", "png", "ome-zarr"):
            export_rasters(tmp_path / "r", tmp_path / run, kind)
            export_rasters(tmp_path / "r", tmp_path / run, kind)  # again: replaced
    files = [path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes(), file


def test_what_stands_in_the_way_is_not_deleted(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r")
    (tmp_path / "out/a.ome.zarr").mkdir(parents=True)
    (tmp_path / "out/a.ome.zarr/mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="no OME-Zarr"):
        export_rasters(tmp_path / "r", tmp_path / "out", "ome-zarr")
    assert (tmp_path / "out/a.ome.zarr/mine.txt").read_text() == "precious"
    assert wsi("export", "ome-zarr", tmp_path / "r", "-o", tmp_path / "x", "--version", "0.6")[0] == 2
    code, out, _ = wsi("export", "png", tmp_path / "r", "-o", tmp_path / "x", "--json")
    assert code == 0 and json.loads(out)[0]["pixel_um"] == [32.0, 32.0]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_opens_it(tmp_path: Path, version: str):
    reader = pytest.importorskip("ome_zarr.reader", reason="ome-zarr is not installed", exc_type=ImportError)
    io = pytest.importorskip("ome_zarr.io", reason="ome-zarr is not installed", exc_type=ImportError)
    made = marked_results(tmp_path / "r")
    export_rasters(tmp_path / "r", tmp_path, "ome-zarr", version=version)
    (node, *_) = list(reader.Reader(io.parse_url(str(tmp_path / "a.ome.zarr")))())
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    assert node.data[0].shape == (3, *(max(index) + 1 for index in (made.grid.rows, made.grid.columns)))
    assert node.metadata["coordinateTransformations"][0][0]["scale"][1] == pytest.approx(32.0)
    models = pytest.importorskip("ome_zarr_models", reason="ome-zarr-models is not installed")
    assert models.open_ome_zarr(zarr.open_group(tmp_path / "a.ome.zarr", mode="r")).ome_zarr_version == version
