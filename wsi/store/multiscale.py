"""Write an image pyramid with several channels as OME-Zarr (OME-NGFF 0.4 on Zarr v2, 0.5 on Zarr v3).

In OME-NGFF the origin is the centre of the first pixel. So the centre of the first image pixel, which is `step` slide
pixels wide, lies ``(step - 1) / 2`` slide pixels from the slide's origin: that is the level's translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from wsi.errors import OutputError
from wsi.files import replacing_folder
from wsi.units import Mpp

#: NGFF versions, and the Zarr format of each.
NGFF = {"0.4": 2, "0.5": 3}
_CHUNK_PX = 256


def write_multiscale(
    path: Path, levels: Sequence[npt.NDArray[np.float32]], channels: Sequence[str], *, step: tuple[float, float],
    mpp: Mpp, version: str = "0.5",
) -> None:  # fmt: skip
    """Write an OME-Zarr image; it appears under its name, ``*.ome.zarr``, only when it is complete.

    `levels` are (channels, rows, columns), the finest first, each with half the resolution of the one before. A pixel
    of the first is `step` (width, height) level-0 pixels of the slide. An existing image is replaced; anything else at
    `path` raises OutputError, and an unknown `version` ValueError.

    Examples
    --------
    >>> write_multiscale(Path("heatmap.ome.zarr"), [values], ["tumour"], step=(256, 256), mpp=mpp)     # doctest: +SKIP
    """
    if version not in NGFF:
        raise ValueError(f"version must be one of {', '.join(NGFF)}, got {version!r}")
    if path.exists() and not any((path / name).is_file() for name in (".zattrs", "zarr.json")):
        raise OutputError(path, "is there already, and no OME-Zarr image", "Choose another folder with -o")
    um_per_px = np.array([mpp.y, mpp.x])
    datasets = []
    for k in range(len(levels)):
        px = np.array(step[::-1]) * 2**k
        scale = {"type": "scale", "scale": [1.0, *(px * um_per_px).tolist()]}
        shift = {"type": "translation", "translation": [0.0, *((px - 1) / 2 * um_per_px).tolist()]}
        datasets.append({"path": str(k), "coordinateTransformations": [scale, shift]})
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    image: dict[str, Any] = {"name": path.name, "axes": axes, "datasets": datasets, "type": "mean"}
    window = {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
    shown = [{"label": name, "color": "FFFFFF", "window": window, "active": i == 0} for i, name in enumerate(channels)]
    if version == "0.4":
        about: dict[str, Any] = {"multiscales": [{"version": version, **image}], "omero": {"channels": shown}}
    else:
        about = {"ome": {"version": version, "multiscales": [image], "omero": {"channels": shown}}}
    v2: dict[str, Any] = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    v3: dict[str, Any] = {"dimension_names": ("c", "y", "x")}
    with replacing_folder(path) as draft:
        group = zarr.create_group(LocalStore(draft), zarr_format=2 if NGFF[version] == 2 else 3, attributes=about)
        for k, level in enumerate(levels):
            chunks = 1, min(_CHUNK_PX, level.shape[1]), min(_CHUNK_PX, level.shape[2])
            array = group.create_array(
                str(k), shape=level.shape, dtype="float32", chunks=chunks, fill_value=float("nan"),
                **(v2 if version == "0.4" else v3),
            )  # fmt: skip
            array[:] = level
