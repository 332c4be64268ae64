"""The patch model on a GPU against itself on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nn.make import TILE_PX, write_model
from tests.stain.make import two_stains
from wsi import native
from wsi.nn.patch import load_patch_model
from wsi.stain import StainTransform, fit
from wsi.stain.device import place

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch sees")


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_probabilities_agree(tmp_path: Path, precision: str, tolerance: float) -> None:
    folder = str(write_model(tmp_path / "model"))
    rgb = np.random.default_rng(0).integers(0, 256, (64, TILE_PX, TILE_PX, 3), np.uint8)
    cpu = load_patch_model(folder, device="cpu", precision="float32")(rgb)
    gpu = load_patch_model(folder, device="cuda", precision=precision)(rgb)
    np.testing.assert_allclose(gpu.probabilities, cpu.probabilities, atol=tolerance)


def test_auto_takes_it(tmp_path: Path) -> None:
    assert load_patch_model(str(write_model(tmp_path / "model"))).device == "cuda"


@pytest.mark.skipif(native.cuda is None, reason="installed without a CUDA compiler")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stain", [StainTransform("none"), fit("macenko", two_stains(64, 64))])
def test_inputs_made_on_the_gpu_are_the_cpus(tmp_path: Path, precision: str, stain: StainTransform) -> None:
    model = load_patch_model(str(write_model(tmp_path / "model")), device="cuda", precision=precision)
    mean, std, dtype = model.config.mean, model.config.std, model.input_dtype
    rgb = np.random.default_rng(0).integers(0, 256, (5, TILE_PX, TILE_PX, 3), np.uint8)
    placed = place(stain, upload=model.upload, stream=model.stream)
    assert placed.device == "cuda"
    x = placed.tensor(model.upload(rgb), mean, std, model.empty_input(5, "cuda"), dtype=dtype)
    on_cpu = stain.tensor(rgb, mean, std, model.empty_input(5, "cpu"), dtype=dtype)
    assert torch.equal(x, model.upload(on_cpu)) and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(model.score(x).probabilities, model.score(on_cpu).probabilities, atol=1e-6)
