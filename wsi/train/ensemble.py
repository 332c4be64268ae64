"""Training of a MIL model: an ensemble over folds and seeds, calibrated on validation, written as a model folder.

::

    OUT/
      config.json, weights.safetensors    the ensemble: `wsi score --mil OUT`
      stain.json                          stains of the training slides, and the accepted distance from them
      CARD.md, figures.json               training data; performance on slides held out from each member
      predictions.csv                     a row a slide and fold: part, label, probabilities
      log.csv, log.png                    loss and figures of each epoch
      splits/splits_<k>.csv               the splits, in CLAM's format
      run.json                            configuration and slides; a rerun must have the same
      members/<fold>-<seed>.safetensors   state of each training: the same command resumes it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi import __version__
from wsi.errors import ModelError, TrainError
from wsi.files import write_csv
from wsi.nn.grade import feature_shift
from wsi.nn.mil import Head, MilNet
from wsi.nn.uncertainty import conformal_threshold, fit_temperature, prediction_set
from wsi.result import rounded
from wsi.train.cohort import Case, Cohort, Split, check_split, write_splits
from wsi.train.figures import threshold_of
from wsi.train.folder import bind, card_of, data_row, packed, write_model
from wsi.train.loop import as_dict, write_log
from wsi.train.mil import Bags, BagStats, Member, MilConfig, measure, targets_of, train_member, try_net
from wsi.train.stains import learn_stains, stains_line

Progress = Callable[[str, int, int], None]


def train_mil(
    cohort: Cohort,
    bags: Bags,
    splits: Sequence[Split],
    out: Path,
    config: MilConfig,
    *,
    seeds: int = 1,
    coverage: float = 0.9,
    positive: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress = lambda member, epoch, of: None,
) -> dict[str, Any]:
    """Train an ensemble and write its model folder; the same call again resumes it.

    Parameters
    ----------
    cohort, bags
        Labels and bags of the same slides; see ``cohort.match``.
    splits : sequence of Split
        `seeds` members are trained on each.
    seeds : int
        Members a split.
    coverage : float
        Of the conformal prediction sets.
    positive : sequence of str
        Classes that are called from a threshold on, which is chosen on validation. Default: the second of two classes.
    progress : callable
        Called with the member, the epochs done, and the maximum.

    Returns
    -------
    dict
        The content of figures.json.

    Raises
    ------
    TrainError, ModelError
        Before anything is written.
    ConfigMismatch
        `out` holds a training of another configuration or of other slides.
    """
    config.check()
    survival = bool(cohort.time_bins)
    if survival != (config.head in ("hazard", "cox")):
        raise ModelError(f"head {config.head!r}", "does not fit the labels", "hazard and cox are for times and events")
    if config.head == "binary" and len(cohort.class_names) != 2:
        raise ModelError("head 'binary'", f"there are {len(cohort.class_names)} classes", "Use softmax or ordinal")
    positive = cohort.positive(positive)
    for k, split in enumerate(splits):
        check_split(cohort, split, f"split {k}")
    _refuse_twins(cohort, bags)
    try_net(cohort, bags, config)
    _bind(out, cohort, bags, splits, config, seeds, coverage, positive)
    write_splits(out / "splits", splits)
    members: dict[tuple[int, int], Member] = {}
    for k, split in enumerate(splits):
        for seed in range(seeds):
            name = f"{k}-{seed}"
            members[k, seed] = train_member(
                cohort, bags, split, replace(config, seed=config.seed + k + seed * len(splits)), device=device,
                state=out / "members" / f"{name}.safetensors",
                progress=lambda epoch, of, name=name: progress(name, epoch, of),  # type: ignore[misc]
            )  # fmt: skip
    temperature = 1.0 if config.head == "cox" else _temperature(cohort, splits, members)
    rows = _predictions(cohort, splits, members, temperature)
    calibration = _calibrate(cohort, rows, positive, coverage)
    heads = [member.head for member in members.values()]
    nets = [member.net for member in members.values()]
    tiles = {i: partial(bags.tiles, i) for i in cohort.cases}
    stains, outside = learn_stains(tiles, {i: case.patient for i, case in cohort.cases.items()}, splits)
    weights, sha256 = packed((nets[0] if len(nets) == 1 else torch.nn.ModuleList(nets)).state_dict())
    figures = _figures(rows, heads[0], calibration, len(splits)) | {
        "epochs": {f"{k}-{seed}": member.best_epoch for (k, seed), member in members.items()},
        "weights_sha256": sha256,
        "outside_stains": outside,
    }
    written = {
        "spec_version": "1.0",
        "task": "mil",
        "architecture": config.architecture,
        "architecture_args": {**config.arguments, "in_features": bags.in_features},
        "num_classes": len(cohort.class_names),
        "class_names": list(cohort.class_names),
        "positive_classes": list(positive),
        "head": config.head,
        "members": len(nets),
        "temperature": temperature,
        **calibration,
        **({"baseline": [head.baseline for head in heads]} if config.head == "cox" else {}),
        **_range_of([bags.stats[i] for split in splits for i in split.train], nets[0]),
        "encoder_sha256": bags.encoder if bags.encoder and len(bags.encoder) == 64 else None,
        "encoder": bags.encoder,
        "weights_sha256": sha256,
    }
    _write_tables(out, cohort, rows, members)
    card = _card(out, cohort, bags, len(splits), written, figures, stains_line(stains, outside))
    write_model(out, weights, written, figures, stains, card)
    return figures


def _range_of(stats: list[BagStats], net: MilNet) -> dict[str, Any]:
    """Return the range of the training bags' mean features and sizes, outside which the model abstains."""
    shift = max(feature_shift(net, torch.from_numpy(bag.sum / bag.tiles)[None]) for bag in stats)
    tiles = [bag.tiles for bag in stats]
    largest = float(f"{shift * (1 + 1e-5):.6g}")  # rounded up: the farthest slide is within
    return {"largest_shift": largest, "bag_tiles": [min(tiles), max(tiles)]}


