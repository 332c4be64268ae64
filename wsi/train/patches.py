"""Training of a patch classifier, with early stopping on validation, written as a model folder.

::

    OUT/
      config.json, weights.safetensors    the model: `wsi score --model OUT`
      stain.json                          stains of the training patients, and the accepted distance from them
      CARD.md, figures.json               training data; performance on held-out patients
      predictions.csv                     a row a patch of validation and test: label, probabilities
      split.csv                           a row a patch: path, patient, label, split
      log.csv, log.png                    loss and figures of each epoch
      run.json                            configuration and patches; a rerun must have the same
      state.safetensors                   state of the training: the same command resumes it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import __version__
from wsi.files import write_csv
from wsi.nn.mil import Head
from wsi.nn.patch import PatchModel
from wsi.slide.base import U8
from wsi.stain.pixels import evenly
from wsi.stain.range import StainRange
from wsi.train.classifier import PatchConfig, PatchTraining, begin
from wsi.train.cohort import Cohort, Split, check_split
from wsi.train.figures import threshold_of
from wsi.train.folder import bind, card_of, data_row, packed, write_model
from wsi.train.images import Patches
from wsi.train.loop import as_dict, write_log
from wsi.train.mil import measure
from wsi.train.stains import learn_stains, stains_line

F64 = npt.NDArray[np.float64]
#: Maximum number of patches on which a patient's stains are measured.
_STAINED = 256


def train_patches(
    cohort: Cohort,
    patches: Patches,
    split: Split,
    out: Path,
    config: PatchConfig,
    *,
    mpp: float,
    positive: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda epoch, of: None,
) -> dict[str, Any]:
    """Train a patch classifier and write its model folder; the same call again resumes it.

    Parameters
    ----------
    cohort, patches
        Labels and pixels by the same ids.
    split : Split
        Test patches are predicted once, at the end.
    mpp : float
        Microns per pixel of the patches, at which slides are then tiled.
    positive : sequence of str
        Classes that the heatmap shows from a threshold on, which is chosen on validation. Default: the second of two
        classes.
    progress : callable
        Called with the epochs done, and the maximum.

    Returns
    -------
    dict
        The content of figures.json.

    Raises
    ------
    TrainError, ModelError
        Before anything is written.
    ConfigMismatch
        `out` holds a training of another configuration or of other patches.
    """
    config.check()
    positive = cohort.positive(positive)
    check_split(cohort, split, "split")
    model = begin(cohort, patches, split, config, mpp, device)
    identity = {
        "wsi_version": __version__,
        "config": as_dict(config),
        "weights to begin from": model.sha256,
        "precision": model.precision,
        "mpp": model.config.mpp,
        "positive": list(positive),
        "class_names": list(cohort.class_names),
        "patches, labels or split": _digest(cohort, patches, split),
    }
    bind(out, identity)
    run = PatchTraining(cohort, patches, split, config, model)
    run.go(out / "state.safetensors", progress)
    held_out = {"validation": split.validation, "test": split.test}
    probabilities = {part: run.probabilities(ids) for part, ids in held_out.items() if ids}
    label = np.array([cohort.cases[i].label for i in split.validation])
    threshold = threshold_of(np.isin(cohort.class_names, positive), label, probabilities["validation"])
    weights, sha256 = packed(model.net.state_dict())
    figures: dict[str, Any] = {part: _figures(cohort, ids, probabilities.get(part)) for part, ids in held_out.items()}
    stains, outside = _stains(cohort, patches, split)
    figures |= {"best_epoch": run.best_epoch, "weights_sha256": sha256, "outside_stains": outside}
    write_log(out, [({}, run.history, run.best_epoch)])
    _write_tables(out, cohort, split, probabilities)
    written = _config_json(model, threshold, positive, sha256)
    card = _card(out, cohort, split, config, written, figures, stains_line(stains, outside))
    write_model(out, weights, written, figures, stains, card)
    return figures


def _digest(cohort: Cohort, patches: Patches, split: Split) -> str:
    """Return the SHA-256 of patients, labels and pixels of all patches, part by part."""
    digest = hashlib.sha256()
    for part in split:
        for i in part:
            case = cohort.cases[i]
            row = f"{i}\0{case.patient}\0{case.label}\0{patches.checksums[i]}\n"
            digest.update(row.encode(errors="backslashreplace"))
        digest.update(b"\n")
    return digest.hexdigest()


def _stains(cohort: Cohort, patches: Patches, split: Split) -> tuple[StainRange, dict[str, Any]]:
    """Find the range of the training patients' stains, each measured on at most ``_STAINED`` of its patches."""
    if all(case.patient == case.slide_id for case in cohort.cases.values()):
        return StainRange(reason="whose the patches are is not known, and one alone says little of a slide"), {}
    of: dict[str, list[str]] = {}
    for i, case in cohort.cases.items():
        of.setdefault(case.patient, []).append(i)

    def tiles(own: list[str]) -> U8:
        return patches.read([own[k] for k in evenly(len(own), _STAINED)])

    parts = (tuple(dict.fromkeys(cohort.cases[i].patient for i in part)) for part in split)
    return learn_stains(
        {who: partial(tiles, own) for who, own in of.items()}, {who: who for who in of}, [Split(*parts)]
    )


