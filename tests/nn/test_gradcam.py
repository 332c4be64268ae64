"""Grad-CAM against the paper's equations written out, and a planted square that it must find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nn.make import write_model
from wsi.errors import ModelError
from wsi.nn.begin import fresh_model
from wsi.nn.checkpoint import ModelConfig
from wsi.nn.gradcam import check_maps, grad_cam
from wsi.nn.patch import PatchModel, load_patch_model

torch.set_num_threads(1)
SIDE = 32


def literally(model: PatchModel, rgb: np.ndarray, k: int) -> np.ndarray:
    """Equations 1 and 2 for one patch, each gradient by a finite difference; one map after another.

    In float32, as these networks' pooling insists on; after it they are linear, so that a large step is exact.
    """
    net, step = model.net, 0.25
    with torch.no_grad():
        (maps,) = net.maps(model.normalised(rgb[None]))

        def logit(a: torch.Tensor) -> float:
            return float(net.classify(net.pool((a,)))[0, k])

        _, count, h, w = maps.shape
        cam = np.zeros((h, w))
        for channel in range(count):
            slope = 0.0
            for i in range(h):
                for j in range(w):
                    up, down = maps.clone(), maps.clone()
                    up[0, channel, i, j] += step
                    down[0, channel, i, j] -= step
                    slope += (logit(up) - logit(down)) / (2 * step)
            cam += slope / (h * w) * maps[0, channel].numpy()  # alpha_k A^k, equation 1 in 2
        large = torch.nn.functional.interpolate(
            torch.from_numpy(np.maximum(cam, 0))[None, None], (rgb.shape[0],) * 2, mode="bilinear"
        )
    return np.asarray(large[0, 0])


@pytest.mark.parametrize("architecture", ["test_resnet", "wsi-p4m", "test_byobnet"])
def test_it_is_what_the_paper_says(architecture: str) -> None:
    torch.manual_seed(0)
    arguments = {"head": 3, "widths": [2, 2, 2], "stem": 2} if architecture == "wsi-p4m" else {}
    model = fresh_model(
        architecture, arguments, ("a", "b", "c"), tile_px=SIDE, mpp=1, mean=[0.5] * 3, std=[0.3] * 3
    )  # fmt: skip
    rgb = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    cams = grad_cam(model, rgb, ["a", "c", "b"])
    assert cams.shape == (3, SIDE, SIDE) and cams.min() >= 0 and cams.max() > 0
    for i, k in enumerate((0, 2, 1)) if architecture == "wsi-p4m" else [(1, 2)]:
        np.testing.assert_allclose(cams[i], literally(model, rgb[i], k), rtol=1e-3, atol=1e-3 * cams.max())


class _Brightness(torch.nn.Module):
    """One map: how bright each 4 x 4 px are; the logit of the second class is their mean. And its negative."""

    num_features = 2

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bright = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)
        return (torch.cat([bright, -bright], 1),)

    def pool(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return maps[0].mean((2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([features[:, 1], features[:, 0]], 1) * 5


def brightness(logits: int = 2) -> PatchModel:
    names = ("dark", "bright")
    config = ModelConfig(Path("brightness"), "patch", "none", names, logits, tile_px=SIDE, mpp=1.0)
    net = _Brightness()
    if logits == 1:
        net.classify = lambda features: features[:, :1] * 5  # type: ignore[method-assign]
    return PatchModel(config, net, name="b", num_features=2, sha256="", device="cpu", precision="float32")


@pytest.mark.parametrize("logits", [1, 2])
def test_it_finds_a_bright_square(logits: int) -> None:
    rgb = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    rgb[0, 4:12, 20:28] = 255
    rgb[1, 16:24, 8:16] = 255
    cams = grad_cam(brightness(logits), rgb, ["bright", "bright"])
    for cam, (y, x) in zip(cams, ((8, 24), (20, 12)), strict=True):
        inside = np.zeros((SIDE, SIDE), bool)
        inside[y - 6 : y + 6, x - 6 : x + 6] = True
        assert cam[~inside].max() == 0 and cam[y - 2 : y + 2, x - 2 : x + 2].min() > 0.9 * cam.max()
    assert grad_cam(brightness(logits), rgb, ["dark", "dark"]).max() == 0  # nothing spoke for it


def test_networks_that_keep_channels_last_give_the_same(tmp_path: Path) -> None:
    """Swin's maps are (b, h, w, c); its features stay those of timm itself."""
    torch.manual_seed(0)
    arguments = {
        "img_size": 32,
        "window_size": 2,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
    }
    model = fresh_model(
        "swin_tiny_patch4_window7_224", arguments, ("a", "b"), tile_px=SIDE, mpp=1, mean=[0.5] * 3, std=[0.3] * 3
    )
    x = torch.rand(2, 3, SIDE, SIDE)
    (maps,) = model.net.maps(x)
    assert maps.shape == (2, 16, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(model.net(x), model.net.net(x))
    assert grad_cam(model, np.full((2, SIDE, SIDE, 3), 90, np.uint8), ["a", "b"]).shape == (2, SIDE, SIDE)


def test_what_has_no_maps_is_refused(tmp_path: Path) -> None:
    model = fresh_model("test_vit", {}, ("a", "b"), tile_px=160, mpp=1, mean=[0.5] * 3, std=[0.3] * 3)
    with pytest.raises(ModelError, match="not convolutional"):
        check_maps(model)
    convolutional = load_patch_model(str(write_model(tmp_path / "m")), device="cpu")
    check_maps(convolutional)
    with pytest.raises(ModelError, match="class 'stroma'"):
        grad_cam(convolutional, np.zeros((1, SIDE, SIDE, 3), np.uint8), ["stroma"])