def _refuse_twins(cohort: Cohort, bags: Bags) -> None:
    """Refuse one slide under two names and patients: it could be both trained on and tested."""
    seen: dict[tuple[int, bytes, bytes], Case] = {}
    for i, case in cohort.cases.items():
        stats = bags.stats[i]
        other = seen.setdefault((stats.tiles, stats.sum.tobytes(), stats.square.tobytes()), case)
        if other.patient != case.patient:
            what = f"{other.slide_id} of patient {other.patient} has the very features of {i}, of {case.patient}"
            raise TrainError("bags", what, "It is one slide twice: keep one")


def _bind(out: Path, cohort: Cohort, bags: Bags, splits: Sequence[Split], config: MilConfig, *others: Any) -> None:
    """Bind a folder to configuration, slides and splits."""
    identity = {
        "wsi_version": __version__,
        "config": as_dict(config),
        "seeds, coverage, positive": [list(value) if isinstance(value, tuple) else value for value in others],
        "class_names": list(cohort.class_names),
        "encoder": bags.encoder,
        "slides": {
            i: [*case[1:], bags.stats[i].tiles, float(bags.stats[i].sum.sum())] for i, case in cohort.cases.items()
        },
        "splits": [list(map(list, split)) for split in splits],
    }
    bind(out, identity, "members")


def _temperature(cohort: Cohort, splits: Sequence[Split], members: dict[tuple[int, int], Member]) -> float:
    """Fit one temperature to all members' logits of their validation slides.

    To the n slides one pseudo-slide of each class is added, which looks like any of them (as Platt 1999 does for two
    classes). Without it, slides that are all classified correctly would drive every probability to 0 or 1.
    """
    n, classes = sum(len(split.validation) for split in splits), range(len(cohort.class_names))
    predicted = []
    for (k, _), member in members.items():
        logits = torch.from_numpy(np.stack([member.logits[i] for i in splits[k].validation]))
        predicted.append((member.head, logits, targets_of([cohort.cases[i] for i in splits[k].validation])))

    def loss_at(temperature: float) -> float:
        each = []
        for head, z, targets in predicted:
            loss = partial(replace(head, temperature=temperature).loss, z)
            more = [loss(targets._replace(label=torch.full_like(targets.label, c))) for c in classes]
            each.append((n * loss(targets) + sum(more)) / (n + len(more)))
        return float(np.mean(each))

    return rounded(fit_temperature(loss_at))


def _predictions(
    cohort: Cohort, splits: Sequence[Split], members: dict[tuple[int, int], Member], temperature: float
) -> list[dict[str, Any]]:
    """Return a row for each validation and test slide; probabilities are the mean over the split's seeds."""
    rows = []
    for k, split in enumerate(splits):
        own = [(replace(m.head, temperature=temperature), m.logits) for (fold, _), m in members.items() if fold == k]
        for part, ids in (("validation", split.validation), ("test", split.test)):
            for i in ids:
                each = [head.probabilities(torch.from_numpy(logits[i])).numpy() for head, logits in own]
                mean = np.mean(each, axis=0)
                rows.append({"case": cohort.cases[i], "fold": k, "part": part, "probabilities": mean})
    return rows


