"""One slide through all stages, into one folder.

``score_slide`` follows the data: open, tissue, grid, tiles, context, grade, exports. Each stage is a plain function
elsewhere; this file calls them in order and times them.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.filters import threshold_otsu

from wsi import __version__
from wsi.context import in_context
from wsi.engine import Engine, ScoreConfig
from wsi.errors import ModelError, SlideUnreadable, StoreError
from wsi.files import remove_folder
from wsi.grid import TileGrid
from wsi.heatmap import overlay_bytes
from wsi.infer import score_tiles
from wsi.nn.checkpoint import ModelConfig
from wsi.nn.gradcam import grad_cam
from wsi.nn.grade import SlideGrade
from wsi.outputs import Findings, numbers_of, write_outputs
from wsi.result import EXPLAINED, Clock, Progress, SlideResult, write_result
from wsi.sheet import save_sheet
from wsi.slide import Slide, identity_of, open_slide
from wsi.stain import FitConfig, StainTransform, fit
from wsi.stain.pixels import density_of
from wsi.stain.range import StainCheck, sample_tiles
from wsi.stain.ruifrok import EOSIN, HAEMATOXYLIN
from wsi.store import PatchStore, copy_tiles, pixel_bytes, stored_tiles
from wsi.tissue import TissueMask, tissue_of
from wsi.units import Box

#: Bytes of one tile in GeoJSON, about.
_OUTLINE_BYTES = 60
#: Tiles that `triage` scores.
_TRIAGE_TILES = 64


def score_slide(
    path: str,
    folder: str | os.PathLike[str],
    engine: Engine,
    config: ScoreConfig | None = None,
    *,
    mpp: float | None = None,
    mpp_source: str = "user",
    mask: str | None = None,
    local: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> SlideResult:
    """Score one slide into `folder`, or resume a run that was stopped.

    Parameters
    ----------
    path : str
        The slide.
    folder : path
        Receives store.zarr, tiles.geojson.gz, regions.geojson, overlay.png, with a MIL head tiles.png, with `explain`
        explained.png, and last result.json. Its name is the slide's id.
    engine : Engine
    config : ScoreConfig, optional
    mpp : float, optional
        Microns per level-0 pixel; overrides what the file says.
    mpp_source : str
        Who gave `mpp`.
    mask : str, optional
        An image that marks the tissue, see ``tissue_in_image``; default: tissue is detected.
    local : str, optional
        A copy of the slide on faster storage, which is read in its place.
    progress : callable
        Called with the stage, the amount done and the total.

    Raises
    ------
    SlideError, GridError, ModelError, StoreError, ConfigMismatch
    OSError
        `folder` cannot be written to; what was written stays.
    """
    config = config or ScoreConfig()
    config.check(engine.model.config)
    folder = Path(folder)
    clock = Clock(progress)
    folder.mkdir(parents=True, exist_ok=True)
    with clock.stage("open"):
        opened = open_slide(path, config.reader, mpp=mpp, mpp_source=mpp_source, decode=config.decode, local=local)
    with opened as slide:
        with clock.stage("tissue"):
            tissue = tissue_of(slide, config.tissue, mask)
        with clock.stage("stain"):
            stain = fit(config.stain, slide, config.stain_target, tissue=tissue) if config.stain else None
        with clock.stage("grid"):
            grid, share = _lay_grid(slide, tissue, engine.model.config, config)
            if config.pixels == "verbatim":
                stored_tiles(slide, grid)  # refuses a grid that is not the slide's own, before there is a store
            store = _store(folder / "store.zarr", grid, slide, stain, engine, config)
        with clock.stage("stain"):
            if engine.stain_range is None:
                stained = StainCheck(undefined="the model does not say which stains it was trained on")
            else:
                stained = engine.stain_range.check(sample_tiles(slide, grid, stain))
        with clock.stage("tiles") as report:
            if config.pixels == "verbatim":
                copy_tiles(slide, store, threads=engine.threads)
            problem = score_tiles(
                slide, store, engine.model, batch_size=engine.batch_size, threads=engine.threads, stain=stain,
                progress=lambda done: report(done, len(grid)), spent=clock.seconds,
            )  # fmt: skip
            clock.seconds |= {f"threads_{name}": value for name, value in slide.spent.seconds.items()}
            unreadable = store.get("unreadable")
        total = float(share.sum())
        lost = float(share[unreadable].sum()) / total if total else float(unreadable.any())
        if lost > config.max_unreadable:
            remove_folder(store.path)  # a better copy of the slide must not meet the marks of this one
            why = f" ({problem})" if problem else ""
            what = f"{lost:.1%} of its tissue cannot be decoded{why}"
            raise SlideUnreadable(path, what, "Copy it from the source again, or allow more with --max-unreadable")
        readable = ~unreadable
        scored = grid.keep(readable)
        context, alone = config.context_of(engine.model.config), None
        if context is not None:
            with clock.stage("context"):
                alone = store.get("probabilities_alone")[readable]
                _put(store, "probabilities", readable, in_context(alone, scored, context))
        with clock.stage("grade"):
            grade = doubts = None
            if engine.mil is not None and readable.any():
                features = store.get("features")
                features = features if readable.all() else features[readable]  # no copy where none is needed
                grade = engine.mil(features, scored.boxes())
                doubts = engine.mil.doubts(grade, features, unreadable=lost, stain=stained.outside)
                _put(store, "attention", readable, grade.attention)
        with clock.stage("export"):
            found = Findings(
                folder, slide, engine, config, tissue, stain, stained, scored, store.get("probabilities")[readable],
                alone, grade, doubts, n_unreadable=int(unreadable.sum()), lost=lost,
            )  # fmt: skip
            drawn = write_outputs(found)
            if config.explain and len(scored):
                _explain(folder, slide, scored, found.probabilities, grade, engine, config, stain)
            numbers = numbers_of(found, drawn, mpp_given=mpp, mask=mask)
    result = SlideResult(numbers, clock.seconds)
    progress("finish", 0, 0)  # the last chance to stop
    write_result(folder, result)
    return result


def _put(store: PatchStore, name: str, readable: npt.NDArray[np.bool_], values: npt.NDArray[np.float32]) -> None:
    """Store values of the readable tiles, and NaN for the others."""
    everywhere = np.full((len(store), *values.shape[1:]), np.nan, np.float32)
    everywhere[readable] = values
    store.put(name, everywhere)


def explain_slide(
    path: str, folder: str | os.PathLike[str], engine: Engine, config: ScoreConfig, *, mpp: float | None = None,
    local: str | None = None, progress: Progress = lambda stage, done, total: None,
) -> None:  # fmt: skip
    """Add explained.png to what ``score_slide`` wrote with the same engine and configuration; change nothing else.

    Raises
    ------
    SlideError, ModelError, StoreError
    """
    folder = Path(folder)
    store = PatchStore.open(folder / "store.zarr")
    readable = ~store.get("unreadable")
    grid, stored = store.grid.keep(readable), store.attributes.get("stain")
    stain = None if stored is None else StainTransform.from_json(json.dumps(stored))
    progress("explain", 0, 0)
    grade = engine.mil(store.get("features")[readable], grid.boxes()) if engine.mil is not None else None
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode, local=local) as slide:
        if list(slide.size) != store.attributes["slide"]["size"]:
            what = f"is of a slide of {store.attributes['slide']['size']}, and {path} has {list(slide.size)}"
            raise StoreError(folder, what, "Give the slide that was scored, or score this one into another folder")
        _explain(folder, slide, grid, store.get("probabilities")[readable], grade, engine, config, stain)


def _explain(
    folder: Path, slide: Slide, grid: TileGrid, probabilities: npt.NDArray[Any], grade: SlideGrade | None,
    engine: Engine, config: ScoreConfig, stain: StainTransform | None,
) -> None:  # fmt: skip
    """Write explained.png: Grad-CAM of the tiles with most evidence for a class, or else the highest probability.

    Shown is where the model sees its first positive class or, if there is none, each tile's likeliest class.
    """
    model = engine.model
    names, positive = model.config.class_names, config.positive or model.config.positive_classes
    if engine.mil is not None and grade is not None:
        evidence = engine.mil.evidence(grade)
    else:
        evidence = {name: probabilities[:, names.index(name)] for name in positive or names}

    def look(rgb: npt.NDArray[np.uint8]) -> tuple[list[str], npt.NDArray[np.float32]]:
        seen = rgb if stain is None else stain.apply(rgb)
        likeliest = model(seen).probabilities.argmax(1).tolist()
        targets = [positive[0] if positive else names[i] for i in likeliest]
        return targets, grad_cam(model, seen, targets)

    save_sheet(folder / EXPLAINED, slide, grid, evidence, look=look)


def estimate_bytes(
    path: str, engine: Engine, config: ScoreConfig, *, mpp: float | None = None, mask: str | None = None
) -> int:
    """Estimate how many bytes `score_slide` will write for a slide; raises the same errors."""
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode) as slide:
        tissue = tissue_of(slide, config.tissue, mask)
        n = len(_lay_grid(slide, tissue, engine.model.config, config)[0])
        pictures = 2 * overlay_bytes(slide)  # and tiles.png
    copies = 2 if config.context_of(engine.model.config) is not None else 1  # probabilities with and without context
    numbers = 4 * len(engine.model.config.class_names) * copies + 2 * (engine.model.num_features or 0) + 4
    return pictures + n * (numbers + _OUTLINE_BYTES) + pixel_bytes(config.pixels, n, engine.model.config.tile_px)


def triage(
    path: str, engine: Engine, config: ScoreConfig, *, mpp: float | None = None, mask: str | None = None
) -> float:
    """Estimate how likely a slide is positive from a few tiles, to sort slides before they are scored.

    Half of the tiles are those with most dense haematoxylin at low magnification, half are spread over the tissue. The
    model scores them at its own resolution; those that cannot be decoded are skipped. Returned is the mean probability
    of the positive classes in the top eighth. Raises ModelError if no positive classes are named.
    """
    positive = config.positive or engine.model.config.positive_classes
    if not positive:
        raise ModelError(engine.model.name, "names no positive classes to look for", "Name them with --positive")
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode) as slide:
        tissue = tissue_of(slide, config.tissue, mask)
        grid, _ = _lay_grid(slide, tissue, engine.model.config, config)
        if not len(grid):
            return 0.0
        side = engine.model.config.tile_px
        everywhere = np.linspace(0, len(grid) - 1, _TRIAGE_TILES // 2).round().astype(int)
        darkest = np.argsort(-_dense(slide, tissue).fraction(grid.boxes()), kind="stable")[: _TRIAGE_TILES // 2]
        patches = []
        for tile in np.union1d(everywhere, darkest).tolist():
            damage: list[Box] = []
            patch = slide.read(grid.box(tile), (side, side), damage=damage)
            if not damage:
                patches.append(patch)
        if not patches:
            return 0.0
    names = engine.model.config.class_names
    scores = engine.model(np.stack(patches)).probabilities[:, [names.index(name) for name in positive]].sum(axis=1)
    return float(np.sort(scores)[-max(1, len(scores) // 8) :].mean())


def _dense(slide: Slide, tissue: TissueMask) -> TissueMask:
    """Return the part of the tissue with more haematoxylin than the rest (Otsu), at the mask's resolution."""
    h, w = tissue.mask.shape
    rgb = slide.read(tissue.box, (w, h), damage=[])
    amount = np.zeros((h, w))
    amount[tissue.mask] = np.linalg.pinv([HAEMATOXYLIN, EOSIN])[:, 0] @ density_of(rgb[tissue.mask], FitConfig())
    found = amount[tissue.mask]
    threshold = threshold_otsu(found) if len(found) and found.min() < found.max() else 0.0  # type: ignore[no-untyped-call]
    return replace(tissue, mask=tissue.mask & (amount > threshold))


