"""What a scored slide leaves for people: GeoJSON for QuPath, the overlay, the contact sheet, and result.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from wsi import __version__
from wsi.engine import Engine, ScoreConfig
from wsi.export.objects import path_classes, percentile_rank, positive_regions, probabilities_alone, tissue_regions
from wsi.export.qupath import write_regions, write_tiles
from wsi.files import sha256_of
from wsi.grid import TileGrid
from wsi.heatmap import Heatmap, major_axis_um, save_overlay
from wsi.nn.grade import Doubts, SlideGrade, pick_class
from wsi.result import rounded
from wsi.sheet import save_sheet
from wsi.slide import Slide, absolute, facts_of, resolution_warnings
from wsi.stain import StainTransform
from wsi.stain.range import StainCheck
from wsi.tissue import TissueMask


@dataclass(frozen=True, eq=False)
class Findings:
    """All that a run knows of a slide once its tiles are scored."""

    folder: Path  # its name is the slide's id
    slide: Slide
    engine: Engine
    config: ScoreConfig
    tissue: TissueMask
    stain: StainTransform | None
    stained: StainCheck
    grid: TileGrid  # the n tiles that could be read
    probabilities: npt.NDArray[np.float32]  # (n, k)
    alone: npt.NDArray[np.float32] | None  # (n, k), before context; None where none was applied
    grade: SlideGrade | None  # None where no MIL model graded the slide
    doubts: Doubts | None
    n_unreadable: int
    lost: float  # the part of the tissue that could not be read

    @property
    def positive(self) -> tuple[str, ...]:
        """Names of the positive classes."""
        return self.config.positive or self.engine.model.config.positive_classes

    @property
    def threshold(self) -> float:
        """Probability from which on a tile is positive."""
        return self.engine.model.config.threshold if self.config.threshold is None else self.config.threshold


class Drawn(NamedTuple):
    """Outlines in level-0 pixels."""

    tissue: list[shapely.Polygon]
    positive: list[shapely.Polygon]
    alone: list[shapely.Polygon] | None  # positive regions before context; None where none was applied
    suppressed: list[shapely.Polygon]  # tiles that are positive before context and negative after


def write_outputs(found: Findings) -> Drawn:
    """Write a slide's GeoJSON and pictures into its folder; return the outlines that result.json measures."""
    folder, slide, grid, probabilities, alone = found.folder, found.slide, found.grid, found.probabilities, found.alone
    model, mil, positive, threshold = found.engine.model, found.engine.mil, found.positive, found.threshold
    names = model.config.class_names
    about: dict[str, Any] = {
        "bounds": slide.bounds,
        "slide_id": folder.name,
        "metadata": {"model": model.name, "model_sha256": model.sha256, "use": "research only"},
    }

    measurements: dict[str, npt.NDArray[Any]] = {f"prob_{name}": probabilities[:, i] for i, name in enumerate(names)}
    if alone is not None:
        measurements |= probabilities_alone(names, np.isin(names, positive), alone)
    if found.grade is not None:
        measurements["attention_percentile"] = percentile_rank(found.grade.attention)
    classes = path_classes(names, positive)
    called = pick_class(probabilities, replace(model.config, positive_classes=positive), threshold)
    write_tiles(folder / "tiles.geojson.gz", grid.boxes(), classes, called, measurements, **about)

    tissue_outlines = found.tissue.outlines()
    regions = tissue_regions(tissue_outlines, slide.mpp)
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
    write_regions(folder / "regions.geojson", regions, **about)
    label = f"probability of {' or '.join(positive)}" if positive else ""
    save_overlay(
        folder / "overlay.png", slide, heatmap,
        regions=outlines, tissue_outlines=tissue_outlines, label=label, threshold=threshold,
    )  # fmt: skip
    if mil is not None and found.grade is not None:
        save_sheet(folder / "tiles.png", slide, grid, mil.evidence(found.grade))
    return Drawn(tissue_outlines, outlines, before, suppressed)


def numbers_of(found: Findings, drawn: Drawn, *, mpp_given: float | None, mask: str | None) -> dict[str, Any]:
    """Assemble result.json. What is undefined is None, and `reasons` says why."""
    slide, model, mil, stain = found.slide, found.engine.model, found.engine.mil, found.stain
    names, positive_grades = (mil.config.class_names, mil.config.positive_classes) if mil else ((), ())
    by_class = {} if found.grade is None else dict(zip(names, found.grade.probabilities.tolist(), strict=True))
    grade = mil.grade(found.grade.probabilities) if mil and found.grade else None
    reasons = _reasons(found, drawn)
    positive_mm2 = None if "positive_mm2" in reasons else _tissue_mm2(drawn.positive, drawn, slide)
    longest_um = max((major_axis_um(outline, slide.mpp) for outline in drawn.positive), default=None)
    warnings = _warnings(found, drawn, grade, positive_mm2)
    return {
        "slide_id": found.folder.name,
        "slide": absolute(slide.path),
        "mpp_given": mpp_given,
        "stain": None if stain is None else json.loads(stain.to_json()),
        "use": "research only",
        "grade": grade,
        "probabilities": {name: rounded(by_class[name]) if by_class else None for name in names} if mil else None,
        "positive_probability": (
            rounded(sum(by_class[name] for name in positive_grades)) if by_class and positive_grades else None
        ),
        "grade_threshold": None if mil is None else mil.grade_threshold,  # of positive_probability
        "uncertainty": None if found.doubts is None else found.doubts.as_json(),
        "n_tiles": len(found.grid),
        "tissue_mm2": rounded(found.tissue.area_mm2),
        "positive_mm2": positive_mm2,
        "positive_alone_mm2": None if drawn.alone is None else _tissue_mm2(drawn.alone, drawn, slide),
        "largest_region_um": None if longest_um is None else rounded(longest_um),
        "class_names": list(model.config.class_names),
        "positive_classes": list(found.positive),
        "threshold": found.threshold,  # of tiles
        **facts_of(slide, "GeoJSON: level-0 pixels minus bounds_px, as QuPath shows the slide; store: level-0 pixels"),
        "flags": list(warnings),
        "warnings": list(warnings.values()),
        "reasons": reasons,
        "provenance": {
            "wsi": __version__,
            "model": model.name,
            "model_sha256": model.sha256,
            "mil_sha256": mil.sha256 if mil else None,
            "precision": model.precision,
        },
        "n_unreadable": found.n_unreadable,
        "unreadable_tissue": rounded(found.lost),
        "stain_distance": found.stained.distance,
        "mask": mask and absolute(mask),
        "mask_sha256": mask and sha256_of(mask),
    }