def _calibrate(cohort: Cohort, rows: list[dict[str, Any]], positive: Sequence[str], coverage: float) -> dict[str, Any]:
    """Choose the thresholds of the positive classes and of the prediction sets, on validation."""
    rows = [row for row in rows if row["part"] == "validation"]
    found: dict[str, Any] = {"threshold": 0.5, "coverage": coverage, "conformal_threshold": None}
    if cohort.time_bins:
        return found
    probabilities = np.stack([row["probabilities"] for row in rows])
    label = np.array([row["case"].label for row in rows])
    least: dict[str, float] = {}  # slides of one patient are not exchangeable: keep the worst
    for row, own in zip(rows, probabilities[np.arange(len(rows)), label].tolist(), strict=True):
        least[row["case"].patient] = min(own, least.get(row["case"].patient, 1.0))
    threshold = conformal_threshold(np.array(list(least.values())), coverage)
    # Rounded down to six decimals: rounded up to 1, it would exclude probabilities of 0.9999999.
    found["conformal_threshold"] = None if threshold is None else float(np.floor(threshold * 1e6) / 1e6)
    found["threshold"] = threshold_of(np.isin(cohort.class_names, positive), label, probabilities)
    return found


def _figures(rows: list[dict[str, Any]], head: Head, calibration: dict[str, Any], folds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for part in ("validation", "test"):
        of = [row for row in rows if row["part"] == part]
        if not of:
            figures[part] = None
            continue
        by_fold = [[row for row in of if row["fold"] == k] for k in range(folds)]
        each = [_measure(some, head) for some in by_fold if some]
        pooled = _measure(of, head)
        figures[part] = {
            "slides": len(of),
            "patients": len({row["case"].patient for row in of}),
            "pooled": pooled,
            "by_fold": {name: [fold[name] for fold in each] for name in pooled},
        }
        threshold = calibration["conformal_threshold"]
        if threshold is not None:
            sets = [prediction_set(row["probabilities"], threshold) for row in of]
            held = [row["case"].label in chosen for row, chosen in zip(of, sets, strict=True)]
            figures[part]["sets"] = {
                "coverage": round(float(np.mean(held)), 4),
                "mean_size": round(float(np.mean([len(chosen) for chosen in sets])), 4),
            }
    return figures


def _measure(rows: list[dict[str, Any]], head: Head) -> dict[str, float | None]:
    return measure([row["case"] for row in rows], np.stack([row["probabilities"] for row in rows]), head)


def _write_tables(
    out: Path, cohort: Cohort, rows: list[dict[str, Any]], members: dict[tuple[int, int], Member]
) -> None:
    names, table = cohort.class_names, []
    columns = ["slide", "patient", "fold", "part", *(["time", "event"] if cohort.time_bins else []), "label"]
    for row in rows:
        case: Case = row["case"]
        known = {"slide": case.slide_id, "patient": case.patient, "fold": row["fold"], "part": row["part"]}
        if cohort.time_bins:
            known |= {"time": case.time, "event": None if case.event is None else int(case.event)}
        predicted = {f"prob_{name}": f"{p:.6g}" for name, p in zip(names, row["probabilities"], strict=True)}
        table.append(known | {"label": names[case.label]} | predicted)
    write_csv(out / "predictions.csv", [*columns, *(f"prob_{name}" for name in names)], table)
    write_log(out, [({"fold": k, "seed": s}, m.history, m.best_epoch) for (k, s), m in members.items()])


def _card(
    out: Path, cohort: Cohort, bags: Bags, n_splits: int, config: dict[str, Any], figures: dict[str, Any], stained: str
) -> str:
    rows = [
        f"| Task | a bag of tile features -> {', '.join(f'`{c}`' for c in cohort.class_names)} |",
        f"| Model | `{config['architecture']}`, head `{config['head']}`, "
        f"{config['members']} members ({n_splits} splits x {config['members'] // n_splits} seeds) |",
        f"| Features | {bags.in_features} a tile, encoder `{bags.encoder or 'not named by the files'}` |",
        data_row(cohort, "slides"),
        f"| Chosen on validation | epoch, temperature {config['temperature']:g}, threshold {config['threshold']:g} |",
        stained,
        f"| sha256 | `{config['weights_sha256']}` |",
    ]
    notes = [
        "Of slides, and patients, that the member had not been trained on; validation slides stopped its training,",
        "test slides decided nothing of it. Each row pools all splits. With folds, every slide is also validation to",
        "one member (temperature, threshold and prediction sets are chosen there) and trained the others: the ensemble",
        "as a whole is not measured here.",
    ]
    no_sets = "- no prediction sets: too few validation patients for the coverage asked, or survival"
    more = [no_sets] if config["conformal_threshold"] is None else []
    return card_of(out, rows, notes, figures, "slides", more)
