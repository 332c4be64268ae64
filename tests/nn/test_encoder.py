"""Encoders from files in the hub's form: what they give, and what is refused. No hub is asked."""

from __future__ import annotations

import json
from math import erf, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wsi.errors import ModelError, ModelNotFound
from wsi.nn import checkpoint
from wsi.nn.backbone import TimmEncoder
from wsi.nn.encoder import KNOWN, load_encoder

INPUT = {"input_size": [3, 160, 160], "mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.2]}


def write_timm(folder: Path, *, classes: int = 0, **config: Any) -> Path:
    """Write a folder as timm pushes it to the hub: the smallest ViT with random weights; `config` goes over its own."""
    import timm

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    net = timm.create_model("test_vit", num_classes=classes)
    save_file(net.state_dict(), folder / "model.safetensors")
    raw = {"architecture": "test_vit", "num_classes": classes, "pretrained_cfg": INPUT}
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def patches(side: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def normalised(rgb: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    x = (torch.from_numpy(rgb).double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return x.permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("classes", [0, 5])
def test_a_timm_folder_gives_what_timm_gives(tmp_path: Path, classes: int) -> None:
    import timm
    from safetensors.torch import load_file

    folder = write_timm(tmp_path / "m", classes=classes)
    encoder = load_encoder(str(folder), precision="float32")
    net = timm.create_model("test_vit", num_classes=classes)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    net.reset_classifier(0)
    x = normalised(patches(160), INPUT["mean"], INPUT["std"])
    with torch.inference_mode():
        np.testing.assert_allclose(encoder(patches(160)).features, net.eval()(x).numpy(), atol=1e-5)
    assert encoder.config.mpp == 0 and encoder.config.tile_px == 160 and encoder(patches(160)).probabilities.size == 0
    assert encoder.sha256 == checkpoint.sha256_of(folder / "model.safetensors")


def test_a_known_name_with_its_files_in_a_folder_is_pooled_as_its_authors_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from safetensors.torch import load_file

    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    arguments = {"img_size": 224, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 4, "global_pool": ""}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments, **layers)
    (tmp_path / "m").mkdir()
    torch.save(net.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    raw = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": INPUT}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    encoder = load_encoder(f"virchow2={tmp_path / 'm'}", precision="float32")
    with torch.inference_mode():
        tokens = net.eval()(normalised(patches(224), INPUT["mean"], INPUT["std"])).numpy()  # (3, 1 + 4 + 196, 32)
    both = np.concatenate([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
    np.testing.assert_allclose(encoder(patches(224)).features, both, atol=1e-5)
    assert (encoder.name, encoder.config.mpp, encoder.config.tile_px) == ("virchow2", 0.5, 224)
    monkeypatch.setattr(checkpoint, "_from_hub", lambda name: {"hf-hub:paige-ai/Virchow2@v1": tmp_path / "m"}[name])
    by_address = load_encoder("hf-hub:paige-ai/Virchow2@v1", precision="float32")
    assert (by_address.name, by_address.num_features) == ("virchow2", 64)
    assert load_file is not None


def write_transformers(folder: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a ViT or DINOv2 under transformers' names: 2 layers of 2 heads, 8 wide, 4 patches of 8 px."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.position_embeddings": (1, 5, 8),
        "embeddings.patch_embeddings.projection.weight": (8, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (8,),
    }
    first, second = ("layernorm_before", "layernorm_after") if kind == "vit" else ("norm1", "norm2")
    up, down = ("intermediate.dense", "output.dense") if kind == "vit" else ("mlp.fc1", "mlp.fc2")
    wide = 12 if kind == "vit" else 32
    norms = {"layernorm": 8}
    for i in (0, 1):
        at = f"encoder.layer.{i}."
        norms |= {at + first: 8, at + second: 8}
        linear = {f"attention.attention.{name}": (8, 8) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (8, 8), up: (wide, 8), down: (8, wide)}
        for name, shape in linear.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        if kind == "dinov2":
            shapes |= {f"{at}layer_scale{j}.lambda1": (8,) for j in (1, 2)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    p = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    unused = {"pooler.dense.bias" if kind == "vit" else "embeddings.mask_token": np.zeros(8, np.float32)}
    folder.mkdir()
    save_file({name: torch.from_numpy(value) for name, value in (p | unused).items()}, folder / "model.safetensors")
    raw = {
        "model_type": kind, "hidden_size": 8, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "layer_norm_eps": 1e-3, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    said = {"do_normalize": True, "image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder, p


def by_the_equations(p: dict[str, np.ndarray], image: np.ndarray, kind: str) -> np.ndarray:
    """The class token of one image (3, 16, 16), literally, under transformers' names."""

    def norm(x: np.ndarray, at: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * p[f"{at}.weight"] + p[f"{at}.bias"]

    def linear(x: np.ndarray, at: str) -> np.ndarray:
        return x @ p[f"{at}.weight"].T + p[f"{at}.bias"]

    kernel = p["embeddings.patch_embeddings.projection.weight"].reshape(8, -1)
    cells = [image[:, y : y + 8, x : x + 8].ravel() @ kernel.T for y in (0, 8) for x in (0, 8)]
    tokens = [p["embeddings.cls_token"][0, 0], *(c + p["embeddings.patch_embeddings.projection.bias"] for c in cells)]
    x = np.stack(tokens) + p["embeddings.position_embeddings"][0]
    first, second = ("layernorm_before", "layernorm_after") if kind == "vit" else ("norm1", "norm2")
    up, down = ("intermediate.dense", "output.dense") if kind == "vit" else ("mlp.fc1", "mlp.fc2")
    for i in (0, 1):
        at = f"encoder.layer.{i}."
        h = norm(x, at + first)
        mixed = np.empty_like(h)
        for head in (slice(0, 4), slice(4, 8)):
            q, k, v = (linear(h, f"{at}attention.attention.{name}")[:, head] for name in ("query", "key", "value"))
            e = np.exp(q @ k.T / 2)
            mixed[:, head] = e / e.sum(1, keepdims=True) @ v
        told = linear(mixed, at + "attention.output.dense")
        x = x + told * (p[at + "layer_scale1.lambda1"] if kind == "dinov2" else 1)
        h = linear(norm(x, at + second), at + up)
        told = linear(h * (1 + np.vectorize(erf)(h / sqrt(2))) / 2, at + down)
        x = x + told * (p[at + "layer_scale2.lambda1"] if kind == "dinov2" else 1)
    return norm(x, "layernorm")[0]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_weights_under_transformers_names_give_the_class_token(tmp_path: Path, kind: str) -> None:
    folder, p = write_transformers(tmp_path / "m", kind)
    encoder = load_encoder(str(folder), precision="float32")
    x = normalised(patches(16), INPUT["mean"], INPUT["std"]).double().numpy()
    expected = np.stack([by_the_equations(p, image, kind) for image in x])
    np.testing.assert_allclose(encoder(patches(16)).features, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "architecture", "width", "millions"),
    [("uni", "vit_large_patch16_224", 1024, 303), ("uni2-h", "vit_giant_patch14_224", 1536, 681)],
)
def test_recipes_give_networks_of_the_published_size(name: str, architecture: str, width: int, millions: int) -> None:
    with torch.device("meta"):
        net = TimmEncoder(architecture, tile_px=224, pool=KNOWN[name].pool, **KNOWN[name].arguments)
    assert net.num_features == width
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_a_patch_model_of_ours_is_an_encoder() -> None:
    assert load_encoder("phantom").num_features == load_encoder("phantom").of_size(70).num_features > 0


def test_how_transformers_normalises_is_read_and_never_guessed(tmp_path: Path) -> None:
    folder, _ = write_transformers(tmp_path / "m", "vit")
    said = folder / "preprocessor_config.json"
    said.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert load_encoder(str(folder)).config.std == (1, 1, 1)
    said.write_text(json.dumps({"image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]}))
    with pytest.raises(ModelError, match="divide by 255"):
        load_encoder(str(folder))
    said.unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: is not there"):
        load_encoder(str(folder))


class TestRefused:
    def test_unknown_names(self) -> None:
        with pytest.raises(ModelNotFound, match=r"Known: uni, .*idc-breast"):
            load_encoder("nobody")
        with pytest.raises(ModelNotFound, match="Known: uni"):
            load_encoder("nobody=somewhere")

    def test_a_gated_repository_says_where_to_ask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError

        def closed(*_: Any, **__: Any) -> str:
            raise GatedRepoError("403 Client Error", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
        with pytest.raises(ModelError, match="gated") as caught:
            load_encoder("uni")
        assert "huggingface.co/MahmoodLab/UNI" in caught.value.remedy and "hf auth login" in caught.value.remedy

    def test_timm_names_are_looked_for_on_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def fetch(name: str) -> Path:
            asked.append(name)
            raise ModelError(name, "cannot be fetched")

        monkeypatch.setattr(checkpoint, "_from_hub", fetch)
        with pytest.raises(ModelError, match="cannot be fetched"):
            load_encoder("resnet50.tv_in1k")
        assert asked == ["hf-hub:timm/resnet50.tv_in1k"]

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"architecture": "vit_of_nobody"}, "not known to timm"),
            ({"pretrained_cfg": None}, "config.json"),
            ({"model_args": {"wings": 2}}, "do not fit"),
            ({"architecture": "test_resnet"}, "weights"),
            ({"model_type": "bert"}, "'bert'"),
        ],
    )
    def test_folders_that_are_no_encoders(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(ModelError, match=says):
            load_encoder(str(write_timm(tmp_path / "m", **changes)))

    @pytest.mark.parametrize("text", ["[]", '"a"', "null", "{"])
    def test_a_config_that_is_no_json_object(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"is no encoder's config\.json"):
            load_encoder(str(tmp_path))
