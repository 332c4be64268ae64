"""What a results folder is bound to: all that decides a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.nn.make import TILE_PX, write_model
from wsi import EngineConfig, ScoreConfig
from wsi.archive.jobs import ScoreJob


def bound_to(model: Path, **more: Any) -> dict[str, Any]:
    engine = EngineConfig(str(model), device="cpu", precision="float32")
    return ScoreJob(engine, ScoreConfig(**more)).load().configuration


@pytest.mark.parametrize(
    "change", [{"threshold": 0.7}, {"positive_classes": []}, {"spacing_um_px": 2.0}, {"patch_size_pixels": 2 * TILE_PX}]
)
def test_a_models_config_decides_too(tmp_path: Path, change: dict[str, Any]) -> None:
    config = write_model(tmp_path / "model") / "config.json"
    before = bound_to(tmp_path / "model")
    config.write_text(json.dumps(json.loads(config.read_text()), indent=3))
    assert bound_to(tmp_path / "model") == before
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    after = bound_to(tmp_path / "model")
    assert [name for name in after if after[name] != before[name]] == ["model_config"]


def test_the_picture_that_stains_are_fitted_to_decides_too(tmp_path: Path) -> None:
    model, target = write_model(tmp_path / "model"), tmp_path / "target.png"
    found = []
    for seed in (0, 1):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(target)
        found.append(bound_to(model, stain="macenko", stain_target=str(target)))
    assert found[0] != found[1] and bound_to(model, stain_target=str(target)) == bound_to(
        model, stain_target=str(target)
    )