def _figures(cohort: Cohort, ids: Sequence[str], probabilities: F64 | None) -> dict[str, Any] | None:
    if probabilities is None:
        return None
    cases = [cohort.cases[i] for i in ids]
    count = {"patches": len(cases), "patients": len({case.patient for case in cases})}
    return count | measure(cases, probabilities, Head("softmax", len(cohort.class_names)))


def _write_tables(out: Path, cohort: Cohort, split: Split, probabilities: Mapping[str, F64]) -> None:
    names, predictions, division = cohort.class_names, [], []
    for part, ids in split._asdict().items():
        for n, i in enumerate(ids):
            case = cohort.cases[i]
            row = {"path": i, "patient": case.patient, "label": names[case.label], "split": part}
            division.append(row)
            if part in probabilities:
                columns = {f"prob_{name}": f"{p:.6g}" for name, p in zip(names, probabilities[part][n], strict=True)}
                predictions.append(row | columns)
    write_csv(out / "split.csv", list(division[0]), division)
    write_csv(out / "predictions.csv", list(predictions[0]), predictions)


def _config_json(model: PatchModel, threshold: float, positive: Sequence[str], sha256: str) -> dict[str, Any]:
    config = model.config
    resize = [] if config.resize_px is None else [{"name": "Resize", "arguments": {"size": config.resize_px}}]
    normalise = {"name": "Normalize", "arguments": {"mean": list(config.mean), "std": list(config.std)}}
    return {
        "spec_version": "1.0",
        "task": "patch",
        "architecture": config.architecture,
        "architecture_args": config.architecture_args,
        "num_classes": len(config.class_names),
        "class_names": list(config.class_names),
        "patch_size_pixels": config.tile_px,
        "spacing_um_px": config.mpp,
        "transform": [*resize, {"name": "ToTensor"}, normalise],
        "positive_classes": list(positive),
        "threshold": threshold,
        "weights_sha256": sha256,
    }


def _card(
    out: Path,
    cohort: Cohort,
    split: Split,
    config: PatchConfig,
    written: Mapping[str, Any],
    figures: Mapping[str, Any],
    stained: str,
) -> str:
    origin = f"begun from `{config.start}`" if config.start else "random weights"
    turned = "turned and mirrored" if config.turn else "not turned"
    how = f"stain augmentation {config.stain:g}, {turned}, JPEG {config.jpeg:g}"
    if config.frozen:
        how = "features once, the classifier alone"
    rows = [
        f"| Task | a patch of {written['patch_size_pixels']} px at {written['spacing_um_px']:g} microns per pixel -> "
        f"{', '.join(f'`{c}`' for c in cohort.class_names)} |",
        f"| Model | `{written['architecture']}` `{json.dumps(written['architecture_args'])}`, {origin} |",
        f"| Training | {how}; the classes {'drawn equally often' if config.balance else 'as frequent as they are'}; "
        f"{len(split.train)} patches |",
        data_row(cohort, "patches"),
        stained,
        f"| Chosen on validation | epoch {figures['best_epoch']}, threshold {written['threshold']:g} |",
        f"| sha256 | `{written['weights_sha256']}` |",
    ]
    notes = ["Validation patches stopped the training; test patches decided nothing. No patient is in two parts."]
    if config.start:
        notes.append("Figures are too good where the weights that it was begun from have seen these patients.")
    return card_of(out, rows, notes, figures, "patches")
