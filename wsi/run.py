"""One slide through all stages, into one folder.

``score_slide`` is the walk of the data: open, tissue, grid, tiles, grade, heatmap, exports. Each
stage is a plain function elsewhere; this file only strings them together and keeps the books.
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
from wsi.nn.patch import PatchModel
from wsi.outputs import numbers_of, write_outputs
from wsi.result import EXPLAINED, Clock, Progress, SlideResult, write_result
from wsi.sheet import Look, save_sheet
from wsi.slide import Slide, identity_of, open_slide
from wsi.stain import FitConfig, StainTransform, fit
from wsi.stain.pixels import density_of
from wsi.stain.range import StainCheck, sample_tiles
from wsi.stain.ruifrok import EOSIN, HAEMATOXYLIN
from wsi.store import PatchStore, copy_tiles, pixel_bytes, stored_tiles
from wsi.tissue import TissueMask, tissue_of
from wsi.units import Box

#: What a tile takes in GeoJSON: about what was seen.
_OUTLINE_BYTES = 60
#: Tiles that a slide is judged by before it is scored.
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
    """Score one slide into `folder`, or go on where an earlier run was stopped.

    Parameters
    ----------
    path : str
        The slide.
    folder : Path
        Its results: store.zarr, tiles.geojson.gz, regions.geojson, overlay.png, with a MIL head tiles.png, with
        `explain` explained.png, and last result.json. Its name is the slide's id.
    engine : Engine
    config : ScoreConfig, optional
    mpp : float, optional
        Microns per level-0 pixel, where the file's own are missing or wrong.
    mpp_source : str
        Who gave `mpp`.
    mask : str, optional
        An image that says where tissue is, see ``tissue_in_image``; default: it is looked for.
    local : str, optional
        A copy of the slide, nearer by, to read from.
    progress : callable
        Called with the stage, and how much of it is done out of how much.

    Raises
    ------
    SlideError, GridError, ModelError, StoreError, ConfigMismatch
        One line each that says what to do.
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
                slide,
                store,
                engine.model,
                batch_size=engine.batch_size,
                threads=engine.threads,
                stain=stain,
                progress=lambda done: report(done, len(grid)),
                spent=clock.seconds,
            )
            clock.seconds |= {f"threads_{name}": value for name, value in slide.spent.seconds.items()}
            unreadable = store.get("unreadable")
        total = float(share.sum())
        lost = float(share[unreadable].sum()) / total if total else float(unreadable.any())
        if lost > config.max_unreadable:
            remove_folder(store.path)  # a better copy of the slide must not meet the marks of this one
            why = f" ({problem})" if problem else ""
            raise SlideUnreadable(
                path,
                f"{lost:.1%} of its tissue cannot be decoded{why}",
                "Copy it from the source again, or allow more with --max-unreadable",
            )
        readable = ~unreadable
        context, alone = config.context_of(engine.model.config), None
        if context is not None:
            with clock.stage("context"):
                everywhere = np.full((len(store), 2), np.nan, np.float32)
                alone = store.get("probabilities_alone")[readable]
                everywhere[readable] = in_context(alone, grid.keep(readable), context)
                store.put("probabilities", everywhere)
        with clock.stage("grade"):
            slide_scores = doubts = None
            if engine.mil is not None and readable.any():
                features = store.get("features")
                features = features if readable.all() else features[readable]  # no copy where none is needed
                slide_scores = engine.mil(features, grid.keep(readable).boxes())
                doubts = engine.mil.doubts(slide_scores, features, unreadable=lost, stain=stained.outside)
                attention = np.full(len(store), np.nan, np.float32)
                attention[readable] = slide_scores.attention
                store.put("attention", attention)
        with clock.stage("export"):
            probabilities, scored = store.get("probabilities")[readable], grid.keep(readable)
            drawn = write_outputs(folder, slide, tissue, scored, probabilities, alone, slide_scores, engine, config)
            if engine.mil is not None and slide_scores is not None:
                save_sheet(folder / "tiles.png", slide, scored, engine.mil.evidence(slide_scores))
            if config.explain and len(scored):
                _explain(folder, slide, scored, probabilities, slide_scores, engine, config, stain)
            numbers = numbers_of(
                slide, folder.name, engine, config, mpp_given=mpp, mask=mask, tissue=tissue, grid=scored, drawn=drawn,
                slide_scores=slide_scores, doubts=doubts, stain=stain, stained=stained,
                n_unreadable=int(unreadable.sum()), lost=lost,
            )  # fmt: skip
    result = SlideResult(numbers, clock.seconds)
    progress("finish", 0, 0)  # the last chance to stop
    write_result(folder, result)
    return result


