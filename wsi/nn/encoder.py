"""Encoders: networks without classes that turn patches into features, from the hub, a folder or timm.

An encoder is a ``PatchModel`` without classes: ``encoder(patches).features``. Its folder is a hub repository or a
copy of one::

    config.json           timm's ("architecture", "pretrained_cfg", "model_args") or transformers' ("model_type": vit,
                          dinov2; then preprocessor_config.json too); or one of our model folders
    model.safetensors     or pytorch_model.bin (tensors only)

``KNOWN`` adds what the files of published encoders do not contain: microns per pixel, layers, and pooling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wsi.errors import ModelError, ModelNotFound
from wsi.nn.checkpoint import (
    HUB_PREFIX,
    ModelConfig,
    find_model,
    fit_weights,
    known_models,
    load_weights,
    normalisation,
    weights_sha256,
)
from wsi.nn.fold import for_inference
from wsi.nn.patch import PatchModel, load_patch_model, pick_device, pick_precision

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Recipe:
    """How a published encoder is used.

    Attributes
    ----------
    repository : str
        On the Hugging Face hub.
    source : str
        Reference for these values.
    pool : {"own", "token", "token+mean"}
        Features: the network's own pooling; the class token; or the class token with the mean of the patch tokens.
    arguments : dict
        Of the network's constructor, overriding config.json; layers by their names.
    mpp, tile_px : float, int
        Of the patches.
    mean, std : tuple of float, optional
        Normalisation; None for that in config.json.
    """

    repository: str
    source: str
    pool: str = "own"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mpp: float = 0.5
    tile_px: int = 224
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_LARGE = {"init_values": 1e-5, "dynamic_img_size": True}

#: Published encoders by name; all were trained on H&E at "20x". Patches of 224 px have the field of view of the model
#: cards' own transforms (for GigaPath: scaled to 256, cropped to 224).
KNOWN = {
    "uni": Recipe("MahmoodLab/UNI", "its model card; Chen et al., Nature Medicine 2024", arguments=_LARGE),
    "uni2-h": Recipe(
        "MahmoodLab/UNI2-h", "its model card",
        arguments=_SWIGLU | _LARGE | {
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
        },
    ),
    "virchow": Recipe(
        "paige-ai/Virchow", "its model card; Vorontsov et al., Nature Medicine 2024", "token+mean", _SWIGLU
    ),
    "virchow2": Recipe("paige-ai/Virchow2", "its model card; arXiv:2408.00738", "token+mean", _SWIGLU),
    "phikon": Recipe("owkin/phikon", "its model card; Filiot et al., medRxiv 2023", "token"),
    "phikon-v2": Recipe("owkin/phikon-v2", "its model card; arXiv:2409.09173", "token"),
    "h-optimus-0": Recipe(
        "bioptimus/H-optimus-0", "its model card", arguments={"init_values": 1e-5, "dynamic_img_size": False},
        mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517),
    ),
    "gigapath": Recipe("prov-gigapath/prov-gigapath", "its model card; Xu et al., Nature 2024"),
}  # fmt: skip


def load_encoder(name: str, *, device: str = "auto", precision: str = "auto", fold: bool = True) -> PatchModel:
    """Load an encoder.

    Parameters
    ----------
    name : str
        A name in ``KNOWN``, or ``NAME=FOLDER`` with its files in a folder (for machines without network); a patch model
        of ours by name or folder; ``hf-hub:OWNER/NAME``; a folder in the hub's format; or a timm name.
    device, precision, fold
        As for ``load_patch_model``.

    Returns
    -------
    PatchModel
        Without classes, unless its folder has some. ``sha256`` is that of the weights file. ``config.mpp`` is 0 where
        the training resolution is unknown.

    Raises
    ------
    ModelNotFound, ModelError

    Examples
    --------
    >>> load_encoder("phantom").num_features
    256
    """
    folder, recipe, shown = _find(name)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "patch_size_pixels" in raw and recipe is None:
            return load_patch_model(name, device=device, precision=precision, fold=fold)
        architecture, arguments, facts = _of_transformers(raw) if "model_type" in raw else _of_timm(raw)
        tile_px = recipe.tile_px if recipe else int(facts["input_size"][-1])
        if recipe is None and "model_type" in raw:
            facts |= _preprocessor(folder)
        mean, std = normalisation((recipe and recipe.mean) or facts["mean"], (recipe and recipe.std) or facts["std"])
    except ModelError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # AttributeError: not a JSON object
        what = f"is no encoder's config.json ({type(error).__name__}: {error})"
        raise ModelError(folder / "config.json", what, "Give a repository of timm, or of transformers' ViT") from error
    config = ModelConfig(
        folder, "patch", architecture, (), 0,
        architecture_args=arguments | dict(recipe.arguments if recipe else {}), tile_px=tile_px,
        mpp=recipe.mpp if recipe else 0.0, mean=mean, std=std,
    )  # fmt: skip
    from wsi.nn.backbone import TimmEncoder

    pool = recipe.pool if recipe else "token" if "model_type" in raw else "own"
    try:
        net = TimmEncoder(architecture, tile_px=tile_px, pool=pool, **config.architecture_args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ModelError(folder / "config.json", f"its arguments do not fit {architecture}: {error}") from error
    state = load_weights(config)
    if "model_type" in raw:
        state = timm_names(state)
    own = net.net.state_dict()
    # Drop only the classifier's weights: fit_weights refuses other unknown names.
    state = {key: value for key, value in state.items() if key in own or not key.startswith(net.classifier_names)}
    fit_weights(net.net, state, config)
    device = pick_device(device)
    precision = pick_precision(precision, device)
    if fold:
        for_inference(net, device, precision)
    return PatchModel(
        config, net, name=shown, num_features=net.num_features, sha256=weights_sha256(config),
        device=device, precision=precision,
    )  # fmt: skip


def _find(name: str) -> tuple[Path, Recipe | None, str]:
    """Return an encoder's folder, its recipe if it is in ``KNOWN``, and the name to show."""
    known, _, folder_given = name.partition("=")
    addresses = {f"{HUB_PREFIX}{recipe.repository}".lower(): key for key, recipe in KNOWN.items()}
    known = addresses.get(name.partition("@")[0].lower(), known)
    recipe = KNOWN.get(known)
    if recipe is not None:
        folder = find_model(folder_given or (f"{HUB_PREFIX}{recipe.repository}" if name == known else name))
        return folder, recipe, known
    if folder_given:
        raise ModelNotFound(f"encoder {known!r}", "is not known", f"Known: {', '.join(KNOWN)}")
    try:
        folder = find_model(name)
    except ModelNotFound:
        from wsi.nn.backbone import hub_of

        repository = hub_of(name)
        if repository is None:
            names = ", ".join((*KNOWN, *known_models()))
            remedy = f"Known: {names}; or a timm name, {HUB_PREFIX}OWNER/NAME, or a folder"
            raise ModelNotFound(f"encoder {name!r}", "there is no such encoder", remedy) from None
        folder = find_model(f"{HUB_PREFIX}{repository}")
    return folder, None, folder.resolve().name if Path(name).is_dir() else name


