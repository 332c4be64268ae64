"""``wsi tile`` from end to end: stores, tables, resuming, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr

from tests.e2e.conftest import Run, digest, rows
from tests.slide.make import halved, section, tiff_slide, write_jpeg_pyramid, write_pyramid
from wsi.archive import jobs
from wsi.slide import open_slide
from wsi.store import PatchStore


@pytest.fixture
def jpeg_slide(tmp_path: Path) -> Path:
    """A pyramid of JPEG tiles of 64 px."""
    full = section(900, 700)
    return write_jpeg_pyramid(tmp_path / "own.tif", [full, halved(full)], tile=64)


def test_what_lies_there_afterwards(wsi: Run, slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "stores"
    code, stdout, stderr = wsi("tile", slides, "--mpp", 1, "--tile", 32, "--pixels", "zstd", "-o", out, "--json", "-q")
    assert code == 0 and stderr == ""
    told = json.loads(stdout)
    assert [row["slide_id"] for row in told["tiled"]] == ["a", "b"] and told["failed"] == []
    table = rows(out / "slides.csv")
    assert [row["status"] for row in table] == ["tiled", "tiled"] and rows(out / "failures.csv") == []
    assert not {"grade", "seconds_grade"} & set(table[0]) and float(table[0]["seconds_tiles"]) >= 0
    configuration = json.loads((out / "run.json").read_text())["configuration"]
    assert configuration["mpp"] == 1.0 and configuration["pixels"] == "zstd" and configuration["level"] is None
    for row in table:
        store = PatchStore.open(out / row["slide_id"] / "store.zarr")
        assert len(store) == int(row["n_tiles"]) > 50 and float(row["tile_mpp"]) == 1.0 and row["tile_px"] == "32"
        with open_slide(slides / f"{row['slide_id']}.svs") as slide:
            for i in (0, 40, len(store) - 1):
                np.testing.assert_array_equal(store.read([i])[0], slide.read(store.grid.box(i), (32, 32)))
        other = zarr.open_group(str(store.path), mode="r", zarr_format=3)["pixels"]
        lazy = da.from_zarr(other)
        np.testing.assert_array_equal(lazy[:9].compute(), store.read(range(9)))


def test_the_slides_own_tiles(wsi: Run, jpeg_slide: Path, tmp_path: Path) -> None:
    code, _, _ = wsi("tile", jpeg_slide, "--pixels", "verbatim", "--min-tissue", 0, "-o", tmp_path / "r", "-q")
    store, slide = PatchStore.open(tmp_path / "r/own/store.zarr"), tiff_slide(jpeg_slide)
    assert code == 0 and len(store) == (900 // 64) * (700 // 64) and store.grid.tile_px == 64
    for i in (0, 70, len(store) - 1):
        np.testing.assert_array_equal(store.read([i])[0], slide.read(store.grid.box(i), (64, 64)))
    code, _, _ = wsi("tile", jpeg_slide, "--pixels", "verbatim", "--level", 1, "-o", tmp_path / "s", "-q")
    assert code == 0 and PatchStore.open(tmp_path / "s/own/store.zarr").grid.mpp == pytest.approx(1.0)


def test_the_same_again_does_nothing(wsi: Run, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("tile", slides, "--mpp", 1, "--tile", 32, "-o", tmp_path, "-q")
    assert wsi(*arguments)[0] == 0
    before, table = digest(tmp_path), (tmp_path / "slides.csv").read_bytes()
    monkeypatch.setattr(jobs, "tile_slide", None)  # would fail
    assert wsi(*arguments)[0] == 0
    assert digest(tmp_path) == before and (tmp_path / "slides.csv").read_bytes() == table


def test_after_an_interruption_only_what_is_missing_is_made(
    wsi: Run, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("tile", slides / "b.svs", "--mpp", 0.5, "--tile", 32, "--stride", 20, "--min-tissue", 0, "-q", "-o")
    assert wsi(*arguments, tmp_path / "whole")[0] == 0
    kept: list[int] = []
    keep = PatchStore.keep

    def stop_after_two(self: PatchStore, shard: int, chunks: list[bytes]) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(shard)
        keep(self, shard, chunks)

    with monkeypatch.context() as patched:
        patched.setattr(PatchStore, "keep", stop_after_two)
        code, _, stderr = wsi(*arguments, tmp_path / "r")
    assert code == 130 and "goes on from here" in stderr and kept == [0, 1]
    monkeypatch.setattr(PatchStore, "keep", lambda self, shard, chunks: kept.append(shard) or keep(self, shard, chunks))
    assert wsi(*arguments, tmp_path / "r")[0] == 0
    assert kept == list(range(7)) and digest(tmp_path / "r") == digest(tmp_path / "whole")


def test_one_bad_slide_does_not_end_the_run(wsi: Run, slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.svs").symlink_to(slides / "a.svs")
    (folder / "letter.svs").write_text("Dear Sir or Madam")
    write_pyramid(folder / "nompp.svs", [section()], None, svs=True)
    code, _, stderr = wsi("tile", folder, "--mpp", 1, "--tile", 32, "-o", tmp_path / "r", "-q")
    assert code == 3 and len(stderr.splitlines()) == 2
    assert [row["slide_id"] for row in rows(tmp_path / "r/slides.csv")] == ["a"]
    failures = {row["slide_id"]: row for row in rows(tmp_path / "r/failures.csv")}
    assert set(failures) == {"letter", "nompp"} and "--slide-mpp" in failures["nompp"]["remedy"]
    code, _, _ = wsi("tile", folder / "nompp.svs", "--slide-mpp", 0.5, "--mpp", 1, "--tile", 32, "-o", tmp_path / "s")
    assert code == 0 and rows(tmp_path / "s/slides.csv")[0]["mpp_source"] == "user"
    assert rows(tmp_path / "s/slides.csv")[0]["flags"] == ""
    code, _, _ = wsi(
        "tile", folder / "a.svs", "--slide-mpp", 0.25, "--mpp", 1, "--tile", 32, "-o", tmp_path / "t", "-q"
    )
    assert code == 0 and rows(tmp_path / "t/slides.csv")[0]["flags"] == "mpp-overridden"
    assert "0.25 (user) was given" in (tmp_path / "t/a/result.json").read_text()


def test_wrong_calls(wsi: Run, slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    cases = [
        ([tmp_path / "nothing.svs", "-o", out], "no such file"),
        ([slides / "a.svs", "-o", out, "--pixels", "gif"], "Known: none, zstd, jpeg, verbatim"),
        ([slides / "a.svs", "-o", out, "--reader", "paint"], "Known readers"),
        ([slides / "a.svs", "-o", out, "--mpp", 0.5, "--level", 0], "only one"),
        ([slides / "a.svs", "-o", out, "--mpp", -0.5], "positive"),
    ]
    for arguments, says in cases:
        code, _, stderr = wsi("tile", *arguments)
        assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, arguments
    assert not out.exists()
    code, _, stderr = wsi("tile", slides / "a.svs", "-o", out, "--pixels", "verbatim", "-q")
    assert code == 2 and "jpeg or zstd" in stderr and rows(out / "failures.csv")[0]["stage"] == "grid"
    assert not (out / "a/store.zarr").exists()


def test_another_wish_is_refused_and_named(wsi: Run, slides: Path, tmp_path: Path) -> None:
    arguments = ("tile", slides / "a.svs", "--mpp", 1, "--tile", 32, "-o", tmp_path, "-q")
    assert wsi(*arguments)[0] == 0
    before = digest(tmp_path)
    code, _, stderr = wsi(*arguments, "--pixels", "zstd")
    assert code == 2 and 'pixels was "jpeg", now "zstd"' in stderr and digest(tmp_path) == before
    assert wsi(*arguments, "--pixels", "zstd", "--force")[0] == 0
    assert PatchStore.open(tmp_path / "a/store.zarr").pixels == "zstd"


class TestScoring:
    """``wsi score --pixels``."""

    def test_kinds(self, wsi: Run, slides: Path, tmp_path: Path) -> None:
        kept = {}
        for pixels in ("zstd", "jpeg"):
            code, _, _ = wsi(
                "score", slides / "a.svs", "-m", "phantom", "--pixels", pixels, "-o", tmp_path / pixels, "-q"
            )
            kept[pixels] = PatchStore.open(tmp_path / pixels / "a/store.zarr")
            assert code == 0 and kept[pixels].missing() == [] and kept[pixels].pixels == pixels
        exact, lossy = (kept[pixels].get("pixels").astype(int) for pixels in ("zstd", "jpeg"))
        assert 0 < np.abs(exact - lossy).mean() < 4
        np.testing.assert_array_equal(kept["zstd"].get("probabilities"), kept["jpeg"].get("probabilities"))
        code, _, stderr = wsi("score", slides / "a.svs", "-m", "phantom", "--pixels", "gif", "-o", tmp_path / "x")
        assert code == 2 and "Known: none, zstd" in stderr

    def test_verbatim_where_the_models_tiles_are_the_slides_own(
        self, wsi: Run, jpeg_slide: Path, tmp_path: Path
    ) -> None:
        """The phantom model wants 64 px at 2 mpp: level 1 of a slide of 1 mpp."""
        common = ("score", jpeg_slide, "-m", "phantom", "--slide-mpp", 1, "-q")
        assert wsi(*common, "--pixels", "verbatim", "-o", tmp_path / "v")[0] == 0
        assert wsi(*common, "--pixels", "zstd", "-o", tmp_path / "z")[0] == 0
        own, read = (PatchStore.open(tmp_path / name / "own/store.zarr") for name in ("v", "z"))
        np.testing.assert_array_equal(own.get("pixels"), read.get("pixels"))
        np.testing.assert_array_equal(own.get("probabilities"), read.get("probabilities"))
        assert own.missing() == []
        code, _, stderr = wsi("score", jpeg_slide, "-m", "phantom", "--pixels", "verbatim", "-o", tmp_path / "w", "-q")
        assert code == 2 and "[grid]" in stderr and "jpeg or zstd" in stderr
        assert not (tmp_path / "w/own/store.zarr").exists()


def test_ink_is_kept_on_request(wsi: Run, tmp_path: Path) -> None:
    rgb = np.full((600, 800, 3), 243, np.uint8)
    rgb[100:500, 200:600] = (45, 85, 185)
    slide = tmp_path / "blue.svs"
    write_pyramid(slide, [rgb], 1.0, svs=True)
    for name, options, found in (("a", (), False), ("b", ("--keep-pen",), True)):
        assert (
            wsi("tile", slide, "--level", 0, "--tile", 64, *options, "--pixels", "none", "-o", tmp_path / name, "-q")[0]
            == 0
        )
        assert (int(rows(tmp_path / name / "slides.csv")[0]["n_tiles"]) > 30) == found
        configuration = json.loads((tmp_path / name / "run.json").read_text())["configuration"]
        assert configuration["tissue"]["exclude_pen"] != found
    assert (
        wsi("tile", slide, "--level", 0, "--tile", 64, "--pixels", "none", "-o", tmp_path / "a", "--keep-pen", "-q")[0]
        == 2
    )
