"""A results folder to a QuPath project: regions, tiles and measurements of every slide.

A project names its slides by absolute paths and can be opened by itself; the objects lie beside as GeoJSON, since
QuPath's own file of objects is serialised Java. ``scripts/import_wsi.groovy``, which QuPath lists under
*Automate > Project scripts*, puts them into all images at once. Layout of a project: ``DefaultProject.java`` of QuPath
0.4 to 0.7.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsi import __version__
from wsi.errors import ResultsError
from wsi.export.geojson import read_geojson
from wsi.export.pseudonym import pseudonym
from wsi.export.qupath import PathClass, Region, write_regions, write_tiles
from wsi.files import replacing, write_json
from wsi.heatmap import Heatmap, major_axis_um
from wsi.result import called
from wsi.scored import ScoredSlide, ScoredTiles, scored_slides
from wsi.units import Box, Mpp

#: QuPath takes some 6 kB of memory for each tile of a file while it reads it.
MAX_TILES = 200_000
#: More annotations than this and QuPath crawls; the smaller ones are then joined, this many to one.
MAX_REGIONS = 10_000
#: Colours of classes: the positive ones as QuPath's built-in Tumor, the others apart from them.
_POSITIVE_RGB = ((200, 0, 0), (200, 0, 200), (220, 110, 0), (120, 0, 60))
_OTHER_RGB = ((120, 170, 220), (150, 200, 150), (160, 90, 160), (255, 200, 0), (50, 50, 50), (90, 140, 90))
_TISSUE = PathClass("Tissue", (150, 200, 150))
#: QuPath's readers. Bio-Formats, which takes OME-TIFF, shows the whole plane; OpenSlide crops it to the bounds.
_BIOFORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"
_OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"

Json = dict[str, Any]


@dataclass(frozen=True)
class QuPathConfig:
    """How results are written for QuPath.

    Attributes
    ----------
    threshold : float, optional
        Probability from which a tile is positive and in a region; None for the one it was scored with.
    simplify_um : float
        How far an outline may move, in microns, to have fewer points; 0 keeps the edges of tiles.
    object_type : {"tile", "detection", "annotation"}
        What a tile becomes.
    crop : bool
        Coordinates count from the corner of the scanned part, as QuPath shows the slide; else from the corner of the
        whole plane, which is what QuPath shows with ``--no-crop`` and through Bio-Formats.
    max_tiles : int
        Tiles in a file; a slide with more is written in several, each a band of rows.
    key : bytes, optional
        Slide ids are replaced by their pseudonyms. No project is then written: it would name the slides' files.
    """

    threshold: float | None = None
    simplify_um: float = 0.0
    object_type: str = "tile"
    crop: bool = True
    max_tiles: int = MAX_TILES
    key: bytes | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {self.threshold:g}")
        if not (0 <= self.simplify_um < float("inf")):
            raise ValueError(f"simplify_um must be 0 or more, got {self.simplify_um:g}")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {self.max_tiles}")


def export_qupath(results: Path, out: Path, config: QuPathConfig | None = None) -> list[Json]:
    """Write a QuPath project for all slides of a results folder.

    Parameters
    ----------
    results : Path
        What ``wsi score`` wrote.
    out : Path
        Made where it is not there. What an earlier export wrote of the same slides is replaced; to a project that is
        there slides are added, and whatever QuPath or its user changed in it stays.
    config : QuPathConfig, optional

    Returns
    -------
    list of dict
        A row a slide: ``slide_id``, ``tiles``, ``tile_files``, ``regions``, ``warnings``.

    Raises
    ------
    ResultsError, StoreError
        No results there, or not those of ``wsi score``; a project there in the other frame, or that is none.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> export_qupath(Path("results"), Path("for_qupath"), QuPathConfig(threshold=0.7))          # doctest: +SKIP
    """
    config = config or QuPathConfig()
    slides = scored_slides(results)
    out.mkdir(parents=True, exist_ok=True)
    if config.key is None:  # first: a project in another frame must not get objects of this one
        _write_project([slide for slide in slides.values() if _is_file(slide)], out, config)
    rows = [_export_slide(slide, out, config) for slide in slides.values()]
    (out / "scripts").mkdir(exist_ok=True)
    with replacing(out / "scripts" / "import_wsi.groovy") as file:
        file.write(Path(__file__).with_name("import_wsi.groovy").read_bytes())
    frame = "level-0 pixels minus the corner of the slide's bounds_px"
    write_json(out / "export.json", {"wsi": __version__, "coordinate_frame": frame, "slides": rows})
    return rows


def path_classes(slide: ScoredSlide) -> list[PathClass]:
    """Return the classes of a slide's tiles, positive ones red."""
    names, positive = slide.class_names, list(slide.numbers.get("positive_classes") or ())
    others = [name for name in names if name not in positive]
    colours = {name: _POSITIVE_RGB[i % len(_POSITIVE_RGB)] for i, name in enumerate(positive)}
    colours |= {name: _OTHER_RGB[i % len(_OTHER_RGB)] for i, name in enumerate(others)}
    return [PathClass(name, colours[name]) for name in names]


