"""Which slide comes first, and what is refused before any does."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from tests.archive.make import CONFIG
from tests.nn.make import write_model
from tests.slide.make import halved, section, spoil, write_jpeg_pyramid, write_pyramid
from wsi import Box, EngineConfig, PatchStore, ScoreConfig, find_slides, open_slide, score_archive, tile_archive
from wsi.archive import Event
from wsi.errors import OutputError, WsiError
from wsi.phantom import PhantomConfig, write_phantom
from wsi.run import estimate_bytes, triage
from wsi.tile import TileConfig, estimate_tiled_bytes


def begun(told: list[Event]) -> list[str]:
    return [event.slide_id for event in told if event.kind == "begin"]


def test_largest_first(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    small = section(seed=3)[:200, :300]
    write_pyramid(tmp_path / "s/a.svs", [small, halved(small)], 0.5, svs=True)
    shutil.copy(slides / "s0.svs", tmp_path / "s/b.svs")
    told: list[Event] = []
    refs = find_slides([str(tmp_path / "s")])
    summary = tile_archive(refs, tmp_path / "r", CONFIG, workers=0, order="size", tell=told.append)
    assert begun(told) == ["b", "a"] and [row["slide_id"] for row in summary.done] == ["a", "b"]
    with pytest.raises(WsiError, match="needs a model"):
        tile_archive(refs, tmp_path / "r", CONFIG, workers=0, order="triage")
    with pytest.raises(WsiError, match="Known: given, size, triage"):
        tile_archive(refs, tmp_path / "r", CONFIG, workers=0, order="random")


def test_likely_positive_first_and_broken_last(slides: Path, tmp_path: Path) -> None:
    """The tiny model sees red: slides are told apart by what it says of the tiles that triage looks at."""
    (tmp_path / "s").mkdir()
    for seed in range(3):
        full = section(seed=seed)
        write_pyramid(tmp_path / f"s/{seed}.svs", [full, halved(full)], 0.5, svs=True)
    (tmp_path / "s/0broken.svs").write_bytes((slides / "s0.svs").read_bytes()[:3000])
    config = EngineConfig(str(write_model(tmp_path / "model", mpp=2.0)), device="cpu", precision="float32")
    engine = config.load()
    score: dict[str, float] = {}
    for seed in range(3):
        path = str(tmp_path / f"s/{seed}.svs")
        score_archive(find_slides([path]), tmp_path / f"alone{seed}", config, workers=0)
        store = PatchStore.open(tmp_path / f"alone{seed}/{seed}/store.zarr")
        assert len(store) <= 32  # so that all of them are looked at
        positive = [engine.model.config.class_names.index(name) for name in engine.model.config.positive_classes]
        found = np.sort(store.get("probabilities")[:, positive].sum(axis=1))
        score[str(seed)] = found[-max(1, len(found) // 8) :].mean()
        assert triage(path, engine, ScoreConfig()) == pytest.approx(score[str(seed)], abs=2e-5)
    told: list[Event] = []
    refs = find_slides([str(tmp_path / "s")])
    summary = score_archive(refs, tmp_path / "r", config, workers=0, order="triage", tell=told.append)
    assert begun(told) == [*sorted(score, key=lambda name: -score[name]), "0broken"]
    assert [row["slide_id"] for row in summary.failed] == ["0broken"]


def test_damage_is_passed_over(tmp_path: Path) -> None:
    """A slide that is scored without its one damaged tile is not put behind all others for it."""
    engine = EngineConfig(str(write_model(tmp_path / "model", mpp=1.0)), device="cpu", precision="float32").load()
    full = section(2048, 1536)
    path = write_jpeg_pyramid(tmp_path / "a.tif", [full, halved(full)], tile=64)
    whole = triage(str(path), engine, ScoreConfig())
    spoil(path, 6 * 16 + 8, page=1)  # row 6, column 8
    assert triage(str(path), engine, ScoreConfig()) == pytest.approx(whole, abs=0.1)


def test_a_small_tumour_is_met_at_low_magnification(tmp_path: Path) -> None:
    """Of 64 tiles all over the slide at most one meets it."""
    engine = EngineConfig("phantom", device="cpu", precision="float32").load()
    found = {}
    for um in (400.0, 0.0):
        path = tmp_path / f"{um}.tif"
        write_phantom(path, PhantomConfig((8192, 8192), tumours=0, tumour_um=(um,) if um else (), seed=2))
        found[um] = triage(str(path), engine, ScoreConfig())
    assert found[400.0] > 0.5 and found[0.0] < 0.1


def test_a_disk_that_is_too_small_is_refused_with_numbers(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = find_slides([str(slides)])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10_000, 10_000))
    with pytest.raises(OutputError, match=r"has 1e-05 GB free, and 2 slides need about 0\.00\d+ GB"):
        tile_archive(refs, tmp_path / "r", CONFIG, workers=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    assert len(tile_archive(refs, tmp_path / "r", CONFIG, workers=0).done) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    assert len(tile_archive(refs, tmp_path / "r", CONFIG, workers=0).done) == 2  # nothing is missing


@pytest.mark.parametrize("pixels", ["none", "zstd", "jpeg"])
def test_estimates_are_near_what_is_written(slides: Path, tmp_path: Path, pixels: str) -> None:
    config = TileConfig(mpp=0.5, tile_px=64, pixels=pixels)
    path = str(slides / "s0.svs")
    tile_archive(find_slides([path]), tmp_path, config, workers=0)
    written = sum(file.stat().st_size for file in (tmp_path / "s0").rglob("*") if file.is_file())
    about = estimate_tiled_bytes(path, config)
    assert 0.2 < about / written < 5, (about, written)  # made-up tissue is not H&E


def test_scoring_is_estimated_too(slides: Path, tmp_path: Path) -> None:
    engine = EngineConfig(str(write_model(tmp_path / "model", mpp=1.0)), device="cpu").load()
    few = estimate_bytes(str(slides / "s0.svs"), engine, ScoreConfig())
    many = estimate_bytes(str(slides / "s0.svs"), engine, ScoreConfig(pixels="zstd"))
    assert 2_000_000 < few < 3_000_000
    assert many - few > 50 * 64 * 64 * 3 / 4, (few, many)  # of some fifty tiles


def test_a_mask_says_where_tissue_is(slides: Path, tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((70, 90), np.uint8)
    mask[:, :45] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"slide,mask,label,patient,note\n{slides / 's0.svs'},left.png,tumour,P7,first\n")
    summary = tile_archive(find_slides([str(manifest)]), tmp_path / "r", CONFIG, workers=0)
    row = summary.done[0]
    assert row["label"] == "tumour" and row["patient"] == "P7"
    from wsi import PatchStore

    boxes = PatchStore.open(tmp_path / "r/s0/store.zarr").grid.boxes()
    with open_slide(slides / "s0.svs") as slide:
        half = Box(0, 0, slide.size[0] / 2, slide.size[1])
        assert row["tissue_mm2"] == pytest.approx(slide.mpp.area_um2(half.w * half.h) / 1e6, rel=1e-3)
        inside = (half.w - boxes[:, 0]).clip(0, boxes[:, 2]) / boxes[:, 2]
        assert (inside >= 0.25 - 1e-9).all() and len(boxes) == 7 * 11
    with pytest.raises(WsiError, match="was made with the mask"):
        tile_archive(find_slides([str(slides / "s0.svs")]), tmp_path / "r", CONFIG, workers=0)
    Image.fromarray(mask[:20]).save(tmp_path / "left.png")
    failed = tile_archive(find_slides([str(manifest)]), tmp_path / "r2", CONFIG, workers=0).failed
    assert "not the same shape" in failed[0]["error"]
    (tmp_path / "left.png").write_text("no image")
    failed = tile_archive(find_slides([str(manifest)]), tmp_path / "r3", CONFIG, workers=0).failed
    assert "no mask that can be read" in failed[0]["error"]


def test_patterns(slides: Path, tmp_path: Path) -> None:
    assert [Path(ref.path).name for ref in find_slides([str(slides / "*.svs")])] == ["s0.svs", "s1.svs"]
    with pytest.raises(WsiError, match="no file matches"):
        find_slides([str(slides / "*.ndpi")])
    (tmp_path / "m.csv").write_text("slide,mask\nx.svs,y.png\n")
    with pytest.raises(WsiError, match="line 2: there is no slide"):
        find_slides([str(tmp_path / "m.csv")])
