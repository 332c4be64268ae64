"""Export a results folder as a QuPath project: regions, tiles and measurements of every slide.

The project names its slides by absolute paths. The objects are GeoJSON files beside it, since QuPath's own object file
is serialised Java. ``scripts/import_wsi.groovy``, which QuPath lists under *Automate > Project scripts*, imports them
into all images. Layout of a project: ``DefaultProject.java`` of QuPath 0.4 to 0.7.
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
from wsi.export.objects import TISSUE, classes_of, measurements, positive_regions, simplify
from wsi.export.pseudonym import pseudonym
from wsi.export.qupath import Region, write_regions, write_tiles
from wsi.files import replacing, write_json
from wsi.heatmap import Heatmap
from wsi.result import called
from wsi.scored import ScoredSlide, ScoredTiles, scored_slides
from wsi.units import Box, Mpp

#: Tiles per file: QuPath needs about 6 kB of memory per tile while it reads a file.
MAX_TILES = 200_000
#: QuPath gets slow with more annotations; smaller regions are then joined, this many to one.
MAX_REGIONS = 10_000
#: QuPath's readers. Bio-Formats, used for OME-TIFF, shows the whole plane; OpenSlide crops it to the bounds.
_BIOFORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"
_OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"

Json = dict[str, Any]


@dataclass(frozen=True)
class QuPathConfig:
    """How results are written for QuPath.

    Attributes
    ----------
    threshold : float, optional
        Probability from which a tile is positive. Default: the one the slide was scored with.
    simplify_um : float
        Tolerance in microns for simplifying outlines; 0 keeps the edges of tiles.
    object_type : {"tile", "detection", "annotation"}
        The QuPath object type of tiles.
    crop : bool
        True: coordinates count from the corner of the scanned area, as QuPath shows the slide. False: from the corner
        of the whole plane, as QuPath shows it with ``--no-crop`` and through Bio-Formats.
    max_tiles : int
        Tiles per file; a slide with more is written to several files, each a band of rows.
    key : bytes, optional
        Replaces slide ids by pseudonyms. Then no project is written, since it would name the slides' files.
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
        A results folder of ``wsi score``.
    out : Path
        Created if missing. Objects of an earlier export of the same slides are replaced. Slides are added to an
        existing project, which keeps the changes that QuPath or its user made.

    Returns
    -------
    list of dict
        A row per slide: ``slide_id``, ``tiles``, ``tile_files``, ``regions``, ``warnings``.

    Raises
    ------
    ResultsError, StoreError
        There are no results of ``wsi score``; or the project in `out` is damaged, or uses the other coordinate frame.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> export_qupath(Path("results"), Path("for_qupath"), QuPathConfig(threshold=0.7))          # doctest: +SKIP
    """
    config = config or QuPathConfig()
    slides = scored_slides(results)
    out.mkdir(parents=True, exist_ok=True)
    if config.key is None:  # first, since it refuses a project in the other frame
        _write_project([slide for slide in slides.values() if _is_file(slide)], out, config)
    rows = [_export_slide(slide, out, config) for slide in slides.values()]
    (out / "scripts").mkdir(exist_ok=True)
    with replacing(out / "scripts" / "import_wsi.groovy") as file:
        file.write(Path(__file__).with_name("import_wsi.groovy").read_bytes())
    frame = "level-0 pixels minus the corner of the slide's bounds_px"
    write_json(out / "export.json", {"wsi": __version__, "coordinate_frame": frame, "slides": rows})
    return rows


def slide_regions(slide: ScoredSlide, tiles: ScoredTiles, mpp: Mpp, config: QuPathConfig) -> list[Region]:
    """Return the outlines of the tissue, as scored, and the positive regions at the threshold."""
    path = slide.folder / "regions.geojson"
    try:
        drawn = read_geojson(path)
    except (OSError, ValueError) as error:
        raise ResultsError(path, f"cannot be read ({error})", "Score the slide again") from error
    found = [
        Region(shapely.transform(shapely.geometry.shape(each["geometry"]), lambda xy: xy + np.array(slide.origin)),
               TISSUE, each["properties"].get("name", ""),
               each["properties"].get("measurements", {}))
        for each in drawn
        if each["properties"]["classification"]["name"] == "Tissue"
    ]  # fmt: skip
    if not slide.positive.any() or not len(tiles.grid):
        return found
    heatmap = Heatmap.of(tiles.grid, tiles.probabilities, slide.positive)
    outlines = simplify(heatmap.regions(_threshold(slide, config), slide.bounds), config.simplify_um, mpp)
    positive = slide.numbers["positive_classes"]
    colour = next(c for c, is_positive in zip(classes_of(slide), slide.positive, strict=True) if is_positive)
    found += positive_regions(outlines[:MAX_REGIONS], heatmap, positive=positive, path_class=colour, mpp=mpp)
    label = " or ".join(positive)
    for start in range(MAX_REGIONS, len(outlines), MAX_REGIONS):
        joined = shapely.MultiPolygon(outlines[start : start + MAX_REGIONS])
        name = f"{label} {start + 1} to {start + len(joined.geoms)}"
        found.append(Region(joined, colour, name, {"area_mm2": mpp.area_um2(joined.area) / 1e6}))
    return found


def shards(rows: npt.NDArray[np.integer], most: int) -> Iterator[slice]:
    """Divide tiles, in grid order, into bands of similar size and of at most `most` tiles.

    A band ends at the end of a grid row, unless a single row is longer than `most`.

    Examples
    --------
    >>> list(shards(np.repeat(np.arange(4), 3), 7))
    [slice(0, 6, None), slice(6, 12, None)]
    """
    n = len(rows)
    ends = np.append(np.flatnonzero(np.diff(rows)) + 1, n)
    start = 0
    while start < n or start == n == 0:
        share = start + -(-(n - start) // -(-max(n - start, 1) // most))  # an equal share of the rest
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
    values, classes = measurements(slide, tiles), classes_of(slide)
    parts = list(shards(tiles.grid.rows, config.max_tiles))
    n_tiles = 0
    written = []
    for i, part in enumerate(parts, 1):
        written.append(folder / f"tiles{'' if len(parts) == 1 else f'-{i}-of-{len(parts)}'}.geojson.gz")
        n_tiles += write_tiles(
            written[-1], boxes[part], classes, names[part],
            {key: each[part] for key, each in values.items()},
            bounds=bounds, slide_id=name, metadata=metadata, object_type=config.object_type, first=part.start,
        )  # fmt: skip
    for earlier in set(folder.glob("tiles*.geojson.gz")) - set(written):  # an earlier export may have had more shards
        earlier.unlink()
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
    """Write the project, or add missing slides to an existing one, which QuPath and its user may have changed."""
    path = out / "project.qpproj"
    # No timestamps, so that the same results give the same project.
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
                raise ResultsError(path, "opens its slides in the other frame (--no-crop)", "Choose another with -o")
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
        classes = {each.name: each.color for slide in slides for each in (TISSUE, *classes_of(slide))}
        packed = [{"name": name, "color": _packed(color)} for name, color in classes.items()]
        (out / "classifiers").mkdir(exist_ok=True)
        write_json(out / "classifiers" / "classes.json", {"pathClasses": packed})


def _packed(color: tuple[int, int, int]) -> int:
    """A colour as in Java: alpha, red, green and blue in a signed 32-bit integer."""
    r, g, b = color
    return (r << 16 | g << 8 | b) - (1 << 24)
