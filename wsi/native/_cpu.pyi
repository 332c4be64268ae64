from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

def area_average(
    source: U8,
    edges_y: npt.NDArray[np.int64],
    edges_x: npt.NDArray[np.int64],
    out: U8,
) -> None: ...
def od_map(rgb: U8, tables: F32, bias: float, out: U8) -> None: ...
def od_map_portable(rgb: U8, tables: F32, bias: float, out: U8) -> None: ...
def od_map_planes(rgb: U8, tables: F32, bias: float, levels: npt.NDArray[Any], out: npt.NDArray[Any]) -> None: ...
def lab_map(rgb: U8, linear: F32, codes: U8, values: F32, out: U8) -> None: ...
def lab_map_planes(
    rgb: U8, linear: F32, codes: U8, values: F32, levels: npt.NDArray[Any], out: npt.NDArray[Any]
) -> None: ...
