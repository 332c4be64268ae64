"""``wsi import``: anybody's outlines to our GeoJSON."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wsi.cli.display import say
from wsi.errors import AnnotationError, OutputError, WsiError


def import_annotations(
    files: Annotated[list[Path], typer.Argument(help="Files of ASAP, ImageScope, HALO, NDP.view, QuPath, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for <name>.geojson.")],
    slide: Annotated[Path | None, typer.Option(help="The slide of these files, or a folder with one for each.")] = None,
    class_names: Annotated[
        list[str] | None, typer.Option("--class", help="OLD=NEW: what a group is called instead (repeatable).")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="Microns per level-0 pixel, where the slide does not say.")] = None,
    mask: Annotated[
        bool,
        typer.Option("--mask", help="Write masks of where to look, and slides.csv for wsi score or wsi tile."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a row a file as JSON.")] = False,
) -> None:
    """Read outlines of whatever program and write GeoJSON: for QuPath, and for `wsi evaluate --annotations`.

    Coordinates of GeoJSON count from the corner of the slide's bounds. Where a slide has such (MIRAX, Leica), and for
    files of NDP.view, Sectra and Cytomine, name it.

    With --mask they say where to look: at tissue within the outlines, and in none of the group Exclusion or Ignore*
    (which alone leave the other tissue).

    Examples:
      wsi import annotations/*.xml -o geojson

      wsi import slide.ndpi.ndpa --slide slide.ndpi --class AN1=Tumor -o geojson

      wsi import regions/*.geojson --slide slides --mask -o masks && wsi score masks/slides.csv --model NAME -o results
    """
    from wsi.annotations import Frame, read_annotations
    from wsi.annotations.convert import write_annotations, write_mask
    from wsi.files import write_csv
    from wsi.slide import open_slide

    renamed = dict(_pair(text) for text in class_names or ())
    if mask and slide is None:
        raise AnnotationError("--mask", "needs the slides", "Name the slide, or the folder of slides, with --slide")
    rows: list[dict[str, Any]] = []
    slides = []
    stems = [_stem(file) for file in files]
    twice = [stem for stem, n in Counter(stems).items() if n > 1]
    if twice:
        raise AnnotationError(twice[0], "is the name of two of these files", "Import them one by one")
    for file, stem in zip(files, stems, strict=True):
        belongs = slide if slide is None or not slide.is_dir() else _slide_of(slide, stem)
        with open_slide(str(belongs), mpp=mpp) if belongs else nullcontext() as opened:
            try:
                found = read_annotations(file, frame=Frame.of(opened) if opened else Frame())
            except OSError as error:
                raise AnnotationError(file, f"cannot be read ({error.strerror or error})", "Check the path") from error
            row: dict[str, Any] = {"file": str(file)}
            try:
                out.mkdir(parents=True, exist_ok=True)
                if mask and belongs and opened:
                    named = [replace(each, group=renamed.get(each.group, each.group)) for each in found]
                    row |= {"mask": str(out / f"{stem}.png"), "annotations": len(found)}
                    row["mm2"] = round(write_mask(row["mask"], named, opened), 6)
                    slides.append({"slide": belongs.absolute(), "mask": f"{stem}.png"} | ({"mpp": mpp} if mpp else {}))
                else:
                    bounds = opened.bounds if opened else None
                    row["geojson"] = str(out / f"{stem}.geojson")
                    row["annotations"] = write_annotations(
                        row["geojson"], found, bounds=bounds, slide_id=stem, classes=renamed
                    )
            except WsiError:
                raise
            except ValueError as error:
                raise AnnotationError(file, f"cannot be written ({error})", "Rename it with --class") from error
            except OSError as error:
                raise OutputError.of(error, out) from error
        groups = Counter(renamed.get(each.group, each.group) or "(none)" for each in found)
        rows.append(row | {"groups": dict(groups)})
        if row["annotations"] < len(found):
            say(f"wsi: {file}: {len(found) - row['annotations']} outlines are smaller than a pixel, and left out")
        if row.get("mm2") == 0:
            say(f"wsi: {file}: no tissue is left to look at")
    if slides:
        write_csv(out / "slides.csv", ("slide", "mask", *(["mpp"] if mpp else [])), slides)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        groups_text = ", ".join(f"{name} {n}" for name, n in row["groups"].items()) or "nothing"
        left = f", {row['mm2']:g} mm2 of tissue" if "mm2" in row else ""
        print(f"{row.get('mask') or row['geojson']}: {row['annotations']} annotations ({groups_text}){left}")


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not new.strip():
        raise AnnotationError(f"--class {text!r}", "is not OLD=NEW", "For example --class _0=Tumor")
    return old, new.strip()


def _stem(file: Path) -> str:
    """The slide's name: without what NDP.view, gzip and others append."""
    name = file.name.removesuffix(".gz")
    return Path(name.removesuffix(".ndpa")).stem if name.endswith(".ndpa") else Path(name).stem


def _slide_of(folder: Path, stem: str) -> Path:
    found = [path for path in sorted(folder.iterdir()) if path.stem.lower() == stem.lower() and path.is_file()]
    if len(found) != 1:
        raise AnnotationError(folder, f"holds {len(found)} slides named {stem}", "Name the slide itself")
    return found[0]
