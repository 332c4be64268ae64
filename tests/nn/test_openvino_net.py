"""Networks run by OpenVINO against the same networks run by torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nn.make import TILE_PX, write_model
from tests.nn.test_encoder import write_timm
from wsi.errors import ModelError
from wsi.nn.encoder import load_encoder
from wsi.nn.openvino_net import compiled
from wsi.nn.patch import PatchModel, load_patch_model, pass_size
from wsi.train.mil import prepare

# Found, not imported: imported by another door than ours, it would tell others of it.
needed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed (pip install 'wsi[openvino]')"
)

NORMALISE = {"name": "Normalize", "arguments": {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.25, 0.2]}}
RESIZE = {"name": "Resize", "arguments": {"size": 64}}
SHIPPED = ("phantom", "idc-breast")


def load(folder: Path, what: str, device: str, precision: str = "float32") -> PatchModel:
    """Load a shipped model, or one of random weights, written once."""
    if what == "encoder":
        name = folder / what if (folder / what).exists() else write_timm(folder / what)
        return load_encoder(str(name), device=device, precision=precision)
    if what not in SHIPPED and not (folder / what).exists():
        if what == "resized":
            write_model(folder / what, transform=[RESIZE, {"name": "ToTensor"}, NORMALISE])
        else:
            write_model(folder / what, network=what, patch_size_pixels=160 if what == "test_vit" else 64)
    return load_patch_model(what if what in SHIPPED else str(folder / what), device=device, precision=precision)


def patches(model: PatchModel, n: int, seed: int = 0) -> np.ndarray:
    """Draw blurred colours: noise averages to the same for every patch."""
    side = model.config.tile_px
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 3, 4, 4)).astype(np.float32)
    fine = torch.nn.functional.interpolate(torch.from_numpy(coarse), (side, side), mode="bilinear")
    return fine.permute(0, 2, 3, 1).round().byte().numpy()


@needed
@pytest.mark.parametrize("what", [*SHIPPED, "test_resnet", "test_efficientnet", "test_vit", "encoder", "resized"])
def test_numbers_are_those_of_torch(tmp_path: Path, what: str) -> None:
    model = load(tmp_path, what, "cpu")
    rgb = patches(model, 5)
    wanted = model(rgb)
    for precision, far in (("float32", 2e-5), ("bfloat16", 2e-2)):
        found = load(tmp_path, what, "openvino", precision)(rgb)
        np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=far)
        np.testing.assert_allclose(found.features, wanted.features, atol=far * np.abs(wanted.features).max())
        assert found.features.dtype == found.probabilities.dtype == np.float32


@needed
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["phantom", "test_vit"])
def test_the_same_bytes_whatever_came_before_or_lies_beside(tmp_path: Path, what: str, precision: str) -> None:
    model = load(tmp_path, what, "openvino", precision)
    rgb = patches(model, 8)
    sizes = [pass_size(n, 8) for n in (8, 1, 3, 5, 2)]
    first = {size: model(rgb[:size]) for size in sizes}
    again = {
        size: load(tmp_path, what, "openvino", precision)(rgb[:size]) for size in sizes[::-1]
    }  # each by a fresh one
    for size in sizes[::-1]:
        beside = patches(model, size, seed=1)
        beside[-1] = rgb[0]  # elsewhere in another batch of the same size
        then = model(beside)
        for before, after, moved in zip(first[size], again[size], then, strict=True):
            assert before.tobytes() == after.tobytes()
            assert before[0].tobytes() == moved[-1].tobytes()


@needed
def test_a_torchscript_model_shows_no_features(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    net = load_patch_model(str(folder), device="cpu", precision="float32").net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the zoo is made of it
        torch.jit.trace(net, torch.zeros(2, 3, TILE_PX, TILE_PX)).save(str(folder / "torchscript_model.pt"))
        by_torch, by_openvino = (
            load_patch_model(str(folder), device=device, torchscript=True) for device in ("cpu", "openvino")
        )
    rgb = patches(by_torch, 4)
    assert by_openvino(rgb).features.shape == (4, 0)
    np.testing.assert_allclose(by_openvino(rgb).probabilities, by_torch(rgb).probabilities, atol=2e-5)


class ByBatch(torch.nn.Module):
    """A network whose answer hangs on how many images it is given: traced, it forgets that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * (2.0 if len(x) == 2 else 1.0)


class Bessel(torch.nn.Module):
    """A function that OpenVINO does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))


@needed
@pytest.mark.parametrize(("net", "says"), [(ByBatch(), "another network"), (Bessel(), "cannot run this network")])
def test_what_it_cannot_do_is_refused_with_the_remedy(net: torch.nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=f"{says}.*--device cpu"):
        compiled(net, "forward", 8, "float32")


@needed
def test_it_tells_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from wsi.nn.patch import load_patch_model\n"
        "load_patch_model('phantom', device='openvino')\n"
        "assert 'openvino.tools.ovc' in sys.modules and sys.modules['openvino_telemetry'] is None\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "intel").exists()  # where the number would lie by which it tells people apart


def test_without_the_package_an_error_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelError, match=r"pip install 'wsi\[openvino\]'; or use --device cpu"):
        load_patch_model("phantom", device="openvino")


def test_a_training_on_it_is_refused_before_it_begins() -> None:
    with pytest.raises(ModelError, match="does not learn"):
        prepare("openvino", torch.get_num_threads())


@needed
def test_it_gives_no_numbers_where_gradients_are_on() -> None:
    model = load_patch_model("phantom", device="openvino")
    with pytest.raises(ModelError, match="does not learn"):
        model.forward(model.normalised(patches(model, 1)))


@needed
def test_threads_and_empty_batches(tmp_path: Path) -> None:
    model = load(tmp_path, "phantom", "openvino")
    batches = [patches(model, 4, seed) for seed in range(12)]
    alone = [model(rgb).probabilities for rgb in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda rgb: model(rgb).probabilities, batches * 4))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 4, together, strict=True))
    assert model(batches[0][:0]).probabilities.shape == (0, 2)