def measurements(slide: ScoredSlide, tiles: ScoredTiles) -> dict[str, npt.NDArray[Any]]:
    """Return what is known of each tile: probabilities, their uncertainty, and the percentile of its attention.

    The uncertainty is the entropy of the probabilities over that of no knowledge at all: 0 to 1.
    """
    p = tiles.probabilities
    found: dict[str, npt.NDArray[Any]] = {f"prob_{name}": p[:, i] for i, name in enumerate(slide.class_names)}
    if p.shape[1] > 1:
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1)
        found["uncertainty"] = (entropy / np.log(p.shape[1])).clip(0, 1)
    if tiles.attention is not None:
        a = tiles.attention  # sums to one over a slide: only the rank means something between slides
        found["attention_percentile"] = np.searchsorted(np.sort(a), a) * (100 / max(len(a), 1))
    return found


def slide_regions(slide: ScoredSlide, tiles: ScoredTiles, mpp: Mpp, config: QuPathConfig) -> list[Region]:
    """Return the tissue as it was outlined when scoring, and the positive regions at the threshold."""
    path = slide.folder / "regions.geojson"
    try:
        drawn = read_geojson(path)
    except (OSError, ValueError) as error:
        raise ResultsError(path, f"cannot be read ({error})", "Score the slide again") from error
    found = [
        Region(shapely.transform(shapely.geometry.shape(each["geometry"]), lambda xy: xy + np.array(slide.origin)),
               _TISSUE, each["properties"].get("name", ""),
               each["properties"].get("measurements", {}))
        for each in drawn
        if each["properties"]["classification"]["name"] == "Tissue"
    ]  # fmt: skip
    if not slide.positive.any() or not len(tiles.grid):
        return found
    score = tiles.probabilities[:, slide.positive].sum(axis=1).clip(0, 1)
    outlines = Heatmap(tiles.grid, score).regions(_threshold(slide, config), slide.bounds)
    outlines = simplify(outlines, config.simplify_um, mpp)
    boxes = tiles.grid.boxes()
    centres = shapely.points(boxes[:, :2] + boxes[:, 2:] / 2)
    region, tile = shapely.STRtree(centres).query(np.array(outlines, object), predicate="contains")
    order = np.argsort(region, kind="stable")
    inside = np.split(score[tile[order]], np.cumsum(np.bincount(region, minlength=len(outlines)))[:-1])
    label = " or ".join(slide.numbers["positive_classes"])
    colour = next(c for c, is_positive in zip(path_classes(slide), slide.positive, strict=True) if is_positive)
    for i, (outline, scores) in enumerate(zip(outlines[:MAX_REGIONS], inside, strict=False), 1):
        numbers = {"area_mm2": mpp.area_um2(outline.area) / 1e6, "major_axis_um": major_axis_um(outline, mpp)}
        if len(scores):
            numbers |= {"mean_probability": float(scores.mean()), "max_probability": float(scores.max())}
        found.append(Region(outline, colour, f"{label} {i}", numbers))
    for start in range(MAX_REGIONS, len(outlines), MAX_REGIONS):
        joined = shapely.MultiPolygon(outlines[start : start + MAX_REGIONS])
        name = f"{label} {start + 1} to {start + len(joined.geoms)}"
        found.append(Region(joined, colour, name, {"area_mm2": mpp.area_um2(joined.area) / 1e6}))
    return found


