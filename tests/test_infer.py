"""Tiles to numbers: what reaches the network, and what the store holds of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.array_slide import ArraySlide
from tests.nn.make import TILE_PX, write_model
from tests.stain.make import two_stains
from wsi import native
from wsi.grid import TileGrid
from wsi.infer import score_tiles
from wsi.native import twin
from wsi.nn.patch import PatchModel, load_patch_model
from wsi.stain import FitConfig, StainTransform, fit
from wsi.store import PatchStore

N, BATCH, TAIL = 35, 16, 4  # three are left for the last pass, filled up to a power of two
SLIDE = ArraySlide(two_stains(5 * TILE_PX, 7 * TILE_PX, strength=0.5), mpp=1.0)
GRID = TileGrid.cover(SLIDE.size, slide_mpp=SLIDE.mpp, mpp=1.0, tile_px=TILE_PX)
STAINS = {
    "as scanned": None,
    "macenko": fit("macenko", SLIDE.rgb),
    "reinhard": fit("reinhard", SLIDE.rgb),
    "vahadane, published": fit("vahadane", SLIDE.rgb, config=FitConfig(published=True, io=255)),
}


def patches() -> np.ndarray:
    rgb = np.empty((N, TILE_PX, TILE_PX, 3), np.uint8)
    for tile, out in enumerate(rgb):
        SLIDE.read(GRID.box(tile), (TILE_PX, TILE_PX), out=out)
    return rgb


def probabilities(folder: Path, model: PatchModel, stain: StainTransform | None) -> np.ndarray:
    arrays = {"probabilities": ((2,), "float32"), "features": ((model.num_features,), "float16")}
    store = PatchStore.create(folder / "store.zarr", GRID, arrays)
    score_tiles(SLIDE, store, model, batch_size=BATCH, threads=2, stain=stain)
    assert store.get("features").shape == (N, model.num_features)
    return store.get("probabilities")


@pytest.fixture
def expected(tmp_path: Path):
    """What a model says of batches whose stains, means and deviations were each seen to on their own."""

    def of(model: PatchModel, stain: StainTransform | None) -> np.ndarray:
        rgb = patches() if stain is None else stain.apply(patches())
        full = np.concatenate([rgb, np.zeros((-N % TAIL, TILE_PX, TILE_PX, 3), np.uint8)])
        return np.concatenate([model(full[i : i + BATCH]).probabilities for i in range(0, N, BATCH)])[:N]

    return of


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_pass_gives_the_bytes_of_many(tmp_path: Path, expected, stain: str, precision: str) -> None:
    model = load_patch_model(str(write_model(tmp_path / "model")), device="cpu", precision=precision)
    found = probabilities(tmp_path, model, STAINS[stain])
    np.testing.assert_array_equal(found, expected(model, STAINS[stain]))


def test_stains_change_what_the_model_sees(tmp_path: Path, expected) -> None:
    model = load_patch_model(str(write_model(tmp_path / "model")), device="cpu", precision="float32")
    plain, *others = (expected(model, stain) for stain in STAINS.values())
    assert all(np.abs(plain - other).max() > 1e-4 for other in others)


def test_a_model_that_resizes_gets_float32(tmp_path: Path, expected) -> None:
    transform = [
        {"name": "Resize", "arguments": {"size": 48}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.2]}},
    ]
    folder = write_model(tmp_path / "model", transform=transform)
    model = load_patch_model(str(folder), device="cpu", precision="bfloat16")
    assert model.input_dtype == "float32"
    stain = STAINS["macenko"]
    np.testing.assert_array_equal(probabilities(tmp_path, model, stain), expected(model, stain))


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("stain", STAINS)
def test_on_a_gpu_bytes_are_uploaded_and_mapped_there(
    tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch, stain: str, has_kernels: bool
) -> None:
    """In place of CUDA's kernels the twins, and a model that says it is on a GPU; without kernels the CPU maps."""
    model = load_patch_model(str(write_model(tmp_path / "model")), device="cpu", precision="float32")
    wanted = expected(model, STAINS[stain])
    seen = []

    def queued(kernel):
        def run(rgb, *arguments):
            *arguments, stream = arguments
            seen.append((len(rgb), stream))
            kernel(*(np.asarray(a) if hasattr(a, "numpy") else a for a in (rgb, *arguments)))

        return run

    maps = {f"{name}{kind}" for name in ("od_map", "sparse_map", "lab_map") for kind in ("", "_tensor")}
    cuda = SimpleNamespace(**{name: queued(getattr(twin, name)) for name in maps}, device_count=lambda: 1)
    monkeypatch.setattr(native, "cuda", cuda if has_kernels else None)

    class Gpu(PatchModel):
        def __init__(self) -> None:
            self.__dict__.update(model.__dict__, device="cuda")

        def upload(self, array):
            return model.upload(array)

        def empty_patches(self, shape):
            return model.empty_patches(shape)

        def empty_input(self, n, device):
            assert device == ("cuda" if has_kernels else "cpu")
            x = model.empty_input(n, "cpu")
            return model.upload(x) if has_kernels else x

        def stream(self):
            return 7

        def score(self, x):
            return model.score(x)

    np.testing.assert_array_equal(probabilities(tmp_path, Gpu(), STAINS[stain]), wanted)
    assert seen == ([(16, 7), (16, 7), (3, 7)] if has_kernels else [])
