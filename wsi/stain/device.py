"""Stain transforms on a GPU: device arrays of any library with DLPack, queued on its stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.errors import StainError
from wsi.stain.transform import StainTransform

Upload = Callable[[npt.NDArray[Any]], Any]


class DeviceStain:
    """A transform with its tables on a GPU; its results equal those of ``StainTransform`` bit for bit.

    Calls do not wait for the device: arrays must stay alive until the stream has reached them.

    Parameters
    ----------
    transform : StainTransform
    upload : callable
        Copies a NumPy array to the current device, such as ``lambda a: torch.from_numpy(a).cuda()`` or
        ``cupy.asarray``.
    stream : callable
        Returns the stream to queue on, as a number: ``lambda: torch.cuda.current_stream().cuda_stream``, or
        ``lambda: cupy.cuda.get_current_stream().ptr``; default the default stream.

    Raises
    ------
    StainError
        The package was built without a CUDA compiler.

    Examples
    --------
    >>> stain = DeviceStain(transform, lambda a: torch.from_numpy(a).cuda())           # doctest: +SKIP
    >>> stain.apply(tiles, torch.empty_like(tiles))                                    # doctest: +SKIP
    """

    device = "cuda"

    def __init__(self, transform: StainTransform, upload: Upload, stream: Callable[[], int] = lambda: 0) -> None:
        if native.cuda is None:
            raise StainError("GPU", "wsi was built without a CUDA compiler", "Install again with nvcc on the PATH")
        self._map = getattr(native.cuda, transform.kernel)
        self._map_tensor = getattr(native.cuda, transform.kernel + "_tensor")
        self._arguments = [upload(a) if isinstance(a, np.ndarray) else a for a in transform.arguments]
        self._upload = upload
        self._stream = stream
        self._levels: dict[Any, Any] = {}

    def apply(self, rgb: Any, out: Any) -> Any:
        """Queue ``StainTransform.apply`` on device arrays uint8 (..., 3), C-contiguous, not overlapping."""
        self._map(rgb, *self._arguments, out, self._stream())
        return out

    def tensor(
        self, rgb: Any, mean: tuple[float, ...], std: tuple[float, ...], out: Any, *, dtype: str = "float32"
    ) -> Any:
        """Queue ``StainTransform.tensor``: uint8 (n, h, w, 3) to (n, 3, h, w) of `dtype`, in either layout."""
        key = (tuple(mean), tuple(std), dtype)
        if key not in self._levels:
            self._levels[key] = self._upload(native.levels(*key).copy())
        self._map_tensor(rgb, *self._arguments, self._levels[key], out, self._stream())
        return out


def place(
    transform: StainTransform,
    device: str = "auto",
    *,
    upload: Upload | None = None,
    stream: Callable[[], int] = lambda: 0,
) -> StainTransform | DeviceStain:
    """Put a transform where the tiles will be.

    Parameters
    ----------
    transform : StainTransform
    device : {"auto", "cpu", "cuda"}
        "auto" is CUDA where there is a device, the kernels were built, and `upload` is given.
    upload, stream
        As in ``DeviceStain``.

    Returns
    -------
    StainTransform or DeviceStain
        Its ``device`` is "cpu" (``apply`` and ``tensor`` take NumPy arrays) or "cuda".

    Raises
    ------
    StainError
        CUDA was asked for by name and is not available, or there is no such device.

    Examples
    --------
    >>> place(StainTransform("macenko"), "cpu").device
    'cpu'
    """
    if device not in ("auto", "cpu", "cuda"):
        raise StainError(f"device={device}", "no such device", "Use auto, cpu or cuda")
    if device == "cuda" and (upload is None or not native.cuda_devices()):
        what = "there is no GPU, or wsi was built without a CUDA compiler" if upload else "needs a way to upload tables"
        raise StainError("device=cuda", what, "Use auto or cpu, or see `wsi doctor`")
    if device == "cpu" or upload is None or not native.cuda_devices():
        return transform
    return DeviceStain(transform, upload, stream)
