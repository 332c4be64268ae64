"""The result of a fit: frozen, saved as a line of JSON, and applied at memory speed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import native
from wsi.errors import StainError
from wsi.slide.base import U8
from wsi.stain.pixels import checked, density_table
from wsi.stain.reinhard import lab_tables
from wsi.stain.statistics import F64, MAX_GAIN, LabStatistics, Stains, Unmeasurable

_FORMAT = 1


@dataclass(frozen=True)
class StainTransform:
    """Maps each pixel from a slide's colours to a target's; without statistics, it is the identity.

    Attributes
    ----------
    method : str
        "macenko", "vahadane", "ruifrok" or "reinhard".
    source, target : Stains or LabStatistics, or None
        Measured and wanted statistics.
    io : float
        Intensity of glass plus one.
    published : bool
        Follow the published programs, including the cast on glass.
    fallback : str, optional
        Why this is not the requested fit, a key of ``FALLBACKS``: the identity, or another slide's transform.
    sparsity : float, optional
        Compute non-negative amounts with this weight of sparsity (Vahadane, as published) instead of least squares.

    Raises
    ------
    StainError
        Source and target of different kinds, or a map that amplifies too much.

    Examples
    --------
    >>> veta = Stains(((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)), (1.9705, 1.0308))
    >>> pale = dataclasses.replace(veta, max_amounts=(1.5, 0.8))
    >>> StainTransform("macenko", pale, veta).apply(np.uint8([[150, 90, 140], [255, 255, 255]])).tolist()
    [[127, 66, 116], [255, 255, 255]]
    """

    method: str
    source: Stains | LabStatistics | None = None
    target: Stains | LabStatistics | None = None
    io: float = 256.0
    published: bool = False
    fallback: str | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        if type(self.source) is not type(self.target):
            raise StainError(self.method, "source and target must be of one kind, or both be left out")
        if not 1 <= self.io <= 256:
            raise StainError(f"io={self.io:g}", "the intensity of glass plus one must be from 1 to 256")
        if self.sparsity is not None and not (0 <= self.sparsity < 1 and type(self.source) is not LabStatistics):
            raise StainError(f"sparsity={self.sparsity:g}", "must be from 0 to below 1, and is for stains alone")
        _ = self.arguments  # refuses maps that amplify too much

    def apply(self, rgb: U8, out: U8 | None = None) -> U8:
        """Map pixels one by one; the result does not depend on batches or order.

        Parameters
        ----------
        rgb : uint8 (..., 3)
            C-contiguous.
        out : uint8, shape of `rgb`, optional
            C-contiguous, not overlapping `rgb`; written in place, and returned.

        Returns
        -------
        uint8, shape of `rgb`

        Raises
        ------
        StainError
            Another dtype or shape, empty, strided, or overlapping. Nothing is copied silently.
        """
        checked(rgb)
        if out is None:
            out = np.empty(rgb.shape, np.uint8)
        elif out.dtype != np.uint8 or out.shape != rgb.shape or np.may_share_memory(rgb, out):
            raise StainError("out", f"is {out.dtype} {out.shape}, or overlaps rgb", f"Give other uint8 {rgb.shape}")
        _check_contiguous(rgb=rgb, out=out)
        getattr(native, self.kernel)(rgb, *self.arguments, out)
        return out

    def tensor(
        self,
        rgb: U8,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        out: npt.NDArray[Any] | None = None,
        *,
        dtype: str = "float32",
        channels_last: bool = False,
    ) -> npt.NDArray[Any]:
        """Map tiles to a network's input in one pass: ``apply``, ``(value / 255 - mean) / std``, layout, dtype.

        Parameters
        ----------
        rgb : uint8 (n, h, w, 3)
            C-contiguous.
        mean, std : 3 floats
            Of the network's normalisation, for values of 0 to 1.
        out : (n, 3, h, w), optional
            Of `dtype` (uint16 for bfloat16), contiguous or channels-last; written in place, and returned.
        dtype : {"float32", "float16", "bfloat16"}
            NumPy has no bfloat16: its bits come as uint16 (``torch.from_numpy(x).view(torch.bfloat16)``).
        channels_last : bool
            Memory layout where `out` is not given: True keeps a pixel's three values together. The numbers are the
            same, and convolutions run faster.

        Returns
        -------
        (n, 3, h, w)
            Each of the 768 possible values is computed in float64 and rounded (to bfloat16 via float32).

        Examples
        --------
        >>> x = StainTransform("macenko").tensor(np.zeros((1, 4, 5, 3), np.uint8), (0.5,) * 3, (0.5,) * 3)
        >>> x.shape, float(x[0, 0, 0, 0])
        ((1, 3, 4, 5), -1.0)
        """
        checked(rgb)
        table = native.levels(tuple(mean), tuple(std), dtype)
        if rgb.ndim != 4:
            raise StainError("rgb", f"is not a batch: its shape is {rgb.shape}", "Give uint8 (n, h, w, 3)")
        n, h, w, _ = rgb.shape
        if out is None:
            shape = (n, h, w, 3) if channels_last else (n, 3, h, w)
            out = np.empty(shape, table.dtype)
            out = out.transpose(0, 3, 1, 2) if channels_last else out
        elif out.dtype != table.dtype or out.shape != (n, 3, h, w):
            raise StainError("out", f"is {out.dtype} {out.shape}", f"Give {table.dtype} {(n, 3, h, w)}")
        by_pixel = out.transpose(0, 2, 3, 1)
        _check_contiguous(rgb=rgb, out=by_pixel if by_pixel.flags.c_contiguous else out)
        getattr(native, self.kernel + "_tensor")(rgb, *self.arguments, table, out)
        return out

    @property
    def device(self) -> str:
        """Where it runs, "cpu"; see ``wsi.stain.device``."""
        return "cpu"

    @property
    def kernel(self) -> str:
        """Name of the map in ``wsi.native``."""
        if isinstance(self.source, LabStatistics):
            return "lab_map"
        return "sparse_map" if self.sparsity is not None and self.source is not None else "od_map"

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the kernel between `rgb` and `out`: tables and numbers."""
        if isinstance(self.source, LabStatistics) and isinstance(self.target, LabStatistics):
            return lab_tables(self.source, self.target, published=self.published)
        if isinstance(self.source, Stains) and isinstance(self.target, Stains):
            if self.sparsity is not None:
                return sparse_tables(self.source, self.target, self.io, self.sparsity, published=self.published)
            matrix = od_matrix(self.source, self.target, residual=not self.published)
            return od_tables(matrix, self.io, published=self.published)
        return od_tables(np.eye(3), 256.0)

    def to_json(self) -> str:
        """Return one line of JSON with sorted keys; ``from_json`` restores an equal transform."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> StainTransform:
        """Read the output of ``to_json``; StainError where it is not that, or holds no valid transform."""
        try:
            values = json.loads(text)
            if values.pop("format") != _FORMAT:
                raise StainError("stain transform", "is of another format", "Fit it again")
            for side in ("source", "target"):
                values[side] = _statistics(values[side])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, StainError):
                raise
            raise StainError("stain transform", f"is not one that to_json wrote ({error})", "Fit it again") from error


def od_matrix(source: Stains, target: Stains, *, residual: bool) -> F64:
    """Return the map in optical density, float64 (3, 3): ``out = matrix @ in``.

    Amounts of the source's stains are scaled to the target's full strength and shown in the target's colours. The
    component perpendicular to both stains is kept with `residual`, and dropped without, as in Macenko. Raises
    Unmeasurable where the map amplifies more than ``MAX_GAIN``.
    """
    ratio = np.array(target.max_amounts) / source.max_amounts
    if residual:
        (seen, wanted), ratio = (with_residual(s) for s in (source, target)), np.append(ratio, 1.0)
    else:
        seen, wanted = np.array(source.vectors), np.array(target.vectors)
    matrix = (wanted.T * ratio) @ np.linalg.pinv(seen.T)
    if np.abs(matrix).max() > MAX_GAIN:
        raise Unmeasurable("gain")
    return np.asarray(matrix)


def od_tables(matrix: F64, io: float, *, published: bool = False) -> tuple[npt.NDArray[np.float32], float]:
    """Factor a map in optical density by input channel, for ``native.od_map``.

    ``256 exp(-sum_k M[c, k] OD(v_k)) - 1`` is a product of one factor for each of red, green and blue. No entry of the
    matrix is above 4.8 and no density above 5.6, so products of three factors fit in float32.

    Parameters
    ----------
    matrix : float64 (3, 3)
        Raises StainError where it is not finite, or has an entry above 4.8.
    io : float
        Intensity of glass plus one.
    published : bool
        Keep negative densities, and map back by ``io * exp(-OD)`` without subtracting one.

    Returns
    -------
    float32 (3, 256, 4), float
        Tables and bias.

    Examples
    --------
    >>> tables, bias = od_tables(np.eye(3), 256.0)
    >>> np.rint(tables[0, [0, 99, 255], 0]).tolist(), bias
    ([1.0, 100.0, 256.0], -0.5)
    """
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or np.abs(matrix).max() > MAX_GAIN:
        raise StainError("optical density map", f"must be 3x3 finite numbers up to {MAX_GAIN:g}")
    density = density_table(io, clamp=not published)
    tables = np.zeros((3, 256, 4), np.float64)
    tables[:, :, :3] = np.exp(-density[None, :, None] * matrix.T[:, None, :])
    tables[0] *= io if published else 256.0
    return tables.astype(np.float32), 0.5 if published else -0.5


def sparse_tables(
    source: Stains, target: Stains, io: float, sparsity: float, *, published: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Make the arguments of ``native.sparse_map``: density of each byte, and the map; see ``wsi.stain.vahadane``.

    Raises Unmeasurable where the map amplifies more than ``MAX_GAIN``, and StainError for stains more than a right
    angle apart, which absorbing stains never are.
    """
    od_matrix(source, target, residual=False)  # refuses maps that amplify too much
    lengths = np.linalg.norm(source.vectors, axis=1)
    stains = np.array(source.vectors) / lengths[:, None]
    overlap = float(stains[0] @ stains[1])
    if overlap < 0:
        raise StainError("stain vectors", "are more than a right angle apart")
    rows = []
    for own, other in (stains, stains[::-1]):
        rows += [*own, -sparsity, *(own - overlap * other) / (1 - overlap**2), -sparsity / (1 + overlap)]
    ratio = np.array(target.max_amounts) / source.max_amounts / lengths
    powers = np.array(target.vectors) * ratio[:, None] / -np.log(2)
    light, bias = (io, 0.5) if published else (256.0, -0.5)
    values = np.array([*rows, *powers.ravel(), light, bias])
    return density_table(io, clamp=not published).astype(np.float32), values.astype(np.float32)


def with_residual(stains: Stains) -> F64:
    """Return both stains and the unit vector perpendicular to them, (3, 3)."""
    h, e = np.array(stains.vectors)
    third = np.cross(h, e)
    return np.stack([h, e, third / np.linalg.norm(third)])


def _statistics(values: dict[str, Any] | None) -> Stains | LabStatistics | None:
    if values is None:
        return None
    if "mean" in values:
        return LabStatistics(tuple(values["mean"]), tuple(values["std"]), values["n_px"])
    h, e = (tuple(v) for v in values["vectors"])
    return Stains((h, e), tuple(values["max_amounts"]), values["n_px"], tuple(values["variances"]))


def _check_contiguous(**arrays: npt.NDArray[Any]) -> None:
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise StainError(name, "is strided", "Give a C-contiguous array: numpy.ascontiguousarray copies it to one")
        if name == "out" and not array.flags.writeable:
            raise StainError(name, "is read-only")