def simplify(outlines: list[shapely.Polygon], tolerance_um: float, mpp: Mpp) -> list[shapely.Polygon]:
    """Drop points of outlines that move them by no more than `tolerance_um`; none crosses itself or another.

    All outlines are simplified together (Douglas and Peucker's rule, kept from crossings as in JTS's
    ``TopologyPreservingSimplifier``); holes stay holes. Where that library cannot keep the promise, nothing is
    simplified.

    Examples
    --------
    >>> stairs = shapely.Polygon([(0, 0), (9, 0), (9, 9), (6, 9), (6, 8.9), (3, 8.9), (3, 9), (0, 9)])
    >>> [len(each.exterior.coords) for each in simplify([stairs], 0.1, Mpp(0.5, 0.5))]
    [5]
    """
    if not tolerance_um or not outlines:
        return outlines
    um = np.array(mpp)
    together = shapely.transform(shapely.MultiPolygon(outlines), lambda xy: xy * um)
    for share in (1.0, 0.7, 0.4):  # the library's tolerance is not a bound: measured, and asked for less
        simple = shapely.simplify(together, tolerance_um * share, preserve_topology=True)
        parts = shapely.get_parts(simple)
        if (
            simple.is_valid
            and len(parts) == len(outlines)
            and _within(shapely.get_parts(together), parts, tolerance_um)
        ):
            return list(shapely.transform(parts, lambda xy: xy / um))
    return outlines


def _within(before: npt.NDArray[np.object_], after: npt.NDArray[np.object_], distance: float) -> bool:
    """Whether each point of the outlines before lies that close to its own outline after."""
    edges = shapely.boundary(after)
    shapely.prepare(edges)
    xy, of = shapely.get_coordinates(shapely.boundary(before), return_index=True)
    return bool(shapely.dwithin(edges[of], shapely.points(xy), distance).all())


