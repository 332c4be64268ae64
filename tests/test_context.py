"""Tiles that inform each other, against the dense equations and against scikit-learn's Gaussian process."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from tests.conftest import REPOSITORY
from tests.e2e.conftest import Run
from tests.nn.make import write_model
from tests.slide.make import halved, section, write_pyramid
from wsi import PatchStore
from wsi.context import in_context
from wsi.errors import ModelError
from wsi.export.objects import measurements
from wsi.grid import TileGrid
from wsi.nn.checkpoint import Context, read_config
from wsi.scored import scored_slides
from wsi.units import Mpp

CONTEXT = Context(1, range_um=700.0, nugget=0.8, mean=-0.5, slope=1.7, intercept=0.3)


def scattered(n: int = 150, seed: int = 0) -> tuple[TileGrid, np.ndarray]:
    """Some tiles of a lattice whose steps differ along x and y, and what is said of each."""
    rng = np.random.default_rng(seed)
    cells = rng.choice(30 * 40, n, replace=False)
    grid = TileGrid((cells % 40).astype(np.int32), (cells // 40).astype(np.int32), (60.0, 50.0), (45.0, 80.0), 100, 2.0)
    p = rng.random(n).astype(np.float32)
    return grid, np.stack([1 - p, p], axis=1)


def places_um(grid: TileGrid) -> np.ndarray:
    """Where the tiles lie: steps of 45 / 60 and 80 / 50 of a tile's 200 microns."""
    return np.stack([grid.columns * 150.0, grid.rows * 320.0], axis=1)


def test_it_is_what_a_gaussian_process_expects() -> None:
    grid, p = scattered()
    kernel = Matern(length_scale=CONTEXT.range_um, nu=0.5, length_scale_bounds="fixed")
    process = GaussianProcessRegressor(kernel, alpha=CONTEXT.nugget, optimizer=None)
    process.fit(places_um(grid), logit(np.float64(p[:, 1])) + 0.5)
    expected = expit(1.7 * (process.predict(places_um(grid)) - 0.5) + 0.3)
    found = in_context(p, grid, CONTEXT)
    np.testing.assert_allclose(found[:, 1], expected, rtol=0, atol=2e-7)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-6)


def test_the_other_column_and_the_order_of_tiles() -> None:
    grid, p = scattered()
    found = in_context(p, grid, CONTEXT)
    turned = in_context(p[:, ::-1], grid, Context(0, 700.0, 0.8, -0.5, 1.7, 0.3))
    assert np.array_equal(turned[:, ::-1], found)
    order = np.random.default_rng(1).permutation(len(grid))
    np.testing.assert_allclose(in_context(p[order], grid.keep(order), CONTEXT), found[order], rtol=0, atol=2e-7)


def test_alone_a_tile_is_drawn_to_the_mean_and_no_further() -> None:
    grid, p = scattered(1)
    expected = -0.5 + (logit(float(p[0, 1])) + 0.5) / 1.8
    assert in_context(p, grid, CONTEXT)[0, 1] == pytest.approx(expit(1.7 * expected + 0.3), abs=1e-6)
    assert in_context(p[:0], grid.keep(np.zeros(1, bool)), CONTEXT).shape == (0, 2)
    sure = np.float32([[0.0, 1.0]])  # of what is certain the log-odds are infinite
    assert np.isfinite(in_context(sure, grid, CONTEXT)).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": {"range_um": 1600, "nugget": 1}}, "lacks the key 'mean'"),
        ({"context": {"range_um": 0, "nugget": 1, "mean": 0}}, "range_um, nugget and slope above 0"),
        ({"context": {"range_um": 1, "nugget": float("nan"), "mean": 0}}, "finite numbers"),
        ({"context": {"range_um": 1, "nugget": 1, "mean": 0, "Slope": 2}}, "context has Slope"),
        ({"context": {"range_um": 1, "nugget": 1, "mean": 0}, "positive_classes": []}, "one of them positive"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    config = write_model(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        read_config(tmp_path / "model", "patch")


def test_a_slide_is_scored_in_context(wsi: Run, tmp_path: Path) -> None:
    """`probabilities` are what all outputs show; a model of another context is another configuration."""
    full = section()
    slide = tmp_path / "a.svs"
    write_pyramid(slide, [full, halved(full)], 0.5, svs=True)
    config = write_model(tmp_path / "model", mpp=1.0) / "config.json"
    words = ("-m", tmp_path / "model", "-o", tmp_path / "r", "-q")
    context = {"range_um": 100.0, "nugget": 1.0, "mean": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"context": context}))
    assert wsi("score", slide, *words)[0] == 0
    store = PatchStore.open(tmp_path / "r/a/store.zarr")
    alone, found = store.get("probabilities_alone"), store.get("probabilities")
    assert np.array_equal(found, in_context(alone, store.grid, Context(1, **context)))
    assert np.abs(found - alone).max() > 0.002
    config.write_text(json.dumps(json.loads(config.read_text()) | {"context": context | {"nugget": 2.0}}))
    code, _, err = wsi("score", slide, *words)
    assert code == 2 and "another configuration: context was" in err


