"""Identify a file or folder, list its problems (``check``), and list what could identify a patient (``phi``).

Nothing is changed. ``check`` chooses a function by the file's suffix or the folder's content. The private functions,
one for each kind, try the package's own readers and turn their errors into lines of text.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow.parquet as pq

from wsi.annotations import READERS, Frame, read_annotations
from wsi.annotations.mask import read_mask
from wsi.errors import AnnotationError, MppError, NotRgb, SlideError, StoreError, TrainError, WsiError
from wsi.export.convert import read_scores, scores_of_wsinfer
from wsi.export.rules import problems, slides_of
from wsi.result import read_result
from wsi.slide import open_slide
from wsi.slide.leaks import leaks, telling_name
from wsi.store import PatchStore
from wsi.train.bags import find_bags, read_bag
from wsi.units import Box, Mpp

_IMAGES = (".tif", ".tiff", ".png")
_TEXTS = (".parquet", ".json", ".csv", ".geojson", ".geojson.gz", ".qpproj", ".groovy", ".log", ".txt", ".html")
#: Metadata files of Zarr groups and arrays, in formats 3 and 2.
_ZARR = ("zarr.json", ".zattrs", ".zarray", ".zgroup")
#: Bytes of a text file that are searched for names.
_MOST_TEXT = 64 << 20
#: Stands for the unknown slide of annotation formats whose coordinates depend on it.
_SOME_SLIDE = Frame(size=(100_000, 100_000), mpp=Mpp(0.25, 0.25), centre_nm=(0.0, 0.0))


@dataclass
class Found:
    """The kind of a file or folder, and its problems.

    Attributes
    ----------
    path : str
    kind : str
        In words; "unknown" if nothing here can read it.
    facts : dict
        Its size and similar, as JSON values.
    problems : list of str
        One line each; empty if all is well.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check(path: Path) -> Found:
    """Identify a file or folder and list its problems.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.

    Examples
    --------
    >>> check(Path("results")).problems                                                   # doctest: +SKIP
    ['slide_7: was not finished']
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        return _folder(path)
    name = path.name.lower()
    if name.endswith(".qpproj"):
        return _project(path)
    if name.endswith((".h5", ".pt", ".npy", ".h5ad")):
        return _bags(path)
    if name.endswith(_IMAGES):
        return _image(path)
    if any(name.endswith(suffix) for suffix in READERS):
        return _annotations(path)
    return _slide(path)


def phi(path: Path) -> Iterator[tuple[str, str, str]]:
    """List what a slide or folder would disclose if it were shared, as (file, where, what); never the values.

    For a folder: paths and names of slides in texts and tables, and in the names of files and folders; and what the
    slides in it disclose. Every picture is listed, since it may contain writing.

    Examples
    --------
    >>> list(phi(Path("results")))                                                        # doctest: +SKIP
    [('run.json', 'text', 'path of a file')]
    """
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    results = [read_result(file.parent) for file in files if file.name == "result.json"]
    ids = {str(result.numbers["slide_id"]) for result in results if result}
    for file in files:
        shown = str(file.relative_to(path)) if path.is_dir() else file.name
        name = file.name.lower()
        if any(re.search(rf"\b{re.escape(slide_id)}\b", file.name) for slide_id in ids):
            yield shown, "file name", "name of a slide"
        if name in _ZARR or name.endswith(_TEXTS):
            text = _text(file)
            if re.search(r"file:/|(?:^|[\"\s,=])(?:/[^/\"\s,]+){2,}|[A-Za-z]:\\\\", text):
                yield shown, "text", "path of a file"
            if any(slide_id in text for slide_id in ids):
                yield shown, "text", "name of a slide"
        elif name.endswith((".png", ".jpg", ".jpeg")):
            yield shown, "picture", "of tissue, and whatever is written on it"
            if telling_name(file.stem):
                yield shown, "file name", file.name
        elif not any(part.endswith(".zarr") for part in file.parts):
            for where, what in leaks(file):
                yield shown, where, what
    for store in sorted({each for file in files for each in file.relative_to(path).parents if each.suffix == ".zarr"}):
        if telling_name(store.name.split(".")[0]):
            yield str(store), "name of a folder", store.name
    for slide_id in sorted(ids):
        if any(slide_id in part for file in files for part in file.relative_to(path).parts[:-1]):
            yield slide_id, "name of a folder", "name of a slide"


def _text(file: Path) -> str:
    if file.suffix == ".parquet":
        try:
            columns = pq.read_table(file).columns
        except (OSError, ValueError):
            return ""
        return "\n".join(value for column in columns for value in column.to_pylist() if isinstance(value, str))
    with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw as opened:
        try:
            return opened.read(_MOST_TEXT).decode("utf-8", "replace")
        except (OSError, EOFError):
            return ""


def _folder(path: Path) -> Found:
    if any((path / name).is_file() for name in _ZARR):
        return _zarr(path)
    if list(path.glob("*.qpproj")):
        return _project(min(path.glob("*.qpproj")))
    if (path / "run.json").is_file() or (path / "result.json").is_file():
        return _results(path)
    if (path / "config.json").is_file():
        return _model(path)
    if scores_of_wsinfer(path):
        return _wsinfer(path)
    try:
        return _bags(path)
    except TrainError:
        return _files(path)


def _files(path: Path) -> Found:
    """A folder of other files, each checked alone: exports, slides, annotations."""
    found = Found(str(path), "folder")
    for each in sorted(path.iterdir()):
        if each.name.startswith(".") or (each.is_dir() and each.suffix != ".zarr"):
            continue
        part = check(each)
        found.facts[part.kind] = found.facts.get(part.kind, 0) + 1
        found.problems += [f"{each.name}: {line}" for line in part.problems]
    if not found.facts:
        return Found(str(path), "unknown", problems=["holds nothing that is known here"])
    return found


def _zarr(path: Path) -> Found:
    """A Zarr group, identified by its attributes: SpatialData, OME-Zarr, or a patch store."""
    try:
        about = json.loads(next(path / name for name in _ZARR if (path / name).is_file()).read_text("utf-8"))
        about = about.get("attributes", about)
        if "spatialdata_attrs" in about:
            parts = sorted(str(each.parent.relative_to(path)) for each in path.glob("*/*/zarr.json"))
            lost = [part for part in parts if part[:6] == "shapes" and not (path / part / "shapes.parquet").is_file()]
            problems = [f"{part}: has no shapes.parquet" for part in lost]
            return Found(str(path), "SpatialData store", {"elements": parts}, problems)
        if "ome" not in about and "multiscales" not in about:
            return _store(path)
        ome = about.get("ome", about)
        levels = [each["path"] for each in ome["multiscales"][0]["datasets"]]
        facts = {"version": ome.get("version", ome["multiscales"][0].get("version")), "levels": len(levels)}
        lost = [level for level in levels if not any((path / level / name).is_file() for name in _ZARR)]
        return Found(str(path), "OME-Zarr image", facts, [f"level {level} is not there" for level in lost])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return Found(str(path), "Zarr group", problems=[f"is damaged ({error!r})"])


def _model(path: Path) -> Found:
    found = Found(str(path), "model folder")
    try:
        found.facts = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        found.problems.append(f"config.json is damaged ({error})")
    return found


def _results(path: Path) -> Found:
    found = Found(str(path), "results of wsi")
    folders = [path] if (path / "result.json").is_file() else sorted(p for p in path.iterdir() if p.is_dir())
    done = 0
    for folder in folders:
        if (folder / "failure.json").is_file():
            found.problems.append(f"{folder.name}: failed; see failures.csv")
        elif (folder / "store.zarr").is_dir() and not (folder / "result.json").is_file():
            found.problems.append(f"{folder.name}: was not finished; the same command goes on")
        elif (folder / "result.json").is_file():
            done += 1
            if read_result(folder) is None:
                found.problems.append(f"{folder.name}: result.json is damaged")
            found.problems += [f"{folder.name}: {each}" for each in _store(folder / "store.zarr").problems]
            geojson = [each for each in (folder / "regions.geojson", folder / "tiles.geojson.gz") if each.exists()]
            found.problems += [f"{folder.name}: {each.name}: {line}" for each in geojson for line in _qupath(each)]
    found.facts = {"slides": done}
    return found


def _qupath(file: Path) -> list[str]:
    try:
        return problems(file)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        return [f"cannot be read ({error})"]


def _store(path: Path) -> Found:
    found = Found(str(path), "patch store")
    try:
        store = PatchStore.open(path)
    except StoreError as error:
        found.problems.append(error.what)
        return found
    found.facts = {"tiles": len(store), "tile_px": store.grid.tile_px, "mpp": store.grid.mpp, "arrays": store.arrays}
    for name in store.arrays:
        missing = store.missing(name) if name != "unreadable" else []
        if missing:
            found.problems.append(f"{name}: {len(missing)} of {len(store.shards)} shards are missing")
    return found


def _project(path: Path) -> Found:
    found = Found(str(path), "QuPath project")
    try:
        slides = slides_of(path)
    except ValueError as error:
        found.problems.append(f"is damaged ({error})")
        return found
    found.facts = {"slides": [name for name, _ in slides]}
    for name, address in slides:
        parts = urlparse(address)
        if parts.scheme == "file" and not Path(unquote(parts.path)).exists():
            found.problems.append(f"{name}: its slide is not where the project says")
    for file in sorted((path.parent / "objects").glob("*/*.geojson*")):
        found.problems += [f"{file.parent.name}/{file.name}: {line}" for line in _qupath(file)]
    return found


def _bags(path: Path) -> Found:
    bags = find_bags([path])
    found = Found(str(path), "bags of features", {"bags": len(bags)})
    for slide_id, place in bags.items():
        try:
            bag = read_bag(place)
        except TrainError as error:
            found.problems.append(f"{slide_id}: {error.what}")
            continue
        tiles = found.facts.get("tiles", 0) + len(bag.features)
        found.facts |= {"width": bag.features.shape[1], "encoder": bag.encoder, "tiles": tiles}
        if bag.boxes is None:
            found.problems.append(f"{slide_id}: has no coordinates")
    return found


def _wsinfer(path: Path) -> Found:
    tables = scores_of_wsinfer(path)
    found = Found(str(path), "results of WSInfer", {"slides": len(tables)})
    for slide_id, table in tables.items():
        try:
            boxes, scores = read_scores(table)
        except TrainError as error:
            found.problems.append(f"{slide_id}: {error.what}")
            continue
        found.facts |= {"classes": list(scores), "tiles": found.facts.get("tiles", 0) + len(boxes)}
    for file in sorted((path / "model-outputs-geojson").glob("*.geojson")):
        found.problems += [f"{file.name}: {line}" for line in _qupath(file)]
    return found


def _image(path: Path) -> Found:
    """A slide if the image has a resolution; otherwise perhaps a mask."""
    found = _slide(path)
    if found.kind not in ("unknown", "image"):
        return found
    try:
        mask = read_mask(path, downsample=1)
    except (WsiError, OSError):
        return found
    return Found(str(path), "mask image", {"size_px": [mask.shape[1], mask.shape[0]], "highest": int(mask.max())})


def _slide(path: Path) -> Found:
    try:
        with open_slide(str(path)) as slide:
            facts: dict[str, Any] = {"size_px": list(slide.size), "mpp": list(slide.mpp)}
            facts["mpp_source"] = slide.mpp_source
            facts |= {"vendor": slide.vendor, "reader": slide.reader, "levels": len(slide.level_sizes)}
            if tuple(slide.bounds) != (0, 0, *slide.size):
                facts["bounds_px"] = list(slide.bounds)
            return Found(str(path), "slide", facts)
    except NotRgb as error:  # such as our heatmaps
        return Found(str(path), "OME-TIFF image", {"as a slide": error.what})
    except SlideError as error:
        problem = f"as a slide: {error.what}. {error.remedy}".strip()
        if isinstance(error, MppError):
            return _without_mpp(path, problem)
        return Found(str(path), "unknown", problems=[problem])


def _without_mpp(path: Path, problem: str) -> Found:
    """An image without a plausible resolution: a slide only if it has colours."""
    try:
        with open_slide(str(path), mpp=1.0) as slide:
            facts = {"size_px": list(slide.size), "vendor": slide.vendor, "levels": len(slide.level_sizes)}
            if ".ome.tif" in path.name.lower():  # such as our heatmaps
                return Found(str(path), "OME-TIFF image", facts)
            (w, h), most = slide.size, 512
            middle = Box(w / 2 - min(w, most) / 2, h / 2 - min(h, most) / 2, min(w, most), min(h, most))
            rgb = slide.read(middle, (64, 64))
            return Found(str(path), "image" if (rgb == rgb[..., :1]).all() else "slide", facts, [problem])
    except SlideError:
        return Found(str(path), "unknown", problems=[problem])


def _annotations(path: Path) -> Found:
    found = Found(str(path), "annotations")
    try:
        drawn = read_annotations(path, frame=_SOME_SLIDE)
    except AnnotationError as error:
        return Found(str(path), "unknown", problems=[f"as annotations: {error.what}. {error.remedy}".strip()])
    found.facts = {"outlines": len(drawn), "groups": dict(Counter(each.group or "(none)" for each in drawn))}
    if not drawn:
        found.problems.append("holds nothing")
    if path.name.lower().endswith((".geojson", ".geojson.gz")):
        found.problems += [f"QuPath: {line}" for line in _qupath(path)]
    return found