def shards(rows: npt.NDArray[np.integer], most: int) -> Iterator[slice]:
    """Divide tiles, in the order of a grid, into bands of about the same size and at most `most`.

    A band ends where a row of the grid does, unless a row alone is longer.

    Examples
    --------
    >>> list(shards(np.repeat(np.arange(4), 3), 7))
    [slice(0, 6, None), slice(6, 12, None)]
    """
    n = len(rows)
    ends = np.append(np.flatnonzero(np.diff(rows)) + 1, n)
    start = 0
    while start < n or start == n == 0:
        share = start + -(-(n - start) // -(-max(n - start, 1) // most))  # of what is left
        whole = ends[(ends > start) & (ends <= share)]
        stop = int(whole[-1]) if len(whole) else min(share, n)
        yield slice(start, stop)
        if stop == n:
            return
        start = stop


def _threshold(slide: ScoredSlide, config: QuPathConfig) -> float:
    return float(slide.numbers["threshold"]) if config.threshold is None else config.threshold


def _is_file(slide: ScoredSlide) -> bool:
    return "://" not in str(slide.numbers["slide"])


def _through_bioformats(slide: ScoredSlide) -> bool:
    return slide.numbers.get("vendor") == "ome-tiff"


def _export_slide(slide: ScoredSlide, out: Path, config: QuPathConfig) -> Json:
    name = pseudonym(slide.slide_id, config.key)
    folder = out / "objects" / name
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("tiles*.geojson.gz"):  # there may have been more of them
        earlier.unlink()
    store = slide.store()
    tiles, mpp = slide.tiles(store), slide.pixel_size(store)
    threshold = _threshold(slide, config)
    bounds = slide.bounds if config.crop and not _through_bioformats(slide) else Box(0, 0, *slide.size)
    provenance = slide.numbers.get("provenance", {})
    metadata = {
        "made_by": f"wsi {provenance.get('wsi', '')}".strip(),
        "model": str(provenance.get("model", "unknown")),
        "model_sha256": str(provenance.get("model_sha256", "unknown")),
        "threshold": f"{threshold:g}",
        "use": "research only",
    }
    regions = slide_regions(slide, tiles, mpp, config)
    n_regions = write_regions(folder / "regions.geojson.gz", regions, bounds=bounds, slide_id=name, metadata=metadata)
    names, boxes = called(tiles.probabilities, slide.positive, threshold), tiles.grid.boxes()
    values, classes = measurements(slide, tiles), path_classes(slide)
    parts = list(shards(tiles.grid.rows, config.max_tiles))
    n_tiles = 0
    for i, part in enumerate(parts, 1):
        which = "" if len(parts) == 1 else f"-{i}-of-{len(parts)}"
        n_tiles += write_tiles(
            folder / f"tiles{which}.geojson.gz", boxes[part], classes, names[part],
            {key: each[part] for key, each in values.items()},
            bounds=bounds, slide_id=name, metadata=metadata, object_type=config.object_type, first=part.start,
        )  # fmt: skip
    warnings = []
    if not len(tiles.grid):
        warnings.append("no tile was scored: look at the warnings of result.json")
    if config.object_type == "annotation" and n_tiles > MAX_REGIONS:
        warnings.append(f"{n_tiles} annotations: QuPath will be slow; write tiles as detections")
    if config.key is None and not _is_file(slide):
        warnings.append("the slide is no file here, and not in the project")
    if len(regions) > n_regions:
        warnings.append(f"{len(regions) - n_regions} regions are smaller than a pixel, and left out")
    return {
        "slide_id": name,
        "tiles": n_tiles,
        "tile_files": len(parts),
        "regions": n_regions,
        "threshold": threshold,
        "bounds_px": list(bounds),
        "mpp": [mpp.x, mpp.y],
        "warnings": warnings,
    }


def _write_project(slides: list[ScoredSlide], out: Path, config: QuPathConfig) -> None:
    """Write the project, or add what is missing to the one that is there: QuPath and its user may have changed it."""
    path = out / "project.qpproj"
    # No time: the same results give the same project.
    project: Json = {"version": "0.4.0", "createTimestamp": 0, "modifyTimestamp": 0, "lastID": 0, "images": []}
    try:
        if path.exists():
            project = json.loads(path.read_text(encoding="utf-8-sig"))
        known = {image["imageName"]: image["serverBuilder"] for image in project["images"]}
        last = max([int(project.get("lastID", 0)), *(int(image["entryID"]) for image in project["images"])])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(path, f"is no QuPath project ({error!r})", "Choose another folder with -o") from error
    for slide in slides:
        arguments = [] if config.crop or _through_bioformats(slide) else ["--no-crop"]
        if slide.slide_id in known:
            if ("--no-crop" in known[slide.slide_id].get("args", arguments)) != bool(arguments):
                raise ResultsError(
                    path, "opens its slides in the other frame (--no-crop)", "Choose another folder with -o"
                )
            continue
        last += 1
        project["images"].append(
            {
                "serverBuilder": {
                    "builderType": "uri",
                    "providerClassName": _BIOFORMATS if _through_bioformats(slide) else _OPENSLIDE,
                    "uri": Path(str(slide.numbers["slide"])).as_uri(),
                    "args": arguments,
                },
                "entryID": last,
                "randomizedName": str(uuid.uuid5(uuid.NAMESPACE_URL, f"wsi:{slide.slide_id}")),
                "imageName": slide.slide_id,
                "metadata": {},
            }
        )
    if last != project.get("lastID") or not path.exists():
        write_json(path, project | {"lastID": last})
    if not (out / "classifiers" / "classes.json").exists():
        classes = {each.name: each.color for slide in slides for each in (_TISSUE, *path_classes(slide))}
        packed = [{"name": name, "color": _packed(color)} for name, color in classes.items()]
        (out / "classifiers").mkdir(exist_ok=True)
        write_json(out / "classifiers" / "classes.json", {"pathClasses": packed})


def _packed(color: tuple[int, int, int]) -> int:
    """A colour as Java holds it: alpha, red, green and blue in a signed 32-bit integer."""
    r, g, b = color
    return (r << 16 | g << 8 | b) - (1 << 24)
