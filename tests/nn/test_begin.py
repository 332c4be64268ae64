"""What a model that is begun from another keeps of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nn.make import TILE_PX, write_model
from wsi.errors import ModelError
from wsi.nn.begin import classifier_of, fresh_model, model_from
from wsi.nn.patch import load_patch_model

torch.set_num_threads(1)
RGB = np.random.default_rng(0).integers(0, 256, (2, TILE_PX, TILE_PX, 3), np.uint8)


@pytest.mark.parametrize(
    ("classes", "kept"), [(("other", "tumour"), True), (("a", "b"), False), (("a", "b", "c"), False)]
)
def test_features_stay_and_the_classifier_where_the_classes_do(
    tmp_path: Path, classes: tuple[str, ...], kept: bool
) -> None:
    base = load_patch_model(str(write_model(tmp_path / "m")), device="cpu", precision="float32", fold=False)
    model = model_from(str(tmp_path / "m"), classes, tile_px=TILE_PX, mpp=2.0)
    np.testing.assert_array_equal(model(RGB).features, base(RGB).features)
    assert np.array_equal(model(RGB).probabilities, base(RGB).probabilities) == kept
    assert model.config.class_names == classes and model.config.mpp == 2.0 and model.sha256 == base.sha256


def test_a_sigmoid_of_one_logit_becomes_a_softmax_of_two(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", classes=("tumour",), weights_sha256=None)
    model = model_from(str(folder), ("not tumour", "tumour"), tile_px=TILE_PX, mpp=1.0)
    assert model(RGB).probabilities.shape == (2, 2) and model.config.num_logits == 2


def test_patches_of_another_size_are_resized_to_its_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model = model_from(str(folder), ("a", "b"), tile_px=50, mpp=1.0)
    assert (model.config.tile_px, model.config.resize_px) == (50, TILE_PX)
    assert model(np.zeros((1, 50, 50, 3), np.uint8)).probabilities.shape == (1, 2)


def test_the_classifier_is_what_only_classify_reads() -> None:
    model = fresh_model(
        "wsi-p4m", {"head": 4, "members": 2}, ("a", "b"), tile_px=50, mpp=1, mean=[0.5] * 3, std=[0.5] * 3
    )
    names = classifier_of(model.net, model.num_features)
    assert names == {f"classifiers.{i}.{what}" for i in range(2) for what in ("weight", "bias")}


def test_what_cannot_be_begun_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="known to timm"):
        fresh_model("resnet1", {}, ("a", "b"), tile_px=32, mpp=1, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ModelError, match="no such encoder"):
        model_from("nowhere", ("a", "b"), tile_px=32, mpp=1)
