"""OME-Zarr (OME-NGFF 0.4 on Zarr v2, 0.5 on Zarr v3): a picture with several channels, as a pyramid.

Continuous coordinates of OME-NGFF begin at the centre of the first pixel; so where a pixel of the picture is
`step` times one of the slide, its centre lies ``(step - 1) / 2`` slide pixels further.
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

#: NGFF versions and the Zarr formats they stand on.
NGFF = {"0.4": 2, "0.5": 3}
_CHUNK_PX = 256


def write_multiscale(
    path: Path,
    levels: Sequence[npt.NDArray[np.float32]],
    channels: Sequence[str],
    *,
    step: tuple[float, float],
    mpp: Mpp,
    version: str = "0.5",
) -> None:
    """Write an OME-Zarr image; it appears under its name only when it is whole.

    Parameters
    ----------
    path : Path
        Ends in ``.ome.zarr``. An image that is there already is replaced; anything else there is an error.
    levels : sequence of float32 (channels, rows, columns)
        The finest first, each half as fine as the one before.
    channels : sequence of str
        Their names.
    step : (float, float)
        Width and height of a pixel of the first level in level-0 pixels of the slide.
    version : {"0.4", "0.5"}

    Raises
    ------
    ValueError
        An unknown version.
    OutputError
        Something else is at `path`.

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
        datasets.append(
            {
                "path": str(k),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, *(px * um_per_px).tolist()]},
                    {"type": "translation", "translation": [0.0, *((px - 1) / 2 * um_per_px).tolist()]},
                ],
            }
        )
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    image: dict[str, Any] = {"name": path.name, "axes": axes, "datasets": datasets, "type": "mean"}
    window = {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
    shown = [{"label": name, "color": "FFFFFF", "window": window, "active": i == 0} for i, name in enumerate(channels)]
    if version == "0.4":
        about: dict[str, Any] = {"multiscales": [{"version": version, **image}], "omero": {"channels": shown}}
    else:
        about = {"ome": {"version": version, "multiscales": [image], "omero": {"channels": shown}}}
    with replacing_folder(path) as draft:
        group = zarr.create_group(LocalStore(draft), zarr_format=2 if NGFF[version] == 2 else 3, attributes=about)
        for k, level in enumerate(levels):
            extra: dict[str, Any] = (
                {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
                if version == "0.4"
                else {"dimension_names": ("c", "y", "x")}
            )
            array = group.create_array(
                str(k),
                shape=level.shape,
                dtype="float32",
                chunks=(1, min(_CHUNK_PX, level.shape[1]), min(_CHUNK_PX, level.shape[2])),
                fill_value=float("nan"),
                **extra,
            )
            array[:] = level
