"""Model folders: what loads, and what is refused with a reason."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.nn.make import TILE_PX, write_head, write_model
from wsi.errors import ModelError, ModelNotFound
from wsi.files import sha256_of
from wsi.nn import checkpoint
from wsi.nn.backbone import TimmNet
from wsi.nn.checkpoint import find_model, known_models, read_config
from wsi.nn.grade import load_mil_model, pick_class
from wsi.nn.patch import load_patch_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def patches(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, TILE_PX, TILE_PX, 3), np.uint8)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestLoads:
    def test_numbers_are_those_of_the_plain_formula(self, folder: Path) -> None:
        model = load_patch_model(str(folder), device="cpu", precision="float32")
        rgb = patches(3)
        scores = model(rgb)
        net = TimmNet("test_resnet", num_classes=2).eval()
        net.load_state_dict(load_file(folder / "weights.safetensors"))
        x = (rgb / 255.0 - [0.7, 0.5, 0.6]) / [0.2, 0.25, 0.2]
        with torch.inference_mode():
            plain = net(torch.from_numpy(x.transpose(0, 3, 1, 2)).float()).softmax(1).numpy()
        np.testing.assert_allclose(scores.probabilities, plain, atol=2e-5)
        assert scores.features.shape == (3, model.num_features) and scores.features.dtype == np.float32

    def test_bfloat16_is_close(self, folder: Path) -> None:
        one = load_patch_model(str(folder), device="cpu", precision="float32")(patches(8)).probabilities
        two = load_patch_model(str(folder), device="cpu", precision="bfloat16")(patches(8)).probabilities
        np.testing.assert_allclose(one, two, atol=2e-2)
        assert (one != two).any()

    def test_by_name_by_path_and_unknown(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_model(str(folder)) == folder
        monkeypatch.setattr(checkpoint, "model_folders", lambda: (folder.parent,))
        assert find_model("model") == folder and known_models() == ["model"]
        with pytest.raises(ModelNotFound, match="Known: model"):
            find_model("nosuch")
        with pytest.raises(LookupError):
            find_model("nosuch")

    def test_pickled_weights_load_without_unpickling(self, folder: Path) -> None:
        state = load_file(folder / "weights.safetensors")
        (folder / "weights.safetensors").unlink()
        torch.save({"state_dict": state}, folder / "pytorch_model.bin")
        change(folder, weights_sha256=None)
        load_patch_model(str(folder), device="cpu")

    def test_weights_of_a_network_that_was_spread_over_gpus(self, folder: Path) -> None:
        expected = load_patch_model(str(folder), device="cpu", precision="float32")(patches(2))
        state = load_file(folder / "weights.safetensors")
        (folder / "weights.safetensors").unlink()
        torch.save({f"module.{key}": value for key, value in state.items()}, folder / "pytorch_model.bin")
        change(folder, weights_sha256=None)
        found = load_patch_model(str(folder), device="cpu", precision="float32")(patches(2))
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)

    def test_torchscript_is_known_by_its_own_hash(self, folder: Path) -> None:
        """Also beside other weights: results of one are not to be taken for those of the other."""
        net = TimmNet("test_resnet", num_classes=2).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; the zoo is made of it
            torch.jit.trace(net, torch.zeros(2, 3, TILE_PX, TILE_PX)).save(str(folder / "torchscript_model.pt"))
            script = load_patch_model(str(folder), device="cpu", torchscript=True)
        assert script.num_features == 0 and script.sha256 == sha256_of(folder / "torchscript_model.pt")
        assert load_patch_model(str(folder), device="cpu").sha256 == sha256_of(folder / "weights.safetensors")

    def test_a_wsinfer_zoo_folder(self, folder: Path) -> None:
        """Only WSInfer's own keys, a Resize, TorchScript weights: runs when allowed, and shows no features."""
        net = TimmNet("test_resnet", num_classes=2).eval()
        net.load_state_dict(load_file(folder / "weights.safetensors"))
        rgb = patches(2)
        zoo = {
            "spec_version": "1.0",
            "architecture": "resnet34",
            "num_classes": 2,
            "class_names": ["notumor", "tumor"],
            "patch_size_pixels": TILE_PX,
            "spacing_um_px": 0.25,
            "transform": [
                {"name": "Resize", "arguments": {"size": 64}},
                {"name": "ToTensor"},
                {"name": "Normalize", "arguments": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
            ],
        }
        (folder / "config.json").write_text(json.dumps(zoo))
        (folder / "weights.safetensors").unlink()
        exported = torch.export.export(net, (torch.zeros(2, 3, 64, 64),)).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; the zoo is made of it
            torch.jit.trace(net, torch.zeros(2, 3, 64, 64)).save(str(folder / "torchscript_model.pt"))
            with pytest.raises(ModelError, match="--torchscript"):
                load_patch_model(str(folder), device="cpu")
            model = load_patch_model(str(folder), device="cpu", torchscript=True)
        scores = model(rgb)
        x = torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255
        x = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        with torch.inference_mode():
            plain = exported((x - 0.5) / 0.5).softmax(1).numpy()
        np.testing.assert_allclose(scores.probabilities, plain, atol=2e-5)
        assert scores.features.shape == (2, 0) and model.config.positive_classes == ()


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"num_classes": 3}, "num_classes is 3"),
            ({"num_classes": 3, "class_names": ["a", "b", "c"], "positive_classes": []}, "disagree"),
            ({"class_names": ["a", "a"], "positive_classes": []}, "class_names"),
            ({"positive_classes": ["lymphoma"]}, "not among class_names"),
            ({"architecture": "resnet5000"}, "neither one of ours nor known to timm"),
            ({"architecture_args": {"wings": 2}}, "architecture_args do not fit"),
            ({"architecture": "test_efficientnet"}, "disagree"),
            ({"weights_sha256": "0" * 64}, "sha256 differs"),
            ({"task": "mil"}, 'task "mil"'),
            ({"transform": [{"name": "ColorJitter"}]}, "ColorJitter"),
            ({"transform": [{"name": "Normalize", "arguments": {"mean": [0, 0, 0], "std": [0, 1, 1]}}]}, "Normalize"),
            (
                {"transform": [{"name": "Normalize", "arguments": {"mean": [0, 0, float("nan")], "std": [1, 1, 1]}}]},
                "Normalize",
            ),
            (
                {"transform": [{"name": "Normalize", "arguments": {"mean": [124, 116, 104], "std": [58, 57, 57]}}]},
                "by 255",
            ),
            ({"transform": [{"name": "Resize", "arguments": {"size": 0}}]}, "Resize"),
            ({"patch_size_pixels": "wide"}, "cannot be used"),
            ({"patch_size_pixels": 0}, "must be positive"),
            ({"spacing_um_px": float("nan")}, "must be positive"),
            ({"threshold": float("nan")}, "threshold is nan"),
            ({"threshold": 50}, "threshold is 50"),
        ],
    )
    def test_a_wrong_configuration(self, folder: Path, changes: dict[str, Any], says: str) -> None:
        change(folder, **changes)
        with pytest.raises(ModelError, match=says) as caught:
            load_patch_model(str(folder), device="cpu")
        assert "\n" not in str(caught.value)

    def test_a_missing_key(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["spacing_um_px"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="spacing_um_px"):
            load_patch_model(str(folder), device="cpu")

    @pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
    def test_a_damaged_configuration(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_config(folder, "patch")

    @pytest.mark.parametrize("keep", [0, 5, 1000, -7])
    def test_corrupt_safetensors(self, folder: Path, keep: int) -> None:
        path = folder / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ModelError, match="sha256 differs"):
            load_patch_model(str(folder), device="cpu")
        change(folder, weights_sha256=None)
        with pytest.raises(ModelError, match="damaged"):
            load_patch_model(str(folder), device="cpu")

    def test_weights_that_are_not_finite(self, folder: Path) -> None:
        from safetensors.torch import save_file

        state = load_file(folder / "weights.safetensors")
        next(value for value in state.values() if value.is_floating_point()).view(-1)[0] = float("nan")
        save_file(state, folder / "weights.safetensors")
        change(folder, weights_sha256=None)
        with pytest.raises(ModelError, match="not finite"):
            load_patch_model(str(folder), device="cpu")

    def test_a_pickle_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "run",)

        (folder / "weights.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
        change(folder, weights_sha256=None)
        with pytest.raises(ModelError, match="not unpickled"):
            load_patch_model(str(folder), device="cpu")
        torch.save({"state_dict": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="not unpickled"):
            load_patch_model(str(folder), device="cpu")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("held", [torch.zeros(3), [torch.zeros(3)], 5, {"state_dict": None}])
    def test_a_file_without_weights_by_name(self, folder: Path, held: Any) -> None:
        (folder / "weights.safetensors").unlink()
        torch.save(held, folder / "pytorch_model.bin")
        change(folder, weights_sha256=None)
        with pytest.raises(ModelError, match="holds no weights by name"):
            load_patch_model(str(folder), device="cpu")

    def test_no_weights_no_config(self, folder: Path) -> None:
        (folder / "weights.safetensors").unlink()
        with pytest.raises(ModelError, match="has no weights"):
            load_patch_model(str(folder), device="cpu")
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_patch_model(str(folder), device="cpu")

    def test_a_device_or_precision_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(ModelError, match="no such device"):
            load_patch_model(str(folder), device="tpu")
        with pytest.raises(ModelError, match="no such precision"):
            load_patch_model(str(folder), precision="float8")
        if not torch.cuda.is_available():
            with pytest.raises(ModelError, match="no CUDA GPU"):
                load_patch_model(str(folder), device="cuda")


class TestHead:
    def test_grades(self, folder: Path, tmp_path: Path) -> None:
        model = load_patch_model(str(folder), device="cpu", precision="float32")
        head = load_mil_model(write_head(tmp_path / "head", model.num_features, model.sha256), model)
        scores = head(np.random.default_rng(0).normal(size=(7, model.num_features)).astype(np.float16))
        assert scores.attention.shape == (7,) and scores.attention.sum() == pytest.approx(1, abs=1e-6)
        assert scores.probabilities.sum() == pytest.approx(1, abs=1e-6)
        assert head.grade(np.array([0.5, 0.5])) == "tumour" and head.grade(np.array([0.51, 0.49])) == "no tumour"

    def test_of_another_encoder_or_width(self, folder: Path, tmp_path: Path) -> None:
        model = load_patch_model(str(folder), device="cpu")
        with pytest.raises(ModelError, match="another patch model"):
            load_mil_model(write_head(tmp_path / "other", model.num_features, "0" * 64), model)
        with pytest.raises(ModelError, match="width 3"):
            load_mil_model(write_head(tmp_path / "narrow", 3, model.sha256), model)
        with pytest.raises(ModelError, match="Known: mean"):
            load_mil_model(write_head(tmp_path / "clam", 3, model.sha256, architecture="clam"), model)

    def test_pick_class_with_a_threshold(self, folder: Path) -> None:
        write_model(folder.parent / "three", classes=("a", "b", "c"))
        config = read_config(folder.parent / "three", "patch")
        rows = np.array([[0.5, 0.1, 0.4], [0.1, 0.45, 0.45], [0.3, 0.05, 0.65]])
        assert pick_class(rows, config, 0.5).tolist() == [0, 1, 2]
        assert pick_class(rows, config, 0.4).tolist() == [2, 2, 2]


def test_hub_addresses_go_to_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked = {}

    def download(repository: str, **arguments: Any) -> str:
        asked.update(arguments, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("hf-hub:owner/name@v2") == folder
    assert asked["repository"] == "owner/name" and asked["revision"] == "v2"
    assert "pytorch_model.bin" not in asked["allow_patterns"]  # the safe weights are there
    (folder / "weights.safetensors").rename(folder / "other.bin")
    find_model("hf-hub:owner/name")
    assert asked["allow_patterns"] == ["pytorch_model.bin"]

    def refuse(repository: str, **arguments: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="no network"):
        find_model("hf-hub:owner/name")
