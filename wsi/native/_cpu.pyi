import numpy as np
import numpy.typing as npt

def area_average(
    source: npt.NDArray[np.uint8],
    edges_y: npt.NDArray[np.int64],
    edges_x: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint8],
) -> None: ...
