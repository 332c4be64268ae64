"""``wsi import``: convert annotations of other programs to GeoJSON or masks."""

from __future__ import annotations

import csv
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi.cli.display import say, writing
from wsi.errors import AnnotationError, OutputError, WsiError

if TYPE_CHECKING:
    from wsi.annotations import Annotation
    from wsi.slide import Slide

#: Columns of the slides.csv that --mask writes; the last only if --slide-mpp was given.
_MANIFEST = ("slide", "mask", "mpp")


def import_annotations(
    files: Annotated[list[Path], typer.Argument(help="Files of ASAP, ImageScope, HALO, NDP.view, QuPath, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for <name>.geojson.")],
    slide: Annotated[Path | None, typer.Option(help="The slide of these files, or a folder of slides.")] = None,
    class_names: Annotated[
        list[str] | None, typer.Option("--class", help="OLD=NEW: rename a group (repeatable).")
    ] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per level-0 pixel, if the slide lacks it.")] = None,
    mask: Annotated[
        bool, typer.Option("--mask", help="Write masks of the region to score, and slides.csv for wsi score or tile.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one row per file as JSON.")] = False,
) -> None:
    """Convert annotations of other programs to GeoJSON, for QuPath and for `wsi evaluate --annotations`.

    GeoJSON coordinates count from the corner of the slide's bounds. Give --slide if the slide has bounds (MIRAX,
    Leica), and for files of NDP.view, Sectra and Cytomine.

    With --mask, write the region to score: the tissue within the outlines, without those of group Exclusion or Ignore*.
    If there are only excluded outlines, the region is all other tissue.

    Examples:
      wsi import annotations/*.xml -o geojson

      wsi import slide.ndpi.ndpa --slide slide.ndpi --class AN1=Tumor -o geojson

      wsi import regions/*.geojson --slide slides --mask -o masks && wsi score masks/slides.csv --model NAME -o results
    """
    from wsi.annotations import Frame, read_annotations
    from wsi.files import write_csv
    from wsi.slide import open_slide

    renamed = dict(_pair(text) for text in class_names or ())
    if mask and slide is None:
        raise AnnotationError("--mask", "needs the slides", "Name the slide, or the folder of slides, with --slide")
    rows: list[dict[str, Any]] = []
    stems = [_stem(file) for file in files]
    twice = [stem for stem, n in Counter(stems).items() if n > 1]
    if twice:
        raise AnnotationError(twice[0], "is the name of two of these files", "Import them one by one")
    of = [slide if slide is None or not slide.is_dir() else _slide_of(slide, stem) for stem in stems]
    if mask and len(set(of)) < len(of):
        raise AnnotationError(files[-1], "is of the same slide as another", "Merge the annotations of a slide")
    listed = _listed(out / "slides.csv") if mask else {}
    for file, stem, belongs in zip(files, stems, of, strict=True):
        target = out / f"{stem}{'.png' if mask else '.geojson'}"
        if target.exists() and target.samefile(file):
            raise OutputError(target, "is read, and would be written over", "Choose another folder with -o")
        with open_slide(str(belongs), mpp=slide_mpp) if belongs else nullcontext() as opened:
            try:
                found = read_annotations(file, frame=Frame.of(opened) if opened else Frame())
            except OSError as error:
                raise AnnotationError(file, f"cannot be read ({error.strerror or error})", "Check the path") from error
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                row = {"file": str(file)} | _write(file, target, found, opened, renamed, mask=mask)
        if mask and belongs:
            name, mpp = str(belongs.absolute()), "" if slide_mpp is None else f"{slide_mpp:g}"
            listed[name] = {"slide": name, "mask": target.name, "mpp": mpp}
        groups = Counter(renamed.get(each.group, each.group) or "(none)" for each in found)
        rows.append(row | {"groups": dict(groups)})
        if row["annotations"] < len(found):
            say(f"wsi: {file}: {len(found) - row['annotations']} outlines are smaller than a pixel, and left out")
        if row.get("mm2") == 0:
            say(f"wsi: {file}: no tissue is left to look at")
    if mask:
        columns = _MANIFEST if any(each["mpp"] for each in listed.values()) else _MANIFEST[:2]
        write_csv(out / "slides.csv", columns, [{name: each[name] for name in columns} for each in listed.values()])
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        groups_text = ", ".join(f"{name} {n}" for name, n in row["groups"].items()) or "nothing"
        left = f", {row['mm2']:g} mm2 of tissue" if "mm2" in row else ""
        print(f"{row.get('mask') or row['geojson']}: {row['annotations']} annotations ({groups_text}){left}")


def _write(
    file: Path, target: Path, found: list[Annotation], slide: Slide | None, renamed: dict[str, str], *, mask: bool
) -> dict[str, Any]:
    """Write the annotations of a file as GeoJSON or as a mask; return their row."""
    from wsi.annotations.convert import write_annotations, write_mask

    try:
        if mask and slide is not None:
            named = [replace(each, group=renamed.get(each.group, each.group)) for each in found]
            mm2 = write_mask(target, named, slide)
            return {"mask": str(target), "annotations": len(found), "mm2": round(mm2, 6)}
        bounds = slide.bounds if slide else None
        n = write_annotations(target, found, bounds=bounds, slide_id=target.stem, classes=renamed)
        return {"geojson": str(target), "annotations": n}
    except WsiError:
        raise
    except ValueError as error:
        raise AnnotationError(file, f"cannot be written ({error})", "Rename it with --class") from error


def _listed(path: Path) -> dict[str, dict[str, str]]:
    """The rows of an earlier import's slides.csv, by slide; a file with other columns is the user's, and refused."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error):
        rows = [{}]
    if any(not {"slide", "mask"} <= set(row) <= set(_MANIFEST) for row in rows):
        raise OutputError(path, "is there already, and not as this command writes it", "Choose another folder with -o")
    return {row["slide"]: {"mpp": ""} | row for row in rows}


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not new.strip():
        raise AnnotationError(f"--class {text!r}", "is not OLD=NEW", "For example --class _0=Tumor")
    return old, new.strip()


def _stem(file: Path) -> str:
    """The slide's name, without the suffixes of NDP.view, gzip and others."""
    name = file.name.removesuffix(".gz")
    return Path(name.removesuffix(".ndpa")).stem


def _slide_of(folder: Path, stem: str) -> Path:
    found = [path for path in sorted(folder.iterdir()) if path.stem.lower() == stem.lower() and path.is_file()]
    if len(found) != 1:
        raise AnnotationError(folder, f"holds {len(found)} slides named {stem}", "Name the slide itself")
    return found[0]
