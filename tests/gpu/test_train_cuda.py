"""Training of a patch model on a GPU: it learns, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.make import write_patches
from wsi.nn.gradcam import grad_cam
from wsi.nn.patch import load_patch_model
from wsi.train.classifier import PatchConfig
from wsi.train.cohort import k_fold
from wsi.train.images import Patches, read_folder
from wsi.train.patches import train_patches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch sees")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_what_was_planted(tmp_path: Path, precision: str) -> None:
    found = read_folder(write_patches(tmp_path / "patches", 120), patient_in=r"p\d+")
    patches, split = Patches(found.places), k_fold(found.cohort, 4, 0)[0]
    config = PatchConfig("test_resnet", epochs=6, patience=6, batch=16, lr=5e-3, precision=precision)

    def stop(epoch: int, of: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_patches(found.cohort, patches, split, tmp_path / "m", config, mpp=1, device="cuda", progress=stop)
    figures = train_patches(found.cohort, patches, split, tmp_path / "m", config, mpp=1, device="cuda")
    assert figures["test"]["auroc"] > 0.9
    model = load_patch_model(str(tmp_path / "m"), device="cuda", precision=precision)
    assert grad_cam(model, patches.read(split.test[:3]), ["b"] * 3).shape == (3, 32, 32)