def _reasons(found: Findings, drawn: Drawn) -> dict[str, str]:
    """Why numbers of result.json are undefined, by key."""
    reasons: dict[str, str] = {}
    mil, nothing = found.engine.mil, _nothing_found(found)
    if found.grade is None:
        why = "no MIL model" if mil is None else nothing
        reasons |= dict.fromkeys(("grade", "probabilities", "positive_probability", "uncertainty"), why)
    elif mil is None or not mil.config.positive_classes:
        reasons["positive_probability"] = "the head names no positive classes"
    if mil is None:
        reasons["grade_threshold"] = "no MIL model"
    elif mil.grade_threshold is None:
        reasons["grade_threshold"] = "the head names no positive classes, or all: no threshold decides the grade"
    if found.doubts is not None:
        reasons |= found.doubts.reasons()
    if not found.positive:
        reasons["positive_mm2"] = reasons["largest_region_um"] = "the model names no positive classes; use --positive"
    elif not len(found.grid):
        reasons["positive_mm2"] = reasons["largest_region_um"] = nothing
    elif not drawn.positive:
        reasons["largest_region_um"] = "no positive region"
    if found.stained.undefined:
        reasons["stain_distance"] = found.stained.undefined
    if drawn.alone is None:
        has_context = found.engine.model.config.context is not None
        no_context = "scored without context" if has_context else "the model has no context"
        reasons["positive_alone_mm2"] = reasons.get("positive_mm2", f"{no_context}: positive_mm2 is of each tile alone")
    return reasons


def _warnings(found: Findings, drawn: Drawn, grade: str | None, positive_mm2: float | None) -> dict[str, str]:
    """What a reader of the results should know, by flag."""
    warnings: dict[str, str] = {}
    slide, model, positive = found.slide, found.engine.model.config, found.positive
    if not len(found.grid):
        advice = f"{_nothing_found(found)}; look at overlay.png, and lower --min-tissue or --stride if there is tissue"
        warnings["no-tile" if found.tissue.mask.any() else "no-tissue"] = found.tissue.dark_field or advice
    warnings |= resolution_warnings(slide, model.mpp, f"the model wants {model.mpp:g}")
    if found.n_unreadable:
        warnings["unreadable-tiles"] = (
            f"{found.n_unreadable} tiles, {found.lost:.2%} of the tissue, cannot be decoded and have no score: "
            "`unreadable` in store.zarr marks them"
        )
    if found.stained.outside:
        warnings["stain-outside"] = found.stained.outside
    if found.doubts is not None and found.doubts.abstain:
        warnings["abstain"] = f"the grade should not be used: {found.doubts.abstain}"
    if found.stain is not None and found.stain.fallback:
        warnings["stain-fallback"] = f"stains could not be measured ({found.stain.fallback}): tiles are as scanned"
    graded = found.engine.mil.config.positive_classes if found.engine.mil else ()
    if grade is not None and grade not in graded and set(graded) & set(positive) and positive_mm2:
        warnings["grade-and-tiles-disagree"] = (
            f"the grade is {grade!r}, and {positive_mm2:g} mm2 are {' or '.join(positive)} by their tiles"
        )
    if drawn.suppressed:
        mm2 = _tissue_mm2(drawn.suppressed, drawn, slide)
        warnings["context-suppressed"] = (
            f"{len(drawn.suppressed)} tiles with {mm2:g} mm2 of tissue are positive alone, "
            "but no longer after smoothing over their neighbours: small foci and errors both look like that; "
            "see positive_alone_mm2 and the tiles' prob_..._alone, or score with --no-context"
        )
    return warnings


def _nothing_found(found: Findings) -> str:
    return "no tile holds enough tissue" if found.tissue.mask.any() else "no tissue"


def _tissue_mm2(tiles: list[shapely.Polygon], drawn: Drawn, slide: Slide) -> float:
    """Area of the tissue inside regions, which are whole tiles, in square millimetres."""
    common = shapely.intersection(shapely.union_all(tiles), shapely.union_all(drawn.tissue))
    return rounded(slide.mpp.area_um2(common.area) / 1e6)
