"""Model folders: finding them, their config.json, and their weights, which are never unpickled by default.

A model is a folder::

    config.json           architecture, classes, tile_px, mpp, mean and std: WSInfer's keys and a few of ours
    weights.safetensors   or model.safetensors, pytorch_model.bin (weights only), torchscript_model.pt (on request)
    stain.json            optional: the stains of the training slides (wsi.stain.range)
    CARD.md, train.py     data, split, figures, limits; the program that made the weights
    mil/                  optional: the MIL head trained on this model's features, a model folder itself
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wsi.errors import ModelError, ModelNotFound
from wsi.files import sha256_of
from wsi.nn.mil.heads import KINDS, Head

HUB_PREFIX = "hf-hub:"
TORCHSCRIPT = "torchscript_model.pt"
_SAFE_WEIGHTS = ("weights.safetensors", "model.safetensors")
_PICKLED_WEIGHTS = ("weights.bin", "pytorch_model.bin", "weights.pt", "weights.pth")
_TRANSFORMS = ("Resize", "ToTensor", "Normalize")


@dataclass(frozen=True)
class Context:
    """Parameters of the smoothing over neighbouring tiles, see ``wsi.context``.

    Attributes
    ----------
    column : int
        The class, of two, whose log-odds are smoothed.
    range_um : float
        Distance at which the correlation has fallen to 1 / e.
    nugget : float
        Noise variance of a single tile's log-odds, relative to the variance of the field.
    mean : float
        Prior mean of the log-odds.
    slope, intercept : float
        Recalibration of the expected log-odds, which are biased towards the mean (Platt 1999).
    """

    column: int
    range_um: float
    nugget: float
    mean: float
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The content of a model folder's config.json.

    Attributes
    ----------
    folder : Path
    task : "patch" or "mil"
    architecture : str
        A timm name or one of ours.
    architecture_args : dict
        Keyword arguments of the network's constructor.
    class_names : tuple of str
    num_logits : int
        Outputs of the network: one a class, or 1 for two classes with a sigmoid.
    positive_classes : tuple of str
        Classes shown in the heatmap and outlined as regions; empty where config.json names none.
    threshold : float
        Probability from which a tile, or a slide, is positive.
    tile_px, mpp : int, float
        Size and resolution of the training patches (patch models; 0 for a MIL head).
    resize_px : int, optional
        Side to which patches are resized before the network.
    context : Context, optional
        Patch models: smoothing over neighbouring tiles.
    mean, std : tuple of float
        Normalisation of the 0..1 RGB input.
    weights_sha256 : str, optional
        Checked when the weights are loaded.
    encoder_sha256 : str, optional
        MIL heads: the patch model whose features the head was trained on.
    head : Head
        MIL heads: interpretation of the logits, with the temperature.
    members : int
        MIL heads: networks in the ensemble.
    conformal_threshold, coverage : float, optional
        MIL heads: least probability of a class in the prediction set, and the set's coverage.
    largest_shift : float, optional
        MIL heads: largest ``grade.feature_shift`` of a training slide.
    bag_tiles : (int, int), optional
        MIL heads: number of tiles of the smallest and the largest training bag.
    """

    folder: Path
    task: Literal["patch", "mil"]
    architecture: str
    class_names: tuple[str, ...]
    num_logits: int
    architecture_args: dict[str, Any] = field(default_factory=dict)
    positive_classes: tuple[str, ...] = ()
    threshold: float = 0.5
    tile_px: int = 0
    mpp: float = 0.0
    resize_px: int | None = None
    context: Context | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    weights_sha256: str | None = None
    encoder_sha256: str | None = None
    head: Head = field(default_factory=lambda: Head("softmax", 2))
    members: int = 1
    conformal_threshold: float | None = None
    coverage: float = 0.9
    largest_shift: float | None = None
    bag_tiles: tuple[int, int] | None = None