def explain_slide(
    path: str, folder: str | os.PathLike[str], engine: Engine, config: ScoreConfig, *, mpp: float | None = None,
    local: str | None = None, progress: Progress = lambda stage, done, total: None,
) -> None:  # fmt: skip
    """Add explained.png to what ``score_slide`` left, with the same engine and configuration; nothing else changes.

    Raises
    ------
    SlideError, ModelError, StoreError
        One line each that says what to do.
    """
    folder = Path(folder)
    store = PatchStore.open(folder / "store.zarr")
    readable = ~store.get("unreadable")
    grid, said = store.grid.keep(readable), store.attributes.get("stain")
    stain = None if said is None else StainTransform.from_json(json.dumps(said))
    progress("explain", 0, 0)
    grade = engine.mil(store.get("features")[readable], grid.boxes()) if engine.mil is not None else None
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode, local=local) as slide:
        if list(slide.size) != store.attributes["slide"]["size"]:
            what = f"is of a slide of {store.attributes['slide']['size']}, and {path} has {list(slide.size)}"
            raise StoreError(folder, what, "Give the slide that was scored, or score this one into another folder")
        _explain(folder, slide, grid, store.get("probabilities")[readable], grade, engine, config, stain)


def _explain(
    folder: Path,
    slide: Slide,
    grid: TileGrid,
    probabilities: npt.NDArray[Any],
    grade: SlideGrade | None,
    engine: Engine,
    config: ScoreConfig,
    stain: StainTransform | None,
) -> None:
    """Write explained.png, of the tiles that spoke most for a class, or without a head of those likeliest of it."""
    if engine.mil is not None and grade is not None:
        evidence = engine.mil.evidence(grade)
    else:
        names = engine.model.config.class_names
        shown = config.positive or engine.model.config.positive_classes or names
        evidence = {name: probabilities[:, names.index(name)] for name in shown}
    save_sheet(folder / EXPLAINED, slide, grid, evidence, look=_look(engine.model, config, stain))


def estimate_bytes(
    path: str, engine: Engine, config: ScoreConfig, *, mpp: float | None = None, mask: str | None = None
) -> int:
    """Say about how many bytes `score_slide` will write for a slide; errors are its own."""
    with open_slide(path, config.reader, mpp=mpp, decode=config.decode) as slide:
        tissue = tissue_of(slide, config.tissue, mask)
        n = len(_lay_grid(slide, tissue, engine.model.config, config)[0])
        pictures = 2 * overlay_bytes(slide)  # and tiles.png
    said = 2 if config.context_of(engine.model.config) is not None else 1  # with what each tile says alone
    numbers = 4 * len(engine.model.config.class_names) * said + 2 * (engine.model.num_features or 0) + 4
    return pictures + n * (numbers + _OUTLINE_BYTES) + pixel_bytes(config.pixels, n, engine.model.config.tile_px)


def triage(
    path: str, engine: Engine, config: ScoreConfig, *, mpp: float | None = None, mask: str | None = None
) -> float:
    """Guess before a slide is scored: the mean probability of the positive classes in the likeliest of a few tiles.

    A look at low magnification chooses which: half of them are those with most dense haematoxylin, half lie all over
    the tissue. The model then sees them at its own microns per pixel, the only ones it is right at; those that cannot
    be decoded are passed over. For sorting slides, and nothing else.

    Raises
    ------
    ModelError
        The model names no positive classes, and the configuration neither.
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
    """Of the tissue, at the mask's low magnification, what holds more haematoxylin than the rest (Otsu)."""
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
    """Tiles that hold enough tissue, and the share of each that is."""
    grid = TileGrid.cover(
        slide.size, slide_mpp=slide.mpp, mpp=model.mpp, tile_px=model.tile_px, stride_px=config.stride_px
    )
    share = tissue.fraction(grid.boxes())
    return grid.keep(share >= config.min_tissue), share[share >= config.min_tissue]


def _look(model: PatchModel, config: ScoreConfig, stain: StainTransform | None) -> Look:
    """Where the model looks for its first positive class; if it has none, for the likeliest class of each tile."""
    names, positive = model.config.class_names, config.positive or model.config.positive_classes

    def look(rgb: npt.NDArray[np.uint8]) -> tuple[list[str], npt.NDArray[np.float32]]:
        seen = rgb if stain is None else stain.apply(rgb)
        likeliest = model(seen).probabilities.argmax(1).tolist()
        targets = [positive[0] if positive else names[i] for i in likeliest]
        return targets, grad_cam(model, seen, targets)

    return look


def _store(
    path: Path, grid: TileGrid, slide: Slide, stain: StainTransform | None, engine: Engine, config: ScoreConfig
) -> PatchStore:
    """Open what an earlier run left, if it is of the same slide, grid and model, or make an empty store."""
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