def _of_timm(raw: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read timm's config.json: architecture, arguments, and the description of the input."""
    arguments = dict(raw.get("model_args") or {})
    arguments.pop("num_classes", None)
    if raw.get("global_pool") is not None:
        arguments.setdefault("global_pool", raw["global_pool"])
    return str(raw["architecture"]), arguments, raw.get("pretrained_cfg") or raw


def _of_transformers(raw: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read transformers' config.json of a ViT or a DINOv2, as arguments of timm's vision transformer."""
    kind = raw["model_type"]
    if kind not in ("vit", "dinov2") or raw.get("hidden_act", "gelu") != "gelu" or raw.get("use_swiglu_ffn"):
        raise ValueError(f"model_type {kind!r} with these layers is not one that is read here")
    width, eps = int(raw["hidden_size"]), float(raw.get("layer_norm_eps", 1e-6))
    ratio = float(raw["intermediate_size"]) / width if kind == "vit" else float(raw.get("mlp_ratio", 4))
    arguments = {
        "img_size": int(raw["image_size"]), "patch_size": int(raw["patch_size"]), "embed_dim": width,
        "depth": int(raw["num_hidden_layers"]), "num_heads": int(raw["num_attention_heads"]), "mlp_ratio": ratio,
        "qkv_bias": bool(raw.get("qkv_bias", True)), "norm_eps": eps,
        "init_values": float(raw.get("layerscale_value", 1.0)) if kind == "dinov2" else None,
    }  # fmt: skip
    side = arguments["img_size"]
    return "vit_base_patch16_224", arguments, {"input_size": [3, side, side], "mean": _IMAGENET[0], "std": _IMAGENET[1]}


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Read mean and std from transformers' separate file; those of ViTs differ from DINOv2's."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ModelError(path, "is not there, and says how input is normalised", "Copy it from beside the config.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not raw.get("do_normalize", True):
        return {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return {"mean": raw["image_mean"], "std": raw["image_std"]}


_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    ("layernorm.", "norm."),
)


def timm_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of transformers' ``ViTModel`` or ``Dinov2Model`` to timm's, and join query, key and value.

    Weights that do not affect the features (pooler, mask token) are dropped.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("vit.").removeprefix("dinov2.")
        if name.startswith(("pooler.", "classifier.")) or name == "embeddings.mask_token":
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        found[name] = value
    for key in [key for key in found if ".attention.attention.query." in key]:
        parts = [found.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        found[key.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return found
