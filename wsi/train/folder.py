"""The folder of a model in training: bound to its configuration at the start, written as a model at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from wsi.errors import ConfigMismatch, OutputError, TrainError
from wsi.files import replacing, write_json
from wsi.stain.range import StainRange
from wsi.train.cohort import Cohort


def bind(out: Path, identity: Mapping[str, Any], part: str = "") -> None:
    """Make a model folder with a subfolder `part`, and record `identity` in its run.json.

    Raises ConfigMismatch where the folder was started with another identity, naming what differs, or holds a model that
    was not trained here; TrainError where run.json is damaged; OutputError where the folder cannot be made.
    """
    try:
        (out / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.of(error, out / part) from error
    path = out / "run.json"
    if not path.is_file() and (out / "config.json").exists():
        raise ConfigMismatch(out, "holds a model that this command did not begin", "Choose another folder")
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise TrainError(path, f"is damaged ({error})", "Choose another folder, or delete this one") from error
        changed = [key for key, value in identity.items() if found.get(key) != json.loads(json.dumps(value))]
        if changed:
            what = f"was begun with another {', '.join(changed)}"
            raise ConfigMismatch(out, what, "Choose another folder, or delete it")
    write_json(path, identity)


def packed(state: Mapping[str, torch.Tensor]) -> tuple[bytes, str]:
    """Pack weights as safetensors; return them and their SHA-256."""
    weights = save({name: value.cpu().contiguous() for name, value in state.items()})
    return weights, hashlib.sha256(weights).hexdigest()


def write_model(
    out: Path, weights: bytes, config: Mapping[str, Any], figures: Mapping[str, Any], stains: StainRange, card: str
) -> None:
    """Write a model's files."""
    for name, content in (("weights.safetensors", weights), ("CARD.md", card.encode())):
        with replacing(out / name) as file:
            file.write(content)
    write_json(out / "figures.json", figures)
    stains.write(out)
    write_json(out / "config.json", config)  # last: it marks the folder as a complete model


def data_row(cohort: Cohort, unit: str) -> str:
    """Describe the data in a row of a model card."""
    patients = {case.patient for case in cohort.cases.values()}
    counts = np.bincount([case.label for case in cohort.cases.values()], minlength=len(cohort.class_names))
    classes = ", ".join(f"{name} {n}" for name, n in zip(cohort.class_names, counts, strict=True))
    return f"| Data | {len(cohort.cases)} {unit} of {len(patients)} patients: {classes} |"


def card_of(
    out: Path,
    rows: Sequence[str],
    notes: Sequence[str],
    figures: Mapping[str, Any],
    unit: str,
    more: Sequence[str] = (),
) -> str:
    """Write a model card: a table of `rows`, `notes` on the figures, the figures by part, and `more` lines."""
    shown = []
    for part in ("validation", "test"):
        found = figures[part]
        if found is not None:
            numbers = found.get("pooled", {key: v for key, v in found.items() if key not in (unit, "patients")})
            values = ", ".join(f"{key} {'undefined' if v is None else f'{v:.3f}'}" for key, v in numbers.items())
            shown.append(f"- {part}: {values} ({found[unit]} {unit}, {found['patients']} patients)")
    head = [f"# {out.resolve().name}", "", "**Research use only. Not a medical device; not validated for diagnosis.**"]
    limits = f"Write here what these {unit} do not represent: laboratories, scanners, patients."
    table = ["", "| | |", "|---|---|", *rows, ""]
    lines = [*head, *table, "## Figures", "", *notes, "", *shown, *more, "", "## Limits", "", limits]
    return "\n".join(lines) + "\n"
