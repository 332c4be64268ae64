"""The only door to OpenVINO, which runs a network on the CPU faster than torch does."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from wsi.errors import ModelError

#: How far a compiled network may lie from torch's, of the largest number: above rounding, below another network.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    It tells Google Analytics of each import and conversion (``openvino_telemetry``, on unless opted out of), and does
    without where that package is not there: here it never is. Slides' networks are nobody else's business.

    Raises
    ------
    ModelError
        It is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        what = f"OpenVINO does not load ({error})"
        raise ModelError(
            "device=openvino", what, "Install it: pip install 'wsi[openvino]'; or use --device cpu"
        ) from None
    return openvino


class _Half(torch.nn.Module):
    """One method of a network, as the module that OpenVINO's converter wants."""

    def __init__(self, net: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.net, self.method = net, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self.net, self.method)(x)
        return found


def compiled(net: torch.nn.Module, method: str, side: int, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile a network for as many threads as torch has now, and see that it computes what torch does.

    Parameters
    ----------
    net : Module
        In evaluation mode, on the CPU, in float32.
    method : str
        Which of its methods: images (b, 3, side, side) to numbers (b, d).
    side : int
    precision : {"float32", "bfloat16"}
        What it computes in.

    Returns
    -------
    callable
        float (b, 3, side, side), best channels-last, to float32 (b, d). Where gradients are on, it raises ModelError.

    Raises
    ------
    ModelError
        OpenVINO is not installed, or cannot run this network.
    """
    ov = import_openvino()
    half = _Half(net, method).eval()
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))  # as normalised patches are
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's tracer on branches by shape: what comes of them is checked below
            model = ov.convert_model(half, example_input=images[:2], input=[([-1, 3, side, side], ov.Type.f32)])
        about = ov.preprocess.PrePostProcessor(model)
        about.input().tensor().set_layout(ov.Layout("NHWC"))  # channels-last in memory, as our pipeline makes them
        about.input().model().set_layout(ov.Layout("NCHW"))
        hints = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "ENABLE_CPU_PINNING": False,  # of several processes all would take the same cores
        }
        run, lock = ov.Core().compile_model(about.build(), "CPU", hints), threading.Lock()  # its one request is shared

        width = int(model.output(0).partial_shape[1].get_length())

        def compute(x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():  # a network that learnt would go on as it was compiled
                raise ModelError("device=openvino", "it does not learn", "Use auto, cpu or cuda")
            if not len(x):
                return torch.zeros(0, width)
            array = x.permute(0, 2, 3, 1).contiguous().numpy()
            with lock:
                return torch.from_numpy(run(array, share_inputs=True)[0].copy())

        with torch.inference_mode():
            found, wanted = compute(images), half(images)
    except Exception as error:  # whatever it is that its converter or compiler does not know
        what = f"OpenVINO cannot run this network ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise ModelError("device=openvino", what, "Use --device cpu") from error
    far = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    largest = float(wanted.abs().max())
    if not far <= _TOLERANCE[precision] * largest:
        what = (
            f"OpenVINO makes another network of this one: its numbers, up to {largest:.3g}, lie {far:.3g} from torch's"
        )
        raise ModelError("device=openvino", what, "Use --device cpu, or --precision float32")
    return compute
