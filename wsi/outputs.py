"""What people look at of a scored slide: tiles and regions for QuPath, the overlay, and the numbers of result.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsi import __version__
from wsi.engine import Engine, ScoreConfig
from wsi.export.objects import TISSUE, path_classes, percentile_rank, positive_regions, probabilities_alone
from wsi.export.qupath import Region, write_regions, write_tiles
from wsi.files import sha256_of
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap, major_axis_um, save_overlay
from wsi.nn.grade import Doubts, SlideGrade, pick_class
from wsi.result import rounded
from wsi.slide import Slide, absolute, facts_of
from wsi.stain import StainTransform
from wsi.stain.range import StainCheck
from wsi.tissue import TissueMask


class Drawn(NamedTuple):
    """Outlines in level-0 pixels.

    Attributes
    ----------
    tissue, positive : list of shapely.Polygon
    alone : list of shapely.Polygon, optional
        Where tiles are positive before they inform each other; None where they do not.
    suppressed : list of shapely.Polygon
        Tiles that are positive alone, and no longer in their context.
    """

    tissue: list[shapely.Polygon]
    positive: list[shapely.Polygon]
    alone: list[shapely.Polygon] | None
    suppressed: list[shapely.Polygon]


def write_outputs(
    folder: Path,
    slide: Slide,
    tissue: TissueMask,
    grid: TileGrid,
    probabilities: npt.NDArray[np.float32],
    alone: npt.NDArray[np.float32] | None,
    slide_scores: SlideGrade | None,
    engine: Engine,
    config: ScoreConfig,
) -> Drawn:
    """Write a slide's GeoJSON and overlay into its folder, and return the outlines that the numbers are of.

    Parameters
    ----------
    folder : Path
        Its name is the slide's id.
    grid : TileGrid
        The n tiles that could be read.
    probabilities : float32 (n, k)
    alone : float32 (n, k), optional
        The same before tiles informed each other; None where they did not.
    slide_scores : SlideGrade, optional
        None where no MIL model graded the slide.
    """
    model = engine.model.config
    names = model.class_names
    positive, threshold = _positive_of(engine, config)
    metadata = {"model": engine.model.name, "model_sha256": engine.model.sha256, "use": "research only"}
    called = pick_class(probabilities, replace(model, positive_classes=positive), threshold)

    measurements: dict[str, npt.NDArray[Any]] = {f"prob_{name}": probabilities[:, i] for i, name in enumerate(names)}
    if alone is not None:
        measurements |= probabilities_alone(names, np.isin(names, positive), alone)
    if slide_scores is not None:
        measurements["attention_percentile"] = percentile_rank(slide_scores.attention)
    classes = path_classes(names, positive)
    write_tiles(
        folder / "tiles.geojson.gz",
        grid.boxes(),
        classes,
        called,
        measurements,
        bounds=slide.bounds,
        slide_id=folder.name,
        metadata=metadata,
    )

    tissue_outlines = tissue.outlines()
    regions = [
        Region(outline, TISSUE, f"Tissue {i}", {"area_mm2": _mm2(outline, slide)})
        for i, outline in enumerate(tissue_outlines, 1)
    ]
    outlines: list[shapely.Polygon] = []
    before: list[shapely.Polygon] | None = None
    suppressed: list[shapely.Polygon] = []
    heatmap = None
    if positive and len(grid):
        columns = [names.index(name) for name in positive]
        heatmap = Heatmap.of(grid, probabilities, columns)
        outlines = heatmap.regions(threshold, slide.bounds)
        if alone is not None:
            each = Heatmap.of(grid, alone, columns)
            before = each.regions(threshold, slide.bounds)
            suppressed = list(grid.keep((each.values >= threshold) & (heatmap.values < threshold)).polygons())
        path_class = next(c for c, name in zip(classes, names, strict=True) if name == positive[0])
        regions += positive_regions(outlines, heatmap, positive=positive, path_class=path_class, mpp=slide.mpp)
    write_regions(folder / "regions.geojson", regions, bounds=slide.bounds, slide_id=folder.name, metadata=metadata)
    save_overlay(
        folder / "overlay.png",
        slide,
        heatmap,
        regions=outlines,
        tissue_outlines=tissue_outlines,
        label=f"probability of {' or '.join(positive)}" if positive else "",
    )
    return Drawn(tissue_outlines, outlines, before, suppressed)


def numbers_of(
    slide: Slide,
    slide_id: str,
    engine: Engine,
    config: ScoreConfig,
    *,
    mpp_given: float | None,
    mask: str | None,
    tissue: TissueMask,
    grid: TileGrid,
    drawn: Drawn,
    slide_scores: SlideGrade | None,
    doubts: Doubts | None,
    stain: StainTransform | None,
    stained: StainCheck,
    n_unreadable: int,
    lost: float,
) -> dict[str, Any]:
    """Assemble result.json: what was asked, found and doubted; what is undefined is None, and `reasons` says why."""
    model, mil = engine.model.config, engine.mil
    (positive, threshold), outlines = _positive_of(engine, config), drawn.positive
    flags, warnings = [], []
    reasons: dict[str, str] = {}
    nothing = "no tile holds enough tissue" if tissue.mask.any() else "no tissue"
    if not len(grid):
        flags.append("no-tile" if tissue.mask.any() else "no-tissue")
        warnings.append(f"{nothing}; look at overlay.png, and lower --min-tissue or --stride if there is tissue")
    if max(slide.mpp) > model.mpp * 1.1:
        flags.append("upsampled")
        warnings.append(
            f"the slide has {max(slide.mpp):.4g} microns per pixel, the model wants {model.mpp:g}: patches are enlarged"
        )
    names, called = (mil.config.class_names, mil.config.positive_classes) if mil else ((), ())
    said = {} if slide_scores is None else dict(zip(names, slide_scores.probabilities.tolist(), strict=True))
    if slide_scores is None:
        why = "no MIL model" if mil is None else nothing
        reasons |= dict.fromkeys(("grade", "probabilities", "positive_probability", "uncertainty"), why)
    elif not called:
        reasons["positive_probability"] = "the head names no positive classes"
    grade_threshold = None if mil is None else mil.grade_threshold
    if grade_threshold is None:
        no_positive = "the head names no positive classes, or all: no threshold decides the grade"
        reasons["grade_threshold"] = "no MIL model" if mil is None else no_positive
    reasons |= {} if doubts is None else doubts.reasons()
    if not positive:
        reasons["positive_mm2"] = reasons["largest_region_um"] = "the model names no positive classes; use --positive"
    elif not len(grid):
        reasons["positive_mm2"] = reasons["largest_region_um"] = nothing
    elif not outlines:
        reasons["largest_region_um"] = "no positive region"
    if n_unreadable:
        flags.append("unreadable-tiles")
        warnings.append(
            f"{n_unreadable} tiles, {lost:.2%} of the tissue, cannot be decoded and have no score: "
            "`unreadable` in store.zarr marks them"
        )
    if stained.undefined:
        reasons["stain_distance"] = stained.undefined
    if stained.outside:
        flags.append("stain-outside")
        warnings.append(stained.outside)
    if doubts is not None and doubts.abstain:
        flags.append("abstain")
        warnings.append(f"the grade should not be used: {doubts.abstain}")
    if stain is not None and stain.fallback:
        flags.append("stain-fallback")
        warnings.append(f"stains could not be measured ({stain.fallback}): tiles are as scanned")

    def tissue_mm2(tiles: list[shapely.Polygon]) -> float:  # what of regions, which are whole tiles, is tissue
        common = shapely.intersection(shapely.union_all(tiles), shapely.union_all(drawn.tissue))
        return rounded(_mm2(common, slide))

    if drawn.alone is None:
        no_context = "scored without context" if model.context is not None else "the model has no context"
        reasons["positive_alone_mm2"] = reasons.get("positive_mm2", f"{no_context}: positive_mm2 is of each tile alone")
    grade = mil.grade(slide_scores.probabilities) if mil and slide_scores else None
    found_mm2 = None if "positive_mm2" in reasons else tissue_mm2(outlines)
    if grade is not None and grade not in called and set(called) & set(positive) and found_mm2:
        flags.append("grade-and-tiles-disagree")
        warnings.append(f"the grade is {grade!r}, and {found_mm2:g} mm2 are {' or '.join(positive)} by their tiles")
    if drawn.suppressed:
        flags.append("context-suppressed")
        warnings.append(
            f"{len(drawn.suppressed)} tiles with {tissue_mm2(drawn.suppressed):g} mm2 of tissue are positive alone, "
            "and not among their neighbours: a small focus looks like that, and so do errors; see positive_alone_mm2 "
            "and the tiles' probability alone, or score with --no-context"
        )
    return {
        "slide_id": slide_id,
        "slide": absolute(slide.path),
        "mpp_given": mpp_given,
        "stain": None if stain is None else json.loads(stain.to_json()),
        "use": "research only",
        "grade": grade,
        "probabilities": {name: rounded(said[name]) if said else None for name in names} if mil else None,
        "positive_probability": rounded(sum(said[name] for name in called)) if said and called else None,
        "grade_threshold": grade_threshold,  # of the slide's positive_probability; `threshold` is of tiles
        "uncertainty": None if doubts is None else doubts.as_json(),
        "n_tiles": len(grid),
        "tissue_mm2": rounded(tissue.area_mm2),
        "positive_mm2": found_mm2,
        "positive_alone_mm2": None if drawn.alone is None else tissue_mm2(drawn.alone),
        "largest_region_um": (
            rounded(max(major_axis_um(outline, slide.mpp) for outline in outlines)) if outlines else None
        ),
        "class_names": list(model.class_names),
        "positive_classes": list(positive),
        "threshold": threshold,
        **facts_of(slide, "GeoJSON: level-0 pixels minus bounds_px, as QuPath shows the slide; store: level-0 pixels"),
        "flags": flags,
        "warnings": warnings,
        "reasons": reasons,
        "provenance": {
            "wsi": __version__,
            "model": engine.model.name,
            "model_sha256": engine.model.sha256,
            "mil_sha256": mil.sha256 if mil else None,
            "precision": engine.model.precision,
        },
        "n_unreadable": n_unreadable,
        "unreadable_tissue": rounded(lost),
        "stain_distance": stained.distance,
        "mask": mask and absolute(mask),
        "mask_sha256": mask and sha256_of(mask),
    }


def _positive_of(engine: Engine, config: ScoreConfig) -> tuple[tuple[str, ...], float]:
    """Which classes are positive, and from which probability on."""
    model = engine.model.config
    threshold = model.threshold if config.threshold is None else config.threshold
    return config.positive or model.positive_classes, threshold


def _mm2(outline: shapely.Geometry, slide: Slide) -> float:
    return slide.mpp.area_um2(outline.area) / 1e6
