"""Patch models: batches of patches in, features and class probabilities out."""

from __future__ import annotations

import contextlib
import copy
import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi import native
from wsi.errors import ModelError
from wsi.files import sha256_of
from wsi.nn.checkpoint import (
    HUB_PREFIX,
    TORCHSCRIPT,
    ModelConfig,
    find_model,
    fit_weights,
    load_weights,
    read_config,
    weights_sha256,
)
from wsi.nn.fold import for_inference

#: Architectures of ours; every other name is timm's.
OUR_NETS = {"wsi-p4m": ("wsi.nn.p4m", "P4MNet"), "wsi-encoder": ("wsi.nn.backbone", "EncoderNet")}

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")


class PatchScores(NamedTuple):
    """What a patch model says of a batch.

    Attributes
    ----------
    features : float32 (b, d)
        d is 0 for a TorchScript model, which does not show them.
    probabilities : float32 (b, k)
        One column a class; a row sums to 1.
    """

    features: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]


def pass_size(n: int, batch_size: int) -> int:
    """How many patches a forward pass takes where n are to be scored: the next power of two, at most `batch_size`.

    Convolution kernels are chosen by shape: with few shapes, which depend on nothing but the slide's tiles and
    `batch_size`, the same tile always gives the same bytes; and the rest of a slide does not cost a whole batch.

    Examples
    --------
    >>> [pass_size(n, 48) for n in (1, 5, 33, 48)]
    [1, 8, 48, 48]
    """
    return min(batch_size, 1 << (n - 1).bit_length())