def model_folders() -> tuple[Path, ...]:
    """Return where models are looked up by name: in the installed package, then beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return tuple(folder for folder in (package / "models", package.parent / "models") if folder.is_dir())


def known_models() -> list[str]:
    """Return the names of the packaged models."""
    return sorted({config.parent.name for folder in model_folders() for config in folder.glob("*/config.json")})


def find_model(name: str) -> Path:
    """Return the folder of a model given by name, by path, or as ``hf-hub:owner/name[@revision]``.

    Raises ModelNotFound, which lists the known names.
    """
    if name.startswith(HUB_PREFIX):
        return _from_hub(name)
    for folder in model_folders():
        if "/" not in name and (folder / name / "config.json").is_file():
            return folder / name
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ModelError(path, "has no config.json", "A model is a folder with config.json and weights.safetensors")
    remedy = f"Known: {', '.join(known_models())}; or give a folder"
    raise ModelNotFound(f"model {name!r}", "there is no such model", remedy)


def read_config(folder: Path, task: Literal["patch", "mil"]) -> ModelConfig:
    """Read and check a model folder's config.json; ModelError names a key that is missing or wrong."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise TypeError("it is not a JSON object")
        found = raw.get("task", "patch")
        if found != task:
            raise TypeError(f'it is of task "{found}", and a "{task}" model is needed')
        names = tuple(str(name) for name in raw["class_names"])
        if int(raw["num_classes"]) != len(names) or len(set(names)) != len(names):
            raise TypeError(f"num_classes is {raw['num_classes']} and class_names are {list(names)}")
        if len(names) == 1:  # one logit with a sigmoid: two classes, so that probabilities sum to 1
            names = (f"not {names[0]}", names[0])
        positive = tuple(str(name) for name in raw.get("positive_classes", ()))
        if not set(positive) <= set(names):
            raise TypeError(f"positive_classes {list(positive)} are not among class_names {list(names)}")
        threshold = float(raw.get("threshold", 0.5))
        if not 0 <= threshold <= 1:
            raise TypeError(f"threshold is {threshold:g}, and a probability is needed")
        common: dict[str, Any] = {
            "folder": folder,
            "task": task,
            "architecture": str(raw["architecture"]),
            "architecture_args": dict(raw.get("architecture_args", {})),
            "class_names": names,
            "positive_classes": positive,
            "threshold": threshold,
            "num_logits": int(raw["num_classes"]),
            "weights_sha256": raw.get("weights_sha256"),
            "encoder_sha256": raw.get("encoder_sha256"),
        }
        own = _mil_of(raw, len(names)) if task == "mil" else _patch_of(raw, names, positive)
        return ModelConfig(**common | own)
    except KeyError as error:
        raise ModelError(path, f"lacks the key {error}", "See DESIGN.md, 'Model folders'") from error
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(path, f"cannot be used: {error}", "See DESIGN.md, 'Model folders'") from error


def load_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Load a folder's weights as a state dict: safetensors first, else ``torch.load(weights_only=True)``.

    Raises ModelError where there are no weights, or they are damaged or would have to be unpickled.
    """
    path = _weights_of(config)
    if path.name == TORCHSCRIPT:
        raise ModelError(path, "is TorchScript, which runs code", "Allow it with --torchscript if you trust its source")
    if config.weights_sha256 not in (None, sha256_of(path)):
        raise ModelError(path, "is not the file its config.json names (sha256 differs)", "Fetch the model again")
    try:
        if path.name in _SAFE_WEIGHTS:
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(path, f"is damaged ({error})", "Fetch the model again") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        what = "is damaged or holds more than tensors, and is not unpickled"
        raise ModelError(path, what, "Convert it to safetensors") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ModelError(path, "holds no weights by name", "Save the network's state_dict()")
    parallel = all(str(key).startswith("module.") for key in state)  # saved by DataParallel
    return {str(key).removeprefix("module.") if parallel else key: value for key, value in state.items()}


def fit_weights(net: torch.nn.Module, state: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Load `state` into `net`; ModelError names the keys and shapes that do not match."""
    expected = net.state_dict()
    # Shapes first: the commonest mistake is another number of classes.
    wrong = [
        f"{key} is {tuple(state[key].shape)} in the weights and {tuple(expected[key].shape)} by the configuration"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    wrong += [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is not part of {config.architecture}" for key in state if key not in expected]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        what = f"its weights disagree with its config.json: {'; '.join(wrong[:3])}{more}"
        raise ModelError(config.folder, what, "Check architecture, architecture_args and num_classes")
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ModelError(config.folder, f"its weights are not finite: {', '.join(bad[:3])}", "Fetch the model again")
    net.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})


def weights_sha256(config: ModelConfig) -> str:
    """Return the SHA-256 of the weights file that ``load_weights`` (or TorchScript) would read."""
    return sha256_of(_weights_of(config))


def _weights_of(config: ModelConfig) -> Path:
    for name in (*_SAFE_WEIGHTS, *_PICKLED_WEIGHTS, TORCHSCRIPT):
        if (config.folder / name).is_file():
            return config.folder / name
    raise ModelError(config.folder, "has no weights", f"Expected {_SAFE_WEIGHTS[0]}")


def _patch_of(raw: dict[str, Any], names: tuple[str, ...], positive: tuple[str, ...]) -> dict[str, Any]:
    """Read the keys that only a patch model has."""
    tile_px, mpp = int(raw["patch_size_pixels"]), float(raw["spacing_um_px"])
    if tile_px < 1 or not (math.isfinite(mpp) and mpp > 0):
        raise TypeError(f"patch_size_pixels is {tile_px} and spacing_um_px is {mpp:g}: both must be positive")
    context = _context_of(raw["context"], names, positive) if "context" in raw else None
    return {"tile_px": tile_px, "mpp": mpp, "context": context} | _transform_of(raw["transform"])