def test_what_context_takes_away_is_told(wsi: Run, tmp_path: Path) -> None:
    """Every tile reaches a threshold alone that none reaches in context; without context the network's word stays."""
    full = section()
    slide = tmp_path / "a.svs"
    write_pyramid(slide, [full, halved(full)], 0.5, svs=True)
    write_model(tmp_path / "plain", mpp=1.0)
    context = {"range_um": 100.0, "nugget": 1.0, "mean": 0.0, "intercept": -2.0}
    write_model(tmp_path / "model", mpp=1.0, context=context)

    def score(model: str, out: str, *words: object) -> tuple[dict[str, object], PatchStore]:
        run = wsi("score", slide, "-m", tmp_path / model, "-o", tmp_path / out, "--threshold", threshold, "-q", *words)
        assert run[0] == 0
        own = tmp_path / out / "a"
        return json.loads((own / "result.json").read_text()), PatchStore.open(own / "store.zarr")

    threshold = 0.5
    plain, store = score("plain", "first")
    alone = store.get("probabilities")
    threshold = float(np.float32(alone[:, 1].min() * 0.999))  # which every tile reaches
    plain, _ = score("plain", "second")
    assert plain["positive_alone_mm2"] is None and "no context" in plain["reasons"]["positive_alone_mm2"]
    shown, store = score("model", "shown")
    assert store.get("probabilities")[:, 1].max() < threshold and shown["positive_mm2"] == 0
    assert shown["positive_alone_mm2"] == plain["positive_mm2"] > 0 and "context-suppressed" in shown["flags"]
    (said,) = (each for each in shown["warnings"] if "positive alone" in each)
    assert said.startswith(f"{len(store)} tiles with {plain['positive_mm2']:g} mm2 ")
    with gzip.open(tmp_path / "shown/a/tiles.geojson.gz") as file:
        tiles = [feature["properties"]["measurements"] for feature in json.load(file)["features"]]
    np.testing.assert_allclose([each["prob_tumour_alone"] for each in tiles], alone[:, 1], atol=1e-4)
    slide_of = scored_slides(tmp_path / "shown")["a"]
    assert np.array_equal(measurements(slide_of, slide_of.tiles(store))["prob_tumour_alone"], alone[:, 1])
    left, store = score("model", "left", "--no-context")
    assert np.array_equal(store.get("probabilities"), alone) and "probabilities_alone" not in store.arrays
    assert left["positive_mm2"] == plain["positive_mm2"] and "context-suppressed" not in left["flags"]
    assert left["reasons"]["positive_alone_mm2"].startswith("scored without context")
    code, _, err = wsi(
        "score", slide, "-m", tmp_path / "model", "-o", tmp_path / "left", "--threshold", threshold, "-q"
    )
    assert code == 2 and "another configuration: context was" in err


def test_small_foci_are_suppressed_as_the_card_says() -> None:
    """The table of small foci in the card of idc-breast, row by row."""
    folder = REPOSITORY / "models/idc-breast"
    model = read_config(folder, "patch")
    assert model.context is not None
    card = (folder / "CARD.md").read_text(encoding="utf-8").partition("### Small foci")[2]
    told = [float(row.split("|")[3]) for row in card.splitlines() if row.startswith("| ") and " x " in row]
    side = round(60 * model.tile_px * model.mpp)
    grid = TileGrid.of_level((side, side), (side, side), slide_mpp=Mpp(1, 1), tile_px=side // 60)
    for k, expected in enumerate(told, 1):
        p = np.full((60, 60), 0.03, np.float32)
        p[20 : 20 + k, 20 : 20 + k] = 0.9
        found = in_context(np.stack([1 - p.ravel(), p.ravel()], 1), grid, model.context)[:, 1].max()
        assert found == pytest.approx(expected, abs=0.001)
    assert len(told) == 5
