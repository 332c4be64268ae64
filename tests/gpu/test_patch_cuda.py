"""The patch model on a GPU against itself on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nn.make import TILE_PX, write_model
from wsi.nn.patch import load_patch_model

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
