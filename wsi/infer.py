"""From tiles to numbers: batches through the patch model, into the store; features through the MIL head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.nn.patch import PatchModel, pass_size
from wsi.result import Laps
from wsi.slide import Slide
from wsi.stain import StainTransform
from wsi.stain.device import place
from wsi.store import PatchStore
from wsi.tiling import stream


def score_tiles(
    slide: Slide,
    store: PatchStore,
    model: PatchModel,
    *,
    batch_size: int,
    threads: int,
    stain: StainTransform | None = None,
    progress: Callable[[int], None] = lambda done: None,
    spent: dict[str, float] | None = None,
) -> str | None:
    """Compute what is missing of ``probabilities``, ``features`` and, where kept as zstd or JPEG, ``pixels``.

    Where the store has ``probabilities_alone``, the network's output goes there, and ``probabilities`` is filled later
    by ``wsi.context.in_context``.

    A patch of which a part cannot be decoded is ``unreadable``: it has no numbers (NaN in the store).

    Parameters
    ----------
    store : PatchStore
        Made for this slide's grid; written shard by shard.
    batch_size : int
        Patches a forward pass. Batches never span two shards.
    threads : int
        Reader threads.
    stain : StainTransform, optional
        Applied to the patches that the model sees; kept pixels stay as they were read.
    progress : callable
        Called with the number of tiles done in all.
    spent : dict, optional
        Seconds of this thread are added under ``tiles_waiting`` (for patches), ``tiles_stain``, ``tiles_forward`` and
        ``tiles_write``.

    Returns
    -------
    str or None
        Why the first unreadable patch that was met now is so.

    Notes
    -----
    Bytes become the network's input in one pass (``StainTransform.tensor``: stains, mean and std, dtype, layout), by
    the identity where no stains are normalised. Convolution kernels are chosen by shape, so every forward pass sees
    `batch_size` patches, and the last of a shard as many as are left, filled up to a power of two: the same
    configuration gives the same bytes. Another batch size, another number of torch threads or another CPU may differ
    in the last bits: 2e-5 in float32 and 2e-2 in bfloat16 bound what was seen of probabilities.
    """
    kept = {"pixels"} if store.pixels in ("zstd", "jpeg") else set()
    said = "probabilities_alone" if "probabilities_alone" in store.arrays else "probabilities"
    wanted = [said, *(["features"] if "features" in store.arrays else []), *kept]
    missing = store.missing(*wanted)
    done = len(store) - sum(len(store.tiles(shard)) for shard in missing)
    shards = [store.tiles(shard) for shard in missing]
    wanted.append("unreadable")
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in wanted}
    first_problem = None
    transform = stain or StainTransform("none")
    device = "auto" if model.device == "cuda" else "cpu"
    placed = place(transform, device, upload=model.upload, stream=model.stream)
    mean, std = model.config.mean, model.config.std
    x = model.empty_input(batch_size, placed.device)
    patches = stream(slide, store.grid, shards, batch_size=batch_size, threads=threads, empty=model.empty_patches)
    lap = Laps({} if spent is None else spent)
    with closing(patches) as batches:
        for tiles, rgb, unreadable, problem in batches:
            lap("tiles_waiting")
            first_problem = first_problem or problem
            progress(done)
            tiles_rgb: Any = model.upload(rgb) if placed.device == "cuda" else rgb
            placed.tensor(tiles_rgb, mean, std, x[: len(rgb)], dtype=model.input_dtype)
            filled = pass_size(len(rgb), batch_size)
            x[len(rgb) : filled] = 0
            lap("tiles_stain")
            scores = model.score(x[:filled])
            lap("tiles_forward")
            parts["unreadable"].append(unreadable)
            parts[said].append(_null(scores.probabilities[: len(rgb)], unreadable))
            if "features" in parts:
                parts["features"].append(_null(scores.features[: len(rgb)], unreadable))
            if "pixels" in parts:
                parts["pixels"].append(rgb.copy())
            done += len(rgb)
            shard = missing[0]
            if tiles.stop == store.tiles(shard).stop:
                store.write(shard, {name: np.concatenate(part) for name, part in parts.items()})
                parts = {name: [] for name in wanted}
                missing.pop(0)
            lap("tiles_write")
    progress(done)
    return first_problem


def _null(values: npt.NDArray[Any], unreadable: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    return np.where(unreadable[:, None], np.nan, values) if unreadable.any() else values