def _mil_of(raw: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Read the keys that only a MIL head has."""
    kind = raw.get("head", "softmax")
    members, baseline = int(raw.get("members", 1)), raw.get("baseline", ())
    if kind not in KINDS:
        raise TypeError(f"head {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "binary" and num_classes != 2:
        raise TypeError(f"a binary head has two classes, not {num_classes}")
    if kind == "cox" and np.shape(baseline) != (members, num_classes - 1):
        raise TypeError(f"baseline is {np.shape(baseline)}, not {members} members by {num_classes - 1} ends")
    rows = tuple(tuple(map(float, row)) for row in baseline)
    if not all(0 <= survival <= 1 for row in rows for survival in row):
        raise TypeError("baseline holds numbers that are not from 0 to 1")
    head = Head(kind, num_classes, float(raw.get("temperature", 1.0)), rows)
    if head.temperature <= 0 or members < 1:
        raise TypeError(f"temperature is {head.temperature} and members is {members}")
    numbers: dict[str, float | None] = {"coverage": float(raw.get("coverage", 0.9))}
    for name in ("conformal_threshold", "largest_shift"):
        numbers[name] = None if raw.get(name) is None else float(raw[name])
    for name, value in {"temperature": head.temperature, **numbers}.items():  # with NaN nothing would be abstained from
        most = 1.0 if name in ("coverage", "conformal_threshold") else math.inf
        if value is not None and not (math.isfinite(value) and 0 <= value <= most):
            raise TypeError(f"{name} is {value:g}, not a finite number from 0 to {most:g}")
    bag_tiles = tuple(map(int, raw["bag_tiles"])) if raw.get("bag_tiles") is not None else None
    if bag_tiles is not None and not (len(bag_tiles) == 2 and 1 <= bag_tiles[0] <= bag_tiles[1]):
        raise TypeError(f"bag_tiles is {list(bag_tiles)}, not the fewest and the most tiles of a training bag")
    return {
        "head": head,
        "num_logits": head.num_logits,
        "members": members,
        "bag_tiles": bag_tiles,
        **numbers,
    }


def _context_of(raw: dict[str, Any], names: tuple[str, ...], positive: tuple[str, ...]) -> Context:
    """Read and check the key "context"."""
    if len(names) != 2 or len(positive) != 1:
        raise TypeError(f"context needs two classes, one of them positive, not {list(names)} and {list(positive)}")
    unknown = set(raw) - {"range_um", "nugget", "mean", "slope", "intercept"}
    if unknown:  # a misspelt "slope" would silently be 1
        raise TypeError(f"context has {', '.join(sorted(unknown))}, which nobody reads")
    values = {name: float(raw[name]) for name in ("range_um", "nugget", "mean")}
    values |= {name: float(raw[name]) for name in ("slope", "intercept") if name in raw}
    context = Context(names.index(positive[0]), **values)
    if not all(map(math.isfinite, values.values())) or min(context.range_um, context.nugget, context.slope) <= 0:
        raise TypeError(f"context is {values}: finite numbers, and range_um, nugget and slope above 0, are needed")
    return context


def _transform_of(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Read WSInfer's list of transforms: optional Resize, ToTensor, Normalize."""
    found: dict[str, Any] = {}
    for step in steps:
        name, arguments = step["name"], step.get("arguments") or {}
        if name not in _TRANSFORMS:
            raise TypeError(f"transform {name!r} is not one of {', '.join(_TRANSFORMS)}")
        if name == "Resize":
            size = arguments["size"]
            sides = {int(side) for side in (size if isinstance(size, list) else [size])}
            if len(sides) != 1 or min(sides) < 1:
                raise TypeError(f"transform Resize to {size} is not square")
            found["resize_px"] = sides.pop()
        elif name == "Normalize":
            found["mean"], found["std"] = normalisation(arguments["mean"], arguments["std"])
    return found


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of RGB in 0..1; ValueError for other values, such as those for 0..255.

    Examples
    --------
    >>> normalisation([0.5, 0.5, 0.5], [1, 1, 1])
    ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    """
    found = tuple(map(float, mean)), tuple(map(float, std))
    numbers = found[0] + found[1]
    if len(found[0]) != 3 or len(found[1]) != 3 or not all(map(math.isfinite, numbers)) or min(found[1]) <= 0:
        raise ValueError(f"Normalize has mean {found[0]} and std {found[1]}: three finite numbers each are needed")
    if max(numbers) > 1 or min(numbers) < 0:
        raise ValueError(f"Normalize has mean {found[0]} and std {found[1]}, and RGB is from 0 to 1: divide by 255")
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))

    try:
        folder = fetch("config.json", "stain.json", "preprocessor_config.json", "*.safetensors", TORCHSCRIPT, "mil/*")
        if not any((folder / weights).is_file() for weights in (*_SAFE_WEIGHTS, TORCHSCRIPT)):
            folder = fetch("pytorch_model.bin")  # fetched only if needed: often a copy of the weights
        return folder
    except GatedRepoError as error:
        what = "is gated: its authors give it to those who ask, and this machine is not logged in as one of them"
        remedy = f"Ask at https://huggingface.co/{repository}, then run `hf auth login` (or set HF_TOKEN)"
        raise ModelError(name, what, remedy) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"cannot be fetched ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})"
        remedy = "Check the name and the network (for a gated model `hf auth login`), or give a folder with its files"
        raise ModelError(name, what, remedy) from error