def _lay_grid(
    slide: Slide, tissue: TissueMask, model: ModelConfig, config: ScoreConfig
) -> tuple[TileGrid, npt.NDArray[np.float64]]:
    """Return the tiles that hold enough tissue, and the tissue share of each."""
    grid = TileGrid.cover(
        slide.size, slide_mpp=slide.mpp, mpp=model.mpp, tile_px=model.tile_px, stride_px=config.stride_px
    )
    share = tissue.fraction(grid.boxes())
    return grid.keep(share >= config.min_tissue), share[share >= config.min_tissue]


def _store(
    path: Path, grid: TileGrid, slide: Slide, stain: StainTransform | None, engine: Engine, config: ScoreConfig
) -> PatchStore:
    """Resume the store of an earlier run on the same slide, grid and model, or create an empty one."""
    identity = {
        **identity_of(slide),
        "model_sha256": engine.model.sha256,
        "precision": engine.model.precision,
        "stain": None if stain is None else json.loads(stain.to_json()),
        "wsi_version": __version__,
    }
    classes = len(engine.model.config.class_names)
    arrays: dict[str, tuple[tuple[int, ...], str]] = {"probabilities": ((classes,), "float32")}
    if config.context_of(engine.model.config) is not None:
        arrays["probabilities_alone"] = arrays["probabilities"]
    if engine.model.num_features:
        arrays["features"] = ((engine.model.num_features,), "float16")
    if engine.mil is not None:
        arrays["attention"] = ((), "float32")
    return PatchStore.resume(path, grid, arrays, pixels=config.pixels, attributes=identity)
