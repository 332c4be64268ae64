"""Patches with labels: what is read, what is checked, and what the outlines on a slide make of its tiles."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from tests.train.make import write_labels, write_patches
from wsi.cli.train import _of_stores
from wsi.errors import TrainError, WsiError
from wsi.grid import TileGrid
from wsi.store import PatchStore
from wsi.train.cohort import check_split, k_fold
from wsi.train.images import Patches, read_folder, read_stores, read_table
from wsi.units import Mpp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_patches(tmp_path / "patches", 24)


def test_a_folder_of_classes(folder: Path) -> None:
    found = read_folder(folder, patient_in=r"(p\d+)_")
    case = found.cohort.cases["b/p00_001.png"]
    assert len(found.cohort.cases) == 24 and found.cohort.class_names == ("a", "b") and found.split is None
    assert (case.patient, case.label) == ("p00", 1)
    patches = Patches(found.places)
    with Image.open(folder / "b" / "p00_001.png") as image:
        np.testing.assert_array_equal(patches.read(["a/p00_000.png", "b/p00_001.png"])[1], np.asarray(image))
    for split in k_fold(found.cohort, 4, 0):
        check_split(found.cohort, split, "split")


def test_a_folder_that_is_divided(folder: Path) -> None:
    for part in ("train", "val", "test"):
        shutil.copytree(folder, folder.parent / "divided" / part)
    found = read_folder(folder.parent / "divided")
    assert found.split is not None and [len(part) for part in found.split] == [24, 24, 24]
    assert found.split.validation[0].startswith("val/a/") and found.cohort.class_names == ("a", "b")


def test_a_table_and_a_division_in_it(folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    parts = ("train", "validation", "test")
    rows = [
        {"path": path.relative_to(folder).as_posix(), "label": path.parent.name, "patient": f"q{i % 6}",
         "split": parts[i % 6 % 3]}
        for i, path in enumerate(files)
    ]  # fmt: skip
    found = read_table(write_labels(folder / "table.csv", rows))
    assert found.split is not None and [len(part) for part in found.split] == [8, 8, 8]
    assert found.cohort.cases[rows[3]["path"]].patient == "q3"
    assert len(Patches(found.places).checksums) == 24
    rows[4]["patient"] = "q0"
    leaking = read_table(write_labels(folder / "leak.csv", rows))
    assert leaking.split is not None
    with pytest.raises(TrainError, match="patient q0 is in train and in validation"):
        check_split(leaking.cohort, leaking.split, "split")
    rows[0]["split"] = "holdout"
    with pytest.raises(TrainError, match="line 2: split 'holdout'"):
        read_table(write_labels(folder / "bad.csv", rows))


class TestBadInput:
    def test_one_class(self, folder: Path) -> None:
        shutil.rmtree(folder / "b")
        with pytest.raises(TrainError, match="all have the label 'a'"):
            read_folder(folder)

    def test_a_class_without_images(self, folder: Path) -> None:
        (folder / "c").mkdir()
        (folder / "c" / "notes.txt").write_text("later")
        with pytest.raises(TrainError, match="c: is a class without images"):
            read_folder(folder)
        with pytest.raises(TrainError, match="nobody is of the class 'd'"):
            shutil.rmtree(folder / "c")
            read_folder(folder, classes=["a", "b", "d"])

    def test_no_classes_no_folder_no_patient(self, folder: Path) -> None:
        with pytest.raises(TrainError, match="no folder a class"):
            read_folder(folder / "a")
        with pytest.raises(TrainError, match="there is no such folder"):
            read_folder(folder / "z")
        with pytest.raises(TrainError, match=r"p00_000.png: holds no patient"):
            read_folder(folder, patient_in="TCGA")
        with pytest.raises(TrainError, match="no regular expression"):
            read_folder(folder, patient_in="(")

    @pytest.mark.parametrize("damage", ["empty", "cut", "text", "missing", "bomb"])
    def test_a_broken_image_is_named(self, folder: Path, damage: str) -> None:
        found = read_folder(folder)
        path = folder / "b" / "p02_005.png"
        whole = path.read_bytes()
        path.unlink()
        if damage != "missing":
            bomb = whole[:16] + struct.pack(">II", 1 << 16, 1 << 16) + whole[24:29]
            bomb += struct.pack(">I", zlib.crc32(bomb[12:29])) + whole[33:]
            damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not an image", "bomb": bomb}
            path.write_bytes(damaged[damage])
        with pytest.raises(TrainError, match=r"p02_005.png: cannot be read as an image"):
            Patches(found.places)

    @pytest.mark.parametrize("size", [(30, 32), (64, 64)])
    def test_an_image_of_another_size_is_named_or_left_out(self, folder: Path, size: tuple[int, int]) -> None:
        Image.new("RGB", size).save(folder / "a" / "p00_000.png")
        found = read_folder(folder)
        with pytest.raises(
            TrainError, match=rf"p00_000.png: is {size[0]} x {size[1]} px, most are 32 px \(1 are not\)"
        ):
            Patches(found.places)
        patches = Patches(found.places, subset=True)
        assert patches.left_out == ["a/p00_000.png"] and patches.tile_px == 32
        cohort, split = found.without(patches.left_out)
        assert "a/p00_000.png" not in cohort.cases and len(cohort.cases) == 23 and split is None

    def test_a_slide_and_sixteen_bits_are_no_patches(self, folder: Path) -> None:
        Image.new("RGB", (4000, 40)).save(folder / "a" / "p00_000.png")
        with pytest.raises(TrainError, match="Cut slides into patches"):
            Patches(read_folder(folder).places)
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "a" / "p00_000.png")
        with pytest.raises(TrainError, match="pixels of the kind I;16"):
            Patches(read_folder(folder).places)


def test_beyond_its_memory_it_reads_again(folder: Path) -> None:
    found = read_folder(folder)
    kept, read = Patches(found.places), Patches(found.places, keep_bytes=5000)
    names = sorted(found.places, reverse=True)
    np.testing.assert_array_equal(kept.read(names), read.read(names))
    assert kept.checksums == read.checksums


class TestStores:
    def a_store(self, folder: Path, *, pixels: str = "zstd", tile_px: int = 100) -> Path:
        grid = TileGrid.cover((1000, 1000), slide_mpp=Mpp(1, 1), mpp=1.0, tile_px=tile_px)
        store = PatchStore.create(folder / "store.zarr", grid, {}, pixels=pixels)
        if pixels != "none":
            rgb = np.arange(len(grid), dtype=np.uint8)[:, None, None, None].repeat(tile_px, 1).repeat(tile_px, 2)
            unreadable = np.arange(len(grid)) == 1
            store.write(0, {"pixels": rgb.repeat(3, 3), "unreadable": unreadable})
        return folder / "store.zarr"

    def test_tiles_are_of_the_class_that_covers_half(self, tmp_path: Path) -> None:
        stores = {"s": self.a_store(tmp_path / "s"), "t": self.a_store(tmp_path / "t")}
        outlines = {
            "s": [
                ("tumour", shapely.box(0, 0, 240, 100)),  # tiles 0, 1 (unreadable); of tile 2 less than half
                ("tumour", shapely.box(300, 0, 360, 100)),  # tile 3, of which more than half
                ("stroma", shapely.box(0, 500, 200, 600)),  # tiles 50, 51
                ("tumour", shapely.box(100, 500, 200, 600)),  # tile 51 is claimed by both
                ("pen", shapely.box(0, 900, 1000, 1000)),
            ]
        }
        found = read_stores(stores, outlines, classes=["stroma", "tumour"])
        labels = {name: case.label for name, case in found.cohort.cases.items()}
        assert labels == {"s/0": 1, "s/3": 1, "s/50": 0} and found.mpp == 1.0
        with_rest = read_stores(stores, outlines, classes=["tumour"], rest="normal", patients={"s": "p", "t": "p"})
        assert with_rest.cohort.class_names == ("normal", "tumour")
        cases = with_rest.cohort.cases
        assert cases["s/2"].label == 0 and cases["s/51"].label == 1 and "s/1" not in cases
        assert len(cases) == 2 * 99 and {case.patient for case in cases.values()} == {"p"}
        assert Patches(found.places).read(["s/50", "s/3"])[:, 0, 0, 0].tolist() == [50, 3]

    def test_what_cannot_be_learnt_from_is_said(self, tmp_path: Path) -> None:
        store = self.a_store(tmp_path / "s")
        drawn = {"s": [("tumour", shapely.box(0, 0, 1000, 100)), ("stroma", shapely.box(0, 500, 1000, 600))]}
        with pytest.raises(WsiError, match="keeps no pixels"):
            read_stores({"s": self.a_store(tmp_path / "n", pixels="none")}, drawn)
        with pytest.raises(WsiError, match="keeps no pixels"):
            read_stores({"s": store, "t": self.a_store(tmp_path / "m", pixels="none")}, drawn)
        with pytest.raises(TrainError, match="holds 80 px at 1 microns per pixel"):
            read_stores({"s": store, "t": self.a_store(tmp_path / "t", tile_px=80)}, drawn)
        with pytest.raises(TrainError, match="no outline covers half"):
            read_stores({"s": store}, {"s": [("tumour", shapely.box(5000, 0, 6000, 100))]})
        with pytest.raises(TrainError, match="no row in the table of patients"):
            read_stores({"s": store}, drawn, patients={"t": "p"})
        with pytest.raises(TrainError, match="all have the label 'tumour'"):
            read_stores({"s": store}, {"s": drawn["s"][:1]})

    def test_a_mask_smaller_than_its_slide_lies_on_all_of_it(self, tmp_path: Path) -> None:
        self.a_store(tmp_path / "results/s")
        numbers = {"slide_id": "s", "size_px": [1000, 1000], "bounds_px": [0, 0, 1000, 1000]}
        (tmp_path / "results/s/result.json").write_text(json.dumps(numbers))
        mask = np.zeros((250, 250), np.uint8)
        mask[:50, :50] = 1
        (tmp_path / "masks").mkdir()
        Image.fromarray(mask).save(tmp_path / "masks/s.png")
        found = _of_stores([tmp_path / "results"], tmp_path / "masks", ["1"], "normal", None, quiet=True)
        tumour = {name for name, case in found.cohort.cases.items() if case.label == 1}
        assert tumour == {"s/0", "s/10", "s/11"}, "and tile 1 could not be read"