class PatchModel:
    """A patch classifier ready to run.

    Attributes
    ----------
    config : ModelConfig
    name : str
        The name it was asked for by, or its folder's.
    sha256 : str
        Of the weights file.
    net : Module
        ``embed`` and ``classify``, and ``maps`` and ``pool``, which ``embed`` is made of.
    num_features : int
        d; 0 where the network does not show its features.
    device, precision : str
        Where and how it runs: "cpu" or "cuda"; "float32" or "bfloat16".

    Examples
    --------
    >>> model = load_patch_model("phantom")
    >>> scores = model(np.full((2, model.config.tile_px, model.config.tile_px, 3), 255, np.uint8))
    >>> scores.probabilities.shape
    (2, 2)
    """

    def __init__(
        self,
        config: ModelConfig,
        net: torch.nn.Module,
        *,
        name: str,
        num_features: int,
        sha256: str,
        device: str,
        precision: str,
    ) -> None:
        self.config = config
        self.name = name
        self.sha256 = sha256
        self.num_features = num_features
        self.device = device
        self.precision = precision
        self.net: Any = net.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._levels = self.upload(native.levels(config.mean, config.std, self.input_dtype).copy())

    @torch.inference_mode()
    def __call__(self, rgb: npt.NDArray[np.uint8]) -> PatchScores:
        """Score patches.

        Parameters
        ----------
        rgb : uint8 (b, tile_px, tile_px, 3)
            At the model's mpp.

        Raises
        ------
        ModelError
            The network gave numbers that are not finite.
        """
        return self.score(self.normalised(rgb))

    def normalised(self, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Make of patches, uint8 (b, h, w, 3), what ``score`` takes."""
        on_device = self.upload(rgb)
        values = [level[on_device[..., channel].int()] for channel, level in enumerate(self._levels)]
        return torch.stack(values, dim=-1).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (b, d) and logits (b, k) of normalised patches; gradients pass, for those who learn."""
        x = self.resized(x)
        with self._autocast():
            if not self.num_features:
                logits = self.net(x)
                return logits[:, :0], logits
            features = self.net.embed(x)
            return features, self.net.classify(features)

    def of_size(self, tile_px: int) -> PatchModel:
        """Return this model for patches of another side, which it resizes to its own."""
        other = copy.copy(self)
        other.config = replace(self.config, tile_px=tile_px, resize_px=self.config.resize_px or self.config.tile_px)
        other._levels = other.upload(native.levels(self.config.mean, self.config.std, other.input_dtype).copy())
        return other

    @property
    def input_dtype(self) -> str:
        """What ``score`` takes: "bfloat16" where the network computes in it from the first layer on, else "float32"."""
        resized = self.config.resize_px not in (None, self.config.tile_px)
        half = self.precision == "bfloat16" and not resized
        return "bfloat16" if half else "float32"

    def empty_input(self, n: int, device: str) -> Any:
        """Make room for the input of n patches, (n, 3, tile_px, tile_px) of ``input_dtype``, channels-last.

        A NumPy array on "cpu" (bits of bfloat16 as uint16), a tensor on "cuda".
        """
        shape, half = (n, self.config.tile_px, self.config.tile_px, 3), self.input_dtype == "bfloat16"
        if device == "cpu":
            return np.empty(shape, np.uint16 if half else np.float32).transpose(0, 3, 1, 2)
        kind = torch.bfloat16 if half else torch.float32
        return torch.empty(shape, dtype=kind, device=device).permute(0, 3, 1, 2)

    def empty_patches(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Memory for patches, uint8; where the model runs on a GPU, pages that are locked, which upload faster."""
        return np.asarray(torch.empty(shape, dtype=torch.uint8, pin_memory=self.device == "cuda").numpy())

    def upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Bring an array to where the model runs."""
        tensor = torch.from_numpy(array).to(self.device)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

    def stream(self) -> int:
        """Return the CUDA stream that the model's next work is queued on."""
        return int(torch.cuda.current_stream().cuda_stream)

    @torch.inference_mode()
    def score(self, x: npt.NDArray[Any] | torch.Tensor) -> PatchScores:
        """Score patches that are normalised: what ``__call__`` does after bytes have become ``native.levels``.

        Parameters
        ----------
        x : (b, 3, tile_px, tile_px)
            Of ``input_dtype``, as ``empty_input`` makes it; with the model's mean and std.

        Raises
        ------
        ModelError
            The network gave numbers that are not finite.
        """
        x = self.upload(x) if isinstance(x, np.ndarray) else x
        features, logits = self.forward(x)
        logits = logits.float()
        if logits.shape != (len(x), self.config.num_logits):
            raise ModelError(
                self.config.folder,
                f"the network gives {tuple(logits.shape)}, not {len(x)} x {self.config.num_logits} logits",
                "Correct class_names in its config.json",
            )
        if self.config.num_logits == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)  # whose softmax is the sigmoid
        probabilities = logits.softmax(1)
        scores = PatchScores(features.float().cpu().numpy(), probabilities.cpu().numpy())
        if not (np.isfinite(scores.features).all() and np.isfinite(scores.probabilities).all()):
            raise ModelError(
                self.config.folder, "the network gave numbers that are not finite", "Try --precision float32"
            )
        return scores

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        """Resize normalised patches to the network's own side, where it has one."""
        side = self.config.resize_px
        if side is None or x.shape[-1] == side:
            return x
        return torch.nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bfloat16":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()


def load_patch_model(
    name: str, *, device: str = "auto", precision: str = "auto", torchscript: bool = False, fold: bool = True
) -> PatchModel:
    """Load a patch model by name, folder or ``hf-hub:`` address.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" is CUDA where there is a GPU.
    precision : {"auto", "float32", "bfloat16"}
        "auto" is bfloat16 autocast on hardware that computes in it natively, float32 elsewhere.
    torchscript : bool
        Allow ``torchscript_model.pt``, which runs whatever code the file holds. Off by default.
    fold : bool
        Make it faster by ``for_inference``; off for whoever goes on training its weights.

    Raises
    ------
    ModelNotFound, ModelError
    """
    folder = find_model(name)
    config = read_config(folder, "patch")
    device = pick_device(device)
    precision = pick_precision(precision, device)
    shown = name if name.startswith(HUB_PREFIX) else folder.resolve().name
    if torchscript and (folder / TORCHSCRIPT).is_file():
        sha256 = sha256_of(folder / TORCHSCRIPT)
        try:
            script: torch.nn.Module = torch.jit.load(str(folder / TORCHSCRIPT), map_location="cpu")
        except RuntimeError as error:
            raise ModelError(folder / TORCHSCRIPT, "is damaged", "Fetch the model again") from error
        return PatchModel(config, script, name=shown, num_features=0, sha256=sha256, device=device, precision="float32")
    net: Any = make_net(config)
    fit_weights(net, load_weights(config), config)
    if fold:
        for_inference(net, device, precision)
    return PatchModel(
        config, net, name=shown, num_features=int(net.num_features), sha256=weights_sha256(config), device=device,
        precision=precision,
    )  # fmt: skip


def pick_device(device: str) -> str:
    """Resolve "auto", and refuse a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in DEVICES:
        raise ModelError(f"device={device!r}", "no such device", f"Use {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device=cuda", "torch sees no CUDA GPU here", "Use --device cpu, or see `wsi doctor`")
    return device


def pick_precision(precision: str, device: str) -> str:
    """Resolve "auto": bfloat16 only where the hardware computes in it."""
    if precision not in PRECISIONS:
        raise ModelError(f"precision={precision!r}", "no such precision", f"Use {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    native = torch.cuda.is_bf16_supported() if device == "cuda" else cpu_has_bfloat16()
    return "bfloat16" if native else "float32"


def gpu_name() -> str | None:
    """Return the name of the GPU that "auto" would take."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16, AMX or Arm BF16); elsewhere it is emulated and slow."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def make_net(config: ModelConfig) -> Any:
    """Make the network that a configuration names, with fresh weights.

    Raises
    ------
    ModelError
        No such architecture, or arguments that it does not take.
    """
    arguments = {"num_classes": config.num_logits, **config.architecture_args}
    try:
        if config.architecture in OUR_NETS:
            module, name = OUR_NETS[config.architecture]
            return getattr(importlib.import_module(module), name)(**arguments)
        from wsi.nn.backbone import TimmNet

        return TimmNet(config.architecture, **arguments)
    except (TypeError, RuntimeError) as error:
        raise ModelError(
            config.folder / "config.json", f"architecture_args do not fit {config.architecture}: {error}"
        ) from error
