"""Features of a slide's patches by any encoder, stored in the slide's patch store.

They are in an array of their own, ``features-<start of the hash of the encoder's weights>``, whose attributes describe
them. So one store holds features of several encoders, each computed once, and none is mistaken for another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import __version__
from wsi.errors import ModelError, SlideError, StoreError
from wsi.nn.grade import MilModel
from wsi.nn.patch import PatchModel, pass_size
from wsi.result import Clock, Progress, SlideResult, rounded
from wsi.stain.range import StainCheck, StainRange, sample_store
from wsi.store import PatchStore, slide_of
from wsi.tiling import stream

#: Accepted relative difference of the patches' field of view from the encoder's: scanners' "20x" differ as much.
TOLERANCE = 0.1


def embed_slide(
    folder: str | os.PathLike[str],
    encoder: PatchModel,
    *,
    batch_size: int = 64,
    threads: int = 4,
    slide_path: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> SlideResult:
    """Compute the features of all patches of ``folder/store.zarr``, or resume an earlier run.

    Patches come from the store, or are cut from the slide again where the store keeps none. The features of a patch
    that cannot be read are NaN, and `unreadable` marks it.

    Parameters
    ----------
    folder : path
        Written by ``tile_slide`` or ``score_slide``.
    encoder : PatchModel
        From ``load_encoder``.
    batch_size : int
        Patches a forward pass; the last batch is padded to a power of two.
    threads : int
        Patches read and decoded at a time.
    slide_path : str, optional
        Path of the slide, if it has moved.
    progress : callable
        Called with the stage, the work done and the total.

    Returns
    -------
    SlideResult
        Numbers: ``features`` is the array's name, float16 (n_tiles, width).

    Raises
    ------
    ModelError
        The encoder gives no features, was made for another resolution, or gave numbers that are not finite.
    StoreError, ConfigMismatch, SlideError
        One line each that says what to do.

    Examples
    --------
    >>> embed_slide("stores/slide", load_encoder("uni")).numbers["features"]        # doctest: +SKIP
    'features-56ef09b44a25'
    """
    folder = Path(folder)
    store = PatchStore.open(folder / "store.zarr")
    _check_view(store, encoder)
    clock = Clock(progress)
    kept = store.pixels != "none"
    name = f"features-{encoder.sha256[:12]}"
    about = {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "precision": encoder.precision,
        "mean": list(encoder.config.mean),
        "std": list(encoder.config.std),
        "input_px": encoder.config.resize_px or encoder.config.tile_px,
        "patches": f"kept as {store.pixels}" if kept else "cut from the slide",
        "wsi_version": __version__,
    }
    if name in store.arrays:  # partial: resume only with the same settings; complete: keep if of the same input
        there = store.about(name)
        free = ("encoder",) if store.missing(name) else ("encoder", "precision", "patches", "wsi_version")
        about |= {key: there[key] for key in free}
    store.add(name, (encoder.num_features,), "float16", about)
    missing = store.missing(name)
    if encoder.config.tile_px != store.grid.tile_px:
        encoder = encoder.of_size(store.grid.tile_px)
    with clock.stage("features") as report, ExitStack() as open_:
        if kept:
            batches = _kept(store, missing, batch_size)
        else:
            slide = open_.enter_context(slide_of(store, slide_path))
            runs = [store.tiles(shard) for shard in missing]
            cut = open_.enter_context(closing(stream(slide, store.grid, runs, batch_size=batch_size, threads=threads)))
            batches = ((batch.tiles, batch.rgb, batch.unreadable) for batch in cut)
        _fill(store, name, encoder, missing, batches, batch_size, lambda done: report(done, len(store)))
    unreadable = store.get("unreadable") if len(store) else np.zeros(0, bool)
    numbers = {
        "slide_id": folder.resolve().name,
        "slide": store.attributes.get("slide_path"),
        "n_tiles": len(store),
        "n_unreadable": int(unreadable.sum()),
        "features": name,
        "width": encoder.num_features,
        "tile_px": store.grid.tile_px,
        "tile_mpp": rounded(store.grid.mpp),
        **about,
    }
    return SlideResult(numbers, clock.seconds)


def grade_slide(folder: str | os.PathLike[str], mil: MilModel) -> dict[str, Any]:
    """Grade a slide from the features in its store that a MIL head was trained on.

    Parameters
    ----------
    folder : path
        As for ``embed_slide``.
    mil : MilModel
        ``config.encoder_sha256`` selects the features.

    Returns
    -------
    dict
        grade, grade_threshold, positive_probability, prob_<class>, entropy, mutual_information, prediction_set,
        abstain, stain_distance; None and `reason` for a slide without a readable tile, or without a measurable stain.

    Raises
    ------
    ModelError
        The head does not name the encoder it was trained on.
    StoreError
        The store has no features of that encoder.
    """
    folder, sha256 = Path(folder), mil.config.encoder_sha256
    store = PatchStore.open(folder / "store.zarr")
    if sha256 is None:
        raise ModelError(mil.config.folder, "does not say which encoder it was trained on", "Train it on our stores")
    name = f"features-{sha256[:12]}"
    if name not in store.arrays or store.about(name).get("encoder_sha256") != sha256:
        raise StoreError(store.path, f"holds no features of the encoder {sha256[:12]}", "Run wsi embed with it")
    features = store.get(name)
    readable = ~store.get("unreadable") if len(store) else np.zeros(0, bool)
    row: dict[str, Any] = {"slide_id": folder.resolve().name, "slide": store.attributes.get("slide_path")}
    if not readable.any():
        return row | {"grade": None, "reason": "no tile that can be read"}
    features = features if readable.all() else features[readable]  # no copy where none is needed
    grade = mil(features, store.grid.keep(readable).boxes())
    known, stained = StainRange.read(mil.config.folder), StainCheck()
    if known is not None:
        try:
            stained = known.check(sample_store(store))
        except (StoreError, SlideError) as error:
            stained = StainCheck(undefined=f"no pixels to measure its stain by: {error}")
    doubts = mil.doubts(grade, features, unreadable=1 - float(readable.mean()), stain=stained.outside).as_json()
    row |= {"grade": mil.grade(grade.probabilities), "grade_threshold": mil.grade_threshold}
    if mil.grade_threshold is not None:
        positive = sum(grade.probabilities[mil.config.class_names.index(k)] for k in mil.config.positive_classes)
        row["positive_probability"] = rounded(float(positive))
    row |= {f"prob_{k}": rounded(float(p)) for k, p in zip(mil.config.class_names, grade.probabilities, strict=True)}
    chosen = doubts.pop("prediction_set")
    row |= doubts | {"prediction_set": None if chosen is None else " or ".join(chosen)}
    return row | {"stain_distance": stained.distance, "reason": stained.undefined}


_Batches = Iterator[tuple[range, npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]


def _fill(
    store: PatchStore,
    name: str,
    encoder: PatchModel,
    missing: list[int],
    batches: _Batches,
    batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Embed the batches, and write each complete shard."""
    side, missing = store.grid.tile_px, list(missing)
    full = np.zeros((batch_size, side, side, 3), np.uint8)
    done = len(store) - sum(len(store.tiles(shard)) for shard in missing)
    report(done)
    features: list[Any] = []
    marks: list[Any] = []
    for tiles, rgb, unreadable in batches:
        filled = pass_size(len(rgb), batch_size)
        full[: len(rgb)] = rgb
        full[len(rgb) : filled] = 0
        found = encoder(full[:filled]).features[: len(rgb)]
        features.append(np.where(unreadable[:, None], np.nan, found))
        marks.append(unreadable)
        done += len(rgb)
        report(done)
        if tiles.stop == store.tiles(missing[0]).stop:
            store.write(missing.pop(0), {"unreadable": np.concatenate(marks), name: np.concatenate(features)})
            features, marks = [], []


def _kept(store: PatchStore, missing: list[int], size: int) -> _Batches:
    marks = store.get("unreadable") if missing else np.zeros(0, bool)
    for shard in missing:
        tiles = store.tiles(shard)
        for start in range(tiles.start, tiles.stop, size):
            rows = range(start, min(start + size, tiles.stop))
            yield rows, store.read(rows), marks[rows.start : rows.stop]


def _check_view(store: PatchStore, encoder: PatchModel) -> None:
    """Refuse an encoder without features, or patches whose field of view differs much from the encoder's."""
    config, grid = encoder.config, store.grid
    if not encoder.num_features:
        raise ModelError(config.folder, "shows no features (TorchScript)", "Give another encoder")
    if config.mpp and abs(grid.tile_px * grid.mpp / (config.tile_px * config.mpp) - 1) > TOLERANCE:
        what = f"wants patches of {config.tile_px} px at {config.mpp:g} microns per pixel, and {store.path} has "
        what += f"{grid.tile_px} px at {grid.mpp:g}"
        remedy = f"Make others: wsi tile --mpp {config.mpp:g} --tile {config.tile_px} --pixels none"
        raise ModelError(encoder.name, what, remedy)
