"""Networks of timm. No other module imports timm."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from wsi.errors import ModelError

_kept_alive: list[Any] = []


def _import_torchvision() -> None:
    """Import torchvision even where its compiled part does not fit this torch.

    timm always imports torchvision. A CUDA build of torchvision beside a CPU-only torch cannot load its C++ library,
    and then fails to register the shape function of an operator that is not defined. Defining the two operators'
    schemas is enough, since their kernels are not used here. Where the builds match, the first import succeeds.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)  # the operators live as long as it does
        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]
        importlib.import_module("torchvision")


_import_torchvision()
#: True where torchvision needed the repair above; in other programs `import timm` fails here.
TORCHVISION_REPAIRED = bool(_kept_alive)
import timm  # noqa: E402
import timm.layers  # noqa: E402


class _Halves(torch.nn.Module):
    """A network in two parts, ``maps`` and ``pool``, as a patch model needs it; here for timm's `net`."""

    net: Any

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalised images (b, 3, h, w) to the input of ``pool``; for convolutional networks maps (b, d, h', w')."""
        return (_channels_second(self.net, self.net.forward_features(x)),)

    def pool(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Output of ``maps`` to features (b, d)."""
        raise NotImplementedError

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (b, 3, h, w) to features (b, d)."""
        return self.pool(self.maps(x))


class TimmNet(_Halves):
    """A timm network with a classifier.

    Examples
    --------
    >>> net = TimmNet("test_resnet", num_classes=2)
    >>> net.classify(net.embed(torch.zeros(1, 3, 64, 64))).shape
    torch.Size([1, 2])
    """

    def __init__(self, name: str, *, num_classes: int, **arguments: Any) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ModelError(f"architecture {name!r}", "is neither one of ours nor known to timm", _closest(name))
        net: Any = timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
        if not isinstance(net.get_classifier(), torch.nn.Linear):
            raise ModelError(f"architecture {name!r}", "ends in no linear layer, which is what reads features here")
        self.net = net
        self.num_features = int(net.get_classifier().in_features)

    def pool(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        features: torch.Tensor = self.net.forward_head(_as_its_own(self.net, maps[0]), pre_logits=True)
        return features

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features (b, d) to logits (b, k)."""
        logits: torch.Tensor = self.net.get_classifier()(features)
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (b, 3, h, w) to logits (b, k)."""
        return self.classify(self.embed(x))


class TimmEncoder(_Halves):
    """A timm network without a classifier, pooled as its authors do.

    Parameters
    ----------
    name : str
        A timm name.
    tile_px : int
        Side of the input.
    pool : {"own", "token", "token+mean"}
        See ``wsi.nn.encoder.Recipe``.
    norm_eps : float, optional
        Epsilon of all layer norms.
    arguments
        Of timm's constructor; layers may be given by name.

    Examples
    --------
    >>> net = TimmEncoder("test_vit", tile_px=160, pool="token+mean")
    >>> net.embed(torch.zeros(2, 3, 160, 160)).shape
    torch.Size([2, 128])
    """

    def __init__(
        self, name: str, *, tile_px: int, pool: str = "own", norm_eps: float | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ModelError(f"architecture {name!r}", "is not known to timm", _closest(name))
        layers: dict[str, Any] = {"SwiGLUPacked": timm.layers.mlp.SwiGLUPacked, "SiLU": torch.nn.SiLU}
        arguments = {
            key: layers.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()
        }
        net: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        if norm_eps is not None:
            for module in net.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.eps = norm_eps
        self.net = net.eval()
        self.pooling = pool
        self.classifier_names = tuple(f"{part}." for part in _names(net.pretrained_cfg.get("classifier")))
        with torch.inference_mode():
            features = self.embed(torch.zeros(1, 3, tile_px, tile_px))
        if features.ndim != 2:
            what = f"gives {tuple(features.shape[1:])} numbers a tile, not a row of them"
            raise ModelError(f"architecture {name!r}", what)
        self.num_features = features.shape[1]

    def pool(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # (b, tokens, width), class and register tokens first; for pool "own" any shape that the head takes
        tokens = _as_its_own(self.net, maps[0])
        if self.pooling == "own":
            features: torch.Tensor = self.net.forward_head(tokens)
            return features
        if self.pooling == "token":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.net.num_prefix_tokens :].mean(1)], 1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Return no logits (b, 0)."""
        return features[:, :0]


class EncoderNet(_Halves):
    """An encoder with a trainable linear classifier: fine-tuning or linear probing of an encoder of ``wsi embed``.

    Parameters
    ----------
    encoder : str
        A timm name; the other arguments are those of ``TimmEncoder``.

    Examples
    --------
    >>> net = EncoderNet(num_classes=3, encoder="test_vit", tile_px=160, pool="token")
    >>> net.classify(net.embed(torch.zeros(1, 3, 160, 160))).shape
    torch.Size([1, 3])
    """

    def __init__(self, *, num_classes: int, encoder: str, **arguments: Any) -> None:
        super().__init__()
        self.encoder = TimmEncoder(encoder, **arguments)
        self.num_features = self.encoder.num_features
        self.classifier = torch.nn.Linear(self.num_features, num_classes)

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.encoder.maps(x)

    def pool(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.encoder.pool(maps)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features (b, d) to logits (b, k)."""
        logits: torch.Tensor = self.classifier(features)
        return logits


def _channels_second(net: Any, found: torch.Tensor) -> torch.Tensor:
    """Maps as (b, d, h, w), also of networks such as Swin that keep them as (b, h, w, d)."""
    return found.permute(0, 3, 1, 2) if found.ndim == 4 and getattr(net, "output_fmt", "") == "NHWC" else found


def _as_its_own(net: Any, maps: torch.Tensor) -> torch.Tensor:
    """Undo ``_channels_second``."""
    return maps.permute(0, 2, 3, 1) if maps.ndim == 4 and getattr(net, "output_fmt", "") == "NHWC" else maps


def hub_of(name: str) -> str | None:
    """Return the hub repository of a timm name's pretrained weights, such as ``timm/resnet50.a1_in1k``."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return None if config is None else config.hf_hub_id and config.hf_hub_id.rstrip("/")


def _names(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _closest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"Did you mean {', '.join(near)}?" if near else "See timm.list_models()"
