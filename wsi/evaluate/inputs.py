"""Strict readers of CSVs, references and annotations: a row skipped in silence would give a wrong number."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsi.annotations import READERS, Frame, lesion_area, rasterize, read_annotations, read_mask
from wsi.annotations.areas import ROLES, Role
from wsi.errors import AnnotationError, EvaluationError
from wsi.metrics.estimate import F64
from wsi.scored import ScoredSlide


def read_detections(path: Path) -> F64:
    """Read an official detection file, float64 (n, 3): confidence, x, y in level-0 pixels.

    Raises
    ------
    EvaluationError
        A row is not three finite numbers, or a confidence is outside 0 to 1; the message names the line.
    """
    rows = []
    for number, row in lines_of(path):
        if number == 1 and not any(map(_is_number, row)):  # the format has no header, but many programs write one
            continue
        where = f"{path}, line {number}"
        try:
            p, x, y = (float(cell) for cell in row)
        except ValueError:
            raise EvaluationError(where, f"is not confidence,x,y: {','.join(row)!r}") from None
        if not (0 <= p <= 1 and math.isfinite(x) and math.isfinite(y)):
            raise EvaluationError(where, f"holds a confidence outside 0 to 1, or no finite number: {','.join(row)!r}")
        rows.append((p, x, y))
    return np.array(rows, np.float64).reshape(-1, 3)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_rows(path: Path, *, header: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Read a CSV with a header, or with the given columns; empty lines are skipped and cells stripped.

    Raises
    ------
    EvaluationError
        The file is missing, not UTF-8 or without rows, two columns share a name, or a row has another length.

    Examples
    --------
    >>> read_rows(Path("labels.csv"))[0]                                                          # doctest: +SKIP
    {'slide_id': 'a', 'label': '1'}
    """
    lines = [(number, line) for number, line in lines_of(path) if any(line)]
    columns = list(header) if header else (lines.pop(0)[1] if lines else [])
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise EvaluationError(path, f"has two columns {twice[0]!r}", "Keep one")
    if not lines:
        raise EvaluationError(path, "holds no rows", "One row a case")
    for number, line in lines:
        if len(line) != len(columns):
            raise EvaluationError(f"{path}, row {number}", f"has {len(line)} cells, the header {len(columns)}")
    return [dict(zip(columns, line, strict=True)) for _, line in lines]


def lines_of(path: Path) -> list[tuple[int, list[str]]]:
    """Return the non-empty rows of a CSV, each with its number from 1; cells are stripped.

    Raises
    ------
    EvaluationError
        The file is missing, or is no CSV in UTF-8.

    Examples
    --------
    >>> lines_of(Path("labels.csv"))[0]                                                           # doctest: +SKIP
    (1, ['slide_id', 'label'])
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except FileNotFoundError:
        raise EvaluationError(path, "there is no such file", "Check the path") from None
    except OSError as error:  # a folder, among others
        raise EvaluationError(path, f"cannot be read ({error.strerror})", "Give a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(path, f"is no CSV in UTF-8 ({error})", "Save it as CSV in UTF-8") from error
    return [(number, row) for number, row in enumerate(rows, 1) if row]


def slide_name(cell: str) -> str:
    """Return a slide's name as it is compared: lower case, without ``.tif``.

    Examples
    --------
    >>> slide_name("Test_001.tif")
    'test_001'
    """
    return cell.lower().removesuffix(".tif")


def unique(
    rows: Sequence[dict[str, str]], column: str, where: Path, name: Callable[[str], str] = str
) -> dict[str, dict[str, str]]:
    """Return rows keyed by a column, whose values `name` normalises and which must be unique.

    Examples
    --------
    >>> unique([{"id": "a", "label": "1"}], "id", Path("labels.csv"))
    {'a': {'id': 'a', 'label': '1'}}
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        key = name(row[column])
        if key in found:
            raise EvaluationError(where, f"holds {row[column]!r} twice", "Keep one row a case")
        found[key] = row
    return found


def annotation_of(folder: Path, slide_id: str) -> Path | None:
    """Return a slide's annotation file, or None: named as the slide, ignoring case, optionally with ``_mask``.

    Raises
    ------
    EvaluationError
        Two files match.
    """
    if folder.is_file():
        return folder
    names = {slide_id.lower() + tail + suffix for suffix in READERS for tail in ("", "_mask")}
    found = sorted(path for path in folder.iterdir() if path.name.lower() in names)
    if len(found) > 1:
        raise EvaluationError(found[0], f"and {found[1].name} both belong to {slide_id}", "Keep one")
    return found[0] if found else None


def unfinished(results: Path) -> list[str]:
    """Return a warning if slides of a results folder were begun and have no result; else an empty list.

    Examples
    --------
    >>> unfinished(Path("results"))                                                               # doctest: +SKIP
    ['2 slides failed or are not finished, and are left out, a for one: see failures.csv']
    """
    begun = {path.parent for kind in ("failure.json", "store.zarr") for path in results.glob(f"*/{kind}")}
    names = sorted(path.name for path in begun if not (path / "result.json").exists())
    if not names:
        return []
    return [f"{len(names)} slides failed or are not finished, and are left out, {names[0]} for one: see failures.csv"]


def is_image(path: Path) -> bool:
    """Return whether an annotation file is a mask image.

    Examples
    --------
    >>> is_image(Path("tumor_001_mask.tif")), is_image(Path("tumor_001.xml"))
    (True, False)
    """
    return path.suffix.lower() in (".tif", ".tiff", ".png")


def frame_of(slide: ScoredSlide) -> Frame:
    """Return the frame of a slide's annotations, as far as its results tell: the origin, and the size for masks.

    Examples
    --------
    >>> read_annotations("a.png", frame=frame_of(slide))                                          # doctest: +SKIP
    """
    return Frame(slide.origin, slide.size)


def lesion_mask(
    path: Path, *, frame: Frame, downsample: int, roles: Mapping[str, Role] | None = None, at: float = 0.0
) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    """Return the mask of lesions at 1/`downsample` of level 0, and warnings about assumptions.

    If the frame's `size` is None, a mask of outlines extends as far as they do. `at` is the sampling point within a
    pixel, see ``rasterize``.

    Examples
    --------
    >>> mask, notes = lesion_mask(Path("tumor_001.xml"), frame=frame_of(slide), downsample=32)    # doctest: +SKIP
    """
    if is_image(path):
        values = read_mask(path, downsample=downsample, size=frame.size, at=at)
        known = ROLES | {group.lower(): role for group, role in (roles or {}).items()}
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256)[1:]) + 1
        unknown = [str(value) for value in present if str(value) not in known]
        if unknown:
            remedy = f"Give it one: --group {unknown[0]}=lesion (or hole, or ignore)"
            raise AnnotationError(path, f"holds the value {unknown[0]}, whose role is unknown", remedy)
        return np.isin(values, [value for value in present if known[str(value)] == "lesion"]), ()
    area, size = lesion_area(read_annotations(path, frame=frame), roles=roles, where=path), frame.size
    if size is None:
        reach = area.geometry.bounds if not area.geometry.is_empty else (0, 0, 0, 0)
        size = math.ceil(reach[2]) + 16 * downsample, math.ceil(reach[3]) + 16 * downsample
    shape = math.ceil(size[0] / downsample), math.ceil(size[1] / downsample)
    return rasterize(area.geometry, shape, downsample, at=at), area.warnings
